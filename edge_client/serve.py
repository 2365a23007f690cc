"""An OpenAI endpoint on this machine for its user's own programs: it forwards requests to the server and drafts for
them.

Everything under /v1 is forwarded unchanged, and the server's answers, errors included, are returned unchanged. Only a
request that makes the server generate gets this edge's session added, so that only this machine drafts for it. While
there is no session the request names one that no edge has, and no edge reads it.
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
"""Headers of one connection, not of the message (RFC 9110, section 7.6.1), and those that httpx writes itself."""
NOT_PASSED_ON = HOP_BY_HOP | {"origin"}
MAX_BODY_BYTES = 64 << 20
CONNECT_TIMEOUT_S = 10.0
KEPT_S = 2.0
"""Seconds to keep an idle connection open; vLLM closes it after five."""
GRACE_S = 1
"""Seconds for unfinished answers when the endpoint stops."""
MAX_WARNED = 32
"""Maximum paths to log a warning for, one line each."""
OF_THIS_MACHINE = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"


def server_client(server_url: str, has_proxy: bool = True, ca_file: str = "") -> httpx.AsyncClient:
    """The client that forwards requests; it adds no headers of its own. Raises UserError."""
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
    """The endpoint's app. `server_url`: the OpenAI endpoint to forward to, /v1 included, through `client`. `session`:
    this edge's current session, empty while it is not connected. `api_key`: sent instead of the programs' own. Any page
    in a browser can reach localhost, so only pages of this machine and of `origins`, and only requests for this
    machine's names and `hosts`, are accepted. `is_opened`: other machines may reach the endpoint by its addresses."""

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
            return _error(413, f"A request may have at most {MAX_BODY_BYTES >> 20} MiB.", "invalid_request_error")
        if request.method == "POST" and is_named(path):
            body = with_session(path, request.headers.get("content-type", ""), body, session() or NOBODY)
        elif request.method == "POST" and is_generating(path) and len(warned) < MAX_WARNED and path not in warned:
            warned.add(path)
            logger.warning("Requests to /v1/%.100s cannot be kept private: other edges may draft for them", path)
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
    """The error for a request under a wrong host name or from a page that is not allowed; None for other requests."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if not is_own_name(host, is_opened, hosts):
        text = f"This endpoint does not answer to the name {host:.100}: allow it with --allow-host."
        return _error(400, text, "invalid_request_error")
    if origin is not None and origin not in origins and not re.fullmatch(OF_THIS_MACHINE, origin):
        text = f"Pages of {origin:.100} may not use this endpoint: allow it with --allow-origin."
        return _error(403, text, "permission_error")
    return None


async def _sent(client: httpx.AsyncClient, asked: httpx.Request) -> httpx.Response:
    """Send a request. Returns the response once its headers have arrived.

    A server closes a connection that was idle for a while. A request that was sent at that moment was not read, and is
    sent again over another connection.
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
    """The result of `waiting`; None if the program disconnects first, which also cancels its request at the server."""
    tasks = asyncio.create_task(waiting), asyncio.create_task(_left(request))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _left(request: Request) -> None:
    """Wait until the program disconnects; its request was read to the end before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _passed_back(answer: httpx.Response, server_url: str) -> Response:
    """The server's answer as a streaming response."""
    response = StreamingResponse(_raw(answer), answer.status_code)
    kept = [pair for pair in answer.headers.multi_items() if pair[0] not in HOP_BY_HOP]
    response.raw_headers = [
        (name.encode(), (own_location(value, server_url) if name == "location" else value).encode("latin-1"))
        for name, value in kept
    ]
    return response


async def _body(request: Request) -> bytes | None:
    """The request's body; None if it is too long."""
    parts, num_bytes = [], 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes > MAX_BODY_BYTES:
            return None
        parts.append(part)
    return b"".join(parts)


async def _raw(answer: httpx.Response) -> AsyncIterator[bytes]:
    """The raw chunks of an answer. If the program disconnects, the request at the server is cancelled."""
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    finally:
        await answer.aclose()


def _error(status: int, message: str, kind: str) -> JSONResponse:
    """An error in OpenAI's form, which every client library understands."""
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


def listening(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError if the address is taken or cannot be used."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise UserError(f"The endpoint cannot listen on {host}:{port} ({reason}): choose another --port.") from None


def names_here(listener: socket.socket) -> tuple[bool, list[str]]:
    """Whether other machines may reach this listener, and the names that they know this machine by."""
    if is_loopback(listener.getsockname()[0]):
        return False, []
    name = socket.gethostname()
    return True, [name, f"{name}.local"]


class _Server(uvicorn.Server):
    """A server that leaves signals to its caller: an interrupted command did what it was told, and exits with 0."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve_beside(app: FastAPI, listener: socket.socket, drafting: Coroutine[None, None, None]) -> None:
    """Run the endpoint and the drafting together; when one ends, so does the other."""
    server = _Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE_S))
    beside = asyncio.create_task(drafting)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await asyncio.wait({beside, serving}, return_when=asyncio.FIRST_COMPLETED)
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # answers that are cut off from here on are no errors
    server.should_exit = True
    await serving
    beside.cancel()
    await beside
