"""The edges' connections, from the first byte to the last: admission, frames in both directions, and timeouts.

An edge's connection is one endless GET (downlink) and one endless POST (uplink) (docs/protocol.md); `streams` has their
HTTP side. This file moves bytes and watches deadlines; it decides nothing about drafts.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

from vllm_specedge.config import GatewayOptions
from vllm_specedge.errors import ByeCode, RemoteProtocolError, UserError
from vllm_specedge.gateway.connection import MAX_BYTES_PER_S, MAX_FRAMES_PER_S, MAX_QUEUED_BYTES, Connection, Refused
from vllm_specedge.gateway.credentials import TokenFile, TokenRecord
from vllm_specedge.gateway.effects import Effect
from vllm_specedge.gateway.router import Router
from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.frames import PROTOCOL_VERSION, Bye, Greet, Hello, Ping, Pong, bye
from vllm_specedge.wire.session import State

logger = logging.getLogger("vllm_specedge.gateway.connections")

MAX_HANDSHAKE_S = 10.0
STOP_S = 1.0
FLUSH_S = 0.1
DEAD_HEARTBEATS = 3
RTT_TICKS = 10
"""Ticks of `watch` between two measurements of an edge's round trip, the first at its arrival. Edges take turns: a
thousand at once blocked everything else for a tenth of a second, every second (benchmarks/LOG.md)."""
RTT_STAMP = 1 << 31
"""Pings with this stamp and above are the gateway's own, for round trips; the router's are below."""
MAX_UNFINISHED_CONNECTIONS = 64
"""Connections beyond max_edges, for handshakes and refusals."""


class Connections:
    """All connections that are open or have just closed."""

    def __init__(self, options: GatewayOptions, router: Router, carry_out: Callable[[Iterable[Effect]], None]) -> None:
        """`carry_out`: carries out the router's effects when an edge sends a frame or leaves."""
        self._router = router
        self._carry_out = carry_out
        self._heartbeat_s = router.limits.heartbeat_ms / 1000
        self._tokens = TokenFile(Path(options.tokens_file)) if options.tokens_file else None
        self._connections: dict[int, Connection] = {}
        self._by_key: dict[str, Connection] = {}
        self._next_id = 0
        self._num_looks = 0
        self._is_stopping = False

    def __len__(self) -> int:
        return len(self._connections)

    @property
    def rtts_s(self) -> dict[int, float]:
        """Measured round-trip times in seconds, by edge."""
        return {each.id: each.rtt_s for each in self._connections.values() if each.rtt_s is not None}

    # -- a connection's life ---------------------------------------------------------------------------------------

    def authorize(self, header: str | None) -> TokenRecord | None:
        """The token of an Authorization header; None if none is required. Raises Refused with 401 or 503."""
        if self._tokens is None:
            return None
        scheme, _, token = (header or "").partition(" ")
        try:
            found = self._tokens.find(token.strip(), time.time()) if scheme.lower() == "bearer" else None
        except UserError as error:
            logger.error("%s", error)
            raise Refused(503, "The gateway cannot read its tokens.") from None
        if found is None:
            self._router.counters["unauthorized"] += 1
            raise Refused(401, "This gateway needs a valid token.", {"WWW-Authenticate": "Bearer"})
        return found

    def connect(self, token: TokenRecord | None) -> Connection:
        """Open a downlink and queue its Greet. Raises Refused: 503 if too many are open, 429 for its token."""
        if self._is_stopping:
            raise Refused(503, "The gateway is stopping.")
        if len(self._connections) >= self._router.limits.max_edges + MAX_UNFINISHED_CONNECTIONS:
            self._router.counters["turned_away"] += 1
            raise Refused(503, "Too many connections: try again later.")
        if token is not None and token.max_edges:
            num_open = sum(each.token == token and each.is_open for each in self._connections.values())
            if num_open >= token.max_edges:
                self._router.counters["turned_away"] += 1
                raise Refused(429, f"This token already has {token.max_edges} connections, its maximum.")
        connection = Connection(self._next_id, secrets.token_urlsafe(16), token, time.monotonic())
        self._next_id += 1
        self._connections[connection.id] = self._by_key[connection.key] = connection
        connection.send(Greet(connection.key, PROTOCOL_VERSION))
        return connection

    async def downlink(self, connection: Connection) -> AsyncIterator[bytes]:
        """All frames queued for one edge, in chunks, until a Bye. The caller calls `forget` at the end."""
        connection.downlink = asyncio.current_task()
        while True:
            while connection.outbox:
                yield connection.next_chunk()
            if not connection.is_open:
                return
            connection.wake.clear()
            await connection.wake.wait()

    def find(self, key: str) -> Connection | None:
        """The connection that waits for its uplink under this key, or None."""
        connection = self._by_key.get(key)
        if connection is None or connection.has_uplink or not connection.is_open:
            return None
        connection.has_uplink = True
        return connection

    async def uplink(self, connection: Connection, chunks: AsyncIterator[bytes]) -> None:
        """Process all frames of one edge, until it stops or is closed."""
        connection.uplink = asyncio.current_task()
        try:
            async for chunk in chunks:
                now_s = time.monotonic()
                if not connection.may_send_bytes.take(len(chunk), now_s):
                    self._flooded(connection)
                for frame in connection.session.receive(chunk) if connection.is_open else ():
                    connection.heard_s = now_s
                    self._heard(connection, frame, now_s)
                if not connection.is_open:
                    return
        except RemoteProtocolError as error:
            self._close(connection, bye(error.code, str(error)))
        except Exception:  # noqa: BLE001 - the outermost edge of this task
            self.failed(f"The uplink of edge {connection.id} failed")
        self._close(connection, bye(ByeCode.GOING_AWAY, "the uplink ended"))

    def _heard(self, connection: Connection, frame: Frame, now_s: float) -> None:
        if not connection.is_open:
            return
        if not connection.may_send_frames.take(1, now_s):
            self._flooded(connection)
            return
        match frame:
            case Bye():
                self._close(connection, None)
            case Hello():
                session = secrets.token_urlsafe(24)
                self._carry_out(self._router.edge_hello(connection.id, frame, session, connection.roles))
                if connection.session.state is State.LIVE:
                    said = (connection.id, frame.name, frame.client, frame.role)
                    logger.info("Edge %s (%.60r, %.60r) joined as %s", *said)
            case Pong() if frame.stamp >= RTT_STAMP:
                connection.rtt_s = ((_stamp_us() - frame.stamp) % RTT_STAMP) / 1e6
            case _:
                self._carry_out(self._router.from_edge(connection.id, frame))

    def _flooded(self, connection: Connection) -> None:
        self._router.counters["floods"] += 1
        text = f"more than {MAX_FRAMES_PER_S} frames or {MAX_BYTES_PER_S >> 10} KiB per second"
        self._close(connection, bye(ByeCode.PROTOCOL, text))

    def deliver(self, edge: int, frame: Frame) -> None:
        """Send a frame of the router to an edge; a Bye ends the connection."""
        connection = self._connections.get(edge)
        if connection is None or not connection.is_open or connection.session.state is State.CLOSED:
            return
        if isinstance(frame, Bye):
            self._close(connection, frame)
        elif connection.queued_bytes > MAX_QUEUED_BYTES:
            self._router.counters["slow_edges"] += 1
            self._close(connection, bye(ByeCode.TOO_SLOW, "this edge does not read fast enough"))
        else:
            connection.send(frame)

    def _close(self, connection: Connection, last: Bye | None) -> None:
        """End a connection: send a Bye if that is still possible, and give its requests to others."""
        if not connection.is_open:
            return
        connection.closed_s = time.monotonic()
        if last is not None and connection.session.state is not State.CLOSED:
            connection.send(last)
            if last.code != ByeCode.GOING_AWAY:
                self._router.counters["refused"] += 1
                logger.info("Edge %s closed: %s", connection.id, last.text)
        connection.wake.set()
        self._carry_out(self._router.edge_left(connection.id))

    def forget(self, connection: Connection) -> None:
        self._close(connection, None)
        for task in (connection.downlink, connection.uplink):
            # Either could wait for ever for a peer that does not even read its Bye.
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        self._connections.pop(connection.id, None)
        self._by_key.pop(connection.key, None)

    async def say_bye(self) -> None:
        """Send Bye to every edge, as the gateway is stopping, and wait a moment. None may reconnect meanwhile."""
        self._is_stopping = True
        for connection in list(self._connections.values()):
            self._close(connection, bye(ByeCode.GOING_AWAY, "the gateway is stopping"))
        downlinks = [c.downlink for c in self._connections.values() if c.downlink is not None]
        if downlinks:
            await asyncio.wait(downlinks, timeout=STOP_S)
            await asyncio.sleep(FLUSH_S)  # an HTTP/2 client loses what it reads together with the server's GOAWAY

    # -- deadlines -------------------------------------------------------------------------------------------------

    def watch(self, now_s: float) -> None:
        """Close connections that are silent for too long or have lost their token; measure round trips."""
        for connection in list(self._connections.values()):
            self._watch_connection(connection, now_s)
            is_due = connection.rtt_s is None or connection.id % RTT_TICKS == self._num_looks % RTT_TICKS
            if is_due and connection.session.state is State.LIVE:
                connection.send(Ping(_stamp_us()))
        self._num_looks += 1
        self._end_revoked()

    def _watch_connection(self, connection: Connection, now_s: float) -> None:
        is_live = connection.session.state is State.LIVE
        limit_s = DEAD_HEARTBEATS * self._heartbeat_s if is_live else MAX_HANDSHAKE_S
        # Until admission the clock runs from the start: a trickle of bytes does not keep a connection open.
        since_s = connection.heard_s if is_live else connection.connected_s
        if connection.is_open and now_s - since_s > limit_s:
            self._router.counters["silent_edges"] += 1
            self._close(connection, bye(ByeCode.SILENT, f"nothing received for {limit_s:.0f} s"))
        elif connection.closed_s is not None and now_s - connection.closed_s > DEAD_HEARTBEATS * self._heartbeat_s:
            self.forget(connection)

    def _end_revoked(self) -> None:
        """Close edges whose token was revoked or has expired; none while the file cannot be read."""
        if self._tokens is None or not self._connections:
            return
        now_s = time.time()
        try:
            valid = {record for record in self._tokens.records() if record.is_valid(now_s)}
        except UserError as error:
            logger.error("%s", error)
            return
        for connection in list(self._connections.values()):
            if connection.token not in valid and connection.is_open:
                self._router.counters["revoked"] += 1
                self._close(connection, bye(ByeCode.GOING_AWAY, "this token is not valid any more"))

    def failed(self, what: str) -> None:
        """Log and count an error at the outermost level of a task: it must not end the gateway."""
        self._router.counters["task_errors"] += 1
        logger.exception("%s", what)


def _stamp_us() -> int:
    return RTT_STAMP + int(time.monotonic() * 1e6) % RTT_STAMP
