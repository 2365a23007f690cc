"""The front refuses what the engines have no room for, and nothing else."""

import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_specedge import admission
from vllm_specedge.admission import DEFAULT_CLASS, LOAD_VARIABLE, STALE_S, AdmissionMiddleware, LoadFile

BODY = {"model": "m", "prompt": "hello"}


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the body that it was sent."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


class Front:
    """The middleware, and what it answered."""

    def __init__(self) -> None:
        self.middleware = AdmissionMiddleware(application)

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

        asyncio.run(self.middleware({"type": "http", "path": path}, receive, send))
        return sent[0]["status"], sent[1]["body"], dict(sent[0]["headers"])


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
    file, front = LoadFile(directory / "0.json"), Front()
    file.write({DEFAULT_CLASS: 2}, 7)
    assert [front.ask()[0] for _ in range(3)] == [200, 200, 503]
    status, body, headers = front.ask()
    assert (status, headers[b"retry-after"]) == (503, b"7")
    assert json.loads(body)["error"]["code"] == 503
    file.write({DEFAULT_CLASS: 1}, 7)
    assert [front.ask()[0] for _ in range(2)] == [200, 503]


def test_what_an_engine_said_long_ago_does_not_count(directory: Path) -> None:
    file = LoadFile(directory / "0.json")
    file.write({DEFAULT_CLASS: 0}, 1)
    then_s = time.time() - STALE_S - 1
    os.utime(file.path, (then_s, then_s))
    assert Front().ask()[0] == 200


def test_one_engine_with_room_is_enough(directory: Path) -> None:
    LoadFile(directory / "0.json").write({DEFAULT_CLASS: 0}, 1)
    LoadFile(directory / "1.json").write({DEFAULT_CLASS: 1}, 1)
    front = Front()
    assert [front.ask()[0] for _ in range(2)] == [200, 503]


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
