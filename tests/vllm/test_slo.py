"""Requests that would miss their target are refused at the front, others are not."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

from .conftest import IMPATIENT, MODEL_NAME, Target, until

BODY = {"model": MODEL_NAME, "prompt": "The sea", "temperature": 0, "ignore_eos": True}


@contextmanager
def busy(target: Target) -> Iterator[None]:
    """The engine is at work on another request, until the end of the block: that hangs up."""
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
            """In doubt a request is let in: if what the engine said last is old, since its steps take long."""
            refused[:] = [status(edge_target, priority=IMPATIENT)]
            return refused[0][0] == 503

        until(is_refused, "what would miss its target is let in")
        [(_, text, retry_after)] = refused
        assert json.loads(text)["error"]["type"] == "overloaded_error"
        assert retry_after is not None
        assert int(retry_after) >= 1
        assert status(edge_target)[0] == 200


def test_requests_that_the_front_answers_by_itself_take_no_place(edge_target: Target) -> None:
    """Within what an engine said last: it has work just before, so that its word counts."""
    assert status(edge_target)[0] == 200
    assert {status(edge_target, model="none")[0] for _ in range(100)} == {404}
    assert status(edge_target)[0] == 200
