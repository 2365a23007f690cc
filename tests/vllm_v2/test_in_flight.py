"""Events while a step is in flight: aborts, preemption, and failures of drafting."""

from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest

from .engines import ASYNCHRONOUS, SYNCHRONOUS, WAYS, Engine, with_edges
from .test_same_tokens import PROMPTS, greedy, long_prompt

every_way = pytest.mark.parametrize("way", WAYS)


@every_way
def test_an_abort_leaves_the_others_as_they_are(plain: Engine, edge: Engine, way: str) -> None:
    said = plain.tokens(PROMPTS, greedy(40))
    edge.oracle.answers = {tuple(prompt): answer for prompt, answer in zip(PROMPTS, said, strict=True)}
    edge.step_as(way)
    engine = edge.llm.llm_engine
    for name, prompt in zip(("gone", "stays"), PROMPTS, strict=True):
        engine.add_request(name, {"prompt_token_ids": prompt}, greedy(40))
    got: dict[str, list[int]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            got[output.request_id] = list(output.outputs[0].token_ids)
        if len(got.get("gone", ())) >= 5:
            engine.abort_request(["gone"])
    assert got["stays"] == said[1]
    assert len(got["gone"]) < 40
    assert not len(edge.drafting.driver)
    assert edge.edges is not None
    assert not edge.edges.num_open


@every_way
def test_a_load_report_includes_what_had_arrived_before_the_last_schedule(
    edge: Engine, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    edge.step_as(way)
    scheduler, last, known = edge.core.scheduler, [0.0, 0.0], set[float]()
    schedule = scheduler.schedule

    def timed_schedule(*args: Any) -> Any:
        began_s = monotonic()
        output = schedule(*args)
        last[:] = began_s, monotonic()
        return output

    def report(scheduler: Any, cost: Any, known_s: float, now_s: float) -> None:
        began_s, ended_s = last
        assert began_s <= known_s <= ended_s <= now_s
        known.add(known_s)

    monkeypatch.setattr(scheduler, "schedule", timed_schedule)
    monkeypatch.setattr(edge.drafting, "_load_report", SimpleNamespace(report=report, num_finished=0))
    edge.tokens(PROMPTS, greedy(20))
    assert len(known) > 2  # drafts may save steps


@pytest.fixture(scope="module")
def small(model: Path) -> Iterator[Engine]:
    """An engine with cache for two of four requests."""
    yield from with_edges(model, ASYNCHRONOUS, num_gpu_blocks_override=12)


@every_way
def test_preempted_requests_say_the_same(plain: Engine, small: Engine, way: str) -> None:
    prompts = [long_prompt(seed, 40) for seed in range(4)]
    said = plain.tokens(prompts, greedy(60))
    small.oracle.answers = {tuple(prompt): answer for prompt, answer in zip(prompts, said, strict=True)}
    preempted: list[Any] = []
    scheduler = small.core.scheduler
    preempt = scheduler._preempt_request
    scheduler._preempt_request = lambda request, *args, **kwargs: (
        preempted.append(request),
        preempt(request, *args, **kwargs),
    )
    small.step_as(way)
    try:
        assert small.tokens(prompts, greedy(60)) == said
    finally:
        scheduler._preempt_request = preempt
    assert preempted


def test_an_engine_that_never_schedules_asynchronously(plain: Engine, model: Path) -> None:
    said = plain.tokens(PROMPTS, greedy(40))
    for engine in with_edges(model, SYNCHRONOUS):
        assert engine.core.batch_queue is None
        engine.oracle.answers = {tuple(prompt): answer for prompt, answer in zip(PROMPTS, said, strict=True)}
        assert engine.tokens(PROMPTS, greedy(40)) == said
        assert engine.counters["accepted_tokens"] > 10


def test_drafting_that_fails_leaves_an_asynchronous_engine(plain: Engine, model: Path) -> None:
    said = plain.tokens(PROMPTS, greedy(40))
    for engine in with_edges(model, ASYNCHRONOUS):
        engine.oracle.answers = {tuple(prompt): answer for prompt, answer in zip(PROMPTS, said, strict=True)}
        engine.step_as("synchronous")
        engine.drafting.driver.end = failing_after(6, engine.drafting.driver.end)
        assert engine.tokens(PROMPTS, greedy(40)) == said
        assert engine.drafting is None
        assert engine.tokens(PROMPTS, greedy(40)) == said


def failing_after(count: int, act: Callable[..., Any]) -> Callable[..., Any]:
    calls = iter(range(count))

    def failing(*args: Any) -> Any:
        next(calls)  # StopIteration, as any fault in drafting
        return act(*args)

    return failing
