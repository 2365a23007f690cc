"""An OpenAI endpoint on this machine for its user's own programs: what they ask goes to the server, drafted for here.

Everything under /v1 is passed on as it came and answered as the server answers, errors included; only a request for a
completion gets the name of this edge's session, so that the server lets this machine draft for it and no other.
"""

import asyncio
import json
import os
import re
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress

import httpx2 as httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse

from vllm_specedge.errors import UserError
from vllm_specedge.prediction import KEY, prediction_text

COMPLETIONS = ("chat/completions", "completions")
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
GRACE_S = 1
"""For answers on their way when the endpoint stops."""
THIS_MACHINE = ("localhost", "127.0.0.1")
OF_THIS_MACHINE = r"https?://(localhost|127\.0\.0\.1)(:\d+)?"


def make_app(
    server_url: str,
    session: Callable[[], str],
    api_key: str = "",
    origins: Sequence[str] = (),
    hosts: Sequence[str] = (),
) -> FastAPI:
    """`server_url`: the OpenAI endpoint that is passed on to, /v1 included. `session`: this edge's at the moment, empty
    while it is not connected. `api_key`: said in the programs' place. Pages of other `origins` than this machine's, and
    requests under other names (`hosts`) than its own, are refused: any page in a browser can reach localhost."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        timeout = httpx.Timeout(CONNECT_TIMEOUT_S, read=None, write=None, pool=None)
        async with httpx.AsyncClient(timeout=timeout, follow_redirects=False) as app.state.client:
            yield

    app = FastAPI(title="edge-client", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*THIS_MACHINE, *hosts])
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_origin_regex=OF_THIS_MACHINE,
        allow_methods=METHODS,
        allow_headers=["*"],
    )

    @app.api_route("/v1/{path:path}", methods=METHODS)
    async def passed_on(path: str, request: Request) -> Response:
        origin = request.headers.get("origin")
        if origin is not None and origin not in origins and not re.fullmatch(OF_THIS_MACHINE, origin):
            text = f"Pages of {origin:.100} may not use this endpoint: allow it with --allow-origin."
            return _error(403, text, "permission_error")
        body = await _body(request)
        if body is None:
            return _error(413, f"A request has at most {MAX_BODY_BYTES >> 20} MiB.", "invalid_request_error")
        if path in COMPLETIONS:
            body = with_session(body, session())
        headers = [(name, value) for name, value in request.headers.items() if name not in NOT_PASSED_ON]
        if api_key:
            headers = [pair for pair in headers if pair[0] != "authorization"]
            headers.append(("authorization", f"Bearer {api_key}"))
        client: httpx.AsyncClient = app.state.client
        url = httpx.URL(f"{server_url.rstrip('/')}/{path}", query=request.url.query.encode() or None)
        asked = client.build_request(request.method, url, headers=headers, content=body)
        try:
            answer = await client.send(asked, stream=True)
        except httpx.HTTPError as error:
            return _error(
                502, f"The server at {server_url} cannot be reached: {error or type(error).__name__}.", "api_error"
            )
        kept = {name: value for name, value in answer.headers.items() if name not in HOP_BY_HOP}
        return StreamingResponse(_raw(answer), answer.status_code, kept)

    return app


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


def with_session(body: bytes, session: str) -> bytes:
    """The same request, drafted for by this edge, and with its predicted output where the server reads it.

    What is no JSON object is the server's to refuse.
    """
    try:
        asked = json.loads(body)
    except ValueError:
        return body
    if not isinstance(asked, dict) or not isinstance(asked.get("vllm_xargs") or {}, dict):
        return body
    more = {"specedge": session} if session else {}
    if asked.get("prediction") is not None:
        with suppress(ValueError):  # the server's to refuse, too
            more[KEY] = prediction_text(asked["prediction"])
    return json.dumps({**asked, "vllm_xargs": {**more, **(asked.get("vllm_xargs") or {})}}).encode() if more else body


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
    server.should_exit = True
    await serving
    beside.cancel()
    await beside
