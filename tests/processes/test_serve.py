"""`edge-client serve`'s endpoint in front of a toy server, over real sockets (tests/vllm/test_serve.py: a real one)."""

import asyncio
import json
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn
from starlette.types import Receive, Send

from edge_client.naming import NOBODY, is_own_name, own_location, path_below, with_session
from edge_client.serve import make_app, names_here
from tests.helpers import in_thread
from vllm_specedge.wire.request_fields import KEY

DEADLINE_S = 20.0
SESSION = "a-session"
OWN = "http://elsewhere"


@dataclass
class Toy:
    """An OpenAI endpoint that gives every request the same answer, and records the requests."""

    asked: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    is_asked: threading.Event = field(default_factory=threading.Event)
    is_left: threading.Event = field(default_factory=threading.Event)
    answer: tuple[int, dict[str, str], bytes] = (200, {}, b"{}")
    is_slow: bool = False

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.asked.append((scope["raw_path"].decode(), headers, body))
        self.is_asked.set()
        if self.is_slow:
            assert (await receive())["type"] == "http.disconnect"
            self.is_left.set()
            return
        status, said, content = self.answer
        pairs = [(name.encode(), value.encode()) for name, value in said.items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": content})


@dataclass
class Pair:
    """A toy server and the endpoint in front of it."""

    toy: Toy
    url: str
    """URL of the endpoint, without /v1."""
    server_url: str
    session: str = SESSION

    def post(self, path: str, body: bytes = b"{}", **headers: str) -> httpx.Response:
        kind = headers.pop("content_type", "application/json")
        sent = {"content-type": kind, **{name.replace("_", "-"): value for name, value in headers.items()}}
        return httpx.post(f"{self.url}{path}", content=body, headers=sent, trust_env=False, timeout=DEADLINE_S)

    def passed_on(self, path: str, body: bytes, **headers: str) -> bytes:
        assert self.post(path, body, **headers).status_code == 200
        return self.toy.asked[-1][2]


@contextmanager
def served(app: Any) -> Iterator[str]:
    """An ASGI app, or a configuration with one, in a thread, on its own port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = app if isinstance(app, uvicorn.Config) else uvicorn.Config(app, log_level="error")
        config.timeout_graceful_shutdown = 1
        server = uvicorn.Server(config)
        with in_thread(lambda: asyncio.run(server.serve(sockets=[listener]))):
            try:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            finally:
                server.should_exit = True


@contextmanager
def endpoint(**options: Any) -> Iterator[Pair]:
    toy = Toy()
    with served(toy) as server_url:
        pair = Pair(toy, "", server_url)
        with served(make_app(f"{server_url}/v1", lambda: pair.session, **options)) as pair.url:
            yield pair


@pytest.fixture
def pair() -> Iterator[Pair]:
    with endpoint() as pair:
        yield pair


def arguments(body: bytes) -> Any:
    return json.loads(body)["vllm_xargs"]


# -- who drafts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["chat/completions", "completions", "responses", "messages", "chat/completions/batch", "chat/completions/"]
)
def test_every_path_that_generates_names_this_edge(pair: Pair, path: str) -> None:
    assert arguments(pair.passed_on(f"/v1/{path}", b'{"model": "m"}')) == {"specedge": SESSION}


def test_without_a_session_no_edge_reads_what_is_asked(pair: Pair) -> None:
    pair.session = ""
    assert arguments(pair.passed_on("/v1/responses", b'{"model": "m"}')) == {"specedge": NOBODY}


def test_a_path_that_cannot_name_an_edge_is_said_once(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "edge_client"):
        for path in ("systemone", "systemone", "embeddings", "messages/count_tokens", "completions"):
            pair.passed_on(f"/v1/{path}", b"{}")
    assert [record.getMessage() for record in caplog.records if record.name == "edge_client"] == [
        "Requests to /v1/systemone cannot be kept private: other edges may draft for them"
    ]


FORM = (
    b'--x-y\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n\xff\x00\r\n'
    b'--x-y\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--x-y--\r\n'
)
OWN_PART = b'--x-y\r\nContent-Disposition: form-data; name="vllm_xargs"\r\n\r\n{"a": 1e400}\r\n'


@pytest.mark.parametrize(("own", "merged"), [(b"", '{"specedge": "s"}'), (OWN_PART, '{"specedge": "s", "a": 1e400}')])
def test_a_form_names_this_edge_too(own: bytes, merged: str) -> None:
    for kind in ("multipart/form-data; boundary=x-y", 'multipart/form-data; charset=utf-8; boundary="x-y"'):
        given = with_session("audio/transcriptions", kind, own + FORM, "s")
        first = f'--x-y\r\nContent-Disposition: form-data; name="vllm_xargs"\r\n\r\n{merged}\r\n'
        assert given == first.encode() + FORM
    assert with_session("audio/transcriptions", "text/plain", FORM, "s") == FORM


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ("{}", '{"vllm_xargs": {"specedge": "s"}}'),
        (
            '{"a":1e400 , "b": 1.10, "c": NaN, "d": "\\ud800"}\n',
            '{"a":1e400 , "b": 1.10, "c": NaN, "d": "\\ud800", "vllm_xargs": {"specedge": "s"}}',
        ),
        (
            '{"vllm_xargs": {"x": 1e400, "y": [1.0, "é", true]}}',
            '{"vllm_xargs": {"x": 1e400, "y": [1.0, "é", true]}, '
            '"vllm_xargs": {"specedge": "s", "x": 1e400, "y": [1.0, "\\u00e9", true]}}',
        ),
        ('{"vllm_xargs": null}', '{"vllm_xargs": null, "vllm_xargs": {"specedge": "s"}}'),
        (
            '{"vllm_xargs": {"specedge": "other"}}',
            '{"vllm_xargs": {"specedge": "other"}, "vllm_xargs": {"specedge": "other"}}',
        ),
        (f'{{"n": {"9" * 5000}}}', f'{{"n": {"9" * 5000}, "vllm_xargs": {{"specedge": "s"}}}}'),
        ('{"vllm_xargs": [1]}', '{"vllm_xargs": [1]}'),
        ("[1]", "[1]"),
        ("{", "{"),
        ("", ""),
        ("[" * 200_000, "[" * 200_000),
        ('{"a": ' * 200_000, '{"a": ' * 200_000),
    ],
)
def test_nothing_but_the_session_is_changed(given: str, passed: str) -> None:
    for encoding in ("utf-8", "utf-16", "utf-32"):
        body = with_session("completions", "application/json", given.encode(encoding), "s")
        assert body.decode(encoding) == passed


def test_a_prediction_goes_where_the_server_reads_it(pair: Pair) -> None:
    body = pair.passed_on("/v1/completions", b'{"prediction": {"type": "content", "content": "abc"}}')
    assert arguments(body) == {"specedge": SESSION, KEY: "abc"}


def test_what_is_nested_too_deeply_is_the_server_s_to_refuse(pair: Pair) -> None:
    pair.toy.answer = 400, {}, b"no"
    body = b"[" * 200_000
    answer = pair.post("/v1/chat/completions", body)
    assert (answer.status_code, answer.content, pair.toy.asked[-1][2]) == (400, b"no", body)


# -- where it leads ------------------------------------------------------------------------------------------------


def ask_raw(url: str, path: str, host: str = "localhost") -> bytes:
    """The answer to a request whose path no client library has normalized."""
    with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0), timeout=DEADLINE_S) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while data := connection.recv(1 << 16):
            answer += data
    return answer


@pytest.mark.parametrize(
    "path",
    [
        "/v1/../metrics",
        "/v1/%2e%2e/health",
        "/v1/%2E./health",
        "/v1/%252e%252e/health",
        "/v1/%25252e%25252e/health",
        "/v1/a/..%2f..%2fhealth",
        "/v1/..%5chealth",
        "/v1/./models",
        "/metrics",
    ],
)
def test_nothing_that_is_not_below_v1_gets_to_the_server(pair: Pair, path: str) -> None:
    assert b" 404 " in ask_raw(pair.url, path).splitlines()[0]
    assert not pair.toy.asked


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("/v1/models/a%2Fb..c", "/v1/models/a/b..c"),
        ("/v1/a%20%C3%A9%3F%23%25?q=1%2F2", "/v1/a%20%C3%A9%3F%23%25?q=1%2F2"),
    ],
)
def test_other_paths_stay_as_they_are(pair: Pair, path: str, sent: str) -> None:
    assert b" 200 " in ask_raw(pair.url, path).splitlines()[0]
    raw = httpx.URL(f"{pair.server_url}{sent}")
    assert pair.toy.asked[-1][0] == raw.raw_path.partition(b"?")[0].decode()


def test_a_redirect_stays_at_the_endpoint(pair: Pair) -> None:
    pair.toy.answer = 307, {"location": f"{pair.server_url}/v1/chat/completions?a=1"}, b""
    assert pair.post("/v1/chat/completions/").headers["location"] == "/v1/chat/completions?a=1"


@pytest.mark.parametrize(
    ("location", "own"),
    [
        ("http://s:1/base/v1/x?y#z", "/v1/x?y#z"),
        ("https://s:1/base/v1/x", "/v1/x"),
        ("/base/v1/x", "/v1/x"),
        ("/login", "/login"),
        ("https://other/base/v1/x", "https://other/base/v1/x"),
    ],
)
def test_a_location_below_the_server_s_is_the_endpoint_s(location: str, own: str) -> None:
    assert own_location(location, "http://s:1/base/v1/") == own


def test_a_path_is_put_into_a_url() -> None:
    assert path_below("a b/%/é") == "a%20b/%25/%C3%A9"
    assert path_below("x/%2e") is None


# -- under which names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "is_opened", "names", "is_answered"),
    [
        ("localhost:11435", False, [], True),
        ("127.0.0.1", False, [], True),
        ("[::1]:11435", False, [], True),
        ("evil.example.org", False, [], False),
        ("localhost.evil.example.org", False, [], False),
        ("192.168.1.5:11435", False, [], False),
        ("0.0.0.0", False, [], False),
        ("192.168.1.5:11435", True, [], True),
        ("[fd00::5]:11435", True, [], True),
        ("evil.example.org", True, [], False),
        ("Laptop.local:11435", True, ["laptop.local"], True),
        ("edge", False, ["edge"], True),
        ("anything.example.org", False, ["*"], True),
        ("", True, [], False),
        ("[::1", True, [], False),
    ],
)
def test_it_answers_to_its_own_names_only(header: str, is_opened: bool, names: list[str], is_answered: bool) -> None:
    assert is_own_name(header, is_opened, names) == is_answered


@pytest.mark.parametrize(
    ("options", "status"), [({}, b"400"), ({"is_opened": True}, b"200"), ({"hosts": ["10.1.2.3"]}, b"200")]
)
def test_what_the_user_opened_is_answered(options: dict[str, Any], status: bytes) -> None:
    with endpoint(**options) as pair:
        answer = ask_raw(pair.url, "/v1/models", host="10.1.2.3:11435")
        assert answer.split()[1] == status
        assert (b"--allow-host" in answer) == (status == b"400")
        assert ask_raw(pair.url, "/v1/models", host="[::1]:11435").split()[1] == b"200"


@pytest.mark.parametrize(("host", "is_opened"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_an_endpoint_for_other_machines_knows_its_machine_s_name(host: str, is_opened: bool) -> None:
    with socket.create_server((host, 0)) as listener:
        found, names = names_here(listener)
    assert (found, socket.gethostname() in names) == (is_opened, is_opened)


# -- as it came ----------------------------------------------------------------------------------------------------


def test_a_program_that_hangs_up_before_the_answer_ends_the_server_s_work(pair: Pair) -> None:
    pair.toy.is_slow = True
    with socket.create_connection(("127.0.0.1", httpx.URL(pair.url).port or 0), timeout=DEADLINE_S) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"
        connection.sendall(head.encode())
        assert pair.toy.is_asked.wait(DEADLINE_S)
    assert pair.toy.is_left.wait(DEADLINE_S)


def test_nothing_is_asked_for_that_the_program_did_not_ask_for(pair: Pair) -> None:
    head = "GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Own: 1\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", httpx.URL(pair.url).port or 0), timeout=DEADLINE_S) as connection:
        connection.sendall(head.encode())
        while connection.recv(1 << 16):
            pass
    sent = pair.toy.asked[-1][1].keys() - {"host", "connection", "content-length"}
    assert sent == {"x-own"}


def test_what_a_program_asks_for_is_passed_on(pair: Pair) -> None:
    pair.toy.answer = 200, {"content-encoding": "x-own"}, b"packed"
    answer = pair.post("/v1/completions", accept_encoding="gzip")
    assert pair.toy.asked[-1][1]["accept-encoding"] == "gzip"
    assert (answer.headers["content-encoding"], answer.content) == ("x-own", b"packed")


def read_request(connection: socket.socket) -> bytes:
    """Read a request whose body is a JSON object; empty at the connection's end."""
    data = b""
    while not data.endswith(b"}") and (more := connection.recv(1 << 16)):
        data += more
    return data


class Closing(threading.Thread):
    """A server that answers one request on its first connection, closes it at the next, and then works normally."""

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(daemon=True)
        self.listener = listener
        self.num_asked = 0

    def run(self) -> None:
        for num_answered in (1, 9):
            with self.listener.accept()[0] as connection:
                for number in range(num_answered + 1):
                    if not read_request(connection):
                        break
                    self.num_asked += 1
                    if number < num_answered:
                        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")


def test_a_connection_that_the_server_just_closed_costs_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_client.serve.KEPT_S", 600.0)  # even on a slow machine
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closing = Closing(listener)
        closing.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with served(make_app(url, lambda: "")) as own, httpx.Client(trust_env=False, timeout=DEADLINE_S) as program:
            for _ in range(2):
                assert program.post(f"{own}/v1/completions", json={}).status_code == 200
        closing.join(DEADLINE_S)
        assert closing.num_asked == 3


class Gone(Closing):
    """Closes each connection when a request arrives."""

    def run(self) -> None:
        with self.listener.accept()[0] as connection:
            read_request(connection)
            self.num_asked += 1


def test_a_request_that_was_sent_on_a_new_connection_is_not_sent_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        gone = Gone(listener)
        gone.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with served(make_app(url, lambda: "")) as own:
            answer = httpx.post(f"{own}/v1/completions", json={}, trust_env=False, timeout=DEADLINE_S)
        gone.join(DEADLINE_S)
        assert (answer.status_code, gone.num_asked) == (502, 1)
