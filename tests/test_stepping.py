"""Steps are asynchronous unless drafts are useful, and measurements end a try that does not pay."""

from collections import deque
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from vllm_specedge.adapter.step_loop import StepLoop
from vllm_specedge.policy.stepping import (
    FIRST_PAUSE,
    JUDGED_AFTER,
    LAST_PAUSE,
    PAYS_AFTER,
    TRIED_PER_PAUSED,
    UNWANTED_BEFORE,
    WANTED_BEFORE,
    Stepping,
)


def planned(stepping: Stepping, number: int, is_useful: bool, gain: float = 1.5) -> int:
    """Number of synchronous steps among `number` planned ones."""
    count = 0
    for _ in range(number):
        count += stepping.is_synchronous
        stepping.planned(is_useful, gain)
    return count


def test_without_useful_drafts_every_step_is_asynchronous() -> None:
    assert planned(Stepping(), 1000, is_useful=False) == 0


def test_useful_drafts_make_the_next_steps_synchronous() -> None:
    stepping = Stepping()
    assert planned(stepping, 500, is_useful=True) == 500 - WANTED_BEFORE
    assert stepping.num_switches == 1


def test_one_useful_step_alone_changes_nothing() -> None:
    stepping = Stepping()
    for _ in range(100):
        stepping.planned(True, 1.5)
        stepping.planned(False, 1.5)
    assert not stepping.num_switches


def test_it_goes_back_when_nothing_is_useful_any_more() -> None:
    stepping = Stepping()
    planned(stepping, 20, is_useful=True)
    assert planned(stepping, 100, is_useful=False) == UNWANTED_BEFORE
    assert not stepping.is_synchronous


def test_what_is_far_from_paying_is_seen_early() -> None:
    assert planned(Stepping(), PAYS_AFTER, is_useful=True, gain=0.8) == JUDGED_AFTER


def test_where_it_has_not_paid_one_step_without_use_is_enough() -> None:
    stepping = Stepping()
    planned(stepping, JUDGED_AFTER + WANTED_BEFORE, is_useful=True, gain=0.95)
    assert planned(stepping, 10, is_useful=False, gain=0.95) == 1


def test_a_try_that_is_not_judged_yet_is_not_ended_by_one_step_without_use() -> None:
    stepping = Stepping()
    planned(stepping, WANTED_BEFORE, is_useful=True)
    assert planned(stepping, UNWANTED_BEFORE - 1, is_useful=False, gain=0.5) == UNWANTED_BEFORE - 1
    assert stepping.is_synchronous


def test_tries_that_end_without_use_and_bring_nothing_become_seldom() -> None:
    """Drafts that occasionally exist for two steps, and are gone when they could be verified."""
    stepping, num_synchronous, num_steps = Stepping(), 0, 20_000
    for _ in range(num_steps):
        num_synchronous += stepping.is_synchronous
        stepping.planned(not stepping.is_synchronous, 0.8)
    assert num_synchronous < num_steps / 100


def test_a_try_costs_a_small_part_of_the_pause_before_it_and_lasts_long_enough_later() -> None:
    stepping, num_tried = Stepping(), list[int]()
    for _ in range(8):
        num_tried.append(0)
        while not stepping.is_synchronous:
            stepping.planned(True, 0.5)
        while stepping.is_synchronous:
            stepping.planned(True, 0.5)
            num_tried[-1] += 1
    pauses = [FIRST_PAUSE * 2**number for number in range(7)]
    assert num_tried == [JUDGED_AFTER, *(min(JUDGED_AFTER, int(pause * TRIED_PER_PAUSED)) for pause in pauses)]
    assert num_tried[-1] == JUDGED_AFTER


def test_a_pause_in_between_is_waited_out() -> None:
    stepping = Stepping()
    planned(stepping, 20, is_useful=True)
    for _ in range(50):
        planned(stepping, UNWANTED_BEFORE - 1, is_useful=False)
        planned(stepping, 1, is_useful=True)
    assert stepping.num_switches == 1


def test_what_does_not_pay_is_tried_more_seldom_each_time() -> None:
    stepping, tries = Stepping(), []
    for step in range(40 * LAST_PAUSE):
        before = stepping.num_switches
        stepping.planned(True, 0.95)
        if stepping.num_switches > before and stepping.is_synchronous:
            tries.append(step)
    pauses = [later - earlier for earlier, later in pairwise(tries)]
    assert pauses[0] == PAYS_AFTER + FIRST_PAUSE + WANTED_BEFORE
    assert pauses == sorted(pauses)
    assert pauses[-1] == PAYS_AFTER + LAST_PAUSE + WANTED_BEFORE


def test_what_pays_again_is_not_held_against_it() -> None:
    stepping = Stepping()
    planned(stepping, 2000, is_useful=True, gain=0.9)
    planned(stepping, 2000, is_useful=True, gain=1.5)
    assert stepping.is_synchronous
    planned(stepping, 1, is_useful=True, gain=0.9)
    assert not stepping.is_synchronous
    assert planned(stepping, FIRST_PAUSE + WANTED_BEFORE + 1, is_useful=True) == 1


@given(st.lists(st.tuples(st.booleans(), st.floats(0.0, 4.0))))
def test_it_becomes_synchronous_only_where_steps_in_a_row_want_it(steps: list[tuple[bool, float]]) -> None:
    stepping, num_wanted = Stepping(), 0
    for is_useful, gain in steps:
        was_synchronous = stepping.is_synchronous
        stepping.planned(is_useful, gain)
        num_wanted = num_wanted + 1 if is_useful and not was_synchronous else 0
        if stepping.is_synchronous and not was_synchronous:
            assert num_wanted >= WANTED_BEFORE


class Core:
    """Like vLLM's EngineCore; records the calls, and whether the scheduler would have had requests."""

    def __init__(self) -> None:
        self.batch_queue: deque[int] = deque()
        self.said: list[str] = []
        self.loop: StepLoop | None = None

    def step(self) -> tuple[Any, bool]:
        assert self.loop is not None
        assert not self.batch_queue
        assert self.loop.is_synchronous_step
        self.said.append("step")
        return {}, True

    def step_with_batch_queue(self) -> tuple[Any, bool]:
        assert self.loop is not None
        assert not self.loop.is_synchronous_step
        if not self.loop.is_draining:
            self.batch_queue.appendleft(0)
            self.said.append("schedule")
            if len(self.batch_queue) < 2:
                return None, True
        self.batch_queue.pop()
        self.said.append("outcome")
        return {}, not self.loop.is_draining


@given(st.lists(st.booleans(), max_size=60))
def test_a_synchronous_step_begins_when_all_before_it_are_done(wanted: list[bool]) -> None:
    core, is_synchronous = Core(), False
    core.loop = loop = StepLoop(core, lambda: is_synchronous)
    for is_synchronous in wanted:
        in_flight, num_said = len(core.batch_queue), len(core.said)
        _, has_run = loop.step()
        assert has_run, "vLLM would sleep a millisecond"
        said = core.said[num_said:]
        if not is_synchronous:
            assert said[0] == "schedule"
        else:
            assert said == (["outcome"] if in_flight else ["step"])
    assert not loop.is_draining
    assert not loop.is_synchronous_step
