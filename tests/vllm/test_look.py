"""What the scheduler reports to the policy: running requests, and other work."""

from math import inf
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.request import RequestStatus

from vllm_specedge.adapter.drafting import Drafting
from vllm_specedge.adapter.engine_handle import EngineHandle
from vllm_specedge.adapter.look import look
from vllm_specedge.adapter.shared_driver import SharedDriver
from vllm_specedge.engine.driver import StepDriver
from vllm_specedge.engine.plan import Row
from vllm_specedge.policy.situation import HoldLimits
from vllm_specedge.policy.slo import Target, Targets
from vllm_specedge.policy.step_cost import StepCost
from vllm_specedge.wire.engine_frames import Edges

BLOCK_SIZE = 16


def running(id_: str, num_tokens: int, num_computed: int | None = None, max_tokens: int = 100, **more: Any) -> Any:
    values = {
        "request_id": id_,
        "num_tokens": num_tokens,
        "num_computed_tokens": num_tokens - 1 if num_computed is None else num_computed,
        "num_output_tokens": 10,
        "num_output_placeholders": 0,
        "max_tokens": max_tokens,
        "priority": 0,
        "status": RequestStatus.RUNNING,
    }
    return SimpleNamespace(**values | more)


TARGETS = Targets({7: Target(itl_s=0.05)}, Target())


@pytest.fixture
def scheduler() -> Any:
    """A scheduler with only the attributes that are read."""
    made = SimpleNamespace()
    made.running, made.waiting, made.kv_holding_waiting, made.deferred_waiting = [], [], [], []
    made.max_num_running_reqs, made.max_num_scheduled_tokens, made.max_model_len = 8, 512, 200
    made.kv_cache_manager = SimpleNamespace(block_pool=SimpleNamespace(get_num_free_blocks=lambda: 1000))
    made.kv_cache_config, made.block_size = SimpleNamespace(kv_cache_groups=[None]), BLOCK_SIZE
    return made


def test_who_decodes_is_a_row_with_the_room_that_is_left_for_drafts(scheduler: Any) -> None:
    scheduler.running = [running("long", 190), running("last", 50, max_tokens=11), running("first", 20, priority=7)]
    rows, load = look(scheduler, TARGETS, None)
    assert rows == [Row("long", 9, 0), Row("last", 0, 0), Row("first", 89, 7)]
    assert (load.context, load.num_others, load.prefill, load.is_pressed) == (260, 0, 0, False)
    assert (load.room, load.step_limit_s) == (512, 0.05)


def parameters(**more: Any) -> Any:
    return SimpleNamespace(sampling_params=SamplingParams(**more), prompt_embeds=None, mm_features=[], resumable=False)


def test_nobody_is_a_row_while_a_request_has_to_be_alone(scheduler: Any) -> None:
    driver = StepDriver(9, 5, HoldLimits(), StepCost())
    driver.receive(Edges(1), 0.0)
    drafting = Drafting(scheduler, EngineHandle(None), SharedDriver(driver, EngineHandle(None)), TARGETS)
    drafted, alone = running("drafted for", 50), running("alone", 20)
    scheduler.running, scheduler.requests = [drafted, alone], {"drafted for": drafted, "alone": alone}
    for request, own in ((drafted, parameters()), (alone, parameters(logprobs=1, logprob_token_ids=[1, 2]))):
        request.__dict__.update(own.__dict__, prompt_token_ids=[1], all_token_ids=[1] * request.num_tokens)
    drafting.added(drafted)
    assert drafting.start_step().num_rows == 2
    assert list(drafting.start_step().choices) == ["drafted for"]
    drafting.added(alone)
    assert (drafting.start_step().num_rows, drafting.start_step().choices) == (2, {})
    drafting.freed(alone)
    assert list(drafting.start_step().choices) == ["drafted for"]


def test_prompts_are_no_rows_and_come_first(scheduler: Any) -> None:
    scheduler.running = [running("decodes", 50), running("prompt", 80, 30)]
    scheduler.waiting = [SimpleNamespace(num_tokens=1000)]
    rows, load = look(scheduler, TARGETS, None)
    assert [row.request_id for row in rows] == ["decodes"]
    assert (load.prefill, load.is_pressed, load.step_limit_s) == (512, True, inf)


def test_without_edges_only_those_that_the_lookup_has_something_for_are_rows(scheduler: Any) -> None:
    scheduler.running = [running("has", 50), running("has not", 50)]
    rows, load = look(scheduler, TARGETS, {"has"})
    assert [row.request_id for row in rows] == ["has"]
    assert load.num_others == 1


@pytest.mark.parametrize(("num_groups", "num_free", "is_scarce"), [(1, 4, False), (1, 3, True), (2, 7, True)])
def test_where_the_cache_is_nearly_full_a_draft_takes_no_block_more(
    scheduler: Any, num_groups: int, num_free: int, is_scarce: bool
) -> None:
    scheduler.kv_cache_manager.block_pool.get_num_free_blocks = lambda: num_free
    scheduler.kv_cache_config.kv_cache_groups = [None] * num_groups
    scheduler.running = [running("full", 3 * BLOCK_SIZE), running("new", 3 * BLOCK_SIZE + 1)]
    rows, _ = look(scheduler, TARGETS, None)
    assert [row.limit for row in rows] == ([0, BLOCK_SIZE - 1] if is_scarce else [89, 89])


def test_tokens_that_a_step_under_way_decides_leave_so_much_less_room(scheduler: Any) -> None:
    scheduler.running = [running("asynchronous", 50, 50, max_tokens=20, num_output_placeholders=1)]
    [row], load = look(scheduler, TARGETS, None)
    assert (row.num_in_flight, row.limit) == (1, 20 - 10 - 1 - 1)
    assert not load.prefill
