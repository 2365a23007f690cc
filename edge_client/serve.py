"""An OpenAI endpoint on this machine for its user's own programs: what they ask goes to the server, drafted for here.

Everything under /v1 is passed on as it came and answered as the server answers, errors included; only a request that
makes the server generate gets the name of this edge's session, so that the server lets this machine draft for it and no
other. While there is no session it names none of an edge's, and no edge reads it.
"""

import asyncio
import logging
import os
import re
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx2 as httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse

from edge_client.naming import NOBODY, is_generating, is_named, is_own_name, own_location, path_below, with_session
from edge_client.ways import client_for, trusted
from vllm_specedge.addresses import is_loopback
from vllm_specedge.errors import UserError

logger = logging.getLogger("edge_client")

METHODS = ["GET", "POST", "DELETE"]
HOP_BY_HOP = {
    "connection",
    "content-length",
    "host",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
"""Headers of one connection, not of what is said (RFC 9110, section 7.6.1), and those that httpx writes itself."""
NOT_PASSED_ON = HOP_BY_HOP | {"origin"}
MAX_BODY_BYTES = 64 << 20
CONNECT_TIMEOUT_S = 10.0
KEPT_S = 2.0
"""A connection that is not in use; vLLM closes it after five seconds."""
GRACE_S = 1
"""For answers on their way when the endpoint stops."""
MAX_WARNED = 32
"""Paths that are named in a line of their own."""
OF_THIS_MACHINE = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"


def server_client(server_url: str, has_proxy: bool = True, ca_file: str = "") -> httpx.AsyncClient:
    """What passes requests on: it adds nothing to them. Raises UserError."""
    timeout = httpx.Timeout(CONNECT_TIMEOUT_S, read=None, write=None, pool=None)
    limits = httpx.Limits(max_connections=None, keepalive_expiry=KEPT_S)
    context = trusted(ca_file, is_alone=False)
    client = client_for(server_url, has_proxy, verify=context, timeout=timeout, limits=limits, follow_redirects=False)
    client.headers.clear()
    return client


def make_app(
    server_url: str,
    session: Callable[[], str],
    api_key: str = "",
    origins: Sequence[str] = (),
    hosts: Sequence[str] = (),
    is_opened: bool = False,
    client: Callable[[], httpx.AsyncClient] | None = None,
) -> FastAPI:
    """`server_url`: the OpenAI endpoint that is passed on to, /v1 included, by a `client` for it. `session`: this
    edge's at the moment, empty while it is not connected. `api_key`: said in the programs' place. Pages of other
    `origins` than this machine's, and requests under other names (`hosts`) than its own, are refused: any page in a
    browser can reach localhost. `is_opened`: other machines may reach it, by its addresses."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with client() if client is not None else server_client(server_url) as app.state.client:
            yield

    app = FastAPI(title="edge-client", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_origin_regex=OF_THIS_MACHINE,
        allow_methods=METHODS,
        allow_headers=["*"],
    )
    warned: set[str] = set()

    @app.api_route("/v1/{path:path}", methods=METHODS)
    async def passed_on(path: str, request: Request) -> Response:
        refusal = _refusal(request, origins, hosts, is_opened)
        if refusal is not None:
            return refusal
        below = path_below(path)
        if below is None:
            return _error(404, "Only paths under /v1 exist here.", "invalid_request_error")
        body = await _body(request)
        if body is None:
            return _error(413, f"A request has at most {MAX_BODY_BYTES >> 20} MiB.", "invalid_request_error")
        if request.method == "POST" and is_named(path):
            body = with_session(path, request.headers.get("content-type", ""), body, session() or NOBODY)
        elif request.method == "POST" and is_generating(path) and len(warned) < MAX_WARNED and path not in warned:
            warned.add(path)
            logger.warning("Requests to /v1/%.100s cannot be kept private: edges of others may draft for them", path)
        headers = [(name, value) for name, value in request.headers.items() if name not in NOT_PASSED_ON]
        if api_key:
            headers = [pair for pair in headers if pair[0] != "authorization"]
            headers.append(("authorization", f"Bearer {api_key}"))
        url = httpx.URL(f"{server_url.rstrip('/')}/{below}", query=request.url.query.encode() or None)
        asked = app.state.client.build_request(request.method, url, headers=headers, content=body)
        try:
            answer = await _unless_left(request, _sent(app.state.client, asked))
        except httpx.HTTPError as error:
            return _error(
                502, f"The server at {server_url} cannot be reached: {error or type(error).__name__}.", "api_error"
            )
        return Response() if answer is None else _passed_back(answer, server_url)

    return app


def _refusal(request: Request, origins: Sequence[str], hosts: Sequence[str], is_opened: bool) -> Response | None:
    """What is said to pages that may not use this endpoint, and under names that are not its own."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if not is_own_name(host, is_opened, hosts):
        text = f"This endpoint does not answer to the name {host:.100}: allow it with --allow-host."
        return _error(400, text, "invalid_request_error")
    if origin is not None and origin not in origins and not re.fullmatch(OF_THIS_MACHINE, origin):
        text = f"Pages of {origin:.100} may not use this endpoint: allow it with --allow-origin."
        return _error(403, text, "permission_error")
    return None


async def _sent(client: httpx.AsyncClient, asked: httpx.Request) -> httpx.Response:
    """The beginning of the answer.

    A server closes a connection that was not used for a while; a request that meets this on its way was not read, and
    is sent again, over another connection.
    """
    events: set[str] = set()

    async def note(event: str, info: Mapping[str, Any]) -> None:
        events.add(event)

    asked.extensions["trace"] = note
    try:
        return await client.send(asked, stream=True)
    except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
        is_used_connection = not any("connect" in event for event in events)
        is_answered = any(event.endswith("receive_response_headers.complete") for event in events)
        if is_answered or not is_used_connection:
            raise
    return await client.send(asked, stream=True)


async def _unless_left(request: Request, waiting: Coroutine[None, None, httpx.Response]) -> httpx.Response | None:
    """What is waited for; None when the program hangs up first, which ends the server's work on its request."""
    tasks = asyncio.create_task(waiting), asyncio.create_task(_left(request))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _left(request: Request) -> None:
    """Until the program that asked hangs up; its request was read to the end."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _passed_back(answer: httpx.Response, server_url: str) -> Response:
    """An answer, as it comes."""
    response = StreamingResponse(_raw(answer), answer.status_code)
    kept = [pair for pair in answer.headers.multi_items() if pair[0] not in HOP_BY_HOP]
    response.raw_headers = [
        (name.encode(), (own_location(value, server_url) if name == "location" else value).encode("latin-1"))
        for name, value in kept
    ]
    return response


async def _body(request: Request) -> bytes | None:
    """What was sent; None if it is too much."""
    parts, num_bytes = [], 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes > MAX_BODY_BYTES:
            return None
        parts.append(part)
    return b"".join(parts)


async def _raw(answer: httpx.Response) -> AsyncIterator[bytes]:
    """As it comes; a program that hangs up ends the server's work on it."""
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    finally:
        await answer.aclose()


def _error(status: int, message: str, kind: str) -> JSONResponse:
    """In OpenAI's form, which every client library understands."""
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


def listening(host: str, port: int) -> socket.socket:
    """Raises UserError if that is taken."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise UserError(f"The endpoint cannot listen on {host}:{port} ({reason}): choose another --port.") from None


def names_here(listener: socket.socket) -> tuple[bool, list[str]]:
    """Whether other machines may reach what listens there, and the names that they know this one by."""
    if is_loopback(listener.getsockname()[0]):
        return False, []
    name = socket.gethostname()
    return True, [name, f"{name}.local"]


class _Server(uvicorn.Server):
    """Signals are its caller's: one that is interrupted has done as it was told, and ends with status 0."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve_beside(app: FastAPI, listener: socket.socket, drafting: Coroutine[None, None, None]) -> None:
    """Endpoint and drafting side by side; when one ends, so does the other."""
    server = _Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE_S))
    beside = asyncio.create_task(drafting)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await asyncio.wait({beside, serving}, return_when=asyncio.FIRST_COMPLETED)
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what is cut off from here on is meant to be
    server.should_exit = True
    await serving
    beside.cancel()
    await beside
