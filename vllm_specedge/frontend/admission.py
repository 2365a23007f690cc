"""Requests that would break the targets are refused at the OpenAI front, before they cost the engine anything.

    vllm serve MODEL --speculative-config '{"method": "edge", "slo": {"default": {"ttft_ms": 2000, "itl_ms": 100}}}' \\
        --middleware vllm_specedge.admission.AdmissionMiddleware

Each engine writes a few numbers to a file beside its socket, some times a second (`LoadFile`); the front looks at them.
Rule 1: in doubt a request is let in. An engine that has nothing to do writes nothing, so what is old does not count.
Rule 2: what is refused by somebody else, and what is over, has no place.
Rule 3: the same answer as an overloaded OpenAI service gives, which its clients know to try again: 503, Retry-After.
"""

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_specedge.frontend.request_body import pass_on

LOAD_VARIABLE = "SPECEDGE_LOAD"
"""The directory of the engines' load files; set by the front end when there are targets, inherited by its engines."""
STALE_S = 2.0
LOOK_AGAIN_S = 0.02
DEFAULT_CLASS = "default"
MAX_BODY_BYTES = 1 << 20
"""The priority is not looked for in a longer body: it counts as of the default class."""
_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")


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

    def take(self, class_: str) -> dict[str, int] | None:
        """A place for one more request, to be given back when it is over: what an engine said that has room for it.

        None if no engine has. If none has said anything of late, all have.
        """
        self.look()
        best = max(self.room.values(), key=lambda room: _room(room, class_), default=None)
        if best is None:
            return {}
        if _room(best, class_) <= 0:
            return None
        for name in best:
            best[name] -= 1
        return best

    def give_back(self, place: dict[str, int]) -> None:
        """A request is over, which an engine may have had or not. What the engine says later knows of that by itself,
        and is another place than this."""
        for name in place:
            place[name] += 1


def _room(room: Mapping[str, int], class_: str) -> int:
    return room.get(class_, room[DEFAULT_CLASS])


class AdmissionMiddleware:
    """ASGI middleware for vLLM's `--middleware`. Without targets it lets everything through."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        directory = os.environ.get(LOAD_VARIABLE)
        self._front = _Front(Path(directory)) if directory else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        front = self._front
        if front is None or scope["type"] != "http" or not scope["path"].endswith(_PATHS):
            await self._app(scope, receive, send)
            return
        place: dict[str, int] | None = None

        def look(body: bytes, is_whole: bool) -> JSONResponse | None:
            nonlocal place
            place = front.take(_priority(body))
            return _refusal(front.retry_after_s) if place is None else None

        try:
            await pass_on(self._app, scope, receive, send, MAX_BODY_BYTES, look)
        finally:
            front.give_back(place or {})


def _priority(body: bytes) -> str:
    try:
        priority = json.loads(body).get("priority", 0)
    except (ValueError, AttributeError, RecursionError):
        return DEFAULT_CLASS  # the application has something to say about it
    return str(priority)


def _refusal(retry_after_s: int) -> JSONResponse:
    text = "The server is at its limit: it could not answer within its latency targets. Try again later."
    error = {"message": text, "type": "overloaded_error", "param": None, "code": 503}
    return JSONResponse({"error": error}, 503, {"retry-after": str(retry_after_s)})
