"""Addresses, proxies and authorities: connecting to a gateway and to a server."""

import asyncio
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpcore2  # noqa: F401 - which looks for socksio once, and not while a test hides it
import pytest
import trustme
import uvicorn
from certificates import write_certificate

from edge_client import gateway_link
from edge_client.client import EdgeClient
from edge_client.drafters.ngram import NgramDrafter
from edge_client.gateway_link import Gateway, Link, LinkError
from edge_client.serve import make_app, server_client
from edge_client.ways import checked_gateway_url, checked_server_url, client_for, proxy_for
from tests.helpers import in_thread
from tests.ports import free_port
from tests.processes.gateways import Engine, edge_in_thread, running_gateway
from tests.processes.test_serve import Toy, ask_raw, served
from tests.processes.test_settings import edge_client
from vllm_specedge.errors import UserError
from vllm_specedge.wire.frames import PROTOCOL_VERSION, Hello

FAR = "gateway.example.org"
"""A name that only the proxy knows."""
VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def _without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


# -- addresses -----------------------------------------------------------------------------------------------------

WRONG = [
    "localhost:8100",
    "127.0.0.1:8000/v1",
    "http://127.0.0.1:99999",
    "http://127.0.0.1:0/v1",
    "http://::1:18438/v1",
    "http://[::1/v1",
    "http:///v1",
    "http://a b/v1",
    "http://host/v1?key=1",
    "ftp://host/v1",
    "http://\udcff/v1",
    "",
]


@pytest.mark.parametrize("url", WRONG)
def test_what_is_no_address_is_one_sentence(url: str) -> None:
    with pytest.raises(UserError, match=r"is not a gateway URL \(.*\): write it as https://gpu\.example\.org:8100\.$"):
        checked_gateway_url(url)
    with pytest.raises(
        UserError,
        match=r"is not (a server URL|the URL of an OpenAI endpoint) \(.*\): write it as https://gpu\.example\.org/v1\.$",
    ):
        checked_server_url(url)


def test_a_server_s_address_has_a_path() -> None:
    with pytest.raises(UserError, match="write http://host:8000/v1"):
        checked_server_url("http://host:8000/")
    for url in ("http://[::1]:8000/v1", "https://host/openai/v1/", "http://user:word@host/v1"):
        assert checked_server_url(url) == url
    assert checked_gateway_url("http://[::1]:8100") == "http://[::1]:8100"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["connect", "http://127.0.0.1:99999", "--draft", "ngram"], "is not a gateway URL"),
        (["doctor", "http://127.0.0.1:99999"], "is not a gateway URL"),
        (["serve", "http://127.0.0.1:1", "--server", "127.0.0.1:8000/v1"], "is not a server URL"),
        (["serve", "http://127.0.0.1:1", "--server", "http://127.0.0.1:8000"], "is not the URL of an OpenAI endpoint"),
        (["chat", "http://127.0.0.1:1", "--server", "http://::1:18438/v1"], "is not a server URL"),
    ],
)
def test_every_command_says_it_at_its_start(tmp_path: Path, arguments: list[str], said: str) -> None:
    status, errors = edge_client(tmp_path, *arguments)
    assert (status, errors.count("\n")) == (2, 1), errors
    assert said in errors


# -- proxies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "proxies", "proxy"),
    [
        ("http://localhost:1/v1", {"http": "http://p", "all": "http://p"}, None),
        ("http://127.8.9.1/v1", {"http": "http://p"}, None),
        ("https://[::1]:1/v1", {"https": "http://p"}, None),
        ("https://host/v1", {"https": "http://p", "all": "http://q"}, "http://p"),
        ("https://host/v1", {"http": "http://p", "all": "q:3128"}, "http://q:3128"),
        ("https://host/v1", {"all": "socks://p:1"}, "socks5://p:1"),
        ("https://host/v1", {"http": "http://p"}, None),
        ("https://direct:1/v1", {"https": "http://p"}, None),
    ],
)
def test_what_goes_by_which_proxy(url: str, proxies: dict[str, str], proxy: str | None) -> None:
    assert proxy_for(url, proxies, lambda host: host == "direct:1") == proxy


