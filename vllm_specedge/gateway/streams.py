"""The HTTP side of an edge's connection: two endless streams.

They are plain ASGI and bypass the framework, because they stay open as long as an edge does. With all that a framework
keeps for a request (dependencies, task groups, wrapped channels, and a frame for each of its layers) an idle edge over
TLS took 84 kB, with the layers alone 64; it takes 55 without (benchmarks/LOG.md).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.types import Receive, Scope, Send

from vllm_specedge.gateway.connection import Refused
from vllm_specedge.gateway.connections import Connections
from vllm_specedge.wire.frames import MEDIA_TYPE

AS_IT_COMES = ((b"cache-control", b"no-store, no-transform"), (b"x-accel-buffering", b"no"))
"""Headers that ask proxies not to buffer a stream; some comply."""


async def downlink(edges: Connections, scope: Scope, receive: Receive, send: Send) -> None:
    """GET: the frames from the gateway to one edge, until either leaves. Raises Refused before it begins."""
    connection = edges.connect(edges.authorize(header(scope, b"authorization")))

    async def watch() -> None:
        """Wait until the edge disconnects."""
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
        pass  # cancelled by the gateway: this edge is gone, or does not even read its Bye
    finally:
        watching.cancel()
        edges.forget(connection)


async def uplink(edges: Connections, scope: Scope, receive: Receive, send: Send) -> None:
    """POST: the frames from one edge, identified by its downlink's key. Raises Refused before it begins."""
    edges.authorize(header(scope, b"authorization"))
    connection = edges.find(header(scope, b"x-specedge-connection") or "")
    if connection is None:
        raise Refused(409, "No downlink waits under this key.")
    with contextlib.suppress(asyncio.CancelledError):  # cancelled by the gateway: its downlink ended
        await edges.uplink(connection, _chunks(receive))
    await _start(send, 204)
    await send({"type": "http.response.body"})


async def _chunks(receive: Receive) -> AsyncIterator[bytes]:
    """The chunks of a request's body, until it ends or its sender is gone."""
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
    """The value of a request's header, or None."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)
