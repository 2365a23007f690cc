"""An engine's reports to its gateway: demand, refused requests included, and its own capacity.

Rule: requests are counted in the scheduler's thread. Frames are made in the link's thread, once per second, from
numbers that only grow and values that are replaced as a whole.
"""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from vllm_specedge.config import EdgeOptions
from vllm_specedge.engine.driver import StepDriver
from vllm_specedge.frontend.load_file import LOAD_VARIABLE, PLACES
from vllm_specedge.frontend.request_classes import RequestClasses
from vllm_specedge.frontend.shared_places import SharedPlaces
from vllm_specedge.policy.capacity import NO_DRAFTS, EdgeDrafts, EngineLimits, capacity_tokens_per_s
from vllm_specedge.policy.demand import Demand
from vllm_specedge.policy.slo import DEFAULT_CLASS
from vllm_specedge.wire import engine_frames
from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.telemetry import DEMAND_COUNTERS, CountedSince, capacity_frame

LOOK_EVERY_S = 0.1
RECKON_EVERY_S = 5.0
STARTED_VARIABLE = "SPECEDGE_STARTED"
"""Start of the server's first process, on the machine's monotonic clock: set by the API server for its engines."""


def note_start() -> None:
    """Set STARTED_VARIABLE; to be called in the server's first process."""
    age_s = time.monotonic() - (psutil.Process().create_time() - psutil.boot_time())
    os.environ[STARTED_VARIABLE] = repr(time.monotonic() - max(0.0, age_s))


class DemandReport:
    """The counts and the capacity of one engine."""

    def __init__(self, vllm_config: Any, options: EdgeOptions, driver: StepDriver) -> None:
        self._driver = driver
        priorities = options.slo_priorities
        self._classes = {priority: name for name, priority in priorities.items()}
        self._names = RequestClasses(priorities).names
        self.demand = Demand(self._names)
        self._counted = {name: CountedSince(DEMAND_COUNTERS) for name in self._names}
        self._limits = EngineLimits(1, 1)
        targets = options.targets
        self._step_s = min(targets.of(priority).itl_s for priority in (*targets.priorities, 1 << 31))
        self._drafts = NO_DRAFTS
        self._capacity: Frame | None = None
        self._reckoned_s = 0.0
        self._waiting: dict[str, bool] = {}
        """The waiting requests, and whether each was counted as deferred, which happens at the second look."""
        self._looked_s = 0.0
        self._refused = [0] * len(self._names)
        parallel = vllm_config.parallel_config
        self._sharing = (parallel.data_parallel_rank_local or 0, max(1, parallel.data_parallel_size_local))
        """Local rank and number of engines on this machine. They share one count of refused requests, and each counts
        its part of it."""
        self._places = _shared_places()
        started = os.environ.get(STARTED_VARIABLE)
        self._start_s = time.monotonic() - float(started) if started else 0.0

    # -- the scheduler's thread ------------------------------------------------------------------------------------

    def added(self, request: Any) -> None:
        self.demand.admitted(self._class_of(request), request.num_prompt_tokens)

    def freed(self, request: Any) -> None:
        self.demand.ended(self._class_of(request), request.num_output_tokens)

    def look(self, scheduler: Any, now_s: float) -> None:
        """Update the report after a step, every LOOK_EVERY_S."""
        if now_s - self._looked_s < LOOK_EVERY_S:
            return
        self._looked_s = now_s
        pool = scheduler.kv_cache_manager.block_pool
        self._limits = EngineLimits(
            scheduler.max_num_running_reqs,
            scheduler.max_num_scheduled_tokens,
            pool.num_gpu_blocks * scheduler.block_size,
            self._step_s,
        )
        self._count_refused()
        self.demand.sample(now_s)
        if scheduler.running:
            self._drafts = self._driver.edge_drafts
        waiting: dict[str, bool] = {}
        for request in (*scheduler.waiting, *scheduler.kv_holding_waiting):
            is_counted = self._waiting.get(request.request_id)
            waiting[request.request_id] = is_counted is not None
            if is_counted is False:
                self.demand.deferred(self._class_of(request), 1)
        self._waiting = waiting

    def _count_refused(self) -> None:
        if self._places is None:
            return
        with suppress(OSError):
            refused = self._places.refused()
            index, size = self._sharing
            for number, name in enumerate(self._names):
                own = (refused[number] + index) // size
                if own > self._refused[number]:
                    self.demand.refused(name, own - self._refused[number])
                    self._refused[number] = own

    def _class_of(self, request: Any) -> str:
        return self._classes.get(request.priority, DEFAULT_CLASS)

    # -- the link's thread -----------------------------------------------------------------------------------------

    def frames(self, num_welcomes: int) -> list[Frame]:
        """The frames for the gateway. `num_welcomes`: as in CountedSince."""
        said = [
            engine_frames.Demand(name, self._counted[name].values(self.demand.counters[name], num_welcomes))
            for name in self._names
        ]
        now_s = time.monotonic()
        if self._capacity is None or now_s - self._reckoned_s >= RECKON_EVERY_S:
            self._capacity, self._reckoned_s = self._reckoned(), now_s
        return [*said, self._capacity]

    def _reckoned(self) -> Frame:
        """The Capacity frame. Computing it takes this process about a millisecond."""
        cost, mix = self._driver.cost, self.demand.mix
        drafts: EdgeDrafts = self._drafts if self._driver.num_edges else NO_DRAFTS
        plain = capacity_tokens_per_s(cost, mix, self._limits)
        return capacity_frame(capacity_tokens_per_s(cost, mix, self._limits, drafts), plain, self._start_s)


def _shared_places() -> SharedPlaces | None:
    directory = os.environ.get(LOAD_VARIABLE)
    if not directory:
        return None
    with suppress(OSError):
        return SharedPlaces(Path(directory) / PLACES)
    return None
