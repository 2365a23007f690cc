"""The gateway process's HTTP side: two endless streams for each edge, and what an operator looks at.

The streams are plain ASGI, and come before the framework, for they are open as long as an edge is: what a framework
keeps for a request (dependencies, task groups, wrapped channels, and a frame for each of its layers) made an idle edge
over TLS 84 kB, and the layers alone 64; it is 55 without (benchmarks/LOG.md).
"""

import asyncio
import contextlib
import json
import logging
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import zmq
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings, HTTP2Settings
from granian.server.embed import Server
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_specedge import __version__
from vllm_specedge.addresses import is_loopback
from vllm_specedge.config import EdgeOptions, split_address
from vllm_specedge.errors import UserError
from vllm_specedge.gateway.connections import MAX_HANDSHAKE_S, MAX_UNFINISHED_CONNECTIONS, STOP_S, Connection, Gateway
from vllm_specedge.gateway.metrics import report_row
from vllm_specedge.gateway.startup_checks import allow_files, check_certificate, check_start
from vllm_specedge.wire.frames import MEDIA_TYPE

logger = logging.getLogger("vllm_specedge.gateway.server")

BACKLOG = 1024
PAGE = Path(__file__).with_name("page")
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
FORWARDED = {"cf-connecting-ip", "fastly-client-ip", "forwarded", "true-client-ip", "via", "x-client-ip", "x-real-ip"}
FORWARDED_BEGIN = ("x-forwarded", "x-envoy-", "x-original-")
"""Headers by which a proxy says that somebody else asks."""
AS_IT_COMES = ((b"cache-control", b"no-store, no-transform"), (b"x-accel-buffering", b"no"))
"""Asks proxies to pass a stream on as it comes: some do."""
AS_IT_COMES_BY_NAME = {name.decode(): value.decode() for name, value in AS_IT_COMES}
EVENT_S = 1.0
MAX_WATCHING = 16
VOCABULARIES = "/edge/v1/vocabularies"
VOCABULARY_MEDIA_TYPE = "application/vnd.specedge.vocabulary"
MAX_PART_BYTES = 60 << 10
"""Of a vocabulary in one answer: it fits the window that HTTP/2 begins with, so whoever does not read costs no more."""
RENEWAL_S = 2.0
"""So often the certificate's files are looked at."""


class Downlinks:
    """ASGI: GET; from the gateway to one edge, for as long as both are there."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = self._gateway.connect(self._gateway.authorize(_header(scope, b"authorization")))
        watching = asyncio.create_task(self._watch(receive, connection))
        try:
            await _start(send, 200, (b"content-type", MEDIA_TYPE.encode()), *AS_IT_COMES)
            async for chunk in self._gateway.downlink(connection):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body"})
        except asyncio.CancelledError:
            pass  # by the gateway: this edge is gone, or does not even read its Bye
        finally:
            watching.cancel()
            self._gateway.forget(connection)

    async def _watch(self, receive: Receive, connection: Connection) -> None:
        """Until the edge hangs up."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gateway.forget(connection)


class Uplinks:
    """ASGI: POST; what one edge says. Its downlink's key says whose it is."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._gateway.authorize(_header(scope, b"authorization"))
        connection = self._gateway.find(_header(scope, b"x-specedge-connection") or "")
        if connection is None:
            raise HTTPException(409, "No downlink waits under this key.")
        with contextlib.suppress(asyncio.CancelledError):  # by the gateway: its downlink is over
            await self._gateway.uplink(connection, _chunks(receive))
        await _start(send, 204)
        await send({"type": "http.response.body"})


async def _chunks(receive: Receive) -> AsyncIterator[bytes]:
    """A request's body, until it ends or its sender is gone."""
    message = await receive()
    while message["type"] == "http.request":
        if message.get("body"):
            yield message["body"]
        if not message.get("more_body"):
            return
        message = await receive()


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


async def _start(send: Send, status: int, *headers: tuple[bytes, bytes]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})


