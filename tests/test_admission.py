"""The front end refuses requests that the engines have no room for, and no others."""

import asyncio
import fcntl
import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from fastapi import FastAPI, Request, Response
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from vllm_specedge.frontend import admission
from vllm_specedge.frontend.admission import AdmissionMiddleware, Front
from vllm_specedge.frontend.load_file import CLASSES, LOAD_VARIABLE, PLACES, Load, LoadFile
from vllm_specedge.frontend.request_classes import MAX_BODY_BYTES, MAX_REWRITTEN_BYTES, RequestClasses
from vllm_specedge.frontend.shared_places import NUM_SLICES, SLICE_S, SharedPlaces
from vllm_specedge.policy.slo import DEFAULT_CLASS, ON_THE_WAY_S, STALE_S

DEADLINE_S = 20.0
BODY = {"model": "m", "prompt": "hello"}


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Echoes the request's body as read by Starlette."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body, more = body + message["body"], message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def say(directory: Path, room: dict[str, int], after_s: float = 0.0, engine: int = 0, **more: Any) -> None:
    """An engine reports its room, now or a little later; 1 s later all requests admitted so far have reached it."""
    now_s = time.monotonic() + after_s
    load = Load(now_s, now_s, room, retry_after_s=7, **more)
    LoadFile(directory / f"{engine}.json").write(load)


