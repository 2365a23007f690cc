"""One gateway per test module, with one engine."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel and the sdist of this tree, as `make dist` makes them: the wheel from the sdist."""
    directory, root = tmp_path_factory.mktemp("dist"), Path(__file__).parents[2]
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(directory), str(root)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return directory
