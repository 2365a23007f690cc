"""A short forecast of demand, and of the engines that it needs, ahead of surges."""

import json
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import vllm_specedge.cli
from vllm_specedge.policy.foresight import DAY_S, SLOT_S, Foresight, engines_needed
from vllm_specedge.simulation.scaling import Ahead, Busy, Fleet, Outcome, Rule, Trace, Waiting, scale

HORIZON_S = 180.0


def after(demand: list[float], horizon_s: float = HORIZON_S) -> Foresight:
    """A forecast after this demand, one number per slot."""
    foresight = Foresight()
    for slot, value in enumerate(demand):
        foresight.observe(value, slot * SLOT_S, horizon_s)
    foresight.observe(demand[-1], len(demand) * SLOT_S, horizon_s)
    return foresight


def test_nothing_is_foreseen_of_nothing() -> None:
    assert Foresight().foreseen(HORIZON_S) == 0.0


def test_what_stays_is_foreseen_to_stay() -> None:
    assert after([500.0] * 100).foreseen(HORIZON_S) == pytest.approx(500.0, rel=1e-6)


def test_what_rises_is_foreseen_to_rise_on_and_what_falls_not_to_be_below_what_it_is() -> None:
    rising, falling = [100.0 + 10 * slot for slot in range(60)], [1000.0 - 10 * slot for slot in range(60)]
    assert 1.1 * rising[-1] < after(rising).foreseen(HORIZON_S) < 2.0 * rising[-1]
    fallen = after(falling)
    assert fallen.foreseen(10 * HORIZON_S) == fallen.foreseen(0.0) >= falling[-1]


def test_the_further_ahead_the_more_of_a_rise() -> None:
    rising = after([100.0 + 10 * slot for slot in range(60)])
    assert rising.foreseen(0.0) < rising.foreseen(60.0) < rising.foreseen(600.0)


def test_a_rise_that_comes_every_day_is_foreseen_before_it_comes() -> None:
    def demand(at_s: float) -> float:
        return 1000.0 if at_s % DAY_S > DAY_S / 2 else 200.0

    foresight, ahead = Foresight(), list[float]()
    for slot in range(int(4.5 * DAY_S / SLOT_S) - 30):
        foresight.observe(demand(slot * SLOT_S), slot * SLOT_S, 600.0)
        if slot * SLOT_S % DAY_S == DAY_S / 2 - 400.0:
            ahead.append(foresight.foreseen(600.0))
    assert ahead[0] < 250.0
    assert ahead[-1] > 500.0


@given(st.lists(st.floats(0, 1e5), min_size=1, max_size=60), st.floats(0, 4000), st.floats(0.5, 200))
def test_whatever_comes_it_is_a_number_that_is_not_below_zero(
    demand: list[float], horizon_s: float, every_s: float
) -> None:
    foresight = Foresight()
    for index, value in enumerate(demand):
        foresight.observe(value, index * every_s, horizon_s)
        assert 0.0 <= foresight.foreseen(horizon_s) <= 100 * (max(demand) + 1)


def test_time_that_jumps_is_taken_for_more_of_the_same() -> None:
    foresight = after([300.0] * 50)
    foresight.observe(300.0, 50 * DAY_S, HORIZON_S)
    foresight.observe(300.0, 49 * DAY_S, HORIZON_S)  # and back
    assert foresight.foreseen(HORIZON_S) == pytest.approx(300.0, rel=0.01)


@given(st.floats(0, 1e5), st.floats(1, 1e4), st.floats(1, 2))
def test_engines_needed_have_the_capacity(demand: float, capacity: float, headroom: float) -> None:
    number = engines_needed(demand, capacity, headroom)
    assert number >= 1
    assert number * capacity >= headroom * demand * (1 - 1e-6)
    assert number == 1 or (number - 1) * capacity <= headroom * demand * (1 + 1e-6)
    assert engines_needed(demand, 0.0) == 0


# -- scaling -------------------------------------------------------------------------------------------------------

FLEET = Fleet()
TRACE = Trace(days=2.0)
SECONDS = list(TRACE.seconds())


def run(rule: Rule) -> Outcome:
    return scale(SECONDS, FLEET, rule)


def test_a_trace_has_days_surges_and_its_mean() -> None:
    calm = [demand for demand, is_surge in SECONDS if not is_surge]
    assert sum(calm) / len(calm) == pytest.approx(TRACE.mean, rel=0.1)
    night, noon = (sum(demand for demand, _ in SECONDS[at : at + 3600]) / 3600 for at in (0, int(DAY_S / 2) - 1800))
    assert night < 0.7 * TRACE.mean < 1.3 * TRACE.mean < noon
    assert len(TRACE.surges()) == pytest.approx(2 * TRACE.surges_per_day, abs=4)
    assert SECONDS[:100] == list(islice(TRACE.seconds(), 100))


def test_ahead_of_demand_fewer_miss_in_surges_at_no_more_engine_hours() -> None:
    """The goal, compared with the usual rule, and with one that keeps engines idle for a part of the time."""
    ahead, waiting = run(Ahead(FLEET)), run(Waiting())
    assert ahead.engine_hours <= waiting.engine_hours
    assert ahead.missed_in_surges <= 0.7 * waiting.missed_in_surges
    lean, busy = run(Ahead(FLEET, 0.9)), run(Busy(0.9))
    assert lean.engine_hours <= busy.engine_hours
    assert lean.missed_in_surges <= 0.85 * busy.missed_in_surges


def test_a_fleet_that_starts_at_once_misses_less() -> None:
    slow, fast = run(Ahead(FLEET)), scale(SECONDS, Fleet(start_s=15.0), Ahead(Fleet(start_s=15.0)))
    assert fast.miss_rate_in_surges <= slow.miss_rate_in_surges
    assert fast.engine_hours < slow.engine_hours


def test_the_command_prints_a_table_or_json() -> None:
    options = ["simulate-scaling", "--days", "1.1", "--seeds", "1"]
    said = CliRunner().invoke(vllm_specedge.cli.app, options)
    assert said.exit_code == 0
    assert "ahead" in said.output
    rows = json.loads(CliRunner().invoke(vllm_specedge.cli.app, [*options, "--json"]).output)
    assert {"rule", "engine_hours", "missed", "missed_in_surges"} == rows[0].keys()
