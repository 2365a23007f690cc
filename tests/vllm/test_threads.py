"""The scheduler's thread and the link's share the book: neither waits for the other, no failure gets to the engine."""

import threading
from collections import deque
from typing import Any

import pytest

from vllm_specedge.adapter.scheduler import EdgeScheduler
from vllm_specedge.engine.drafting import DraftBook
from vllm_specedge.policy.decision import HoldLimits
from vllm_specedge.wire.frames import Edges, Frame

DEADLINE_S = 10.0


class Link:
    """What the link's thread has received, and nobody has taken in yet."""

    def __init__(self, *frames: Frame) -> None:
        self.inbox = deque((0.0, frame) for frame in frames)
        self.is_stopped = False

    def send(self, frames: list[Frame]) -> None:
        assert not frames

    def stop(self) -> None:
        self.is_stopped = True


@pytest.fixture
def scheduler() -> Any:
    """With what the threads share, and without an engine."""
    made = object.__new__(EdgeScheduler)
    made._lock, made._failure, made._arrived = threading.RLock(), None, threading.Event()
    made._is_drafting = True
    made._is_parked = made._was_parked = False
    made._plan_ahead, made._engine, made.running = None, None, []
    made.book = DraftBook(9, 5, HoldLimits())
    made._link = Link(Edges(3))
    return made


def in_a_thread(act: Any) -> None:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def test_the_link_takes_in_what_came_while_the_scheduler_waits_for_the_workers(scheduler: Any) -> None:
    scheduler._plan_ahead = "made before this came"
    in_a_thread(scheduler._wake)
    assert scheduler.book.num_edges == 3
    assert (scheduler._plan_ahead, list(scheduler._link.inbox)) == (None, [])
    assert scheduler._arrived.is_set()


def test_it_never_waits_and_leaves_it_to_whoever_is_at_the_book(scheduler: Any) -> None:
    with scheduler._lock:
        in_a_thread(scheduler._wake)
        assert len(scheduler._link.inbox) == 1
    scheduler._guarded(scheduler._take_in)
    assert scheduler.book.num_edges == 3


def test_a_parked_engine_takes_it_in_itself_when_it_is_awake(scheduler: Any) -> None:
    scheduler._is_parked = True
    in_a_thread(scheduler._wake)
    assert len(scheduler._link.inbox) == 1


def test_what_fails_in_the_link_s_thread_ends_drafting_and_raises_nowhere(scheduler: Any) -> None:
    scheduler._link.inbox.append((0.0, None))
    scheduler.book.receive = lambda frame, at_s: 1 / 0
    in_a_thread(scheduler._wake)
    assert scheduler._is_drafting  # until the scheduler's thread looks
    assert scheduler._guarded(lambda: "not reached") is None
    assert not scheduler._is_drafting
    assert scheduler._link.is_stopped
    in_a_thread(scheduler._wake)
