"""An engine's report of demand and capacity to its gateway, from vLLM's requests and the front end's refusals."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_specedge.adapter.demand_report import LOOK_EVERY_S, STARTED_VARIABLE, DemandReport
from vllm_specedge.config import parse_options
from vllm_specedge.engine.driver import StepDriver
from vllm_specedge.frontend.load_file import LOAD_VARIABLE, PLACES
from vllm_specedge.frontend.shared_places import SharedPlaces
from vllm_specedge.policy.situation import HoldLimits
from vllm_specedge.policy.step_cost import StepCost
from vllm_specedge.wire.engine_frames import Capacity, Demand
from vllm_specedge.wire.telemetry import DEMAND_COUNTERS

OPTIONS = parse_options({"slo": {"-1": {"itl_ms": 50}, "default": {"itl_ms": 500}}})


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SharedPlaces]:
    monkeypatch.setenv(LOAD_VARIABLE, str(tmp_path))
    made = SharedPlaces(tmp_path / PLACES)
    yield made
    made.close()


def report(rank: int = 0, size: int = 1) -> DemandReport:
    driver = StepDriver(9, 5, HoldLimits(), StepCost({1: 0.02, 64: 0.03, 1024: 0.2}))
    parallel = SimpleNamespace(data_parallel_rank_local=rank, data_parallel_size_local=size)
    return DemandReport(SimpleNamespace(parallel_config=parallel), OPTIONS, driver)


def request(id_: str, priority: int = 0) -> Any:
    return SimpleNamespace(request_id=id_, priority=priority, num_prompt_tokens=30, num_output_tokens=60)


def scheduler(*waiting: Any) -> Any:
    pool = SimpleNamespace(num_gpu_blocks=1000)
    return SimpleNamespace(
        waiting=waiting,
        kv_holding_waiting=(),
        running=(),
        max_num_running_reqs=16,
        max_num_scheduled_tokens=512,
        block_size=16,
        kv_cache_manager=SimpleNamespace(block_pool=pool),
    )


def counted(made: DemandReport) -> dict[str, dict[str, int]]:
    names = [name for name, _ in DEMAND_COUNTERS]
    frames = [frame for frame in made.frames(1) if isinstance(frame, Demand)]
    return {frame.name: dict(zip(names, frame.values, strict=True)) for frame in frames}


def test_what_comes_and_what_was_refused_is_counted_by_class(places: SharedPlaces) -> None:
    made = report()
    made.added(request("a"))
    made.freed(request("a"))
    made.added(request("b", -1))
    made.added(request("c", 7))
    with places.locked():
        places.refuse(0)
        places.refuse(1)
        places.refuse(1)
    made.look(scheduler(), 1.0)
    said = counted(made)
    assert said.keys() == {"default", "-1"}
    assert (said["default"]["admitted_requests"], said["default"]["refused_requests"]) == (2, 1)
    assert (said["-1"]["admitted_requests"], said["-1"]["refused_requests"]) == (1, 2)
    assert said["-1"]["refused_tokens"] == 120
    assert counted(made) == said, "nothing is counted twice"


def test_engines_that_share_a_front_share_what_it_refused(places: SharedPlaces) -> None:
    ranks = [report(rank, 3) for rank in range(3)]
    with places.locked():
        for _ in range(7):
            places.refuse(0)
    for rank in ranks:
        rank.look(scheduler(), 1.0)
    assert sum(counted(rank)["default"]["refused_requests"] for rank in ranks) == 7


@pytest.mark.timeout(60)
def test_an_engine_does_not_wait_for_a_front_that_stands_still_with_the_lock(places: SharedPlaces) -> None:
    made = report()
    with places.locked():
        places.refuse(0)
        made.look(scheduler(), 1.0)
    assert counted(made)["default"]["refused_requests"] == 1


def test_who_still_waits_at_the_second_look_was_deferred_once() -> None:
    made, one, other = report(), request("one"), request("other", -1)
    for look, waiting in enumerate([(one,), (one, other), (one,), (one,), ()], start=1):
        made.look(scheduler(*waiting), look * 2 * LOOK_EVERY_S)
    said = counted(made)
    assert said["default"]["deferred_requests"] == 1
    assert said["-1"]["deferred_requests"] == 0


def test_capacity_keeps_to_the_shortest_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STARTED_VARIABLE, repr(time.monotonic() - 61.0))
    made = report()
    made.look(scheduler(), 1.0)
    (said,) = (frame for frame in made.frames(1) if isinstance(frame, Capacity))
    assert said.with_edges == said.without_edges, "there is no edge"
    assert 1000 / 0.03 < said.without_edges < 16_000 / 0.02
    assert 61_000 <= said.start_ms < 70_000


def test_a_server_s_start_is_that_of_its_first_process() -> None:
    code = (
        "import time; began_s = time.monotonic()\n"
        "from vllm_specedge.adapter.demand_report import STARTED_VARIABLE, note_start\n"
        "import os; note_start(); print(began_s - float(os.environ[STARTED_VARIABLE]))"
    )
    env = {name: value for name, value in os.environ.items() if name != STARTED_VARIABLE}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert -0.5 < float(done.stdout) < 30.0
