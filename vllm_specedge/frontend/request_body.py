"""Shared by our ASGI middlewares: inspection of a request's body on its way to the application.

vLLM runs its users' middlewares before its own, which checks the API key. So a body is only inspected when the
application reads it: by then the sender is authorized, and refused requests cost nothing here.
"""

from collections.abc import Callable
from typing import TypeAlias

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

Look: TypeAlias = Callable[[bytes, bool], bytes | Response | None]
"""Inspects a body; the second argument tells whether it is complete. Returns a body to use instead, a response to send
instead of the application's, or None to leave the body unchanged."""
Ask: TypeAlias = Callable[[], Response | None]
"""Returns a response to send instead of the application's, before the body is read; None: continue."""


async def pass_on(
    app: ASGIApp,
    scope: Scope,
    receive: Receive,
    send: Send,
    limit_bytes: int,
    look: Look,
    before: Ask = lambda: None,
) -> None:
    """Run an application. When it first reads the body, `before` is called, and then `look` with the body up to the
    message that reaches the limit; each once."""
    inner = {**scope, "headers": list(scope["headers"])}
    again: Receive | None = None
    is_refused = False

    async def looked_at() -> Message:
        nonlocal again, is_refused
        if again is None:
            found: bytes | Response | None = before()
            again = receive
            if found is None:
                body, is_whole, again = await _read_body(receive, limit_bytes)
                found = look(body, is_whole)
            if isinstance(found, Response):
                is_refused = True
                await found(scope, receive, send)
                again = _first([{"type": "http.disconnect"}], receive)
            elif found is not None:
                _set_length(inner["headers"], len(found))
                again = _first([{"type": "http.request", "body": found, "more_body": False}], receive)
        return await again()

    async def unless_refused(message: Message) -> None:
        if not is_refused:
            await send(message)

    try:
        await app(inner, looked_at, unless_refused)
    except ClientDisconnect:
        if not is_refused:
            raise


def _set_length(headers: list[tuple[bytes, bytes]], num_bytes: int) -> None:
    """Set the content length in place: the application already has this list."""
    headers[:] = [*(pair for pair in headers if pair[0] != b"content-length"), (b"content-length", b"%d" % num_bytes)]


async def _read_body(receive: Receive, limit_bytes: int) -> tuple[bytes, bool, Receive]:
    """A request's body up to the message that reaches the limit, whether it is complete, and a `receive` that replays
    it."""
    messages = [await receive()]
    size = len(messages[0].get("body", b""))
    while messages[-1].get("more_body") and size < limit_bytes:
        messages.append(await receive())
        size += len(messages[-1].get("body", b""))
    body = b"".join(message.get("body", b"") for message in messages)
    is_whole = messages[-1]["type"] == "http.request" and not messages[-1].get("more_body")
    return body, is_whole, _first(messages, receive)


def _first(messages: list[Message], receive: Receive) -> Receive:
    """A `receive` that returns these messages first."""
    left = iter(messages)

    async def again() -> Message:
        message = next(left, None)
        return message if message is not None else await receive()

    return again
