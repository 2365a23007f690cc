"""The gateway's pages for people and tools, and the vocabularies that edges fetch in addition to their streams."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.types import Scope

from vllm_specedge import __version__
from vllm_specedge.addresses import is_loopback
from vllm_specedge.gateway.connection import Refused
from vllm_specedge.gateway.gateway import Gateway
from vllm_specedge.gateway.metrics import report_row
from vllm_specedge.gateway.streams import AS_IT_COMES, header

PAGE = Path(__file__).with_name("page")
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
FORWARDED = {"cf-connecting-ip", "fastly-client-ip", "forwarded", "true-client-ip", "via", "x-client-ip", "x-real-ip"}
FORWARDED_BEGIN = ("x-forwarded", "x-envoy-", "x-original-")
"""Headers by which a proxy shows that it forwards somebody else's request."""
EVENT_S = 1.0
MAX_WATCHING = 16
VOCABULARIES = "/edge/v1/vocabularies"
VOCABULARY_MEDIA_TYPE = "application/vnd.specedge.vocabulary"
MAX_PART_BYTES = 60 << 10
"""Maximum part of a vocabulary in one answer: it fits HTTP/2's initial window, so a client that does not read costs no
more."""


def is_from_here(scope: Scope) -> bool:
    """Whether a request comes from this machine, and not through a proxy that runs on it for others.

    In doubt the answer is no. A proxy that adds no headers still asks for its public name, or uses HTTP/1.0, as nginx
    does by default. A request through `ssh -L` comes from this machine.
    """
    host, _ = scope["client"] or ("", 0)
    names = {name.decode("latin-1") for name, _ in scope["headers"]}
    is_forwarded = any(name in FORWARDED or name.startswith(FORWARDED_BEGIN) for name in names)
    try:
        asked_for = urlsplit(f"//{header(scope, b'host') or ''}").hostname or ""
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


def refusal(refused: Refused) -> JSONResponse:
    """The response for a refused request."""
    return JSONResponse({"detail": refused.text}, refused.status, dict(refused.headers))


async def _refuse(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    return refusal(error)


def pages(gateway: Gateway) -> FastAPI:
    """The app with everything but the streams."""
    app = FastAPI(title="vLLM-SpecEdge gateway", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(Refused, _refuse)
    _add_status(app, gateway)
    _add_vocabularies(app, gateway)
    _add_probes(app, gateway)
    _add_metrics(app, gateway)
    return app


def _add_status(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

    app.mount("/page", StaticFiles(directory=PAGE))

    @app.get("/status.json")
    async def status(request: Request) -> JSONResponse:
        return JSONResponse(gateway.view(is_from_here(request.scope)))

    @app.get("/status/events")
    async def events(request: Request) -> StreamingResponse:
        """The data of the page, every second. As open as /metrics and /requests, for a limited number of viewers."""
        if gateway.num_watching >= MAX_WATCHING:
            raise Refused(503, "Too many viewers of this page: try again later.")
        return StreamingResponse(
            _events(gateway, is_from_here(request.scope)),
            media_type="text/event-stream",
            headers={name.decode(): value.decode() for name, value in AS_IT_COMES},
        )


def _add_vocabularies(app: FastAPI, gateway: Gateway) -> None:
    @app.get(VOCABULARIES)
    async def vocabularies(request: Request) -> JSONResponse:
        """The list of vocabularies, for clients that may connect as an edge."""
        gateway.edges.authorize(request.headers.get("authorization"))
        return JSONResponse({"vocabularies": gateway.served_vocabularies()})

    @app.get(VOCABULARIES + "/{fingerprint}")
    async def vocabulary(request: Request, fingerprint: str, offset: Annotated[int, Query(ge=0)] = 0) -> Response:
        """The part of a packed vocabulary from `offset` on, at most MAX_PART_BYTES."""
        gateway.edges.authorize(request.headers.get("authorization"))
        packed = gateway.vocabularies.packed.get(fingerprint)
        if packed is None:
            raise Refused(404, "No engine here has this vocabulary.")
        return Response(packed[offset : offset + MAX_PART_BYTES], media_type=VOCABULARY_MEDIA_TYPE)


def _add_probes(app: FastAPI, gateway: Gateway) -> None:
    @app.api_route("/livez", methods=["GET", "HEAD"])
    async def livez() -> JSONResponse:
        """Liveness: whether the gateway answers at all, for probes that restart it if not."""
        return JSONResponse({})

    @app.api_route("/healthz", methods=["GET", "HEAD"])
    async def healthz() -> JSONResponse:
        """Readiness: whether an engine is connected, for probes that send edges elsewhere if not."""
        num_engines = len(gateway.router.engines)
        return JSONResponse({"engines": num_engines, "edges": len(gateway.router.edges)}, 200 if num_engines else 503)


def _add_metrics(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(gateway.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/requests")
    async def requests() -> JSONResponse:
        """The counters of each of the requests that closed last, newest first.

        Open to everybody who can reach the gateway, like /metrics, whose totals give the same away to frequent readers:
        the length of answers and the acceptance of drafts, but no token, no text and no name of a request.
        """
        return JSONResponse({"requests": [report_row(report) for report in reversed(gateway.router.reports)]})