class Client:
    """The middleware, and its answers."""

    def __init__(self, app: Any = application) -> None:
        self.middleware = AdmissionMiddleware(app)

    def ask(
        self,
        body: Any = BODY,
        path: str = "/v1/completions",
        parts: int = 1,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> tuple[int, bytes, dict[bytes, bytes]]:
        data = json.dumps(body).encode() if not isinstance(body, bytes) else body
        size = max(1, len(data) // parts)
        pieces = [data[at : at + size] for at in range(0, len(data), size)] or [b""]
        messages: Iterator[Any] = iter(
            {"type": "http.request", "body": piece, "more_body": number < len(pieces) - 1}
            for number, piece in enumerate(pieces)
        )
        sent: list[Any] = []

        async def receive() -> Any:
            return next(messages)

        async def send(message: Any) -> None:
            sent.append(message)

        asyncio.run(self.middleware({"type": "http", "path": path, "headers": list(headers)}, receive, send))
        return sent[0]["status"], sent[1]["body"], dict(sent[0]["headers"])


@contextmanager
def running(number: int) -> Iterator[Client]:
    """A front end that has admitted `number` requests, which run until the block ends."""
    started, ended = threading.Semaphore(0), threading.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            await application(scope, receive, send)
            return
        await receive()
        started.release()
        assert await asyncio.to_thread(ended.wait, DEADLINE_S)
        await JSONResponse({}, 200)(scope, receive, send)

    front = Client(slow)
    threads = [threading.Thread(target=front.ask) for _ in range(number)]
    for thread in threads:
        thread.start()
        assert started.acquire(timeout=DEADLINE_S)
    try:
        yield front
    finally:
        ended.set()
        for thread in threads:
            thread.join(DEADLINE_S)


async def stranger(scope: Any, receive: Any, send: Any) -> None:
    """Refuses every request without reading its body, as vLLM's front end does if the key is missing."""
    await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)


async def no_model(scope: Any, receive: Any, send: Any) -> None:
    """Reads the request and answers by itself; the engine does not receive it."""
    await receive()
    await JSONResponse({"error": "no such model"}, 404)(scope, receive, send)


async def broken(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    raise ConnectionResetError


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(LOAD_VARIABLE, str(tmp_path))
    return tmp_path


def test_without_targets_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LOAD_VARIABLE, raising=False)
    assert Client().ask()[0] == 200


def test_an_engine_that_has_said_nothing_has_room(directory: Path) -> None:
    assert Client().ask()[0] == 200


def test_as_many_are_let_in_as_there_is_room_for_until_the_engine_says_more(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "LOOK_AGAIN_S", 0.0)
    say(directory, {DEFAULT_CLASS: 2})
    with running(2) as front:
        status, body, headers = front.ask()
        assert (status, headers[b"retry-after"]) == (429, b"7")
        assert json.loads(body)["error"]["code"] == 429
        say(directory, {DEFAULT_CLASS: 1}, after_s=1.0)
        assert front.ask()[0] == 200  # and it is over: the next may come
        assert front.ask()[0] == 200


def test_a_place_is_given_back_when_a_request_is_over_but_not_into_what_an_engine_said_since(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "LOOK_AGAIN_S", 0.0)
    say(directory, {DEFAULT_CLASS: 2})
    with running(2) as front:
        assert front.ask()[0] == 429
    assert front.ask()[0] == 200
    say(directory, {DEFAULT_CLASS: 1}, after_s=1.0)
    with running(1) as front:
        assert front.ask()[0] == 200
        say(directory, {DEFAULT_CLASS: 0}, after_s=1.0)
        assert front.ask()[0] == 429
    assert front.ask()[0] == 429


@pytest.mark.parametrize("app", [stranger, no_model, broken])
def test_what_never_reaches_an_engine_takes_no_place(directory: Path, app: Any) -> None:
    say(directory, {DEFAULT_CLASS: 1})
    front = Client(app)
    for _ in range(20):
        with suppress(ConnectionResetError):
            assert front.ask()[0] in (401, 404)


def test_the_body_of_a_stranger_is_not_even_read(directory: Path) -> None:
    async def receive() -> Any:
        raise AssertionError

    async def send(message: Any) -> None:
        pass

    say(directory, {DEFAULT_CLASS: 1})
    asyncio.run(
        AdmissionMiddleware(stranger)({"type": "http", "path": "/v1/completions", "headers": []}, receive, send)
    )


def test_a_refusal_is_the_only_answer_whatever_the_application_makes_of_it(directory: Path) -> None:
    """The order in vLLM's front end: this middleware, the one for the key, then the framework that reads the body."""
    app = FastAPI()

    @app.post("/v1/completions")
    async def completions(asked: dict[str, Any]) -> dict[str, Any]:
        return asked

    @app.middleware("http")
    async def with_key(request: Request, call_next: Any) -> Response:
        has_key = request.headers.get("authorization") == "Bearer key"
        return await call_next(request) if has_key else Response(status_code=401)  # type: ignore[no-any-return]

    app.add_middleware(AdmissionMiddleware)
    say(directory, {DEFAULT_CLASS: 0})

    async def ask(key: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.post("/v1/completions", json=BODY, headers={"authorization": f"Bearer {key}"})

    assert asyncio.run(ask("none")).status_code == 401
    refused = asyncio.run(ask("key"))
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "7")
    assert refused.json()["error"]["type"] == "overloaded_error"
    say(directory, {DEFAULT_CLASS: 1})
    app.middleware_stack = None  # the next is told at once what the engine said
    assert asyncio.run(ask("key")).json() == BODY


def test_what_an_engine_said_long_ago_does_not_count(directory: Path) -> None:
    say(directory, {DEFAULT_CLASS: 0}, after_s=-STALE_S - 0.1)
    assert Client().ask()[0] == 200


def test_one_engine_with_room_is_enough(directory: Path) -> None:
    say(directory, {DEFAULT_CLASS: 0})
    say(directory, {DEFAULT_CLASS: 1}, engine=1)
    with running(1) as front:
        assert front.ask()[0] == 429


def test_a_priority_with_a_class_of_its_own_is_counted_there(directory: Path) -> None:
    RequestClasses({"0": 0, "-5": -5}).write(directory / CLASSES)
    say(directory, {DEFAULT_CLASS: 0, "0": 0, "-5": 9})
    front = Client()
    assert front.ask(BODY | {"priority": -5})[0] == 200
    assert front.ask(BODY | {"priority": "-5"})[0] == 200  # as the application reads it
    assert front.ask(BODY | {"priority": 3})[0] == 429
    assert front.ask(BODY)[0] == 429


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("body", [BODY | {"priority": 1}, b"no json", b"", [1, 2], b"[" * 200_000])
def test_the_application_gets_the_whole_body(directory: Path, body: Any, parts: int) -> None:
    say(directory, {DEFAULT_CLASS: 9})
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert Client().ask(body, parts=parts)[1] == data


def test_what_generates_nothing_is_let_through(directory: Path) -> None:
    say(directory, {DEFAULT_CLASS: 0})
    assert Client().ask(path="/v1/models")[0] == 200
    assert Client().ask(path="/prefix/v1/chat/completions")[0] == 429


def test_what_cannot_be_written_is_no_fault_of_the_engine_s(tmp_path: Path) -> None:
    LoadFile(tmp_path / "gone" / "0.json").write(Load(0.0, 0.0))
    assert not (tmp_path / "gone").exists()


def test_without_room_for_what_is_shared_all_are_let_in(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    (directory / PLACES).mkdir()
    say(directory, {DEFAULT_CLASS: 0})
    assert Client().ask()[0] == 200
    assert "All requests are admitted" in caplog.text


def test_what_could_never_be_served_is_told_not_to_come_again(directory: Path) -> None:
    say(directory, {DEFAULT_CLASS: 0}, unserved=frozenset({DEFAULT_CLASS}))
    status, body, headers = Client().ask()
    assert (status, headers.get(b"retry-after"), headers[b"x-should-retry"]) == (503, None, b"false")
    assert json.loads(body)["error"]["code"] == 503
    say(directory, {DEFAULT_CLASS: 0}, engine=1)  # another could, later
    assert Client().ask()[0] == 429


# -- several API processes -----------------------------------------------------------------------------------------

ASK_MANY = """
import sys
from pathlib import Path
from vllm_specedge.frontend.admission import Front
from vllm_specedge.frontend.request_classes import RequestClasses
from vllm_specedge.frontend.shared_places import SharedPlaces
directory, number, now_s = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
front = Front(directory, SharedPlaces(directory / "places"), RequestClasses())
print("ready", flush=True)
sys.stdin.readline()
print(sum(front.ask("default", now_s + n * 1e-5).is_admitted for n in range(number)))
"""


def test_four_processes_let_in_no_more_than_there_is_room_for(directory: Path) -> None:
    now_s, room, each = 1000.0, 5000, 3000
    LoadFile(directory / "0.json").write(Load(now_s, now_s, {DEFAULT_CLASS: room}))
    command = [sys.executable, "-c", ASK_MANY, str(directory), str(each), str(now_s)]
    fronts = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    try:
        for front in fronts:
            assert front.stdout is not None
            assert front.stdout.readline() == "ready\n"
        for front in fronts:
            assert front.stdin is not None
            front.stdin.write("\n")
            front.stdin.flush()
        admitted = [int(front.communicate(timeout=DEADLINE_S)[0]) for front in fronts]
    finally:
        for front in fronts:
            front.kill()
            front.communicate()
    assert sum(admitted) == room
    places = SharedPlaces(directory / PLACES)
    with places.locked():
        assert places.refused()[0] == 4 * each - room
    places.close()


@pytest.mark.timeout(60)
def test_a_process_that_is_stopped_with_the_lock_stops_no_other(directory: Path) -> None:
    LoadFile(directory / "0.json").write(Load(1000.0, 1000.0, {DEFAULT_CLASS: 400}))
    front = Front(directory, SharedPlaces(directory / PLACES), RequestClasses())
    with (directory / PLACES).open("rb") as stopped:
        fcntl.flock(stopped, fcntl.LOCK_EX)
        admitted = sum(front.ask(DEFAULT_CLASS, 1000.0 + n * 1e-5).is_admitted for n in range(500))
        assert admitted == 400
        fcntl.flock(stopped, fcntl.LOCK_UN)
        with front.places.locked(), pytest.raises(BlockingIOError):
            fcntl.flock(stopped, fcntl.LOCK_EX | fcntl.LOCK_NB)
    front.places.close()


@pytest.fixture
def two_fronts(directory: Path) -> Iterator[tuple[Front, Front]]:
    both = [Front(directory, SharedPlaces(directory / PLACES), RequestClasses()) for _ in range(2)]
    yield both[0], both[1]
    for front in both:
        front.places.close()


def test_what_one_process_let_in_is_in_the_other_s_way_until_an_engine_s_report_knows_it(
    directory: Path, two_fronts: tuple[Front, Front]
) -> None:
    one, other = two_fronts
    file, said_s = LoadFile(directory / "0.json"), 100.0
    file.write(Load(said_s, said_s, {DEFAULT_CLASS: 1}))
    assert one.ask(DEFAULT_CLASS, said_s + 0.01).is_admitted
    assert not other.ask(DEFAULT_CLASS, said_s + 0.02).is_admitted
    known_s = said_s + 0.01
    file.write(Load(known_s, known_s, {DEFAULT_CLASS: 1}))  # it may not have had it by then
    assert not other.ask(DEFAULT_CLASS, said_s + 0.05).is_admitted
    file.write(Load(said_s + 1.0, known_s, {DEFAULT_CLASS: 1}))  # after a long step, which began before
    assert not other.ask(DEFAULT_CLASS, said_s + 1.1).is_admitted
    known_s += ON_THE_WAY_S + SLICE_S
    file.write(Load(said_s + 1.2, known_s, {DEFAULT_CLASS: 1}))
    assert other.ask(DEFAULT_CLASS, said_s + 1.3).is_admitted


def test_a_place_goes_back_to_all_and_what_a_dead_process_took_is_its_own_for_a_report_s_time(
    directory: Path, two_fronts: tuple[Front, Front]
) -> None:
    one, other = two_fronts
    LoadFile(directory / "0.json").write(Load(100.0, 100.0, {DEFAULT_CLASS: 1}))
    verdict = one.ask(DEFAULT_CLASS, 100.01)
    assert verdict.place is not None
    one.give_back(verdict.place)
    assert other.ask(DEFAULT_CLASS, 100.02).is_admitted
    # `other` dies with it, and its slice of time comes round again.
    later_s = 100.0 + NUM_SLICES * SLICE_S
    LoadFile(directory / "0.json").write(Load(later_s, later_s, {DEFAULT_CLASS: 1}))
    assert one.ask(DEFAULT_CLASS, 100.02 + NUM_SLICES * SLICE_S).is_admitted


# -- classes -------------------------------------------------------------------------------------------------------


async def priority_of(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the priority that vLLM would read from the headers, and the body."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    asked = json.loads(message["body"])
    found = [value.decode() for name, value in scope["headers"] if name == b"x-vllm-priority"]
    await JSONResponse([found, asked])(scope, receive, send)


def test_a_header_names_the_class_and_gives_it_its_priority_whatever_the_request_says(directory: Path) -> None:
    RequestClasses({"gold": -1, DEFAULT_CLASS: 0}, "header", "x-slo-class").write(directory / CLASSES)
    say(directory, {DEFAULT_CLASS: 0, "gold": 9})
    front = Client(priority_of)
    gold, forged = (b"x-slo-class", b"gold"), (b"x-vllm-priority", b"-1")
    own = BODY | {"priority": 7}
    assert json.loads(front.ask(own, headers=(gold, forged, forged))[1]) == [["-1"], own]
    assert front.ask(own, headers=(forged,))[0] == 429
    assert front.ask(own, headers=((b"x-slo-class", b"silver"),))[0] == 429
    say(directory, {DEFAULT_CLASS: 9})
    assert json.loads(Client(priority_of).ask(own, headers=(forged,))[1]) == [["0"], own]


@pytest.mark.parametrize("path", ["/v1/chat/completions/batch", "/inference/v1/generate", "/cohere/v2/chat"])
def test_where_vllm_knows_no_header_the_body_gets_the_priority(directory: Path, path: str) -> None:
    RequestClasses({"gold": -1, DEFAULT_CLASS: 0}, "header", "x-slo-class").write(directory / CLASSES)
    say(directory, {DEFAULT_CLASS: 9, "gold": 9})
    gold = ((b"x-slo-class", b"gold"),)
    assert json.loads(Client(priority_of).ask(BODY | {"priority": 7}, path, headers=gold)[1])[1]["priority"] == -1
    assert json.loads(Client(priority_of).ask({}, path, headers=gold)[1])[1] == {"priority": -1}


@pytest.mark.parametrize("parts", [1, 5])
def test_a_body_that_is_not_looked_at_comes_whole(directory: Path, parts: int) -> None:
    RequestClasses({"gold": -1, DEFAULT_CLASS: 0}, "header", "x-slo-class").write(directory / CLASSES)
    say(directory, {DEFAULT_CLASS: 9, "gold": 9})
    data = b"x" * (2 * MAX_BODY_BYTES)
    assert Client().ask(data, parts=parts)[1] == data


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/completions", ((b"x-vllm-priority", b"-5"),), 200),
        ("/v1/completions", ((b"x-vllm-priority", b" 3 "), (b"x-vllm-priority", b"-5")), 429),
        ("/v1/completions", ((b"x-vllm-priority", b"high"),), 200),
        ("/cohere/v2/chat", ((b"x-vllm-priority", b"3"),), 200),
    ],
)
def test_a_priority_in_vllm_s_header_comes_before_the_body_s_where_vllm_sees_it_so(
    directory: Path, path: str, headers: Any, status: int
) -> None:
    RequestClasses({"-5": -5}).write(directory / CLASSES)
    say(directory, {DEFAULT_CLASS: 0, "-5": 9})
    assert Client().ask(BODY | {"priority": -5}, path, headers=headers)[0] == status


def test_the_group_of_a_key_is_its_class(directory: Path) -> None:
    keys = {hashlib.sha256(b"se-one").hexdigest(): "gold"}
    RequestClasses({"gold": -1, DEFAULT_CLASS: 0}, "key", "", keys).write(directory / CLASSES)
    say(directory, {DEFAULT_CLASS: 0, "gold": 9})
    assert Client().ask(headers=((b"authorization", b"Bearer se-one"),))[0] == 200
    for other in (b"Bearer se-two", b"Basic se-one", b"se-one", b"Bearer", b""):
        assert Client().ask(headers=((b"authorization", other),))[0] == 429


def test_a_class_that_a_header_names_is_refused_before_a_byte_of_the_body_is_read(directory: Path) -> None:
    RequestClasses({"gold": -1, DEFAULT_CLASS: 0}, "header", "x-slo-class").write(directory / CLASSES)
    say(directory, {DEFAULT_CLASS: 0, "gold": 0})
    assert _status_without_body([(b"x-slo-class", b"gold")]) == 429


def test_so_is_a_body_that_says_itself_that_it_is_huge(directory: Path) -> None:
    say(directory, {DEFAULT_CLASS: 0})
    assert _status_without_body([(b"content-length", str(MAX_BODY_BYTES + 1).encode())]) == 429


def _status_without_body(headers: list[tuple[bytes, bytes]]) -> int:
    async def receive() -> Any:
        raise AssertionError

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/v1/completions", "headers": headers}
    asyncio.run(AdmissionMiddleware(application)(scope, receive, send))
    return int(sent[0]["status"])


def test_a_body_that_cannot_get_its_class_s_priority_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "MAX_REWRITTEN_BYTES", 1000)
    assert MAX_REWRITTEN_BYTES > 1000
    RequestClasses({DEFAULT_CLASS: 0}, "header", "x-slo-class").write(directory / CLASSES)
    say(directory, {DEFAULT_CLASS: 9})
    assert Client().ask(BODY | {"prompt": "x" * 2000}, "/inference/v1/generate", parts=4)[0] == 413


@pytest.mark.parametrize("body", [b"[" * MAX_BODY_BYTES, b'{"a":' * 200_000, b'{"a":[' + b"[]," * 300_000 + b"1]}"])
def test_no_body_takes_long_to_look_at(body: bytes) -> None:
    """The body is scanned, not parsed into objects."""
    took_s = []
    for _ in range(5):
        started_s = time.perf_counter()
        assert RequestClasses({"5": 5}).of_body(body) == DEFAULT_CLASS
        took_s.append(time.perf_counter() - started_s)
    assert min(took_s) < 0.02
