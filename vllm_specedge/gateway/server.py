"""The gateway process: its web server, renewal of its certificate, and shutdown."""

import asyncio
import contextlib
import logging
import signal
import sys
from pathlib import Path

import zmq
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings, HTTP2Settings
from granian.server.embed import Server
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_specedge.config import GatewayOptions, split_address
from vllm_specedge.errors import UserError
from vllm_specedge.gateway.connection import Refused
from vllm_specedge.gateway.connections import MAX_HANDSHAKE_S, MAX_UNFINISHED_CONNECTIONS, STOP_S
from vllm_specedge.gateway.gateway import Gateway
from vllm_specedge.gateway.pages import pages, refusal
from vllm_specedge.gateway.startup_checks import allow_files, check_certificate, check_start
from vllm_specedge.gateway.streams import downlink, uplink

logger = logging.getLogger("vllm_specedge.gateway.server")

BACKLOG = 1024
RENEWAL_S = 2.0
"""Seconds between checks of the certificate's files."""


def make_app(gateway: Gateway) -> ASGIApp:
    framework = pages(gateway)
    streams = {("GET", "/edge/v1/down"): downlink, ("POST", "/edge/v1/up"): uplink}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        stream = streams.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if stream is None:
            await framework(scope, receive, send)
            return
        try:
            await stream(gateway.edges, scope, receive, send)
        except Refused as refused:  # before it began
            await refusal(refused)(scope, receive, send)

    return app


def _server(app: ASGIApp, options: GatewayOptions) -> Server:
    host, port = split_address(options.listen)
    return Server(
        app,
        address=host,
        port=port,
        interface=Interfaces.ASGINL,
        http=HTTPModes.auto,
        http1_settings=HTTP1Settings(header_read_timeout=int(MAX_HANDSHAKE_S * 1000), max_buffer_size=64 * 1024),
        # HTTP/2 PINGs detect a dead peer; application heartbeats detect one that is alive but stuck.
        http2_settings=HTTP2Settings(keep_alive_interval=5000, keep_alive_timeout=5, max_headers_size=64 * 1024),
        websockets=False,
        backlog=BACKLOG,
        # The web server's default is 128 connections. `connect` bounds ours, and answers those beyond.
        backpressure=options.max_edges + MAX_UNFINISHED_CONNECTIONS + BACKLOG,
        log_enabled=False,
        ssl_cert=Path(options.tls_cert) if options.tls_cert else None,
        ssl_key=Path(options.tls_key) if options.tls_key else None,
        ssl_ca=Path(options.tls_client_ca) if options.tls_client_ca else None,
        ssl_client_verify=bool(options.tls_client_ca),
    )


async def _certificate_changed(options: GatewayOptions) -> None:
    """Return when the TLS files have changed since the start and the new ones can be used."""
    paths = [Path(name) for name in (options.tls_cert, options.tls_key, options.tls_client_ca) if name]

    def stamps() -> list[tuple[int, int]]:
        return [(stat.st_mtime_ns, stat.st_ino) for stat in (path.stat() for path in paths)]

    first = stamps()
    while True:
        await asyncio.sleep(RENEWAL_S)
        # Files are replaced one after the other: the old ones stay in use until the new ones match.
        with contextlib.suppress(OSError, UserError):
            if stamps() != first:
                check_certificate(options)
                return


async def _ended_with_parent() -> None:
    """Return when standard input closes: the engine that started this process is gone."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()


async def serve(options: GatewayOptions, engine_endpoint: str, ends_with_stdin: bool) -> bool:
    """Run a gateway until SIGTERM, SIGINT or, if `ends_with_stdin`, the end of its input. Raises UserError at start.

    Returns whether it ended because of a new certificate and must be restarted: the web server reads certificates only
    at its start. Edges reconnect by themselves, and requests go on meanwhile.
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
    tasks = [serving, asyncio.create_task(gateway.watch()), asyncio.create_task(stop.wait())]
    if ends_with_stdin:
        tasks.append(asyncio.create_task(_ended_with_parent()))
    renewal = asyncio.create_task(_certificate_changed(options)) if options.tls_cert else None
    if renewal is not None:
        tasks.append(renewal)
    logger.info("Gateway listens for edges on %s", options.listen)
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    await gateway.edges.say_bye()
    gateway.close()
    # Not cancelled: its threads would outlive the interpreter.
    server.stop()  # type: ignore[no-untyped-call]
    await asyncio.wait({serving}, timeout=STOP_S)
    for task in pending:
        task.cancel()
    for task in done:
        task.result()
    return renewal in done
