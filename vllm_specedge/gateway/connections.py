"""The gateway's connections: edges on one side, engines on the other, the Router in between.

This file moves bytes and minds deadlines; it decides nothing about drafts. One GET (downlink) and one POST (uplink)
make an edge's connection, each endless (docs/protocol.md); `web` has their HTTP side.
"""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import HTTPException
from prometheus_client import CollectorRegistry, Gauge, ProcessCollector

from vllm_specedge.config import EdgeOptions
from vllm_specedge.errors import ByeCode, RemoteProtocolError, UserError
from vllm_specedge.gateway.credentials import TokenFile, TokenRecord
from vllm_specedge.gateway.engine_socket import EngineSocket
from vllm_specedge.gateway.metrics import RequestHistograms, RouterCollector
from vllm_specedge.gateway.router import ROLES, Effect, Router, RouterLimits, ToEdge
from vllm_specedge.gateway.status import Overview
from vllm_specedge.gateway.vocabulary_store import VocabularyStore
from vllm_specedge.wire.frames import (
    PROTOCOL_VERSION,
    Bye,
    EngineHello,
    Frame,
    FrameReader,
    Greet,
    Groups,
    Hello,
    Ping,
    Pong,
    VocabularyPart,
    bye,
    encode,
)
from vllm_specedge.wire.session import Role, Session, State
from vllm_specedge.wire.telemetry import groups_of

logger = logging.getLogger("vllm_specedge.gateway.connections")

MAX_QUEUED_BYTES = 8 << 20
"""An edge that lets more than this pile up is closed: the longest context fits, at 5 bytes a token."""
CHUNK_BYTES = 64 << 10
MAX_FRAMES_PER_S = 2000
"""An edge that sends more is closed: 32 requests at 30 steps a second need half of it."""
MAX_BYTES_PER_S = 1 << 20
"""The same: a proposal has some 40 bytes."""
MAX_HANDSHAKE_S = 10.0
STOP_S = 1.0
FLUSH_S = 0.1
DEAD_HEARTBEATS = 3
RTT_TICKS = 10
"""An edge is asked how far away it is when it comes, and then at every so many looks of the watch, not all at a time: a
thousand of them kept a tenth of a second from everybody else, every second (benchmarks/LOG.md)."""
RTT_STAMP = 1 << 31
"""Pings with this stamp and above are the gateway's own, to know how far away an edge is; the router's are below."""
ENGINE_DEAD_S = 15.0
MAX_UNFINISHED_CONNECTIONS = 64
"""Beyond max_edges, so many connections may be shaking hands or being turned away."""


