"""The gateway process: HTTP/2 to the edges, ZeroMQ to the engines, the Router in between.

This file moves bytes and minds deadlines; it decides nothing about drafts. One GET (downlink) and one POST (uplink)
make an edge's connection, each endless, on any ASGI server that speaks HTTP/2 (docs/protocol.md).
"""

import asyncio
import contextlib
import logging
import secrets
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import zmq
import zmq.asyncio
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings, HTTP2Settings
from granian.server.embed import Server
from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect

from vllm_specedge import __version__
from vllm_specedge.config import EdgeOptions, split_address
from vllm_specedge.errors import ByeCode, RemoteProtocolError, UserError
from vllm_specedge.frames import (
    MEDIA_TYPE,
    PROTOCOL_VERSION,
    Bye,
    Frame,
    FrameReader,
    Greet,
    Hello,
    bye,
    encode,
)
from vllm_specedge.metrics import RequestHistograms, RouterCollector, report_row
from vllm_specedge.preflight import check_certificate, check_start
from vllm_specedge.router import ROLES, Effect, Router, RouterLimits, ToEdge
from vllm_specedge.session import Role, Session, State
from vllm_specedge.tokens import TokenFile, TokenRecord

logger = logging.getLogger("vllm_specedge.gateway")

MAX_QUEUED_BYTES = 8 << 20
"""An edge that lets more than this pile up is closed: the longest context fits, at 5 bytes a token."""
BACKLOG = 1024
CHUNK_BYTES = 64 << 10
MAX_FRAMES_PER_S = 2000
"""An edge that sends more is closed: 32 requests at 30 steps a second need half of it."""
MAX_BYTES_PER_S = 1 << 20
"""The same: a proposal has some 40 bytes."""
MAX_HANDSHAKE_S = 10.0
STOP_S = 1.0
FLUSH_S = 0.1
RENEWAL_S = 2.0
"""So often the certificate's files are looked at."""
DEAD_HEARTBEATS = 3
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


class Gateway:
    """Carries out what the Router decides."""

    def __init__(self, options: EdgeOptions, engine_endpoint: str) -> None:
        limits = RouterLimits(
            max_edges=options.max_edges,
            max_requests_per_edge=options.max_requests_per_edge,
            credit_tokens=options.credit_tokens,
        )
        self.router = Router(limits)
        self.registry = CollectorRegistry()
        self.registry.register(RouterCollector(self.router))
        self._histograms = RequestHistograms(self.registry)
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
        self._socket: zmq.asyncio.Socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.bind(engine_endpoint)

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
            raise HTTPException(401, "This gateway needs a valid token.", {"WWW-Authenticate": "Bearer"})
        return found

    def connect(self, token: TokenRecord | None) -> Connection:
        """A new downlink, greeted. Raises HTTPException 503 when too many are open, 429 of this token."""
        if self._is_stopping:
            raise HTTPException(503, "The gateway is stopping.")
        if len(self._connections) >= self.router.limits.max_edges + MAX_UNFINISHED_CONNECTIONS:
            raise HTTPException(503, "Too many connections: try again later.")
        if token is not None and token.max_edges:
            num_open = sum(each.token == token and each.closed_s is None for each in self._connections.values())
            if num_open >= token.max_edges:
                raise HTTPException(429, f"This token has its {token.max_edges} connections.")
        now_s = time.monotonic()
        connection = Connection(self._next_id, secrets.token_urlsafe(16), token, now_s, now_s)
        self._next_id += 1
        self._connections[connection.id] = self._by_key[connection.key] = connection
        self._send(connection, Greet(connection.key, PROTOCOL_VERSION))
        return connection

    async def downlink(self, connection: Connection) -> AsyncIterator[bytes]:
        """Everything queued for one edge, in as few chunks as come; ends after a Bye or when the edge is gone."""
        connection.downlink = asyncio.current_task()
        try:
            while True:
                while connection.outbox:
                    yield connection.next_chunk()
                if connection.closed_s is not None:
                    return
                connection.wake.clear()
                await connection.wake.wait()
        finally:
            self._forget(connection)

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
        except ClientDisconnect:
            pass
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

    def _forget(self, connection: Connection) -> None:
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
            # A ROUTER socket queues or drops at once; the future is done when it returns.
            self._socket.send_multipart([effect.engine, encode(effect.frame)])
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

    # -- engines ---------------------------------------------------------------------------------------------------

    async def serve_engines(self) -> None:
        """Take in what engines say, for ever."""
        while True:
            engine, data = await self._socket.recv_multipart()
            self._engine_heard_s[engine] = time.monotonic()
            try:
                for frame in FrameReader().feed(data):
                    self._from_engine(engine, frame)
            except RemoteProtocolError as error:
                self._carry_out(self.router.engine_left(engine))
                logger.warning("An engine was dropped: %s", error)
            except Exception:  # noqa: BLE001 - the outermost edge of this task
                self._failed("A message of an engine's failed")

    def _from_engine(self, engine: bytes, frame: Frame) -> None:
        num_reports = self.router.counters["reports"]
        self._carry_out(self.router.from_engine(engine, frame))
        if self.router.counters["reports"] > num_reports:
            self._histograms.observe(self.router.reports[-1])

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
        self._end_revoked()
        for engine, heard_s in list(self._engine_heard_s.items()):
            if now_s - heard_s > ENGINE_DEAD_S:
                del self._engine_heard_s[engine]
                self._carry_out(self.router.engine_left(engine))

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
            self._forget(connection)


