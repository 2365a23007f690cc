"""One gateway a module of tests, and one engine that it knows."""

from collections.abc import Iterator

import pytest
from stack import wait_for

from tests.processes.gateways import Engine, Running, running_gateway


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_gateway(tmp_path_factory.mktemp("gateway")) as running:
        yield running


@pytest.fixture(scope="module")
def engine(gateway: Running) -> Iterator[Engine]:
    engine = Engine(gateway.endpoint)
    wait_for(gateway.process, f"{gateway.url}/healthz", "engines", 1)
    yield engine
    engine.link.stop()
