"""OpenAI's predicted outputs in the API server: the `prediction` field of requests, and its usage in answers.

    vllm serve MODEL --speculative-config edge --middleware vllm_specedge.prediction_front.PredictionMiddleware

vLLM has no `prediction`, so it is passed as `vllm_xargs.specedge_prediction`, which may also be given directly. As with
OpenAI, the answer's `usage` has the numbers of the prediction's tokens that were in the answer and that were not; they
are not part of `completion_tokens`.
Rule: a request without a prediction passes unchanged, and so does an answer that cannot be parsed.
"""

import asyncio
import copy
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_specedge import exact_json
from vllm_specedge.engine.predicted_output import Prediction
from vllm_specedge.frontend.request_body import pass_on
from vllm_specedge.wire.request_fields import KEY, take_prediction

logger = logging.getLogger("vllm.specedge.prediction")

MAX_BODY_BYTES = 64 << 20
"""A longer request passes unchanged."""
_PATHS = ("/v1/chat/completions", "/v1/completions")
_MARKS = (b'"prediction"', f'"{KEY}"'.encode())

Encode: TypeAlias = Callable[[str], list[int]]


class PredictionMiddleware:
    """ASGI middleware for vLLM's `--middleware`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._encode: Encode | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith(_PATHS):
            await self._app(scope, receive, send)
            return
        answer = send

        def look(body: bytes, is_whole: bool) -> bytes | JSONResponse | None:
            nonlocal answer
            asked = _asked(body) if is_whole else None
            try:
                text = take_prediction(asked) if asked is not None else ""
            except ValueError as error:
                said = {"message": str(error), "type": "invalid_request_error", "param": "prediction", "code": 400}
                return JSONResponse({"error": said}, 400)
            if not text:
                return None
            answer = self._answer(scope, send, text)
            return exact_json.write(asked).encode()

        async def answered(message: Message) -> None:
            await answer(message)

        await pass_on(self._app, scope, receive, answered, MAX_BODY_BYTES, look)

    def _answer(self, scope: Scope, send: Send, text: str) -> Send:
        async def usage(answers: list[str]) -> dict[str, int]:
            try:
                return await asyncio.to_thread(prediction_usage, text, answers, self._encoder(scope))
            except Exception:  # the answer itself is fine
                logger.exception("The usage of a predicted output cannot be computed")
                return {}

        return Answer(send, usage)

    def _encoder(self, scope: Scope) -> Encode:
        """A separate tokenizer: the server's is in use on other threads and cannot be shared with them."""
        if self._encode is None:
            tokenizer = copy.deepcopy(scope["app"].state.engine_client.get_tokenizer())

            def encode(text: str) -> list[int]:
                return list(tokenizer.encode(text, add_special_tokens=False))

            self._encode = encode
        return self._encode


def prediction_usage(predicted: str, answers: list[str], encode: Encode) -> dict[str, int]:
    """How many of the prediction's tokens were in the answers and how many were not, summed over the answers."""
    tokens, num_accepted = encode(predicted), 0
    for answer in answers:
        prediction = Prediction(tokens)
        prediction.advance(encode(answer))
        num_accepted += prediction.num_accepted
    num_rejected = max(0, len(tokens) * len(answers) - num_accepted)
    return {"accepted_prediction_tokens": num_accepted, "rejected_prediction_tokens": num_rejected}


class Answer:
    """Forwards an answer to `send` and adds to its usage."""

    def __init__(self, send: Send, usage: Callable[[list[str]], Awaitable[dict[str, int]]]) -> None:
        self._send = send
        self._usage = usage
        self._start: Message | None = None
        """The start of the response, held back until the whole answer is there, since it has the content length."""
        self._is_stream = False
        self._rest = b""
        self._texts: dict[int, str] = {}

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._is_stream = kind.startswith(b"text/event-stream")
            if kind.startswith(b"application/json") and message["status"] == 200:
                self._start = message
                return
        elif message["type"] == "http.response.body" and self._is_stream:
            message = {**message, "body": await self._events(message.get("body", b""), message.get("more_body", False))}
        elif message["type"] == "http.response.body" and self._start is not None:
            self._rest += message.get("body", b"")
            if message.get("more_body"):
                return
            await self._whole(self._start)
            return
        await self._send(message)

    async def _whole(self, start: Message) -> None:
        body = await self._with_usage(self._rest)
        kept = [pair for pair in start["headers"] if pair[0].lower() != b"content-length"]
        await self._send({**start, "headers": [*kept, (b"content-length", str(len(body)).encode())]})
        await self._send({"type": "http.response.body", "body": body})

    async def _events(self, data: bytes, has_more: bool) -> bytes:
        """Process the complete events of a stream; an incomplete last one waits for more data."""
        *events, self._rest = (self._rest + data).split(b"\n\n")
        if not has_more:
            events, self._rest = [*events, self._rest], b""
        for index, event in enumerate(events):
            if event.startswith(b"data: "):
                events[index] = b"data: " + await self._with_usage(event.removeprefix(b"data: "))
        return b"\n\n".join([*events, b""] if has_more else events)

    async def _with_usage(self, data: bytes) -> bytes:
        """Add to the usage of one JSON object, an answer or an event of one."""
        try:
            said = json.loads(data)
            for choice in said["choices"]:
                self._texts[choice["index"]] = self._texts.get(choice["index"], "") + _text_of(choice)
            usage = said.get("usage")
        except (ValueError, LookupError, TypeError, RecursionError):
            return data  # an error, or the end of a stream
        if usage is None or (said["choices"] and self._is_stream):
            return data
        details = usage.get("completion_tokens_details") or {}
        usage["completion_tokens_details"] = {**details, **await self._usage(list(self._texts.values()))}
        return json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode()


def _text_of(choice: dict[str, Any]) -> str:
    said = choice.get("message") or choice.get("delta") or {}
    return said.get("content") or choice.get("text") or ""


def _asked(body: bytes) -> dict[str, Any] | None:
    if not any(mark in body for mark in _MARKS):
        return None
    try:
        asked = exact_json.read(body)
    except (ValueError, RecursionError):
        return None  # the application reports the error
    return asked if isinstance(asked, dict) else None
