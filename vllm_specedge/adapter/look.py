"""The policy's view of vLLM's scheduler: requests that could decode in the next step, and the other work."""

from math import inf
from typing import Any

from vllm.v1.request import RequestStatus

from vllm_specedge.engine.plan import Row
from vllm_specedge.policy.situation import Load
from vllm_specedge.policy.slo import Targets


def look(scheduler: Any, targets: Targets, drafted: set[str] | None) -> tuple[list[Row], Load]:
    """Rows for the requests in `drafted`, or if None, for all that decode; and the rest of the load.

    If few requests have a draft, only those become rows, as a row costs microseconds and there may be hundreds.
    """
    is_scarce = _is_scarce(scheduler)
    rows, prefill, context, num_others = [], 0, 0, 0
    priorities: set[int] = set()
    for request in scheduler.running:
        # Tokens of a running step are not known yet, and count as computed (AsyncScheduler).
        num_tokens, num_in_flight = request.num_tokens, request.num_output_placeholders
        num_left = num_tokens + num_in_flight - request.num_computed_tokens
        if request.status != RequestStatus.RUNNING or num_left != 1:
            prefill += num_left
            continue
        context += num_tokens
        priorities.add(request.priority)
        if drafted is not None and request.request_id not in drafted:
            num_others += 1
            continue
        left = min(request.max_tokens - request.num_output_tokens, scheduler.max_model_len - num_tokens)
        left -= num_in_flight
        if is_scarce:
            left = min(left, 1 + -num_tokens % scheduler.block_size)
        rows.append(Row(request.request_id, left - 1, request.priority, num_in_flight))
    is_pressed = num_waiting(scheduler) > 0
    if is_pressed and len(scheduler.running) < scheduler.max_num_running_reqs:
        prefill += next((request.num_tokens for request in scheduler.waiting), 0)
    room = scheduler.max_num_scheduled_tokens
    step_limit_s = min((targets.of(priority).itl_s for priority in priorities), default=inf)
    return rows, Load(context, num_others, min(prefill, room), is_pressed, room, step_limit_s=step_limit_s)


def has_room_for_waiting(scheduler: Any) -> bool:
    """Whether the next step may begin a waiting request."""
    return len(scheduler.running) < scheduler.max_num_running_reqs and num_waiting(scheduler) > 0


def num_waiting(scheduler: Any) -> int:
    """Requests that are not admitted yet, in any of vLLM's queues."""
    return len(scheduler.waiting) + len(scheduler.kv_holding_waiting) + len(scheduler.deferred_waiting)


def _is_scarce(scheduler: Any) -> bool:
    """Whether the cache lacks free blocks for the next token and the draft of every running request."""
    num_free: int = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    num_groups: int = len(scheduler.kv_cache_config.kv_cache_groups)
    return num_free < 2 * num_groups * len(scheduler.running)
