"""The scheduler's thread and the link's share the driver: neither waits, and no failure reaches the engine."""

import threading
import time
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_specedge.adapter.engine_handle import EngineHandle
from vllm_specedge.adapter.scheduler import EdgeScheduler
from vllm_specedge.adapter.shared_driver import SharedDriver
from vllm_specedge.engine.driver import StepDriver
from vllm_specedge.engine.plan import StepPlan
from vllm_specedge.policy.situation import HoldLimits
from vllm_specedge.policy.step_cost import StepCost
from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.engine_frames import Edges

DEADLINE_S = 10.0


class Link:
    """Frames that the link's thread has received and that are not processed yet."""

    def __init__(self, *frames: Frame) -> None:
        self.inbox = deque((0.0, frame) for frame in frames)
        self.is_stopped = False
        self.can_wake = True

    def wake_at(self, at_s: float) -> bool:
        return self.can_wake

    def send(self, frames: list[Frame]) -> None:
        assert not frames

    def stop(self) -> None:
        self.is_stopped = True


@pytest.fixture
def shared() -> SharedDriver:
    """A shared driver without an engine, with a gateway that reports three edges."""
    made = SharedDriver(StepDriver(9, 5, HoldLimits(), StepCost()), EngineHandle(None))
    made.link = Link(Edges(3))  # type: ignore[assignment]
    return made


def in_a_thread(act: Any) -> None:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def made_anew(shared: SharedDriver) -> bool:
    """Whether the previous plan is no longer valid and was made again."""
    made: list[StepPlan] = []

    def make() -> StepPlan:
        made.append(StepPlan())
        return made[-1]

    shared.planned(make)
    return bool(made)


def test_the_link_takes_in_what_came_while_the_scheduler_waits_for_the_workers(shared: SharedDriver) -> None:
    inbox, shared.link.inbox = shared.link.inbox, deque()
    assert made_anew(shared)
    assert not made_anew(shared)
    shared.link.inbox = inbox
    in_a_thread(shared.wake)
    assert shared.driver.num_edges == 3
    assert list(shared.link.inbox) == []
    assert shared.wait(time.monotonic() + DEADLINE_S)
    assert made_anew(shared)


def test_it_never_waits_and_leaves_it_to_whoever_is_at_the_driver(shared: SharedDriver) -> None:
    def at_it() -> None:
        in_a_thread(shared.wake)
        assert len(shared.link.inbox) == 1

    shared.locked(at_it)
    shared.locked(shared.take_in)
    assert shared.driver.num_edges == 3


def test_a_parked_engine_takes_it_in_itself_when_it_is_awake(shared: SharedDriver) -> None:
    inbox, shared.link.inbox = shared.link.inbox, deque()
    assert shared.park(1.0)
    shared.link.inbox = inbox
    in_a_thread(shared.wake)
    assert len(shared.link.inbox) == 1


def test_an_engine_does_not_park_where_it_would_not_be_woken(shared: SharedDriver) -> None:
    assert not shared.park(1.0)  # a frame has arrived
    shared.link.inbox.clear()
    shared.link.can_wake = False
    assert not shared.park(1.0)


def test_what_fails_in_the_link_s_thread_is_raised_to_the_scheduler_s_and_nowhere_else(shared: SharedDriver) -> None:
    shared.driver.receive = lambda frame, at_s: 1 / 0
    in_a_thread(shared.wake)
    with pytest.raises(ZeroDivisionError):
        shared.locked(lambda: pytest.fail("not reached"))
    shared.stop()
    assert shared.link.is_stopped
    shared.link.inbox.append((0.0, Edges(4)))
    in_a_thread(shared.wake)
    assert len(shared.link.inbox) == 1


def test_what_fails_ends_drafting_and_raises_nowhere(shared: SharedDriver) -> None:
    scheduler: Any = object.__new__(EdgeScheduler)
    held = SimpleNamespace(next_decode_eligible_step=9, spec_token_ids=[1])
    scheduler._drafting, scheduler.running = SimpleNamespace(shared=shared, stop=shared.stop), [held]
    assert scheduler._do(lambda drafting: 7) == 7
    assert scheduler._do(lambda drafting: 1 / 0) is None
    assert scheduler._drafting is None
    assert shared.link.is_stopped
    assert (held.next_decode_eligible_step, held.spec_token_ids) == (0, [])
    assert scheduler._do(lambda drafting: pytest.fail("not reached")) is None