def is_from_here(scope: Scope) -> bool:
    """Whether a request comes from this machine, and not through a proxy that runs on it for others.

    In doubt it is from elsewhere: a proxy that says nothing of itself asks for the name under which others know it, or
    in HTTP/1.0, as nginx does unless it is told otherwise. An `ssh -L` is from here.
    """
    host, _ = scope["client"] or ("", 0)
    names = {name.decode("latin-1") for name, _ in scope["headers"]}
    is_forwarded = any(name in FORWARDED or name.startswith(FORWARDED_BEGIN) for name in names)
    try:
        asked_for = urlsplit(f"//{_header(scope, b'host') or ''}").hostname or ""
    except ValueError:
        asked_for = ""
    is_old = scope["http_version"] in ("1", "1.0")
    return is_loopback(host) and is_loopback(asked_for) and not is_forwarded and not is_old


async def _events(gateway: Gateway, is_here: bool) -> AsyncIterator[str]:
    gateway.num_watching += 1
    try:
        while True:
            yield f"data: {json.dumps(gateway.view(is_here), separators=(',', ':'))}\n\n"
            await asyncio.sleep(EVENT_S)
    finally:
        gateway.num_watching -= 1


def make_app(gateway: Gateway) -> ASGIApp:
    """All that the gateway answers."""
    pages = _pages(gateway)
    streams: dict[tuple[str, str], ASGIApp] = {
        ("GET", "/edge/v1/down"): Downlinks(gateway),
        ("POST", "/edge/v1/up"): Uplinks(gateway),
    }

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        stream = streams.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if stream is None:
            await pages(scope, receive, send)
            return
        try:
            await stream(scope, receive, send)
        except HTTPException as error:  # before it began
            answer = JSONResponse({"detail": error.detail}, error.status_code, error.headers)
            await answer(scope, receive, send)

    return app


def _pages(gateway: Gateway) -> FastAPI:
    """What people and their tools look at."""
    app = FastAPI(title="vLLM-SpecEdge gateway", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

    app.mount("/page", StaticFiles(directory=PAGE))

    @app.get("/status.json")
    async def status(request: Request) -> JSONResponse:
        return JSONResponse(gateway.view(is_from_here(request.scope)))

    @app.get("/status/events")
    async def events(request: Request) -> StreamingResponse:
        """What the page shows, every second: as open as /metrics and /requests, and for as many as look at a time."""
        if gateway.num_watching >= MAX_WATCHING:
            raise HTTPException(503, "Too many look at this page: try again later.")
        return StreamingResponse(
            _events(gateway, is_from_here(request.scope)),
            media_type="text/event-stream",
            headers=AS_IT_COMES_BY_NAME,
        )

    @app.get(VOCABULARIES)
    async def vocabularies(request: Request) -> JSONResponse:
        """Those that there are, for those who may connect as an edge."""
        gateway.authorize(request.headers.get("authorization"))
        return JSONResponse({"vocabularies": gateway.served_vocabularies()})

    @app.get(VOCABULARIES + "/{fingerprint}")
    async def vocabulary(request: Request, fingerprint: str, offset: Annotated[int, Query(ge=0)] = 0) -> Response:
        """As much of one, packed, as an answer has."""
        gateway.authorize(request.headers.get("authorization"))
        packed = gateway.vocabularies.packed.get(fingerprint)
        if packed is None:
            raise HTTPException(404, "No engine here has this vocabulary.")
        return Response(packed[offset : offset + MAX_PART_BYTES], media_type=VOCABULARY_MEDIA_TYPE)

    @app.api_route("/livez", methods=["GET", "HEAD"])
    async def livez() -> JSONResponse:
        """Whether it answers at all: for probes that start anew what does not."""
        return JSONResponse({})

    @app.api_route("/healthz", methods=["GET", "HEAD"])
    async def healthz() -> JSONResponse:
        """Whether it is of use to edges: for probes that send them elsewhere meanwhile."""
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


def _server(app: ASGIApp, options: EdgeOptions) -> Server:
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
    allow_files(options.max_edges)
    server = _server(make_app(gateway), options)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    gateway.serve_engines()
    serving = asyncio.create_task(server.serve())
    tasks = [
        serving,
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
    gateway.close()
    # Not cancelled: its threads would outlive the interpreter.
    server.stop()  # type: ignore[no-untyped-call]
    await asyncio.wait({serving}, timeout=STOP_S)
    for task in pending:
        task.cancel()
    for task in done:
        task.result()
    return renewal in done
