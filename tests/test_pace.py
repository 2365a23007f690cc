"""Pace from an edge's measurements: directions and bounds only, as the rules themselves are tuned by experiment."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.drafting.pacing import FRAME_BYTES, HTTP2_HEADER_BYTES, MAX_FLOOR, MIN_FLOOR, Calibration, Pace
from vllm_specedge.wire.codec import encode
from vllm_specedge.wire.frames import Propose

probabilities = st.floats(0.0, 1.0)
survivals = st.lists(st.floats(0.001, 1.0), min_size=1, max_size=40).map(lambda values: sorted(values, reverse=True))
seconds = st.floats(0.0001, 2.0)


def paced(rtt_s: float = 0.02, round_s: float | None = 0.03, row_s: float = 0.0, pass_s: float = 0.001) -> Pace:
    """A pass takes `pass_s`, and `row_s` for each row."""
    pace = Pace(rtt_s=rtt_s)
    for rows in (1, 2, 4):
        pace.pass_s.observe(rows, pass_s + row_s * rows)
    if round_s is not None:
        pace.round_took(round_s)
    return pace


# -- how often the draft is right ---------------------------------------------------------------------------------


@given(probabilities)
def test_before_anything_is_measured_a_claim_is_believed(claimed: float) -> None:
    assert Calibration()(claimed) == pytest.approx(claimed)


@given(probabilities, st.floats(0.05, 0.95), st.integers(0, 100))
def test_a_claim_that_is_often_seen_counts_as_it_turns_out(claimed: float, rate: float, seed: int) -> None:
    random, calibration = Random(seed), Calibration()
    for _ in range(1500):
        calibration.observe(claimed, random.random() < rate)
    assert calibration(claimed) == pytest.approx(rate, abs=0.13)


def test_what_was_long_ago_counts_less() -> None:
    calibration = Calibration()
    for is_right in [True] * 2000 + [False] * 2000:
        calibration.observe(0.75, is_right)
    assert calibration(0.75) < 0.1


@given(st.lists(st.tuples(probabilities, st.booleans()), max_size=60), probabilities)
def test_a_calibrated_claim_is_a_probability(seen: list[tuple[float, bool]], claimed: float) -> None:
    calibration = Calibration()
    for observed in seen:
        calibration.observe(*observed)
    assert 0.0 <= calibration(claimed) <= 1.0


def test_a_claim_says_nothing_of_one_that_is_far_from_it() -> None:
    calibration = Calibration()
    for _ in range(100):
        calibration.observe(0.9, is_right=False)
    assert calibration(0.3) == pytest.approx(0.3)


# -- how wide -----------------------------------------------------------------------------------------------------


@given(survivals, st.integers(1, 16))
def test_a_pass_is_as_wide_as_it_can_be_where_more_rows_cost_nothing(likely: list[float], max_width: int) -> None:
    assert paced().width(likely, max_width) == min(len(likely), max_width)
    assert Pace().width(likely, max_width) == min(len(likely), max_width)


@given(survivals, st.integers(1, 16))
def test_a_pass_has_one_row_where_each_costs_as_much_as_the_first(likely: list[float], max_width: int) -> None:
    assert paced(pass_s=0.0, row_s=0.001).width(likely, max_width) == 1


@given(survivals, st.integers(1, 16), st.floats(0.0, 0.01), st.floats(0.0001, 0.01), st.floats(0.0, 0.01))
def test_the_dearer_rows_are_the_narrower_a_pass_is(
    likely: list[float], max_width: int, row_s: float, pass_s: float, more_s: float
) -> None:
    width = paced(pass_s=pass_s, row_s=row_s).width(likely, max_width)
    assert 1 <= paced(pass_s=pass_s, row_s=row_s + more_s).width(likely, max_width) <= width
    assert width <= min(len(likely), max_width)


# -- how far ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 16), st.integers(0, 64), seconds, seconds, st.floats(0.0, 1.0))
def test_the_further_away_the_server_is_the_further_ahead_is_drafted(
    max_draft: int, credit: int, rtt_s: float, round_s: float, more_s: float
) -> None:
    horizon = paced(rtt_s, round_s).horizon(max_draft, credit)
    assert horizon <= paced(rtt_s + more_s, round_s).horizon(max_draft, credit) <= credit
    assert paced(rtt_s, round_s=None).horizon(max_draft, credit) >= min(max_draft, credit)
    assert horizon >= min(max_draft, credit)


def test_a_server_that_is_far_away_in_rounds_is_drafted_for_to_the_end_of_the_credit() -> None:
    assert paced(rtt_s=0.001, round_s=0.1).horizon(5, 32) < 32
    assert paced(rtt_s=1.0, round_s=0.01).horizon(5, 32) == 32


# -- what it may cost ---------------------------------------------------------------------------------------------


def generate(pace: Pace, frames_per_commit: int, tokens_per_commit: int, tokens_per_frame: int = 6) -> list[float]:
    """The floor after each of many commits."""
    floors = [pace.floor]
    for _ in range(300):
        for _ in range(frames_per_commit):
            pace.sent(len(encode(Propose(0, 1000, tuple(range(1000, 1000 + tokens_per_frame))))))
        pace.committed(tokens_per_commit)
        floors.append(pace.floor)
    return floors


def test_what_is_drafted_is_more_probable_while_proposals_cost_too_much() -> None:
    floors = generate(Pace(), frames_per_commit=5, tokens_per_commit=1)
    assert floors == sorted(floors)
    assert floors[0] < floors[-1] == MAX_FLOOR


def test_what_is_drafted_is_less_probable_while_proposals_cost_little() -> None:
    floors = generate(Pace(), frames_per_commit=1, tokens_per_commit=50)
    assert floors == sorted(floors, reverse=True)
    assert floors[0] > floors[-1] == MIN_FLOOR


@given(st.floats(0.1, 1000.0), st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=80))
def test_the_floor_has_bounds_and_follows_the_surplus(budget: float, rounds: list[tuple[int, int]]) -> None:
    pace = Pace(uplink_bytes_per_token=budget)
    for num_frames, num_tokens in rounds:
        before = pace.floor
        for _ in range(num_frames):
            pace.sent(len(encode(Propose(0, 0, (1, 2, 3)))))
        cost = pace._bytes / (pace._tokens + num_tokens)
        pace.committed(num_tokens)
        assert MIN_FLOOR <= pace.floor <= MAX_FLOOR
        assert (pace.floor >= before) if cost > budget else (pace.floor <= before)


def test_a_large_budget_does_not_draft_what_a_small_one_does_not_pay_for() -> None:
    small = Pace(uplink_bytes_per_token=10.0)
    large = Pace(uplink_bytes_per_token=40.0)
    assert generate(small, 1, 1)[-1] > generate(large, 1, 2)[-1]


def test_what_a_frame_costs_beside_its_tokens_is_what_is_stated() -> None:
    frame = Propose(70, 1000, (30_000,))
    assert abs(len(encode(frame)) - 2 + HTTP2_HEADER_BYTES - FRAME_BYTES) <= 5


@given(st.floats(0.0, 64.0), st.floats(0.0, 64.0), st.floats(0.1, 100.0))
def test_more_of_use_is_never_less_worth_a_frame(expected: float, more: float, budget: float) -> None:
    pace = Pace(uplink_bytes_per_token=budget)
    assert pace.is_worth_a_frame(expected + more) >= pace.is_worth_a_frame(expected)
    assert Pace(uplink_bytes_per_token=budget + 1).is_worth_a_frame(expected) >= pace.is_worth_a_frame(expected)
    assert not pace.is_worth_a_frame(0.0)


# -- when ---------------------------------------------------------------------------------------------------------


def test_a_server_that_has_nothing_hears_at_once_where_the_tail_is_hopeless() -> None:
    pace = paced(rtt_s=0.02, round_s=0.03)
    assert not pace.is_enough([0.99])
    assert pace.is_enough([0.99, 1e-6])
    assert pace.is_enough([1e-6])


@given(survivals, seconds, seconds, st.floats(0.0001, 0.1))
def test_a_tail_that_can_only_lose_is_not_waited_for(
    likely: list[float], rtt_s: float, round_s: float, pass_s: float
) -> None:
    pace = paced(rtt_s, round_s, pass_s=pass_s)
    assert pace.is_enough([*likely, likely[-1] * 1e-5])


@given(survivals, seconds, seconds, st.floats(0.0001, 0.1), st.floats(0.0, 1.0))
def test_a_slower_draft_is_enough_earlier(
    likely: list[float], rtt_s: float, round_s: float, pass_s: float, more_s: float
) -> None:
    quick, slow = (paced(rtt_s, round_s, pass_s=each_s) for each_s in (pass_s, pass_s + more_s))
    assert slow.is_enough(likely) >= quick.is_enough(likely)


times = st.floats(0.0, 1e5)


@given(times, seconds, st.floats(0.0, 1.0), st.lists(st.floats(1e-6, 3.0), max_size=12))
def test_a_deadline_is_never_over_and_not_further_off_than_a_short_round(
    committed_s: float, since_s: float, rtt_s: float, rounds: list[float]
) -> None:
    pace, now_s = Pace(rtt_s=rtt_s), committed_s + since_s
    for round_s in rounds:
        pace.round_took(round_s)
    tolerance_s = 1e-9 * (1 + now_s)
    deadline_s = pace.deadline_s(committed_s, now_s)
    assert deadline_s >= now_s - tolerance_s
    if pace.short_round_s is None:
        assert deadline_s == now_s
    else:
        assert min(rounds) - 1e-12 <= pace.short_round_s <= max(rounds) + 1e-12
        assert deadline_s <= now_s + pace.short_round_s + tolerance_s


def test_commits_at_the_same_time_do_no_harm() -> None:
    pace = Pace(rtt_s=0.01)
    pace.round_took(0.0)
    assert pace.deadline_s(5.0, 6.0) == 6.0
    assert pace.horizon(5, 32) >= 5
    assert isinstance(pace.is_enough([0.9, 0.8]), bool)


def test_a_short_round_is_learnt_at_once_and_a_long_one_slowly() -> None:
    pace = paced(round_s=0.1)
    pace.round_took(0.02)
    assert pace.short_round_s is not None
    after_short_s = pace.short_round_s
    assert after_short_s < 0.07
    pace.round_took(0.1)
    assert after_short_s < pace.short_round_s < (after_short_s + 0.1) / 2


@given(st.lists(st.tuples(st.integers(1, 8), st.floats(0, 0.5)), min_size=1), st.floats(1, 1000))
def test_a_capped_edge_drafts_no_faster(passes: list[tuple[int, float]], limit: float) -> None:
    pace = Pace(max_tokens_per_s=limit)
    now_s = total = 0.0
    for num_tokens, pause_s in passes:
        now_s = max(now_s + pause_s, pace.rest_until_s)
        assert total <= limit * now_s + 1e-6
        pace.drafted(num_tokens, now_s)
        total += num_tokens


def test_an_edge_without_a_cap_never_rests() -> None:
    pace = Pace()
    pace.drafted(8, 5.0)
    assert pace.rest_until_s == 0.0
