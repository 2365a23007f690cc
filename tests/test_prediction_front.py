"""Predicted outputs at the OpenAI front end, with a real ASGI client; only the application behind it has no vLLM."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from vllm_specedge.frontend.predicted_outputs import PredictionMiddleware
from vllm_specedge.wire.request_fields import KEY, prediction_text, take_prediction

FORETOLD = "the quick brown fox"
PREDICTION = {"type": "content", "content": FORETOLD}


class Words:
    """A tokenizer whose tokens are words."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [sum(word.encode()) for word in text.split()]


def application(answer: Any) -> tuple[FastAPI, list[bytes]]:
    """Returns a fixed answer, and records the requests."""
    app, asked = FastAPI(), []
    app.state.engine_client = SimpleNamespace(get_tokenizer=Words)
    app.add_middleware(PredictionMiddleware)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked.append(await request.body())
        assert int(request.headers["content-length"]) == len(asked[-1])
        return answer() if callable(answer) else Response(json.dumps(answer), media_type="application/json")

    return app, asked


def post(app: FastAPI, body: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await client.post("/v1/chat/completions", content=content)

    return asyncio.run(run())


def choice(text: str, index: int = 0, what: str = "message") -> dict[str, Any]:
    return {"index": index, what: {"content": text}}


def test_a_prediction_goes_to_the_engine_and_the_usage_says_what_became_of_it() -> None:
    usage = {"completion_tokens": 4, "completion_tokens_details": {"reasoning_tokens": 0}}
    app, asked = application({"choices": [choice("the quick red fox")], "usage": usage})
    answer = post(app, {"model": "m", "prediction": PREDICTION, "vllm_xargs": {"specedge": "s"}})
    assert json.loads(asked[0]) == {"model": "m", "vllm_xargs": {KEY: FORETOLD, "specedge": "s"}}
    details = {"reasoning_tokens": 0, "accepted_prediction_tokens": 3, "rejected_prediction_tokens": 1}
    assert answer.json()["usage"] == {"completion_tokens": 4, "completion_tokens_details": details}
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_numbers_beside_a_prediction_stay_as_they_are_written() -> None:
    app, asked = application({"choices": [], "usage": {}})
    numbers = b'"seed": 12345678901234567890123, "x": [1e400, 1.10, -0], "y": {"z": null, "t": true}'
    post(app, b'{"prediction": {"type": "content", "content": "a"}, ' + numbers + b"}")
    assert asked == [b"{" + numbers + b', "vllm_xargs": {"' + KEY.encode() + b'": "a"}}']


def test_the_engine_s_own_field_may_be_given_instead() -> None:
    app, asked = application({"choices": [choice(FORETOLD, i) for i in range(2)], "usage": {}})
    body = {"vllm_xargs": {KEY: FORETOLD}}
    answer = post(app, body)
    assert json.loads(asked[0]) == body
    details = answer.json()["usage"]["completion_tokens_details"]
    assert details == {"accepted_prediction_tokens": 8, "rejected_prediction_tokens": 0}


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_stream_passes_as_it_comes_and_its_last_usage_has_the_figures(size: int) -> None:
    events = [
        {"choices": [choice("the quick", what="delta")], "usage": None},
        {"choices": [choice(" brown fox", what="delta")], "usage": {"completion_tokens": 4}},
        {"choices": [], "usage": {"completion_tokens": 4}},
    ]
    sent = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"

    async def pieces() -> Any:
        for start in range(0, len(sent), size):
            yield sent[start : start + size]

    app, _ = application(lambda: StreamingResponse(pieces(), media_type="text/event-stream"))
    got = post(app, {"stream": True, "prediction": PREDICTION}).content
    before, last = sent.split(b"\n\n")[:2], got.split(b"\n\n")
    assert last[:2] == before
    details = {"accepted_prediction_tokens": 4, "rejected_prediction_tokens": 0}
    usage = {"completion_tokens": 4, "completion_tokens_details": details}
    assert json.loads(last[2].removeprefix(b"data: ")) == {"choices": [], "usage": usage}
    assert last[3:] == [b"data: [DONE]", b""]


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "m", "messages": []}',
        b"{",
        b"[]",
        b'{"x": "prediction"}',
        b'{"prediction": null}',
        b"",
        b'{"prediction": ' + b"[" * 200_000,
    ],
)
def test_a_request_without_a_prediction_passes_as_it_came(body: bytes) -> None:
    app, asked = application({"choices": [], "usage": {}})
    answer = post(app, body)
    assert asked == [body]
    assert answer.json() == {"choices": [], "usage": {}}


