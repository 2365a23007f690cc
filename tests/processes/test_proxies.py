"""Gateways behind a real proxy."""

import re
from pathlib import Path

import httpx2 as httpx
import pytest

from edge_client import gateway_link as link_module
from edge_client.client import EdgeClient
from edge_client.drafters.ngram import NgramDrafter
from edge_client.gateway_link import Gateway, LinkError
from tests.processes.gateways import DEADLINE_S, Engine, Running, edge_in_thread, hello, refused
from tests.processes.proxies import needs_nginx, running_nginx
from vllm_specedge.wire.codec import FrameReader
from vllm_specedge.wire.frames import Greet

pytestmark = needs_nginx

pytestmark = pytest.mark.usefixtures("engine")


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
    engine.wait(lambda: engine.driver.num_edges == 0)


DOCUMENT = (Path(__file__).parents[2] / "docs" / "operate.md").read_text()
DOCUMENTED = re.findall(r"```nginx\n(.*?)```", DOCUMENT, re.DOTALL)


def with_gateway(location: str, gateway: Running) -> str:
    assert location.count("127.0.0.1:8100") == 1
    return location.replace("127.0.0.1:8100", f"127.0.0.1:{gateway.port}")


@pytest.mark.parametrize("path", ["/edge/v1/down", "/status/events"])
def test_what_the_gateway_says_is_passed_on_as_it_asks(gateway: Running, tmp_path: Path, path: str) -> None:
    """As nginx is, it would keep what it gets until it has some kilobytes, or there is no more."""
    with (
        running_nginx(tmp_path, with_gateway("proxy_pass http://127.0.0.1:8100;", gateway)) as url,
        httpx.stream("GET", url + path, timeout=DEADLINE_S, trust_env=False) as answer,
    ):
        first = next(answer.iter_raw())
    if path == "/edge/v1/down":
        assert [type(frame) for frame in FrameReader().feed(first)] == [Greet]
    else:
        assert first.count(b"data: ") <= 3  # of which there is one a second


@pytest.mark.parametrize("location", DOCUMENTED, ids=["as HTTP/2", "as HTTP/1.1"])
def test_an_edge_drafts_through_a_proxy_that_is_set_up_as_documented(
    gateway: Running, engine: Engine, tmp_path: Path, location: str
) -> None:
    """For longer than a request's body may be, by nginx's default."""
    with (
        running_nginx(tmp_path, with_gateway(location, gateway), listen=" http2") as url,
        edge_in_thread(EdgeClient(Gateway(url), NgramDrafter(), "edge")),
    ):
        assert engine.generate("one", 60) >= 30
    engine.wait(lambda: engine.driver.num_edges == 0)


HOLDS_BACK = {
    "both ways": "proxy_pass http://127.0.0.1:8100; proxy_ignore_headers X-Accel-Buffering;",
    "what edges say": "proxy_pass http://127.0.0.1:8100;",
    "what edges say, since it is refused": "grpc_pass grpc://127.0.0.1:8100; location /edge/v1/up { return 403; }",
}


@pytest.mark.parametrize("location", HOLDS_BACK.values(), ids=HOLDS_BACK)
def test_an_edge_whose_streams_are_held_back_is_told_so_at_once(
    gateway: Running, tmp_path: Path, location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "FIRST_SILENCE_S", 1.0)
    with running_nginx(tmp_path, with_gateway(location, gateway), listen=" http2") as url:
        assert "may hold streams back" in str(refused(url, hello()))


def test_the_gateway_says_so_too(gateway: Running, tmp_path: Path) -> None:
    """It gives up first, and what it says comes through where only what edges say is held back."""
    location = with_gateway(HOLDS_BACK["what edges say"], gateway)
    with running_nginx(tmp_path, location, listen=" http2") as url:
        assert "may hold streams back" in str(refused(url, hello()))


def test_a_body_that_is_longer_than_a_proxy_takes_ends_the_connection(gateway: Running, tmp_path: Path) -> None:
    location = with_gateway(DOCUMENTED[1], gateway).replace("client_max_body_size 0", "client_max_body_size 1")
    with running_nginx(tmp_path, location, listen=" http2") as url:
        assert isinstance(refused(url, hello()), LinkError)
