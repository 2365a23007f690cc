"""The HTTP side of an edge's connection: two endless streams.

They are plain ASGI, and come before the framework, for they are open as long as an edge is: what a framework keeps for
a request (dependencies, task groups, wrapped channels, and a frame for each of its layers) made an idle edge over TLS
84 kB, and the layers alone 64; it is 55 without (benchmarks/LOG.md).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.types import Receive, Scope, Send

from vllm_specedge.gateway.connection import Refused
from vllm_specedge.gateway.connections import Connections
from vllm_specedge.wire.frames import MEDIA_TYPE

AS_IT_COMES = ((b"cache-control", b"no-store, no-transform"), (b"x-accel-buffering", b"no"))
"""Asks proxies to pass a stream on as it comes: some do."""


async def downlink(edges: Connections, scope: Scope, receive: Receive, send: Send) -> None:
    """GET: from the gateway to one edge, for as long as both are there. Raises Refused before it begins."""
    connection = edges.connect(edges.authorize(header(scope, b"authorization")))

    async def watch() -> None:
        """Until the edge hangs up."""
        while (await receive())["type"] != "http.disconnect":
            pass
        edges.forget(connection)

    watching = asyncio.create_task(watch())
    try:
        await _start(send, 200, (b"content-type", MEDIA_TYPE.encode()), *AS_IT_COMES)
        async for chunk in edges.downlink(connection):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body"})
    except asyncio.CancelledError:
        pass  # by the gateway: this edge is gone, or does not even read its Bye
    finally:
        watching.cancel()
        edges.forget(connection)


async def uplink(edges: Connections, scope: Scope, receive: Receive, send: Send) -> None:
    """POST: what one edge says; its downlink's key says whose it is. Raises Refused before it begins."""
    edges.authorize(header(scope, b"authorization"))
    connection = edges.find(header(scope, b"x-specedge-connection") or "")
    if connection is None:
        raise Refused(409, "No downlink waits under this key.")
    with contextlib.suppress(asyncio.CancelledError):  # by the gateway: its downlink is over
        await edges.uplink(connection, _chunks(receive))
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


async def _start(send: Send, status: int, *headers: tuple[bytes, bytes]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})


def header(scope: Scope, name: bytes) -> str | None:
    """That of a request's headers, or None."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)
