import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_specedge.estimates import Line, Smoothed
from vllm_specedge.policy import (
    MODES,
    PRIOR_ACCEPTED,
    PRIOR_FIRST,
    EdgeRecord,
    HoldLimits,
    hold_until,
    is_worth_verifying,
)

LIMITS = HoldLimits(hold_limit_s=0.1, max_misses=2)
seconds = st.integers(0, 30).map(lambda number: number / 100)
chances = st.integers(0, 10).map(lambda number: number / 10)


def record(
    answer_s: float | None,
    deviation_s: float = 0.0,
    accepted: float = PRIOR_ACCEPTED,
    misses: int = 0,
    first: float = PRIOR_FIRST,
    hit: float = 0.0,
) -> EdgeRecord:
    return EdgeRecord(Smoothed(answer_s, deviation_s), Smoothed(accepted), Smoothed(first), Smoothed(hit), misses)


counts = st.integers(0, 20).map(lambda number: number / 2)
records = st.builds(record, st.none() | seconds, seconds, counts, st.integers(0, 2), chances, chances)
limits = st.builds(HoldLimits, hold_limit_s=seconds, mode=st.sampled_from(MODES), max_misses=st.integers(1, 3))


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


@given(records, seconds, seconds, seconds, limits)
def test_a_hold_goes_on_until_the_time_it_said(
    edge: EdgeRecord, committed_s: float, after_s: float, step_s: float, limits: HoldLimits
) -> None:
    now_s = committed_s + after_s
    until_s = hold_until(edge, committed_s, now_s, step_s, limits)
    if until_s is not None:
        for part in (0.1, 0.5, 0.9):
            assert hold_until(edge, committed_s, now_s + part * (until_s - now_s), step_s, limits) == until_s


@given(records, seconds, seconds, counts, chances, limits)
def test_a_better_edge_is_waited_for_where_a_worse_one_is(
    edge: EdgeRecord, after_s: float, step_s: float, more: float, part: float, limits: HoldLimits
) -> None:
    """One that is right more often, answers sooner, or whose drafts are worth less after another token."""
    if hold_until(edge, 0.0, after_s, step_s, limits) is None:
        return
    assert edge.accepted.mean is not None
    assert edge.first.mean is not None
    edge.accepted.mean += more
    assert hold_until(edge, 0.0, after_s, step_s, limits) is not None
    edge.first.mean *= part
    assert hold_until(edge, 0.0, after_s, step_s, limits) is not None
    if edge.answer_s.mean is not None:
        edge.answer_s.mean *= part
        edge.answer_s.deviation = 1.0
        assert hold_until(edge, 0.0, after_s, step_s, limits) is not None


@given(records, seconds, seconds, seconds)
def test_an_edge_that_never_answered_or_was_never_right_is_not_waited_for(
    edge: EdgeRecord, answer_s: float, after_s: float, step_s: float
) -> None:
    edge.answer_s.mean = None
    assert hold_until(edge, 1.0, 1.0 + after_s, step_s, LIMITS) is None
    edge.answer_s.mean, edge.accepted.mean = answer_s, 0.0
    assert hold_until(edge, 1.0, 1.0 + after_s, step_s, LIMITS) is None


@given(st.floats(0.0, 0.09), st.floats(0.01, 10), st.floats(0, 1), st.floats(0, 1), st.floats(0.001, 0.2))
def test_a_wait_begins_where_the_draft_brings_more_than_the_token_that_it_delays(
    answer_s: float, accepted: float, first: float, hit: float, step_s: float
) -> None:
    """Counted in tokens at the rate of a request that always waits."""
    edge = record(answer_s, 1.0, accepted, first=first, hit=hit)
    lost = accepted * (1 - first) * (1 - hit)
    gained = (step_s - answer_s) / (step_s + answer_s) * (1 + accepted) + lost
    if abs(gained - 1) > 1e-6:
        assert (hold_until(edge, 0.0, 0.0, step_s, LIMITS) is not None) == (gained > 1)


@given(st.floats(0, 0.1), st.floats(0, 1), st.floats(0, 10))
def test_a_draft_that_comes_after_the_step_is_waited_for_only_if_that_step_would_spoil_it(
    step_s: float, part: float, accepted: float
) -> None:
    kept = record(0.1, 1.0, accepted, first=1.0)
    assert hold_until(kept, 0.0, 0.0, step_s, HoldLimits(hold_limit_s=1.0)) is None
    spoilt = record(0.1, 1.0, accepted, first=part, hit=0.0)
    if accepted * (1 - part) < 0.999:
        assert hold_until(spoilt, 0.0, 0.0, step_s, HoldLimits(hold_limit_s=1.0)) is None


def test_a_draft_that_is_worth_it_is_held_for_until_four_deviations_late() -> None:
    assert hold_until(record(0.02, 0.005, 3.0), 10.0, 10.001, 0.03, LIMITS) == pytest.approx(10.04)


def test_an_edge_of_which_nothing_was_verified_is_waited_for_if_it_answers_within_three_fifths_of_a_step() -> None:
    assert hold_until(record(0.021), 0.0, 0.0, 0.035001, LIMITS) == pytest.approx(0.021)
    assert hold_until(record(0.021), 0.0, 0.0, 0.034999, LIMITS) is None


def test_an_edge_s_branches_make_up_for_what_its_trunk_misses() -> None:
    edge = EdgeRecord()
    assert edge.survival == PRIOR_FIRST
    for _ in range(100):
        edge.verified(0)
        edge.hit.observe(1.0)
    assert (edge.first.mean, edge.accepted.mean) == pytest.approx((0, 0), abs=1e-4)
    assert edge.survival == pytest.approx(1, abs=1e-4)
    for _ in range(100):
        edge.verified(4)
        edge.hit.observe(0.0)
    assert (edge.first.mean, edge.accepted.mean) == pytest.approx((1, 4), abs=1e-4)
    assert edge.survival == pytest.approx(1, abs=1e-4)


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


@given(st.floats(0.01, 1), st.floats(0, 1), counts, counts, st.integers(1, 8), st.integers(0, 8))
def test_what_pays_pays_with_more_right_tokens_or_with_fewer_to_verify(
    first_s: float, part: float, accepted: float, more: float, num_tokens: int, num_more: int
) -> None:
    line = Line()
    for size in (1, 5, 9):
        line.observe(size, first_s * (1 + part * (size - 1)))
    if is_worth_verifying(accepted, num_tokens + num_more, line):
        assert is_worth_verifying(accepted + more, num_tokens, line)
    if abs(accepted - num_tokens * part) > 1e-6:
        assert is_worth_verifying(accepted, num_tokens, line) == (accepted > num_tokens * part)


def test_while_it_is_not_known_what_verifying_costs_it_is_tried() -> None:
    line = Line()
    assert is_worth_verifying(0.0, 5, line)
    line.observe(1, 0.1)
    assert is_worth_verifying(0.0, 5, line)