@dataclass(slots=True)
class Connection:
    """One edge's two streams."""

    id: int
    key: str
    token: TokenRecord | None
    """What it came with; None where the gateway asks for none."""
    connected_s: float
    heard_s: float
    session: Session = field(default_factory=lambda: Session(Role.GATEWAY))
    outbox: deque[bytes] = field(default_factory=deque)
    queued_bytes: int = 0
    num_frames: int = 0
    num_bytes: int = 0
    """Heard since the last tick of the watch."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    has_uplink: bool = False
    downlink: "asyncio.Task[object] | None" = None
    uplink: "asyncio.Task[object] | None" = None
    closed_s: float | None = None
    rtt_s: float | None = None

    def next_chunk(self) -> bytes:
        """As much of what is queued as is given to the web server at a time: what is there is out of our hands."""
        frames: list[bytes] = []
        num_bytes = 0
        while self.outbox and num_bytes < CHUNK_BYTES:
            frames.append(self.outbox.popleft())
            num_bytes += len(frames[-1])
        self.queued_bytes -= num_bytes
        return b"".join(frames)

    @property
    def roles(self) -> frozenset[str]:
        return self.token.roles if self.token is not None else frozenset(ROLES)


def _stamp_us() -> int:
    return RTT_STAMP + int(time.monotonic() * 1e6) % RTT_STAMP


class Gateway:
    """Carries out what the Router decides."""

    def __init__(self, options: EdgeOptions, engine_endpoint: str) -> None:
        limits = RouterLimits(
            max_edges=options.max_edges,
            max_requests_per_edge=options.max_requests_per_edge,
            credit_tokens=options.credit_tokens,
        )
        self.router = Router(limits)
        self.vocabularies = VocabularyStore()
        self.registry = CollectorRegistry()
        self.registry.register(RouterCollector(self.router))
        self._histograms = RequestHistograms(self.registry)
        self._overview = Overview()
        ProcessCollector(registry=self.registry)
        for name, help_text, value in (
            ("connections", "Connections of edges, admitted or not.", lambda: len(self._connections)),
            ("tasks", "Tasks of the gateway's event loop.", lambda: len(asyncio.all_tasks())),
        ):
            Gauge(f"specedge_gateway_{name}", help_text, registry=self.registry).set_function(value)
        self._heartbeat_s = limits.heartbeat_ms / 1000
        self._tokens = TokenFile(Path(options.tokens_file)) if options.tokens_file else None
        self._connections: dict[int, Connection] = {}
        self._by_key: dict[str, Connection] = {}
        self._next_id = 0
        self._engine_heard_s: dict[bytes, float] = {}
        self._effects: deque[Effect] = deque()
        self._is_carrying_out = False
        self._is_stopping = False
        self._num_looks = 0
        self._has_public_names = options.public_names
        self.num_watching = 0
        """How many look at the status page."""
        self._engines = EngineSocket(engine_endpoint, self._heard)

    # -- edges -----------------------------------------------------------------------------------------------------

    def authorize(self, header: str | None) -> TokenRecord | None:
        """The token of an Authorization header; None where none is asked for. Raises HTTPException 401, 503."""
        if self._tokens is None:
            return None
        scheme, _, token = (header or "").partition(" ")
        try:
            found = self._tokens.find(token.strip(), time.time()) if scheme.lower() == "bearer" else None
        except UserError as error:
            logger.error("%s", error)
            raise HTTPException(503, "The gateway cannot read its tokens.") from None
        if found is None:
            self.router.counters["unauthorized"] += 1
            raise HTTPException(401, "This gateway needs a valid token.", {"WWW-Authenticate": "Bearer"})
        return found

    def connect(self, token: TokenRecord | None) -> Connection:
        """A new downlink, greeted. Raises HTTPException 503 when too many are open, 429 of this token."""
        if self._is_stopping:
            raise HTTPException(503, "The gateway is stopping.")
        if len(self._connections) >= self.router.limits.max_edges + MAX_UNFINISHED_CONNECTIONS:
            self.router.counters["turned_away"] += 1
            raise HTTPException(503, "Too many connections: try again later.")
        if token is not None and token.max_edges:
            num_open = sum(each.token == token and each.closed_s is None for each in self._connections.values())
            if num_open >= token.max_edges:
                self.router.counters["turned_away"] += 1
                raise HTTPException(429, f"This token has its {token.max_edges} connections.")
        now_s = time.monotonic()
        connection = Connection(self._next_id, secrets.token_urlsafe(16), token, now_s, now_s)
        self._next_id += 1
        self._connections[connection.id] = self._by_key[connection.key] = connection
        self._send(connection, Greet(connection.key, PROTOCOL_VERSION))
        return connection

    async def downlink(self, connection: Connection) -> AsyncIterator[bytes]:
        """Everything queued for one edge, in chunks, until a Bye. Whoever sends it on calls `forget` at the end."""
        connection.downlink = asyncio.current_task()
        while True:
            while connection.outbox:
                yield connection.next_chunk()
            if connection.closed_s is not None:
                return
            connection.wake.clear()
            await connection.wake.wait()

    async def uplink(self, connection: Connection, chunks: AsyncIterator[bytes]) -> None:
        """Everything one edge says, until it stops or is closed."""
        connection.uplink = asyncio.current_task()
        try:
            async for chunk in chunks:
                connection.num_bytes += len(chunk)
                for frame in connection.session.receive(chunk):
                    connection.heard_s = time.monotonic()
                    self._from_edge(connection, frame)
                if connection.closed_s is not None:
                    return
        except RemoteProtocolError as error:
            self._close(connection, bye(error.code, str(error)))
        except Exception:  # noqa: BLE001 - the outermost edge of this task
            self._failed(f"The uplink of edge {connection.id} failed")
        self._close(connection, bye(ByeCode.GOING_AWAY, "the uplink ended"))

    def find(self, key: str) -> Connection | None:
        """The connection that waits for its uplink under this key."""
        connection = self._by_key.get(key)
        if connection is None or connection.has_uplink or connection.closed_s is not None:
            return None
        connection.has_uplink = True
        return connection

    def _from_edge(self, connection: Connection, frame: Frame) -> None:
        if connection.closed_s is not None:
            return
        connection.num_frames += 1
        tick_s = self._heartbeat_s / 2
        if connection.num_frames > MAX_FRAMES_PER_S * tick_s or connection.num_bytes > MAX_BYTES_PER_S * tick_s:
            self.router.counters["floods"] += 1
            text = f"more than {MAX_FRAMES_PER_S} frames or {MAX_BYTES_PER_S >> 10} KiB a second"
            self._close(connection, bye(ByeCode.PROTOCOL, text))
        elif isinstance(frame, Bye):
            self._close(connection, None)
        elif isinstance(frame, Hello):
            session = secrets.token_urlsafe(24)
            self._carry_out(self.router.edge_hello(connection.id, frame, session, connection.roles))
            if connection.session.state is State.LIVE:
                logger.info("Edge %s (%.60r, %.60r) joined as %s", connection.id, frame.name, frame.client, frame.role)
        elif isinstance(frame, Pong) and frame.stamp >= RTT_STAMP:
            connection.rtt_s = ((_stamp_us() - frame.stamp) % RTT_STAMP) / 1e6
        else:
            self._carry_out(self.router.from_edge(connection.id, frame))

    def _send(self, connection: Connection, frame: Frame) -> None:
        data = connection.session.send(frame)
        connection.outbox.append(data)
        connection.queued_bytes += len(data)
        connection.wake.set()

    def _close(self, connection: Connection, last: Bye | None) -> None:
        """End a connection: say Bye if it can still be said, and give its requests to others."""
        if connection.closed_s is not None:
            return
        connection.closed_s = time.monotonic()
        if last is not None and connection.session.state is not State.CLOSED:
            self._send(connection, last)
            if last.code != ByeCode.GOING_AWAY:
                self.router.counters["refused"] += 1
                logger.info("Edge %s closed: %s", connection.id, last.text)
        connection.wake.set()
        self._carry_out(self.router.edge_left(connection.id))

    def forget(self, connection: Connection) -> None:
        """Its downlink is over."""
        self._close(connection, None)
        for task in (connection.downlink, connection.uplink):
            # Either would wait for ever for a peer that does not even read its Bye.
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        self._connections.pop(connection.id, None)
        self._by_key.pop(connection.key, None)

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        """In the order in which the router decided: what closing an edge on the way calls for comes after these."""
        self._effects.extend(effects)
        if self._is_carrying_out:
            return
        self._is_carrying_out = True
        try:
            while self._effects:
                self._carry_out_one(self._effects.popleft())
        finally:
            self._is_carrying_out = False

    def _carry_out_one(self, effect: Effect) -> None:
        if not isinstance(effect, ToEdge):
            self._engines.send(effect.engine, encode(effect.frame))
            return
        connection = self._connections.get(effect.edge)
        if connection is None or connection.closed_s is not None or connection.session.state is State.CLOSED:
            return
        if isinstance(effect.frame, Bye):
            self._close(connection, effect.frame)
        elif connection.queued_bytes > MAX_QUEUED_BYTES:
            self.router.counters["slow_edges"] += 1
            self._close(connection, bye(ByeCode.TOO_SLOW, "this edge does not read fast enough"))
        else:
            self._send(connection, effect.frame)

    def _failed(self, what: str) -> None:
        """The outermost edge of a task: one error costs what it was about, not the gateway."""
        self.router.counters["task_errors"] += 1
        logger.exception("%s", what)

    async def say_bye(self) -> None:
        """The gateway is stopping: tell every edge, and give them a moment to hear it. None may come back meanwhile."""
        self._is_stopping = True
        for connection in list(self._connections.values()):
            self._close(connection, bye(ByeCode.GOING_AWAY, "the gateway is stopping"))
        downlinks = [c.downlink for c in self._connections.values() if c.downlink is not None]
        if downlinks:
            await asyncio.wait(downlinks, timeout=STOP_S)
            await asyncio.sleep(FLUSH_S)  # an HTTP/2 client loses what it reads together with the server's GOAWAY

    def close(self) -> None:
        """No engine is heard any more."""
        self._engines.close()

    # -- engines ---------------------------------------------------------------------------------------------------

    def serve_engines(self) -> None:
        """Take in what engines say from now on."""
        self._engines.start()

    def _heard(self, engine: bytes, data: bytes) -> None:
        """One message of an engine's."""
        self._engine_heard_s[engine] = time.monotonic()
        try:
            for frame in FrameReader().feed(data):
                self._from_engine(engine, frame)
        except RemoteProtocolError as error:
            self._carry_out(self.router.engine_left(engine))
            logger.warning("An engine was dropped: %s", error)
        except Exception:  # noqa: BLE001 - the outermost edge of this message
            self._failed("A message of an engine's failed")

    def view(self, is_from_here: bool) -> dict[str, object]:
        """What the status page shows, to a reader on this machine or elsewhere."""
        now_s = time.monotonic()
        rtts_s = {each.id: each.rtt_s for each in self._connections.values() if each.rtt_s is not None}
        has_names = self._has_public_names or is_from_here
        return self._overview.view(self.router, rtts_s, now_s, has_names)

    def _from_engine(self, engine: bytes, frame: Frame) -> None:
        if isinstance(frame, Groups) and engine in self.router.engines:
            self._overview.steps(groups_of(frame, time.monotonic()))
        num_reports = self.router.counters["reports"]
        self._carry_out(self.router.from_engine(engine, frame))
        if self.router.counters["reports"] > num_reports:
            self._histograms.observe(self.router.reports[-1])
        if isinstance(frame, EngineHello | Ping | VocabularyPart):
            self._learn_vocabulary(engine, frame)

    def _learn_vocabulary(self, engine: bytes, frame: EngineHello | Ping | VocabularyPart) -> None:
        known = self.router.engines.get(engine)
        if known is None:
            return
        fingerprint = known.hello.fingerprint
        try:
            if isinstance(frame, VocabularyPart):
                want = self.vocabularies.take(engine, fingerprint, frame)
            else:
                want = self.vocabularies.ask(engine, fingerprint)
        except RemoteProtocolError as error:
            logger.warning("The vocabulary of %.60r is not served to edges: %s", known.hello.model, error)
            return
        if want is not None:
            self._engines.send(engine, encode(want))

    def served_vocabularies(self) -> list[dict[str, object]]:
        """Of each vocabulary that an edge may fetch, its fingerprint, how large it is, and the models that have it."""
        models: dict[str, list[str]] = {}
        for engine in self.router.engines.values():
            if engine.hello.fingerprint in self.vocabularies.packed:
                models.setdefault(engine.hello.fingerprint, []).append(engine.hello.model)
        packed = self.vocabularies.packed
        return [
            {"fingerprint": fingerprint, "bytes": len(packed[fingerprint]), "models": sorted(set(names))}
            for fingerprint, names in models.items()
        ]

    async def watch(self) -> None:
        """Close what has been silent for too long, for ever."""
        while True:
            await asyncio.sleep(self._heartbeat_s / 2)
            try:
                self._watch(time.monotonic())
            except Exception:  # noqa: BLE001 - the outermost edge of this task
                self._failed("Watching the connections failed")

    def _watch(self, now_s: float) -> None:
        for connection in list(self._connections.values()):
            connection.num_frames = connection.num_bytes = 0
            self._watch_connection(connection, now_s)
            is_due = connection.rtt_s is None or connection.id % RTT_TICKS == self._num_looks % RTT_TICKS
            if is_due and connection.session.state is State.LIVE:
                self._send(connection, Ping(_stamp_us()))
        self._num_looks += 1
        self._overview.sample(self.router, now_s)
        self._end_revoked()
        for engine, heard_s in list(self._engine_heard_s.items()):
            if now_s - heard_s > ENGINE_DEAD_S:
                del self._engine_heard_s[engine]
                self._carry_out(self.router.engine_left(engine))
        self.vocabularies.keep({id_: engine.hello.fingerprint for id_, engine in self.router.engines.items()})

    def _end_revoked(self) -> None:
        """Close those whose token was revoked or has expired. Nobody, while the file cannot be read."""
        if self._tokens is None or not self._connections:
            return
        now_s = time.time()
        try:
            valid = {record for record in self._tokens.records() if record.is_valid(now_s)}
        except UserError as error:
            logger.error("%s", error)
            return
        for connection in list(self._connections.values()):
            if connection.token not in valid and connection.closed_s is None:
                self.router.counters["revoked"] += 1
                self._close(connection, bye(ByeCode.GOING_AWAY, "this token is not valid any more"))

    def _watch_connection(self, connection: Connection, now_s: float) -> None:
        is_live = connection.session.state is State.LIVE
        limit_s = DEAD_HEARTBEATS * self._heartbeat_s if is_live else MAX_HANDSHAKE_S
        # Until it is admitted the clock runs from the start: a trickle of bytes keeps nothing open.
        since_s = connection.heard_s if is_live else connection.connected_s
        if connection.closed_s is None and now_s - since_s > limit_s:
            self.router.counters["silent_edges"] += 1
            self._close(connection, bye(ByeCode.SILENT, f"nothing heard for {limit_s:.0f} s"))
        elif connection.closed_s is not None and now_s - connection.closed_s > DEAD_HEARTBEATS * self._heartbeat_s:
            self.forget(connection)