def make_app(gateway: Gateway) -> FastAPI:
    """The gateway's HTTP side."""
    app = FastAPI(title="vLLM-SpecEdge gateway", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)

    def authorized(request: Request) -> TokenRecord | None:
        return gateway.authorize(request.headers.get("authorization"))

    @app.get("/edge/v1/down")
    async def down(request: Request) -> StreamingResponse:
        connection = gateway.connect(authorized(request))
        return StreamingResponse(gateway.downlink(connection), media_type=MEDIA_TYPE)

    @app.post("/edge/v1/up")
    async def up(request: Request) -> Response:
        authorized(request)
        connection = gateway.find(request.headers.get("x-specedge-connection", ""))
        if connection is None:
            raise HTTPException(409, "No downlink waits under this key.")
        await gateway.uplink(connection, request.stream())
        return Response(status_code=204)

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        num_engines = len(gateway.router.engines)
        return JSONResponse({"engines": num_engines, "edges": len(gateway.router.edges)}, 200 if num_engines else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(gateway.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/requests")
    async def requests() -> JSONResponse:
        """What each of the requests that closed last came to, newest first.

        Open to whoever reaches the gateway, as /metrics is, whose totals give the same away to who reads them often:
        how long answers are and how well drafts do, in numbers, but no token, no text and no name of a request.
        """
        return JSONResponse({"requests": [report_row(report) for report in reversed(gateway.router.reports)]})

    return app


def _server(app: FastAPI, options: EdgeOptions) -> Server:
    host, port = split_address(options.listen)
    return Server(
        app,
        address=host,
        port=port,
        interface=Interfaces.ASGINL,
        http=HTTPModes.auto,
        http1_settings=HTTP1Settings(header_read_timeout=int(MAX_HANDSHAKE_S * 1000), max_buffer_size=64 * 1024),
        # PINGs notice a dead peer below; application heartbeats notice one that is alive but stuck.
        http2_settings=HTTP2Settings(keep_alive_interval=5000, keep_alive_timeout=5, max_headers_size=64 * 1024),
        websockets=False,
        backlog=BACKLOG,
        # The web server would take 128 connections if nothing were said. Ours are bounded, and answered, in `connect`.
        backpressure=options.max_edges + MAX_UNFINISHED_CONNECTIONS + BACKLOG,
        log_enabled=False,
        ssl_cert=Path(options.tls_cert) if options.tls_cert else None,
        ssl_key=Path(options.tls_key) if options.tls_key else None,
        ssl_ca=Path(options.tls_client_ca) if options.tls_client_ca else None,
        ssl_client_verify=bool(options.tls_client_ca),
    )


async def _certificate_changed(options: EdgeOptions) -> None:
    """Return when there are other TLS files than at the start, and they can be used."""
    paths = [Path(name) for name in (options.tls_cert, options.tls_key, options.tls_client_ca) if name]

    def stamps() -> list[tuple[int, int]]:
        return [(stat.st_mtime_ns, stat.st_ino) for stat in (path.stat() for path in paths)]

    first = stamps()
    while True:
        await asyncio.sleep(RENEWAL_S)
        # Files are replaced one after the other: until they match again the old ones stay in use.
        with contextlib.suppress(OSError, UserError):
            if stamps() != first:
                check_certificate(options)
                return


async def _ended_with_parent() -> None:
    """Return when standard input closes: the engine that started this process is gone."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()


async def serve(options: EdgeOptions, engine_endpoint: str, ends_with_stdin: bool) -> bool:
    """Run a gateway until SIGTERM, SIGINT or, if asked to, the end of standard input. Raises UserError at start.

    Returns whether it ended because of a new certificate, and is to be started again. The web server reads it at its
    start only; edges come back by themselves, and requests go on meanwhile.
    """
    try:
        gateway = Gateway(options, engine_endpoint)
    except zmq.ZMQError as error:
        raise UserError(f"Engines cannot be served at {engine_endpoint} ({error}): choose another endpoint.") from None
    check_start(options)
    server = _server(make_app(gateway), options)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    serving = asyncio.create_task(server.serve())
    tasks = [
        serving,
        asyncio.create_task(gateway.serve_engines()),
        asyncio.create_task(gateway.watch()),
        asyncio.create_task(stop.wait()),
    ]
    if ends_with_stdin:
        tasks.append(asyncio.create_task(_ended_with_parent()))
    renewal = asyncio.create_task(_certificate_changed(options)) if options.tls_cert else None
    if renewal is not None:
        tasks.append(renewal)
    logger.info("Gateway listens for edges on %s", options.listen)
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    await gateway.say_bye()
    # Not cancelled: its threads would outlive the interpreter.
    server.stop()  # type: ignore[no-untyped-call]
    await asyncio.wait({serving}, timeout=STOP_S)
    for task in pending:
        task.cancel()
    for task in done:
        task.result()
    return renewal in done
