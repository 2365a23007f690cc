"""What the scheduler tells the policy of the requests that run, and of what else there is to do."""

from math import inf
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from vllm_specedge.adapter.scheduler import EdgeScheduler
from vllm_specedge.engine.drafting import DraftBook, Row
from vllm_specedge.policy.decision import HoldLimits
from vllm_specedge.policy.slo import Target, Targets
from vllm_specedge.wire.frames import Edges

BLOCK_SIZE = 16


def running(id_: str, num_tokens: int, num_computed: int | None = None, max_tokens: int = 100, **more: Any) -> Any:
    values = {
        "request_id": id_,
        "num_tokens": num_tokens,
        "num_computed_tokens": num_tokens - 1 if num_computed is None else num_computed,
        "num_output_tokens": 10,
        "max_tokens": max_tokens,
        "priority": 0,
        "status": RequestStatus.RUNNING,
    }
    return SimpleNamespace(**values | more)


@pytest.fixture
def scheduler() -> Any:
    """With what it looks at, and without an engine."""
    made = object.__new__(EdgeScheduler)
    made.book = DraftBook(9, 5, HoldLimits())
    made.book.receive(Edges(1), 0.0)
    made._suggested, made._alone, made._targets = set(), set(), Targets({7: Target(itl_s=0.05)}, Target())
    made.running, made.waiting, made.kv_holding_waiting, made.deferred_waiting = [], [], [], []
    made.max_num_running_reqs, made.max_num_scheduled_tokens, made.max_model_len = 8, 512, 200
    made.kv_cache_manager = SimpleNamespace(block_pool=SimpleNamespace(get_num_free_blocks=lambda: 1000))
    made.kv_cache_config, made.block_size = SimpleNamespace(kv_cache_groups=[None]), BLOCK_SIZE
    return made


def test_who_decodes_is_a_row_with_the_room_that_is_left_for_drafts(scheduler: Any) -> None:
    scheduler.running = [running("long", 190), running("last", 50, max_tokens=11), running("first", 20, priority=7)]
    rows, load = scheduler._look()
    assert rows == [Row("long", 9, 0), Row("last", 0, 0), Row("first", 89, 7)]
    assert (load.context, load.num_others, load.prefill, load.is_pressed) == (260, 0, 0, False)
    assert (load.room, load.step_limit_s) == (512, 0.05)


def test_nobody_is_a_row_while_a_request_has_to_be_alone(scheduler: Any) -> None:
    scheduler.running, scheduler._alone = [running("drafted for", 50), running("alone", 20)], {"alone"}
    scheduler._suggested.add("drafted for")
    rows, load = scheduler._look()
    assert (rows, load.num_others) == ([], 2)


def test_prompts_are_no_rows_and_come_first(scheduler: Any) -> None:
    scheduler.running = [running("decodes", 50), running("prompt", 80, 30)]
    scheduler.waiting = [SimpleNamespace(num_tokens=1000)]
    rows, load = scheduler._look()
    assert [row.request_id for row in rows] == ["decodes"]
    assert (load.prefill, load.is_pressed, load.step_limit_s) == (512, True, inf)


def test_without_edges_only_those_that_the_lookup_has_something_for_are_rows(scheduler: Any) -> None:
    scheduler.book.receive(Edges(0), 0.0)
    scheduler.running = [running("has", 50), running("has not", 50)]
    scheduler._suggested = {"has"}
    rows, load = scheduler._look()
    assert [row.request_id for row in rows] == ["has"]
    assert load.num_others == 1


@pytest.mark.parametrize(("num_groups", "num_free", "is_scarce"), [(1, 4, False), (1, 3, True), (2, 7, True)])
def test_where_the_cache_is_nearly_full_a_draft_takes_no_block_more(
    scheduler: Any, num_groups: int, num_free: int, is_scarce: bool
) -> None:
    scheduler.kv_cache_manager.block_pool.get_num_free_blocks = lambda: num_free
    scheduler.kv_cache_config.kv_cache_groups = [None] * num_groups
    scheduler.running = [running("full", 3 * BLOCK_SIZE), running("new", 3 * BLOCK_SIZE + 1)]
    rows, _ = scheduler._look()
    assert [row.limit for row in rows] == ([0, BLOCK_SIZE - 1] if is_scarce else [89, 89])
