"""Requests that would break the targets are refused at the OpenAI front, before they cost the engine anything.

    vllm serve MODEL --speculative-config '{"method": "edge", "slo": {"default": {"ttft_ms": 2000, "itl_ms": 100}}}' \\
        --middleware vllm_specedge.admission.AdmissionMiddleware

Each engine writes a few numbers to a file beside its socket, some times a second (`LoadFile`); the front looks at them.
Rule 1: in doubt a request is let in. An engine that has nothing to do writes nothing, so what is old does not count.
Rule 2: the same answer as an overloaded OpenAI service gives, which its clients know to try again: 503, Retry-After.
"""

import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

LOAD_VARIABLE = "SPECEDGE_LOAD"
"""The directory of the engines' load files; set by the front end when there are targets, inherited by its engines."""
STALE_S = 2.0
LOOK_AGAIN_S = 0.02
DEFAULT_CLASS = "default"
MAX_BODY_BYTES = 1 << 20
"""The priority is not looked for in a longer body: it counts as of the default class."""
_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")

_Message: TypeAlias = MutableMapping[str, Any]
_Receive: TypeAlias = Callable[[], Awaitable[_Message]]
_Send: TypeAlias = Callable[[_Message], Awaitable[None]]
_App: TypeAlias = Callable[[MutableMapping[str, Any], _Receive, _Send], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class LoadFile:
    """Where one engine says how many more requests it could take."""

    path: Path

    def write(self, room: Mapping[str, int], retry_after_s: int) -> None:
        """`room`: by class, a priority or DEFAULT_CLASS, how many more requests would meet their targets.

        What cannot be written (a full disk) is left out: what was said before grows old, and then all are let in.
        """
        text = json.dumps({"room": room, "retry_after_s": retry_after_s})
        new = self.path.with_suffix(".new")
        with suppress(OSError):
            new.write_text(text)
            new.replace(self.path)


@dataclass(slots=True)
class _Front:
    """What the engines said last, less what was let in since."""

    directory: Path
    looked_s: float = 0.0
    versions: dict[str, int] = field(default_factory=dict)
    room: dict[str, dict[str, int]] = field(default_factory=dict)
    """By engine and class."""
    retry_after_s: int = 1

    def look(self) -> None:
        now_s = time.monotonic()
        if now_s - self.looked_s < LOOK_AGAIN_S:
            return
        self.looked_s = now_s
        with suppress(OSError):  # a server that ends takes its directory with it
            self._read()

    def _read(self) -> None:
        current = {entry.name: entry for entry in os.scandir(self.directory) if entry.name.endswith(".json")}
        for name, entry in current.items():
            written_ns = entry.stat().st_mtime_ns
            if time.time() - written_ns / 1e9 > STALE_S:
                self.room.pop(name, None)
            elif self.versions.get(name) != written_ns:
                self.versions[name] = written_ns
                said = json.loads(Path(entry.path).read_text())
                self.room[name], self.retry_after_s = dict(said["room"]), said["retry_after_s"]

    def take(self, class_: str) -> bool:
        """Whether one more request is let in: some engine has room for it, or none has said anything of late."""
        self.look()
        best = max(self.room.values(), key=lambda room: _room(room, class_), default=None)
        if best is None:
            return True
        if _room(best, class_) <= 0:
            return False
        for name in best:
            best[name] -= 1
        return True


def _room(room: Mapping[str, int], class_: str) -> int:
    return room.get(class_, room[DEFAULT_CLASS])


class AdmissionMiddleware:
    """ASGI middleware for vLLM's `--middleware`. Without targets it lets everything through."""

    def __init__(self, app: _App) -> None:
        self._app = app
        directory = os.environ.get(LOAD_VARIABLE)
        self._front = _Front(Path(directory)) if directory else None

    async def __call__(self, scope: MutableMapping[str, Any], receive: _Receive, send: _Send) -> None:
        if self._front is None or scope["type"] != "http" or not scope["path"].endswith(_PATHS):
            await self._app(scope, receive, send)
            return
        class_, receive = await _class_of(receive)
        if self._front.take(class_):
            await self._app(scope, receive, send)
        else:
            await _refuse(send, self._front.retry_after_s)


async def _class_of(receive: _Receive) -> tuple[str, _Receive]:
    """The class of a request by its body, and a way to read that body again."""
    messages = [await receive()]
    size = len(messages[0].get("body", b""))
    while messages[-1].get("more_body") and size < MAX_BODY_BYTES:
        messages.append(await receive())
        size += len(messages[-1].get("body", b""))
    body = b"".join(message.get("body", b"") for message in messages)
    left = iter(messages)

    async def again() -> _Message:
        message = next(left, None)
        return message if message is not None else await receive()

    return _priority(body), again


def _priority(body: bytes) -> str:
    try:
        priority = json.loads(body).get("priority", 0)
    except (ValueError, AttributeError):
        return DEFAULT_CLASS  # the application has something to say about it
    return str(priority)


async def _refuse(send: _Send, retry_after_s: int) -> None:
    text = "The server is at its limit: it could not answer within its latency targets. Try again later."
    body = json.dumps({"error": {"message": text, "type": "overloaded_error", "param": None, "code": 503}}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"retry-after", str(retry_after_s).encode()),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})