@pytest.mark.parametrize(
    "given",
    [
        "text",
        7,
        {},
        {"type": "content"},
        {"type": "content", "content": 7},
        {"type": "x", "content": "y"},
        {"type": "content", "content": [{"text": "y"}]},
        {"type": "content", "content": [{"type": "text", "text": 7}]},
    ],
)
def test_a_prediction_that_is_none_is_refused_as_openai_refuses(given: object) -> None:
    app, asked = application({})
    answer = post(app, {"prediction": given})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prediction"
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert asked == []


@pytest.mark.parametrize("answer", [{"error": {"message": "no"}}, [], {"choices": 7, "usage": {}}, {"choices": [{}]}])
def test_an_answer_that_is_not_understood_passes(answer: Any) -> None:
    app, _ = application(answer)
    assert post(app, {"prediction": PREDICTION}).json() == answer


def test_a_server_whose_tokenizer_is_not_to_be_had_answers_all_the_same() -> None:
    app, _ = application({"choices": [choice(FORETOLD)], "usage": {"completion_tokens": 4}})
    del app.state.engine_client
    answer = post(app, {"prediction": PREDICTION}).json()
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["choices"] == [choice(FORETOLD)]


def test_an_error_passes_as_it_is() -> None:
    app, _ = application(lambda: Response(b'{"error": 1}', 418, media_type="application/json"))
    answer = post(app, {"prediction": PREDICTION})
    assert (answer.status_code, answer.content) == (418, b'{"error": 1}')


def test_what_is_predicted_may_come_in_parts() -> None:
    parts = [{"type": "text", "text": "the quick"}, {"type": "text", "text": " brown fox"}]
    assert prediction_text({"type": "content", "content": parts}) == FORETOLD


@pytest.mark.parametrize("others", [7, [], "x"])
def test_extra_arguments_that_are_none_are_the_server_s_to_refuse(others: object) -> None:
    asked = {"prediction": PREDICTION, "vllm_xargs": others}
    assert take_prediction(asked) == FORETOLD
    assert asked == {"vllm_xargs": others}


def test_the_body_of_a_stranger_is_not_even_read() -> None:
    """vLLM's own middleware, which checks the key, comes after this one."""

    async def stranger(scope: Any, receive: Any, send: Any) -> None:
        await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)

    async def receive() -> Any:
        raise AssertionError

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    asyncio.run(PredictionMiddleware(stranger)(scope, receive, send))
    assert sent[0]["status"] == 401


def test_a_program_that_hangs_up_in_the_middle_of_its_request_asked_for_nothing() -> None:
    body = json.dumps({"prediction": PREDICTION}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": True}, {"type": "http.disconnect"}]
    got: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        got.extend([await receive(), await receive()])

    async def receive() -> Any:
        return messages[len(taken) - 1] if not taken.append(None) else None  # type: ignore[func-returns-value]

    async def send(message: Any) -> None:
        raise AssertionError

    taken: list[None] = []
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    asyncio.run(PredictionMiddleware(application)(scope, receive, send))
    assert got == messages


def test_other_paths_and_long_bodies_are_none_of_its_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_specedge.frontend.predicted_outputs.MAX_BODY_BYTES", 10)
    app, asked = application({"choices": [], "usage": {}})
    body = json.dumps({"prediction": PREDICTION}).encode()
    assert post(app, body).status_code == 200
    assert asked == [body]
