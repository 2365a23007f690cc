"""What our ASGI middlewares share: a request's body, read and still there to be read, and an answer in JSON."""

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeAlias

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


async def read_body(receive: Receive, limit_bytes: int) -> tuple[bytes, bool, Receive]:
    """A request's body, up to the message that reaches the limit; whether that is all; a way to read it again."""
    messages = [await receive()]
    size = len(messages[0].get("body", b""))
    while messages[-1].get("more_body") and size < limit_bytes:
        messages.append(await receive())
        size += len(messages[-1].get("body", b""))
    body = b"".join(message.get("body", b"") for message in messages)
    return body, not messages[-1].get("more_body"), first(messages, receive)


def first(messages: list[Message], receive: Receive) -> Receive:
    """These, and then what `receive` has."""
    left = iter(messages)

    async def again() -> Message:
        message = next(left, None)
        return message if message is not None else await receive()

    return again


async def answer_json(send: Send, status: int, said: object, headers: Mapping[bytes, bytes] | None = None) -> None:
    """A whole answer."""
    body = json.dumps(said).encode()
    all_headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *(headers or {}).items(),
    ]
    await send({"type": "http.response.start", "status": status, "headers": all_headers})
    await send({"type": "http.response.body", "body": body})
