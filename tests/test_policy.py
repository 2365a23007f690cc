import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vllm_specedge.policy import MODES, EdgeRecord, HoldLimits, Smoothed, hold_until

LIMITS = HoldLimits(hold_limit_s=0.1, max_misses=2)
seconds = st.integers(0, 30).map(lambda number: number / 100)


def record(
    answer_s: float | None, deviation_s: float = 0.0, accepted: float | None = None, misses: int = 0
) -> EdgeRecord:
    edge = EdgeRecord(Smoothed(answer_s, deviation_s), num_misses=misses)
    if accepted is not None:
        edge.accepted = Smoothed(accepted)
    return edge


records = st.builds(record, st.none() | seconds, seconds, st.none() | st.integers(0, 10), st.integers(0, 2))
limits = st.builds(HoldLimits, hold_limit_s=seconds, max_misses=st.integers(1, 3))


@given(records, seconds, seconds, seconds, limits)
def test_a_hold_ends_after_now_and_within_the_limit(
    edge: EdgeRecord, committed_s: float, after_s: float, step_s: float, limits: HoldLimits
) -> None:
    now_s = committed_s + after_s
    until_s = hold_until(edge, committed_s, now_s, step_s, limits)
    assert until_s is None or now_s < until_s <= committed_s + limits.hold_limit_s


@given(records, seconds, seconds, seconds, seconds, limits)
def test_a_slower_step_never_turns_a_hold_into_none(
    edge: EdgeRecord, committed_s: float, after_s: float, step_s: float, more_s: float, limits: HoldLimits
) -> None:
    now_s = committed_s + after_s
    until_s = hold_until(edge, committed_s, now_s, step_s, limits)
    if until_s is not None:
        assert hold_until(edge, committed_s, now_s, step_s + more_s, limits) == until_s


@given(records, seconds, seconds, seconds, seconds, limits)
def test_a_hold_that_time_has_ended_does_not_begin_again(
    edge: EdgeRecord, committed_s: float, after_s: float, later_s: float, step_s: float, limits: HoldLimits
) -> None:
    until_s = hold_until(edge, committed_s, committed_s + after_s, step_s, limits)
    if until_s is not None:
        assert hold_until(edge, committed_s, until_s + later_s, step_s, limits) is None


@given(records, seconds, seconds, limits)
def test_an_edge_that_never_answered_is_not_waited_for(
    edge: EdgeRecord, after_s: float, step_s: float, limits: HoldLimits
) -> None:
    edge.answer_s.mean = None
    assert hold_until(edge, 1.0, 1.0 + after_s, step_s, limits) is None


@given(st.floats(0.05, 0.1), st.floats(0, 5), st.floats(0, 0.02))
def test_a_wait_that_costs_more_than_it_brings_is_not_begun(answer_s: float, accepted: float, step_s: float) -> None:
    assume(answer_s >= accepted * step_s)
    assert hold_until(record(answer_s, 1.0, accepted), 0.0, 0.0, step_s, LIMITS) is None


@given(seconds, seconds, seconds)
def test_nothing_is_waited_for_where_nothing_is_ever_accepted(answer_s: float, now_s: float, step_s: float) -> None:
    assert hold_until(record(answer_s, 1.0, accepted=0.0), 0.0, now_s, step_s, LIMITS) is None


def test_a_draft_that_is_worth_it_is_held_for_until_four_deviations_late() -> None:
    assert hold_until(record(0.02, 0.005, 3.0), 10.0, 10.001, 0.03, LIMITS) == pytest.approx(10.04)


def test_one_token_is_expected_of_an_edge_whose_drafts_were_never_verified() -> None:
    assert hold_until(record(0.02), 0.0, 0.0, 0.021, LIMITS) == pytest.approx(0.02)
    assert hold_until(record(0.02), 0.0, 0.0, 0.019, LIMITS) is None


def test_an_edge_that_missed_twice_in_a_row_is_not_waited_for_until_it_is_in_time_again() -> None:
    edge = record(0.02, 0.005, 3.0)
    edge.missed()
    assert hold_until(edge, 0.0, 0.0, 0.03, LIMITS) is not None
    edge.missed()
    assert hold_until(edge, 0.0, 0.0, 0.03, LIMITS) is None
    edge.answered(0.041, in_time=False)
    assert hold_until(edge, 0.0, 0.0, 0.03, LIMITS) is None
    edge.answered(0.02, in_time=True)
    assert hold_until(edge, 0.0, 0.0, 0.03, LIMITS) is not None


def test_an_edge_that_is_not_waited_for_can_show_that_it_is_punctual_again() -> None:
    """Its answers come after the request went on without it, but no later than its record says."""
    edge = record(0.02, 0.005, 3.0)
    edge.missed()
    edge.missed()
    edge.answered(0.03, in_time=False)
    assert hold_until(edge, 0.0, 0.0, 0.03, LIMITS) is not None


def test_an_operator_may_always_wait_or_never() -> None:
    limits = [HoldLimits(hold_limit_s=0.1, mode=mode) for mode in MODES]
    useless, useful = record(None, misses=9), record(0.02, 0.005, 3.0)
    assert [hold_until(useless, 1.0, 1.05, 0.0, each) for each in limits] == [None, 1.1, None]
    assert [hold_until(useful, 1.0, 1.0, 0.03, each) for each in limits] == [pytest.approx(1.04), 1.1, None]
    assert [hold_until(useful, 1.0, 1.1, 0.03, each) for each in limits] == [None, None, None]


def test_a_limit_of_zero_never_holds() -> None:
    assert hold_until(record(0.01, 0.1, 5.0), 0.0, 0.0, 1.0, HoldLimits(hold_limit_s=0.0)) is None


def test_the_first_observation_is_the_mean_and_half_of_it_the_deviation() -> None:
    smoothed = Smoothed()
    assert smoothed.mean is None
    smoothed.observe(0.2)
    assert [smoothed.mean, smoothed.deviation] == [0.2, 0.1]
    smoothed.observe(0.6)
    assert smoothed.mean == pytest.approx(0.25)
    assert smoothed.deviation == pytest.approx(0.1 + 0.25 * (0.4 - 0.1))


@given(st.lists(st.floats(-100, 100), min_size=1))
def test_a_mean_stays_within_what_was_observed(values: list[float]) -> None:
    smoothed = Smoothed()
    for value in values:
        smoothed.observe(value)
    assert smoothed.mean is not None
    assert min(values) - 1e-9 <= smoothed.mean <= max(values) + 1e-9


@given(st.floats(0, 100), st.floats(0, 100))
def test_a_mean_follows_what_stays_the_same(first: float, then: float) -> None:
    smoothed = Smoothed()
    for value in [first] + [then] * 200:
        smoothed.observe(value)
    assert smoothed.mean == pytest.approx(then, abs=1e-6)
    assert smoothed.deviation == pytest.approx(0, abs=1e-6)
