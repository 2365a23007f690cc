"""Whether one more request would meet its targets, and leave others theirs."""

from dataclasses import dataclass, replace
from math import inf
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_specedge.estimators import Rate
from vllm_specedge.policy.slo import (
    Queue,
    Target,
    Targets,
    forecast,
    is_admitted,
    num_admissible,
    num_reserved,
    retry_after_s,
    rooms,
    unserved,
)
from vllm_specedge.policy.step_cost import StepCost

COST = StepCost({1: 0.02, 64: 0.03, 1024: 0.2})
IDLE = Queue([], [], context=0, slots=64, room=1024, finished_per_s=0.0, is_by_priority=False)

queues = st.builds(
    Queue,
    running=st.lists(st.integers(0, 3), max_size=40),
    waiting=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3000)), max_size=10),
    context=st.integers(0, 100_000),
    slots=st.integers(1, 64),
    room=st.integers(64, 2048),
    finished_per_s=st.floats(0, 10),
    is_by_priority=st.booleans(),
)
targets = st.builds(Target, ttft_s=st.floats(0.01, 5), itl_s=st.floats(0.01, 1))


def test_an_idle_engine_takes_as_long_as_the_prompt_and_then_a_step_of_one() -> None:
    expected = forecast(IDLE, 0, 500, COST)
    assert expected.ttft_s == pytest.approx(COST(1, 500, 0, 500))
    assert expected.itl_s == pytest.approx(COST(1, 1, 500))


def test_prompts_ahead_come_first_in_steps_as_large_as_they_may_be() -> None:
    queue = replace(IDLE, waiting=[(0, 2000)])
    step_s, rest_s = COST(1, 1024, 0, 1024), COST(1, 452, 0, 452)
    assert forecast(queue, 0, 500, COST).ttft_s == pytest.approx(2 * step_s + rest_s)


def test_the_less_important_do_not_come_first_where_priority_counts() -> None:
    queue = replace(IDLE, waiting=[(5, 2000)], is_by_priority=True)
    assert forecast(queue, 0, 500, COST).ttft_s == forecast(IDLE, 0, 500, COST).ttft_s
    assert forecast(queue, 5, 500, COST).ttft_s > forecast(queue, 0, 500, COST).ttft_s


def test_where_all_slots_are_taken_others_must_end_first() -> None:
    queue = replace(IDLE, running=[0] * 64, finished_per_s=0.5)
    assert forecast(queue, 0, 100, COST).ttft_s > 2.0


def test_a_request_is_not_let_in_if_it_would_break_the_target_of_one_that_runs() -> None:
    for_all = Targets({1: Target(itl_s=0.0215)})
    assert is_admitted(IDLE, 0, 100, for_all, COST)
    assert is_admitted(replace(IDLE, running=[0] * 30), 0, 100, for_all, COST)
    assert not is_admitted(replace(IDLE, running=[0] * 30 + [1]), 0, 100, for_all, COST)


@given(queues, targets, st.integers(1, 2000))
def test_what_may_come_may_come_one_after_the_other_and_no_more(queue: Queue, target: Target, num_tokens: int) -> None:
    wanted = Targets(default=target)
    number = num_admissible(queue, 0, num_tokens, wanted, COST, limit=8)
    assert 0 <= number <= 8
    for already in range(number + 1):
        now = replace(queue, waiting=[*queue.waiting, *[(0, num_tokens)] * already])
        assert is_admitted(now, 0, num_tokens, wanted, COST) == (already < number) or already == 8


@given(queues, targets, st.integers(1, 2000), st.integers(1, 2000))
def test_what_would_not_get_its_target_would_not_behind_more_that_wait(
    queue: Queue, target: Target, num_tokens: int, more: int
) -> None:
    wanted = Targets(default=target)
    if not is_admitted(queue, 0, num_tokens, wanted, COST):
        assert not is_admitted(replace(queue, waiting=[*queue.waiting, (0, more)]), 0, num_tokens, wanted, COST)


