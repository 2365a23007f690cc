"""Requests that would miss their target are refused at the front end, others are not."""

import asyncio
import json
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from fastapi import FastAPI

from vllm_specedge.frontend.load_file import LOAD_VARIABLE, Load, LoadFile
from vllm_specedge.frontend.request_classes import PRIORITY_HEADER
from vllm_specedge.frontend.shared_places import SharedPlaces
from vllm_specedge.policy.slo import DEFAULT_CLASS

from .conftest import IMPATIENT, MODEL_NAME, Target, until

BODY = {"model": MODEL_NAME, "prompt": "The sea", "temperature": 0, "ignore_eos": True}


@contextmanager
def busy(target: Target) -> Iterator[None]:
    """The engine runs another request until the end of the block, which aborts it."""
    body = BODY | {"max_tokens": 2000, "stream": True}
    with target.http.stream("POST", f"{target.server.url}/v1/completions", json=body) as response:
        lines = response.iter_lines()
        for _ in range(20):
            next(lines)
        yield


def status(target: Target, **extra: object) -> tuple[int, str, str | None]:
    response = target.http.post(f"{target.server.url}/v1/completions", json=BODY | {"max_tokens": 4} | extra)
    return response.status_code, response.text, response.headers.get("retry-after")


def test_a_busy_server_refuses_what_would_miss_its_target_and_serves_the_others(edge_target: Target) -> None:
    with busy(edge_target):
        refused: list[tuple[int, str, str | None]] = []

        def is_refused() -> bool:
            """In doubt a request is admitted: if the engine's latest report is old because its steps take long."""
            refused[:] = [status(edge_target, priority=IMPATIENT)]
            return refused[0][0] == 503  # a target of 1 ms is never met

        until(is_refused, "what would miss its target is let in")
        [(_, text, retry_after)] = refused
        assert json.loads(text)["error"]["type"] == "overloaded_error"
        assert retry_after is None
        assert status(edge_target)[0] == 200


def test_requests_that_the_front_answers_by_itself_take_no_place(edge_target: Target) -> None:
    """While an engine's latest report is valid: it has work just before, so that the report is recent."""
    assert status(edge_target)[0] == 200
    assert {status(edge_target, model="none")[0] for _ in range(100)} == {404}
    assert status(edge_target)[0] == 200


def test_behind_vllm_s_own_middlewares_a_request_without_a_key_takes_no_place_and_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In vLLM's order: its users' middlewares are outermost."""
    from vllm.entrypoints.generate.base.serving import PRIORITY_HEADER as OF_VLLM
    from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware

    assert OF_VLLM.lower().encode() == PRIORITY_HEADER

    monkeypatch.setenv(LOAD_VARIABLE, str(tmp_path))
    app = FastAPI()

    @app.post("/v1/completions")
    async def completions(asked: dict[str, Any]) -> dict[str, Any]:
        return asked

    args = Namespace(
        allowed_origins=["*"],
        allow_credentials=False,
        allowed_methods=["*"],
        allowed_headers=["*"],
        api_key=["se-key"],
        enable_request_id_headers=False,
        middleware=["vllm_specedge.admission.AdmissionMiddleware"],
    )
    init_entrypoints_middleware(args, app, ())
    LoadFile(tmp_path / "0.json").write(Load(time.monotonic(), time.monotonic(), {DEFAULT_CLASS: 0}))

    async def statuses() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            with_key = {"authorization": "Bearer se-key"}
            asked = [client.post("/v1/completions", json=BODY) for _ in range(20)]
            strangers = [(await each).status_code for each in asked]
            return [*strangers, (await client.post("/v1/completions", json=BODY, headers=with_key)).status_code]

    assert asyncio.run(statuses()) == [401] * 20 + [429]
    places = SharedPlaces(tmp_path / "places")
    with places.locked():
        assert places.refused()[0] == 1
    places.close()
