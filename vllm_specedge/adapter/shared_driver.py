"""A step driver shared by the scheduler's and the link's threads, and the parking of the engine.

Rule 1: only the thread that holds the lock uses the driver. The link's thread processes proposals while the scheduler's
waits for the workers. It never waits for the lock: else the scheduler's thread would have to, between two steps.
Rule 2: while every request waits for a draft, the engine's loop sleeps ("parked") until the link wakes it.
"""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from vllm_specedge.adapter.engine_handle import EngineHandle
from vllm_specedge.engine.driver import StepDriver
from vllm_specedge.engine.gateway_link import EngineLink
from vllm_specedge.engine.plan import StepPlan
from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.engine_frames import Stats
from vllm_specedge.wire.telemetry import CountedSince, groups_frame, step_times

_BLOCK_S = 0.002
_T = TypeVar("_T")


class SharedDriver:
    """A StepDriver, the link that feeds it, and the engine whose steps it drives."""

    def __init__(self, driver: StepDriver, engine: EngineHandle) -> None:
        self.driver = driver
        self.link: EngineLink | None = None
        self._engine = engine
        self._lock = threading.RLock()
        self._arrived = threading.Event()
        self._is_parked = self._was_parked = False
        self._is_over = False
        self._failure: Exception | None = None
        """Error in the link's thread, raised when the scheduler's thread next uses the driver."""
        self._plan: StepPlan | None = None
        """The plan, while it is valid: the engine asks several times whether there is something to do."""
        self._counted = CountedSince()
        self.more_stats: Callable[[int], list[Frame]] = lambda num_welcomes: []
        """Returns further frames for the gateway, given how many times the engine was welcomed."""

    # -- the scheduler's thread ------------------------------------------------------------------------------------

    def locked(self, act: Callable[[], _T]) -> _T:
        """Run `act`, which uses the driver, under the lock. Raises an error of the link's thread, if there was one."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            return act()

    def stop(self) -> None:
        """Stop drafting."""
        self._is_over, self._is_parked = True, False
        if self.link is not None:
            self.link.stop()

    def planned(self, make: Callable[[], StepPlan]) -> StepPlan:
        """The plan for the next step, made anew if anything has changed."""
        if self._plan is None or (self.link is not None and self.link.inbox):
            self.take_in()
            self._plan = make()
        return self._plan

    def changed(self) -> None:
        """Invalidate the plan."""
        self._plan = None

    def take_in(self) -> None:
        """Pass received frames to the driver."""
        if self.link is None:
            return
        inbox = self.link.inbox
        self._arrived.clear()
        if inbox and self._was_parked:
            self.driver.counters["wakes"] += 1
            self.driver.counters["wake_us"] += int((time.monotonic() - inbox[0][0]) * 1e6)
        self._was_parked = False
        while inbox:
            arrived_s, frame = inbox.popleft()
            self.send(self.driver.receive(frame, arrived_s))

    def send(self, frames: list[Frame]) -> None:
        """Send frames to the gateway, if there is one."""
        if frames and self.link is not None:
            self.link.send(frames)

    def park(self, until_s: float) -> bool:
        """Whether the engine's loop may sleep: it will certainly be woken, at `until_s` at the latest."""
        assert self.link is not None
        # The flag is set before the timer is set and the inbox checked; the link checks the flag after both.
        self._is_parked = self._was_parked = True
        if not self.link.wake_at(until_s) or self.link.inbox:
            self._is_parked = self._was_parked = False
        return self._is_parked

    def unpark(self) -> None:
        """Note that the engine's loop runs."""
        self._is_parked = False

    def wait(self, until_s: float) -> bool:
        """Wait a little for frames, for an engine without a loop that could sleep. False: none came."""
        left_s = until_s - time.monotonic()
        return left_s > 0 and self._arrived.wait(min(left_s, _BLOCK_S))

    # -- the link's thread -----------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Called when there are frames in the inbox, or at the time given to `wake_at`."""
        if not self._is_parked:
            self._take_in_early()
        self._arrived.set()
        if self._is_parked and self._engine.has_loop:
            self._is_parked = False
            self._engine.wake()

    def _take_in_early(self) -> None:
        if self._is_over or not self._lock.acquire(blocking=False):
            return
        try:
            self.take_in()
            self.changed()
        except Exception as error:  # noqa: BLE001 - raised again in `locked`, which ends drafting
            self._failure = error
        finally:
            self._lock.release()

    def stats(self) -> list[Frame]:
        """The frames to send to the gateway every second."""
        num_welcomes = self.link.num_welcomes if self.link is not None else 1
        return [
            Stats(self._counted.values(self.driver.counters, num_welcomes)),
            step_times(*self.driver.cost.parts_s),
            groups_frame(self.driver.speedups.take_groups(), time.monotonic()),
            *self.more_stats(num_welcomes),
        ]
