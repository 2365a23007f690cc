"""Admission control: requests that would break the latency targets are refused in the API server, before they cost the
engine anything.

    vllm serve MODEL --speculative-config '{"method": "edge", "slo": {"default": {"ttft_ms": 2000, "itl_ms": 100}}}' \\
        --middleware vllm_specedge.admission.AdmissionMiddleware

Each engine writes a few numbers to a file next to its socket, several times per second (`LoadFile`). The API processes
read them, together with the requests that all of them have admitted since (`SharedPlaces`).
Rule 1: in doubt a request is admitted. An idle engine writes nothing, so old numbers do not count.
Rule 2: a request that something else refused, or that has ended, takes no place.
Rule 3: a request that may be retried gets 429 and Retry-After, which OpenAI's clients know; one that could never be
served gets 503.
"""

import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_specedge.frontend.load_file import CLASSES, LOAD_VARIABLE, PLACES, Load, LoadFile
from vllm_specedge.frontend.request_body import pass_on
from vllm_specedge.frontend.request_classes import (
    MAX_BODY_BYTES,
    MAX_REWRITTEN_BYTES,
    PATHS_BY_BODY,
    PATHS_BY_HEADER,
    Headers,
    RequestClasses,
    with_priority,
)
from vllm_specedge.frontend.shared_places import Place, SharedPlaces
from vllm_specedge.policy.slo import ON_THE_WAY_S, STALE_S

logger = logging.getLogger("vllm_specedge.frontend.admission")

LOOK_AGAIN_S = 0.02


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one more request is admitted."""

    is_admitted: bool
    place: Place | None = None
    """The place to give back when the request ends; None: no engine has reported."""
    retry_after_s: int | None = None
    """Seconds after which a refused request may be retried; None: a retry cannot help."""


@dataclass(slots=True)
class Front:
    """Admission in one API process: the engines' last reports, less the requests that all processes admitted since."""

    directory: Path
    places: SharedPlaces
    classes: RequestClasses
    _looked_s: float = float("-inf")
    _versions: dict[str, int] = field(default_factory=dict)
    _loads: dict[int, Load] = field(default_factory=dict)
    """Last report by engine."""

    def ask(self, class_: str, now_s: float) -> Verdict:
        """Whether a request of this class is admitted now. If so, it has taken a place."""
        self._look(now_s)
        loads = {engine: load for engine, load in self._loads.items() if now_s - load.said_s <= STALE_S}
        number = self.classes.names.index(class_)
        with self.places.locked():
            room = {engine: self._room(engine, load, class_) for engine, load in loads.items()}
            best = max(room, key=room.__getitem__, default=None)
            if best is not None and room[best] <= 0:
                self.places.refuse(number)
            else:
                return Verdict(True, None if best is None else self.places.take(best, now_s))
        if all(class_ in load.unserved for load in loads.values()):
            return Verdict(False)
        return Verdict(False, retry_after_s=min(load.retry_after_s for load in loads.values()))

    def _room(self, engine: int, load: Load, class_: str) -> int:
        return load.room_of(class_) - self.places.taken(engine, load.known_s - ON_THE_WAY_S)

    def give_back(self, place: Place) -> None:
        """Free the place of a request that has ended, whether or not it reached an engine. An engine's later reports
        include this by themselves."""
        with self.places.locked():
            self.places.give_back(place)

    def _look(self, now_s: float) -> None:
        if now_s - self._looked_s < LOOK_AGAIN_S:
            return
        self._looked_s = now_s
        with suppress(OSError, ValueError):  # a server that ends takes its directory with it
            for entry in os.scandir(self.directory):
                name, suffix = os.path.splitext(entry.name)
                if suffix != ".json" or not name.isdecimal():
                    continue
                version = entry.stat().st_mtime_ns
                if self._versions.get(name) != version:
                    self._versions[name] = version
                    self._loads[int(name)] = LoadFile(Path(entry.path)).read()


def _front() -> Front | None:
    """The admission of this process; None if there are no targets."""
    directory = os.environ.get(LOAD_VARIABLE)
    if not directory:
        return None
    path = Path(directory)
    try:
        return Front(path, SharedPlaces(path / PLACES), RequestClasses.read(path / CLASSES))
    except OSError as error:
        logger.error("All requests are admitted: %s cannot be used (%s)", path / PLACES, error.strerror)
        return None


class AdmissionMiddleware:
    """ASGI middleware for vLLM's `--middleware`. Without targets it admits everything."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._front = _front()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        front = self._front
        if front is None or scope["type"] != "http" or not scope["path"].endswith(PATHS_BY_HEADER + PATHS_BY_BODY):
            await self._app(scope, receive, send)
            return
        request = _Request(front, scope["path"], scope["headers"])
        scope = {**scope, "headers": request.headers}
        try:
            await pass_on(self._app, scope, receive, send, request.limit_bytes, request.look, request.before)
        finally:
            if request.place is not None:
                front.give_back(request.place)


class _Request:
    """A request that is being admitted."""

    def __init__(self, front: Front, path: str, headers: Headers) -> None:
        self.place: Place | None = None
        self._front = front
        self._class = front.classes.of_headers(path, headers)
        """Its class; None if only its body tells it."""
        self.headers = headers
        if self._class is not None:
            self.headers = front.classes.with_priority(self._class, headers)
        self._is_rewritten = front.classes.source != "priority" and path.endswith(PATHS_BY_BODY)
        self.limit_bytes = MAX_BODY_BYTES if self._class is None else MAX_REWRITTEN_BYTES * self._is_rewritten

    def before(self) -> Response | None:
        return self._ask(self._class) if self._class is not None else None

    def look(self, body: bytes, is_whole: bool) -> bytes | Response | None:
        if self._class is None:
            return self._ask(self._front.classes.of_body(body) if is_whole else self._front.classes.names[0])
        if not self._is_rewritten:
            return None
        if not is_whole and len(body) >= MAX_REWRITTEN_BYTES:
            return _error(413, "invalid_request_error", f"A request may have at most {MAX_REWRITTEN_BYTES} bytes here.")
        return with_priority(body, self._front.classes.priorities.get(self._class, 0)) if is_whole else None

    def _ask(self, class_: str) -> Response | None:
        verdict = self._front.ask(class_, time.monotonic())
        self.place = verdict.place
        return None if verdict.is_admitted else _refusal(verdict.retry_after_s)


def _refusal(retry_after_s: int | None) -> Response:
    if retry_after_s is None:
        text = "This server cannot meet the latency targets of this request's class, even when it is idle."
        return _error(503, "overloaded_error", text, {"x-should-retry": "false"})
    text = "The server is at its limit: it could not answer within its latency targets. Try again later."
    return _error(429, "overloaded_error", text, {"retry-after": str(retry_after_s)})


def _error(status: int, kind: str, text: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": text, "type": kind, "param": None, "code": status}}, status, headers)
