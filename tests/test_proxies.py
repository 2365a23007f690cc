"""Gateways behind a real proxy."""

from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from stack import wait_for

from edge_client.client import EdgeClient
from edge_client.drafters.ngram import NgramDrafter
from edge_client.link import Gateway
from tests.proxies import needs_nginx, running_nginx
from tests.test_gateway import Engine, Running, edge_in_thread, running_gateway

pytestmark = needs_nginx


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_gateway(tmp_path_factory.mktemp("gateway")) as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def engine(gateway: Running) -> Iterator[Engine]:
    engine = Engine(gateway.endpoint)
    wait_for(gateway.process, f"{gateway.url}/healthz", "engines", 1)
    yield engine
    engine.link.stop()


def names(url: str) -> list[str]:
    with httpx.Client(trust_env=False) as client:
        return [edge["name"] for edge in client.get(f"{url}/status.json").json()["edges"]]


@pytest.mark.parametrize(
    "said",
    [
        "",
        "proxy_http_version 1.1; proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;",
        "proxy_http_version 1.1; proxy_set_header Host gpu.example.org;",
    ],
    ids=["as it is", "says for whom it asks", "says by which name"],
)
def test_who_reads_the_page_through_a_proxy_on_this_machine_sees_no_names(
    gateway: Running, engine: Engine, tmp_path: Path, said: str
) -> None:
    location = f"{said} proxy_pass http://127.0.0.1:{gateway.port};"
    with (
        edge_in_thread(EdgeClient(Gateway(gateway.url), NgramDrafter(), "my laptop")),
        running_nginx(tmp_path, location) as proxy_url,
    ):
        assert names(gateway.url) == ["my laptop"]
        assert names(proxy_url) == [""]
    engine.wait(lambda: engine.book.num_edges == 0)