@pytest.mark.parametrize("proxy", ["socks://127.0.0.1:9", "socks5://127.0.0.1:9", "gopher://127.0.0.1:9", "http://:x"])
def test_a_proxy_that_cannot_be_used_is_one_sentence(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setitem(sys.modules, "socksio", None)  # as without the extra
    with pytest.raises(UserError, match="--no-proxy"):
        client_for("https://host/v1")
    assert client_for("https://host/v1", has_proxy=False)
    assert client_for("http://127.0.0.1/v1")


@pytest.mark.parametrize("proxy", ["socks5://me:secret@proxy:1080", "gopher://me:secret@proxy:9"])
def test_a_proxy_s_password_is_not_said(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setitem(sys.modules, "socksio", None)
    with pytest.raises(UserError, match="//proxy:") as caught:
        client_for("https://host/v1")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("command", ["serve", "chat", "connect"])
def test_no_command_ends_with_a_traceback_for_a_proxy(tmp_path: Path, command: str) -> None:
    more = ["--server", "http://192.0.2.1:1/v1"] if command != "connect" else ["--draft", "ngram"]
    more += ["--port", str(free_port())] if command == "serve" else []
    status, said = edge_client(tmp_path, command, "https://192.0.2.1:1", *more, ALL_PROXY="gopher://127.0.0.1:9")
    assert (status, said.count("\n")) == (2, 1), said
    assert "--no-proxy" in said


class Proxy(threading.Thread):
    """Always connects to one local port, and records the requested addresses."""

    def __init__(self, listener: socket.socket, port: int) -> None:
        super().__init__(daemon=True)
        self.listener, self.port = listener, port
        self.asked: list[bytes] = []

    def run(self) -> None:
        with suppress(OSError):  # closed: it is over
            while True:
                self._serve(self.listener.accept()[0])

    def _serve(self, program: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += program.recv(1 << 16)
        self.asked.append(head.split(b"\r\n")[0])
        server = socket.create_connection(("127.0.0.1", self.port))
        program.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for source, sink in ((program, server), (server, program)):
            threading.Thread(target=_copy, args=(source, sink), daemon=True).start()


class SocksProxy(Proxy):
    """The same for SOCKS5 without a password (RFC 1928): a greeting, then the destination by name."""

    def _serve(self, program: socket.socket) -> None:
        with program.makefile("rb") as words:
            _, num_methods = words.read(2)
            words.read(num_methods)
            program.sendall(b"\5\0")
            _, command, _, kind = words.read(4)
            assert (command, kind) == (1, 3), "connect, to a name"
            name = words.read(words.read(1)[0])
            port = int.from_bytes(words.read(2), "big")
        self.asked.append(name + b":%d" % port)
        server = socket.create_connection(("127.0.0.1", self.port))
        program.sendall(b"\5\0\0\1" + bytes(6))
        for source, sink in ((program, server), (server, program)):
            threading.Thread(target=_copy, args=(source, sink), daemon=True).start()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)
    source.close()


@contextmanager
def proxy_to(port: int, scheme: str = "http") -> Iterator[tuple[str, list[bytes]]]:
    """A proxy's address, and the addresses requested from it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = (Proxy if scheme == "http" else SocksProxy)(listener, port)
        with in_thread(proxy.run):
            try:
                yield f"{scheme}://127.0.0.1:{listener.getsockname()[1]}", proxy.asked
            finally:
                listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(("scheme", "said"), [("http", "CONNECT {} HTTP/1.1"), ("socks5", "{}"), ("socks", "{}")])
def test_an_edge_drafts_through_a_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, said: str
) -> None:
    options = write_certificate(tmp_path, trustme.CA(), FAR, "localhost")
    ca = str(tmp_path / "ca.pem")
    with running_gateway(tmp_path, *options, verify=ca) as gateway, proxy_to(gateway.port, scheme) as (proxy, asked):
        monkeypatch.setenv("HTTPS_PROXY", proxy)
        engine = Engine(gateway.endpoint)
        try:
            far = Gateway(f"https://{FAR}:{gateway.port}", ca_file=ca)
            with edge_in_thread(EdgeClient(far, NgramDrafter(), "edge")):
                assert engine.generate("by proxy", 20) > 0
            num_asked = len(asked)
            assert set(asked) == {said.format(f"{FAR}:{gateway.port}").encode()}
            with edge_in_thread(EdgeClient(Gateway(gateway.url, ca_file=ca), NgramDrafter(), "near")):
                pass
            assert len(asked) == num_asked
        finally:
            engine.link.stop()


# -- not a gateway -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "said"), [("http", "it is not an edge gateway"), ("https", "write http://")])
def test_a_port_that_is_no_gateway_s_is_said(tmp_path: Path, scheme: str, said: str) -> None:
    with served(Toy()) as url:
        for command in (
            ["connect", "--draft", "ngram"],
            ["serve", "--server", f"{url}/v1", "--port", str(free_port())],
        ):
            status, errors = edge_client(tmp_path, *command, url.replace("http", scheme, 1), "--quiet")
            assert (status, errors.count("\n")) == (2, 1), errors
            assert said in errors


@contextmanager
def hanging_up(answer: bytes, is_reset: bool) -> Iterator[str]:
    """A server that sends `answer` to every client, and hangs up."""

    def answers() -> None:
        with suppress(OSError):  # the listener was closed
            while True:
                peer, _ = listener.accept()
                with peer:
                    peer.recv(1)
                    peer.sendall(answer)
                    if is_reset:  # zero linger time: the peer's reads fail, whatever was sent before
                        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with socket.create_server(("127.0.0.1", 0)) as listener, in_thread(answers):
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("is_reset", [False, True])
@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n"])
def test_whatever_hangs_up_is_said_alike(answer: bytes, is_reset: bool) -> None:
    hello = Hello(PROTOCOL_VERSION, "test", "near", "pool", "", 1)
    with hanging_up(answer, is_reset) as url, pytest.raises(LinkError, match="it is not an edge gateway"):
        asyncio.run(Link(Gateway(url), hello, on_frame=lambda frame: None).run())


def why_not(url: str, ca_file: str = "") -> str:
    """The message of an edge that cannot connect there."""
    hello = Hello(PROTOCOL_VERSION, "test", "near", "pool", "", 1)
    with pytest.raises(LinkError) as refusal:
        asyncio.run(Link(Gateway(url, ca_file=ca_file), hello, on_frame=lambda frame: None).run())
    return str(refusal.value)


def test_an_address_where_nothing_listens_is_said() -> None:
    assert why_not(f"http://127.0.0.1:{free_port()}").startswith("nothing listens there; start the server")


def test_a_host_that_is_not_known_is_said() -> None:
    assert why_not("http://no-such-host.invalid:8100").startswith("no host of that name is known here; correct it")


def test_a_host_that_does_not_answer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener that accepts no more connections because its queue is full."""
    monkeypatch.setattr(gateway_link, "CONNECT_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, ExitStack() as waiting:
        port = listener.getsockname()[1]
        for _ in range(4):
            peer = waiting.enter_context(socket.socket())
            peer.setblocking(False)
            peer.connect_ex(("127.0.0.1", port))
        assert why_not(f"http://127.0.0.1:{port}").startswith("it does not answer; correct host and port")


@pytest.mark.parametrize(
    ("name", "ca_file", "lasts_days", "said"),
    [
        ("localhost", "", 1, "its certificate is from an authority that is not trusted here; name that authority"),
        ("gpu.example.org", "ca.pem", 1, "its certificate is for another name"),
        ("localhost", "ca.pem", -1, "its certificate has expired"),
    ],
)
def test_what_is_wrong_with_a_certificate_is_said(
    tmp_path: Path, name: str, ca_file: str, lasts_days: int, said: str
) -> None:
    end = datetime.now(UTC) + timedelta(days=lasts_days)
    _, certificate, _, key = write_certificate(tmp_path, trustme.CA(), name, not_after=end)
    config = uvicorn.Config(Toy(), log_level="error", ssl_certfile=certificate, ssl_keyfile=key)
    with served(config) as served_url:
        url = served_url.replace("http", "https", 1).replace("127.0.0.1", "localhost")
        assert why_not(url, str(tmp_path / ca_file) if ca_file else "").startswith(said)


# -- authorities ---------------------------------------------------------------------------------------------------


def test_a_server_behind_an_authority_of_one_s_own_is_reached(tmp_path: Path) -> None:
    _, certificate, _, key = write_certificate(tmp_path, trustme.CA())
    ca = str(tmp_path / "ca.pem")
    config = uvicorn.Config(Toy(), log_level="error", ssl_certfile=certificate, ssl_keyfile=key)
    with served(config) as url:
        server_url = f"{url.replace('http', 'https', 1).replace('127.0.0.1', 'localhost')}/v1"
        for ca_file, status in ((ca, b"200"), ("", b"502")):
            app = make_app(
                server_url, lambda: "", client=lambda ca_file=ca_file: server_client(server_url, True, ca_file)
            )
            with served(app) as own:
                assert ask_raw(own, "/v1/models").split()[1] == status


def test_a_ca_file_that_is_none_is_one_sentence() -> None:
    with pytest.raises(UserError, match="CA file /nowhere cannot be used"):
        server_client("https://host/v1", ca_file="/nowhere")
