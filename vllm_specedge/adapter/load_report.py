"""An engine's load report for the API processes, if there are latency targets (frontend/admission.py, slo.py)."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_specedge.adapter.demand_report import DemandReport
from vllm_specedge.config import EdgeOptions
from vllm_specedge.estimators import Rate
from vllm_specedge.frontend.load_file import LOAD_VARIABLE, Load, LoadFile
from vllm_specedge.policy.slo import DEFAULT_CLASS, Queue, retry_after_s, rooms, unserved
from vllm_specedge.policy.step_cost import StepCost

EVERY_S = 0.1
LOWEST_PRIORITY = 1 << 31
"""Assumed priority of the default class where its requests may have any: below all other classes."""


class LoadReport:
    """Writes, every EVERY_S at most, how many more requests of each class would meet their targets."""

    def __init__(self, vllm_config: Any, options: EdgeOptions, demand: DemandReport) -> None:
        rank = vllm_config.parallel_config.data_parallel_index
        directory = os.environ.get(LOAD_VARIABLE)
        self.num_finished = 0
        self._file = LoadFile(Path(directory) / f"{rank}.json") if directory else None
        self._targets = options.targets
        self._classes: Mapping[str, int] = {DEFAULT_CLASS: LOWEST_PRIORITY, **options.slo_priorities}
        self._demand = demand
        self._finished = Rate()
        self._last_s = 0.0

    def report(self, scheduler: Any, cost: StepCost, known_s: float, now_s: float) -> None:
        """Report at the end of a step. `known_s`: when the last step was scheduled; vLLM takes requests in before."""
        if self._file is None or now_s - self._last_s < EVERY_S:
            return
        self._last_s = now_s
        self._finished.observe(self.num_finished, now_s)
        self.num_finished = 0
        self._file.write(self._load(scheduler, cost, known_s, now_s))

    def _load(self, scheduler: Any, cost: StepCost, known_s: float, now_s: float) -> Load:
        typical = max(1, round(self._demand.demand.mix.prompt_tokens))
        queue, targets = self._queue(scheduler, now_s), self._targets
        never = unserved(queue, self._classes, typical, targets, cost)
        room = rooms(queue, self._classes, typical, targets, cost, self._demand.demand.offered_per_s)
        return Load(now_s, known_s, room, never, retry_after_s(queue))

    def _queue(self, scheduler: Any, now_s: float) -> Queue:
        waiting = [*scheduler.waiting, *scheduler.kv_holding_waiting]
        return Queue(
            running=[request.priority for request in scheduler.running],
            waiting=[(request.priority, request.num_tokens - request.num_computed_tokens) for request in waiting],
            context=sum(request.num_computed_tokens for request in scheduler.running),
            slots=scheduler.max_num_running_reqs,
            room=scheduler.max_num_scheduled_tokens,
            finished_per_s=self._finished.per_s,
            is_by_priority=scheduler.scheduler_config.policy == "priority",
            prompt_per_token=self._demand.demand.mix.prompt_per_token,
            lately=frozenset(self._classes[name] for name in self._demand.demand.lately(now_s)),
        )