@given(queues, targets, st.integers(1, 2000))
def test_what_is_let_in_now_is_let_in_ever(queue: Queue, target: Target, num_tokens: int) -> None:
    wanted = Targets(default=target)
    if is_admitted(queue, 0, num_tokens, wanted, COST):
        assert not unserved(queue, {"default": 0}, num_tokens, wanted, COST)


def test_a_target_below_a_step_s_time_is_never_met_and_nothing_to_the_others() -> None:
    """Also while such a request runs that was admitted in doubt, or others of its class arrive and are refused."""
    wanted = Targets({-7: Target(itl_s=0.001)}, Target(ttft_s=1.0, itl_s=0.1))
    classes = {"hasty": -7, "default": 1 << 31}
    full = replace(IDLE, running=[0] * 64, waiting=[(0, 100_000)] * 9)
    assert unserved(full, classes, 1, wanted, COST) == {"hasty"}
    come = replace(IDLE, running=[0, -7], lately=frozenset({-7, 0}), finished_per_s=1.0)
    found = rooms(come, classes, 10, wanted, COST, {"hasty": 50.0})
    assert found["hasty"] == 0
    alone = replace(IDLE, running=[0, 0], finished_per_s=1.0)
    assert found["default"] == rooms(alone, classes, 10, wanted, COST)["default"] > 0


def test_a_default_class_that_is_never_served_is_nothing_to_the_others_either() -> None:
    wanted = Targets({-1: Target(itl_s=0.1)}, Target(itl_s=0.001))
    found = rooms(replace(IDLE, running=[0, 3]), {"gold": -1, "default": 1 << 31}, 10, wanted, COST)
    assert found["default"] == 0
    assert found["gold"] > 0


def test_a_step_has_prompts_beside_the_tokens_of_answers() -> None:
    queue = replace(IDLE, running=[0] * 20)
    assert forecast(replace(queue, prompt_per_token=1.0), 0, 100, COST).itl_s == pytest.approx(
        COST(21, 42, 100, 21), rel=1e-6
    )
    assert forecast(replace(queue, prompt_per_token=1.0), 0, 100, COST).itl_s > forecast(queue, 0, 100, COST).itl_s


def test_who_came_of_late_is_expected_and_has_a_say_in_how_long_a_step_may_be() -> None:
    wanted = Targets({1: Target(itl_s=0.0215)})
    full = replace(IDLE, running=[0] * 30)
    assert is_admitted(full, 0, 100, wanted, COST)
    assert not is_admitted(replace(full, lately=frozenset({1})), 0, 100, wanted, COST)


CLASSES = {"gold": -1, "default": 0}


def test_less_important_classes_leave_places_free_for_those_that_are_expected() -> None:
    queue, wanted = replace(IDLE, finished_per_s=4.0), Targets(default=Target(itl_s=0.025))
    alone = rooms(queue, CLASSES, 10, wanted, COST)
    assert alone["gold"] == alone["default"] > 10
    found = rooms(queue, CLASSES, 10, wanted, COST, {"gold": 2.0, "default": 50.0})
    assert found["gold"] == alone["gold"]
    assert found["default"] == alone["default"] - 1  # at half of what becomes free
    assert rooms(queue, CLASSES, 10, wanted, COST, {"gold": 5.0})["default"] == 0


@given(st.floats(0, 50), st.floats(0, 50), st.floats(0, 50))
def test_more_is_kept_free_the_more_come(offered: float, more: float, freed: float) -> None:
    assert 0 <= num_reserved(offered, freed) <= num_reserved(offered + more, freed) <= 64


def test_without_targets_everybody_is_let_in() -> None:
    queue = replace(IDLE, running=[0] * 64, waiting=[(0, 100_000)] * 100, finished_per_s=0.01)
    assert num_admissible(queue, 0, 1000, Targets(), COST) == 64


