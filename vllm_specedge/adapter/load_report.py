"""What an engine tells the front of its load, where there are targets for latency (frontend/admission.py, slo.py)."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_specedge.config import EdgeOptions
from vllm_specedge.estimators import Rate
from vllm_specedge.frontend.load_file import LOAD_VARIABLE, Load, LoadFile
from vllm_specedge.policy.slo import (
    DEFAULT_CLASS,
    Queue,
    Targets,
    is_ever_admitted,
    num_admissible,
    retry_after_s,
)
from vllm_specedge.policy.step_cost import StepCost

EVERY_S = 0.1
LOWEST_PRIORITY = 1 << 31
"""Requests of the default class, where they may have any priority, are thought to come after all that have a class."""


def load_of(
    queue: Queue,
    num_tokens: int,
    priorities: Mapping[str, int],
    targets: Targets,
    cost: StepCost,
    now_s: float,
) -> Load:
    """What an engine could take on: of each class, requests with a prompt of so many tokens."""
    classes = {DEFAULT_CLASS: LOWEST_PRIORITY, **priorities}
    return Load(
        said_s=now_s,
        room={name: num_admissible(queue, each, num_tokens, targets, cost) for name, each in classes.items()},
        unserved=frozenset(
            name for name, each in classes.items() if not is_ever_admitted(queue, each, num_tokens, targets, cost)
        ),
        retry_after_s=retry_after_s(queue),
    )


class LoadReport:
    """Writes now and then how many more requests of each class would get what they are to get."""

    def __init__(self, vllm_config: Any, options: EdgeOptions) -> None:
        rank = vllm_config.parallel_config.data_parallel_index
        directory = os.environ.get(LOAD_VARIABLE)
        self.num_finished = 0
        self._file = LoadFile(Path(directory) / f"{rank}.json") if directory else None
        self._targets = options.targets
        self._priorities = options.slo_priorities
        self._finished = Rate()
        self._last_s = 0.0

    def report(self, scheduler: Any, cost: StepCost, now_s: float) -> None:
        if self._file is None or now_s - self._last_s < EVERY_S:
            return
        self._last_s = now_s
        self._finished.observe(self.num_finished, now_s)
        self.num_finished = 0
        prompts = [request.num_prompt_tokens for request in scheduler.running]
        typical = sum(prompts) // len(prompts) if prompts else 1
        queue = _queue(scheduler, self._finished.per_s)
        self._file.write(load_of(queue, typical, self._priorities, self._targets, cost, now_s))


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
