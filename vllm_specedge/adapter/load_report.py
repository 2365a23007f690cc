"""What an engine tells the front of its load, where there are targets for latency (admission.py, slo.py)."""

import os
from pathlib import Path
from typing import Any

from vllm_specedge.estimators import Rate
from vllm_specedge.frontend.admission import DEFAULT_CLASS, LOAD_VARIABLE, LoadFile
from vllm_specedge.policy.slo import Queue, Targets, num_admissible, retry_after_s
from vllm_specedge.policy.step_cost import StepCost

EVERY_S = 0.1
LOWEST_PRIORITY = 1 << 31
"""Requests of the default class are thought to come after all that have a class."""


class LoadReport:
    """Writes now and then how many more requests of each class would get what they are to get."""

    def __init__(self, vllm_config: Any, targets: Targets) -> None:
        rank = vllm_config.parallel_config.data_parallel_index
        directory = os.environ.get(LOAD_VARIABLE)
        self.num_finished = 0
        self._file = LoadFile(Path(directory) / f"{rank}.json") if directory else None
        self._targets = targets
        self._finished = Rate()
        self._last_s = 0.0

    def report(self, scheduler: Any, cost: StepCost, now_s: float) -> None:
        if self._file is None or now_s - self._last_s < EVERY_S:
            return
        self._last_s = now_s
        self._finished.observe(self.num_finished, now_s)
        self.num_finished = 0
        queue = _queue(scheduler, self._finished.per_s)
        prompts = [request.num_prompt_tokens for request in scheduler.running]
        typical = sum(prompts) // len(prompts) if prompts else 1
        room = {
            str(priority): num_admissible(queue, priority, typical, self._targets, cost)
            for priority in self._targets.priorities
        }
        room[DEFAULT_CLASS] = num_admissible(queue, LOWEST_PRIORITY, typical, self._targets, cost)
        self._file.write(room, retry_after_s(queue))


def _queue(scheduler: Any, finished_per_s: float) -> Queue:
    waiting = [*scheduler.waiting, *scheduler.kv_holding_waiting]
    return Queue(
        running=[request.priority for request in scheduler.running],
        waiting=[(request.priority, request.num_tokens - request.num_computed_tokens) for request in waiting],
        context=sum(request.num_computed_tokens for request in scheduler.running),
        slots=scheduler.max_num_running_reqs,
        room=scheduler.max_num_scheduled_tokens,
        finished_per_s=finished_per_s,
        is_by_priority=scheduler.scheduler_config.policy == "priority",
    )