@given(queues)
def test_another_try_is_asked_for_in_1_to_30_seconds(queue: Queue) -> None:
    assert 1 <= retry_after_s(queue) <= 30


# -- under overload ------------------------------------------------------------------------------------------------

PROMPT_TOKENS, ANSWER_TOKENS, SLOTS, ROOM = 200, 50, 64, 1024
SLO = Targets(default=Target(ttft_s=1.0, itl_s=0.25))
REPORTED_EVERY_S = 0.1
OVERLOAD_S = 60.0


@dataclass(eq=False)
class Asked:
    """A request; `num_made` tokens of its answer are generated."""

    came_s: float
    num_prefilled: int = 0
    num_made: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    longest_s: float = 0.0

    def gets(self, now_s: float) -> None:
        if self.num_made:
            self.longest_s = max(self.longest_s, now_s - self.last_s)
        else:
            self.first_s = now_s
        self.num_made, self.last_s = self.num_made + 1, now_s

    def is_good(self) -> bool:
        target = SLO.of(0)
        return self.first_s - self.came_s <= target.ttft_s and self.longest_s <= target.itl_s


def goodput(arrivals_per_s: float, is_limited: bool) -> float:
    """Requests per second that met their targets, on an engine with continuous batching and chunked prefill."""
    chance, now_s, reported_s, may_come = Random(1), 0.0, -inf, 0
    next_s, num_good = chance.expovariate(arrivals_per_s), 0
    waiting, running, finished = list[Asked](), list[Asked](), Rate()
    num_finished = 0
    while now_s < OVERLOAD_S:
        while next_s <= now_s:
            if may_come > 0 or not is_limited:
                may_come -= 1
                waiting.append(Asked(next_s))
            next_s += chance.expovariate(arrivals_per_s)
        while waiting and len(running) < SLOTS:
            running.append(waiting.pop(0))
        decoding = [one for one in running if one.num_prefilled == PROMPT_TOKENS]
        left, chunks = ROOM - len(decoding), dict[Asked, int]()
        for one in running:
            if one.num_prefilled < PROMPT_TOKENS and left:
                chunks[one] = min(left, PROMPT_TOKENS - one.num_prefilled)
                left -= chunks[one]
        prefilled, context = sum(chunks.values()), sum(one.num_prefilled + one.num_made for one in running)
        if running:
            now_s += COST(len(running), len(decoding) + prefilled, context, prefilled)
        else:
            now_s = next_s
        for one, num_tokens in chunks.items():
            one.num_prefilled += num_tokens
        for one in [*decoding, *(one for one in chunks if one.num_prefilled == PROMPT_TOKENS)]:
            one.gets(now_s)
        ended = [one for one in running if one.num_made == ANSWER_TOKENS]
        num_good, num_finished = num_good + sum(map(Asked.is_good, ended)), num_finished + len(ended)
        running = [one for one in running if one not in ended]
        if now_s >= reported_s + REPORTED_EVERY_S or not running:
            finished.observe(num_finished, now_s)
            reported_s, num_finished = now_s, 0
            queue = Queue(
                [0] * len(running), [(0, PROMPT_TOKENS)] * len(waiting), context, SLOTS, ROOM, finished.per_s, False
            )
            may_come = num_admissible(queue, 0, PROMPT_TOKENS, SLO, COST)
    return num_good / OVERLOAD_S


def test_under_overload_goodput_holds_where_it_would_collapse() -> None:
    rates = [2.0, 8.0, 12.0, 16.0, 24.0, 32.0]
    unlimited = [goodput(rate, is_limited=False) for rate in rates]
    limited = [goodput(rate, is_limited=True) for rate in rates]
    best = max(unlimited)
    assert unlimited[-1] < 0.2 * best  # it collapses: answers come too late
    assert limited[-1] > 0.8 * best  # it holds, at twice what the engine can do
    assert all(own >= 0.95 * other for own, other in zip(limited, unlimited, strict=True))
