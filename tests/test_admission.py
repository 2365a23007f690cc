"""The front refuses what the engines have no room for, and nothing else."""

import asyncio
import json
import os
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
from vllm_specedge.frontend.admission import DEFAULT_CLASS, LOAD_VARIABLE, STALE_S, AdmissionMiddleware, LoadFile

DEADLINE_S = 20.0
BODY = {"model": "m", "prompt": "hello"}


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the body that it was sent, as Starlette reads it."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body, more = body + message["body"], message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


class Front:
    """The middleware, and what it answered."""

    def __init__(self, app: Any = application) -> None:
        self.middleware = AdmissionMiddleware(app)

    def ask(
        self, body: Any = BODY, path: str = "/v1/completions", parts: int = 1
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

        asyncio.run(self.middleware({"type": "http", "path": path, "headers": []}, receive, send))
        return sent[0]["status"], sent[1]["body"], dict(sent[0]["headers"])


@contextmanager
def running(number: int) -> Iterator[Front]:
    """A front that has let in so many requests, which are being answered until the block ends."""
    started, ended = threading.Semaphore(0), threading.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            await application(scope, receive, send)
            return
        await receive()
        started.release()
        assert await asyncio.to_thread(ended.wait, DEADLINE_S)
        await JSONResponse({}, 200)(scope, receive, send)

    front = Front(slow)
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
    """Refuses whoever asks, as vLLM's front does without a key: it looks at no body."""
    await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)


async def no_model(scope: Any, receive: Any, send: Any) -> None:
    """Reads what is asked and answers by itself: the engine hears nothing."""
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
    assert Front().ask()[0] == 200


def test_an_engine_that_has_said_nothing_has_room(directory: Path) -> None:
    assert Front().ask()[0] == 200


def test_as_many_are_let_in_as_there_is_room_for_until_the_engine_says_more(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "LOOK_AGAIN_S", 0.0)
    file = LoadFile(directory / "0.json")
    file.write({DEFAULT_CLASS: 2}, 7)
    with running(2) as front:
        status, body, headers = front.ask()
        assert (status, headers[b"retry-after"]) == (503, b"7")
        assert json.loads(body)["error"]["code"] == 503
        file.write({DEFAULT_CLASS: 1}, 7)
        assert front.ask()[0] == 200  # and it is over: the next may come
        assert front.ask()[0] == 200


def test_a_place_is_given_back_when_a_request_is_over_but_not_into_what_an_engine_said_since(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "LOOK_AGAIN_S", 0.0)
    file = LoadFile(directory / "0.json")
    file.write({DEFAULT_CLASS: 2}, 7)
    with running(2) as front:
        assert front.ask()[0] == 503
    assert front.ask()[0] == 200
    file.write({DEFAULT_CLASS: 1}, 7)
    with running(1) as front:
        assert front.ask()[0] == 503
        file.write({DEFAULT_CLASS: 0}, 7)
        assert front.ask()[0] == 503
    assert front.ask()[0] == 503


@pytest.mark.parametrize("app", [stranger, no_model, broken])
def test_what_never_reaches_an_engine_takes_no_place(directory: Path, app: Any) -> None:
    LoadFile(directory / "0.json").write({DEFAULT_CLASS: 1}, 7)
    front = Front(app)
    for _ in range(20):
        with suppress(ConnectionResetError):
            assert front.ask()[0] in (401, 404)


def test_the_body_of_a_stranger_is_not_even_read(directory: Path) -> None:
    async def receive() -> Any:
        raise AssertionError

    async def send(message: Any) -> None:
        pass

    LoadFile(directory / "0.json").write({DEFAULT_CLASS: 1}, 7)
    asyncio.run(
        AdmissionMiddleware(stranger)({"type": "http", "path": "/v1/completions", "headers": []}, receive, send)
    )


def test_a_refusal_is_the_only_answer_whatever_the_application_makes_of_it(directory: Path) -> None:
    """The order of vLLM's front: this middleware, the key's, then the framework that reads the body."""
    app = FastAPI()

    @app.post("/v1/completions")
    async def completions(asked: dict[str, Any]) -> dict[str, Any]:
        return asked

    @app.middleware("http")
    async def with_key(request: Request, call_next: Any) -> Response:
        has_key = request.headers.get("authorization") == "Bearer key"
        return await call_next(request) if has_key else Response(status_code=401)  # type: ignore[no-any-return]

    app.add_middleware(AdmissionMiddleware)
    LoadFile(directory / "0.json").write({DEFAULT_CLASS: 0}, 7)

    async def ask(key: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.post("/v1/completions", json=BODY, headers={"authorization": f"Bearer {key}"})

    assert asyncio.run(ask("none")).status_code == 401
    refused = asyncio.run(ask("key"))
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "7")
    assert refused.json()["error"]["type"] == "overloaded_error"
    LoadFile(directory / "0.json").write({DEFAULT_CLASS: 1}, 7)
    app.middleware_stack = None  # the next is told at once what the engine said
    assert asyncio.run(ask("key")).json() == BODY


def test_what_an_engine_said_long_ago_does_not_count(directory: Path) -> None:
    file = LoadFile(directory / "0.json")
    file.write({DEFAULT_CLASS: 0}, 1)
    then_s = time.time() - STALE_S - 1
    os.utime(file.path, (then_s, then_s))
    assert Front().ask()[0] == 200


def test_one_engine_with_room_is_enough(directory: Path) -> None:
    LoadFile(directory / "0.json").write({DEFAULT_CLASS: 0}, 1)
    LoadFile(directory / "1.json").write({DEFAULT_CLASS: 1}, 1)
    with running(1) as front:
        assert front.ask()[0] == 503


def test_a_priority_with_a_class_of_its_own_is_counted_there(directory: Path) -> None:
    LoadFile(directory / "0.json").write({DEFAULT_CLASS: 0, "0": 0, "-5": 9}, 1)
    front = Front()
    assert front.ask(BODY | {"priority": -5})[0] == 200
    assert front.ask(BODY | {"priority": 3})[0] == 503
    assert front.ask(BODY)[0] == 503


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("body", [BODY | {"priority": 1}, b"no json", b"", [1, 2], b"[" * 200_000])
def test_the_application_gets_the_whole_body(directory: Path, body: Any, parts: int) -> None:
    LoadFile(directory / "0.json").write({DEFAULT_CLASS: 9}, 1)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert Front().ask(body, parts=parts)[1] == data


def test_what_generates_nothing_is_let_through(directory: Path) -> None:
    LoadFile(directory / "0.json").write({DEFAULT_CLASS: 0}, 1)
    assert Front().ask(path="/v1/models")[0] == 200
    assert Front().ask(path="/prefix/v1/chat/completions")[0] == 503


def test_what_cannot_be_written_is_no_fault_of_the_engine_s(tmp_path: Path) -> None:
    LoadFile(tmp_path / "gone" / "0.json").write({DEFAULT_CLASS: 0}, 1)
    assert not (tmp_path / "gone").exists()
