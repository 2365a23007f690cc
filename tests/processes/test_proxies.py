"""Gateways behind a real proxy."""

import asyncio
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import trustme
from certificates import write_certificate
from starlette.types import Receive, Send

from edge_client import gateway_link as link_module
from edge_client.client import EdgeClient
from edge_client.drafters.ngram import NgramDrafter
from edge_client.gateway_link import Gateway, LinkError
from edge_client.serve import make_app
from tests.ports import free_port
from tests.processes.gateways import DEADLINE_S, Engine, Running, edge_in_thread, hello, refused
from tests.processes.proxies import needs, running_caddy, running_haproxy, running_nginx
from tests.processes.test_serve import DEADLINE_S as ANSWER_LIMIT_S
from tests.processes.test_serve import served
from vllm_specedge.wire.codec import FrameReader
from vllm_specedge.wire.frames import Greet

pytestmark = [needs("nginx"), pytest.mark.usefixtures("engine")]


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


DOCUMENT = (Path(__file__).parents[2] / "docs" / "proxies.md").read_text()
DOCUMENTED = re.findall(r"```nginx\n(.*?)```", DOCUMENT, re.DOTALL)
OF_GATEWAY = [location for location in DOCUMENTED if "127.0.0.1:8100" in location]


def documented(language: str) -> str:
    (block,) = re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)
    return str(block)


def with_gateway(location: str, gateway: Running) -> str:
    assert location.count("127.0.0.1:8100") == 1
    return location.replace("127.0.0.1:8100", f"127.0.0.1:{gateway.port}")


@pytest.mark.parametrize("path", ["/edge/v1/down", "/status/events"])
def test_what_the_gateway_says_is_passed_on_as_it_asks(gateway: Running, tmp_path: Path, path: str) -> None:
    """By default nginx would buffer the response until it has some kilobytes, or the end."""
    with (
        running_nginx(tmp_path, with_gateway("proxy_pass http://127.0.0.1:8100;", gateway)) as url,
        httpx.stream("GET", url + path, timeout=DEADLINE_S, trust_env=False) as answer,
    ):
        first = next(answer.iter_raw())
    if path == "/edge/v1/down":
        assert [type(frame) for frame in FrameReader().feed(first)] == [Greet]
    else:
        assert first.count(b"data: ") <= 3  # of which there is one a second


@pytest.mark.parametrize("location", OF_GATEWAY, ids=["as HTTP/2", "as HTTP/1.1"])
def test_an_edge_drafts_through_a_proxy_that_is_set_up_as_documented(
    gateway: Running, engine: Engine, tmp_path: Path, location: str
) -> None:
    """For longer than nginx's default limit of a request's body allows."""
    with (
        running_nginx(tmp_path, with_gateway(location, gateway), listen=" http2") as url,
        edge_in_thread(EdgeClient(Gateway(url), NgramDrafter(), "edge")),
    ):
        assert engine.generate("one", 60) >= 30
    engine.wait(lambda: engine.driver.num_edges == 0)


@contextmanager
def with_caddy(gateway: Running, directory: Path) -> Iterator[str]:
    host, site = with_gateway(documented("caddy"), gateway).split("{", 1)
    assert host.strip() == "gpu.example.org"
    certificate, key = str(directory / "cert.pem"), str(directory / "key.pem")
    with running_caddy(directory, site.rstrip().removesuffix("}"), certificate, key) as url:
        yield url


@contextmanager
def with_haproxy(gateway: Running, directory: Path) -> Iterator[str]:
    both = directory / "both.pem"
    both.write_bytes((directory / "cert.pem").read_bytes() + (directory / "key.pem").read_bytes())
    port, here = free_port(), {":443": "127.0.0.1:{port}", "/etc/haproxy/gpu.example.org.pem": str(both)}
    configuration = with_gateway(documented("haproxy"), gateway)
    for name, instead in here.items():
        assert name in configuration
        configuration = configuration.replace(name, instead.format(port=port))
    with running_haproxy(directory, configuration, port) as url:
        yield url


@pytest.mark.parametrize(
    "proxied",
    [
        pytest.param(with_caddy, marks=needs("caddy"), id="Caddy"),
        pytest.param(with_haproxy, marks=needs("haproxy"), id="HAProxy"),
    ],
)
def test_an_edge_drafts_through_a_proxy_that_ends_tls(
    gateway: Running,
    engine: Engine,
    tmp_path: Path,
    proxied: Callable[[Running, Path], AbstractContextManager[str]],
) -> None:
    write_certificate(tmp_path, trustme.CA(), "localhost")
    authority = str(tmp_path / "ca.pem")
    with (
        proxied(gateway, tmp_path) as url,
        edge_in_thread(EdgeClient(Gateway(url, ca_file=authority), NgramDrafter(), "my laptop")),
    ):
        assert engine.generate("one", 60) >= 30
        with httpx.Client(verify=ssl.create_default_context(cafile=authority), trust_env=False) as client:
            assert [edge["name"] for edge in client.get(f"{url}/status.json").json()["edges"]] == [""]
    engine.wait(lambda: engine.driver.num_edges == 0)


def test_answers_of_serve_come_through_as_they_are_written(tmp_path: Path) -> None:
    """The server sends each event once the previous one has arrived behind all proxies."""
    (location,) = set(DOCUMENTED) - set(OF_GATEWAY)
    arrived = threading.Semaphore()

    async def server(scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for number in range(3):
            has_arrived = await asyncio.to_thread(arrived.acquire, timeout=ANSWER_LIMIT_S)
            event = b"data: %d\n\n" % number if has_arrived else b"data: late\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": number < 2})

    with (
        served(server) as server_url,
        served(make_app(f"{server_url}/v1", str, hosts=["ai.example.org"])) as url,
        running_nginx(tmp_path, location.replace("http://127.0.0.1:11435", url)) as proxy_url,
        httpx.stream(
            "POST",
            f"{proxy_url}/v1/chat/completions",
            json={},
            headers={"host": "ai.example.org"},
            timeout=2 * ANSWER_LIMIT_S,
            trust_env=False,
        ) as answer,
    ):
        assert answer.status_code == 200
        for number, event in enumerate(answer.iter_raw()):
            assert event == b"data: %d\n\n" % number
            arrived.release()


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
    """It gives up first, and its message arrives if only the edges' direction is buffered."""
    location = with_gateway(HOLDS_BACK["what edges say"], gateway)
    with running_nginx(tmp_path, location, listen=" http2") as url:
        assert "may hold streams back" in str(refused(url, hello()))


def test_a_body_that_is_longer_than_a_proxy_takes_ends_the_connection(gateway: Running, tmp_path: Path) -> None:
    location = with_gateway(OF_GATEWAY[1], gateway).replace("client_max_body_size 0", "client_max_body_size 1")
    with running_nginx(tmp_path, location, listen=" http2") as url:
        assert isinstance(refused(url, hello()), LinkError)
