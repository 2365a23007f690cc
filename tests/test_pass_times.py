"""Times of forward passes: profiled once, tracked afterwards, and used by an edge."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.drafters import Candidate
from edge_client.drafters.ngram import NgramDrafter
from edge_client.drafters.profile import in_words, profile
from edge_client.drafting.pacing import Pace
from edge_client.drafting.pass_times import PassTimes
from tests.helpers import ListSequence

INT8 = {1: 0.0190, 2: 0.0200, 4: 0.0230, 8: 0.0270}
LLAMA_CPP = {1: 0.0195, 2: 0.0400, 4: 0.0700, 8: 0.1260}
"""On a CPU, both with the 0.5B draft (issue 22)."""
profiles = st.dictionaries(st.sampled_from((1, 2, 4, 8)), st.floats(1e-4, 10.0), min_size=1)
LIKELY = [0.9, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15]


class TimedDrafter:
    """Each pass takes the next time from a list."""

    fingerprint, max_context_tokens, description = "", 4096, "timed"

    def __init__(self, durations_s: Sequence[float], max_width: int = 8) -> None:
        self.left_s, self.now_s, self.max_width = [0.0, *durations_s], 0.0, max_width
        self.opened: list[ListSequence] = []

    def clock(self) -> float:
        return self.now_s

    def open(self) -> ListSequence:
        self.opened.append(TimedSequence(self))
        return self.opened[-1]


class TimedSequence(ListSequence):
    def __init__(self, drafter: TimedDrafter) -> None:
        super().__init__(lambda tokens: [])
        self.drafter = drafter

    def append(self, tokens: Sequence[int], width: int) -> list[Candidate]:
        self.drafter.now_s += self.drafter.left_s.pop(0)
        return super().append(tokens, width)

    def branch(self, tokens: Sequence[int], parents: Sequence[int], width: int) -> list[list[Candidate]]:
        self.drafter.now_s += self.drafter.left_s.pop(0)
        return super().branch(tokens, parents, width)


def test_passes_of_each_width_are_timed_by_their_median_and_the_first_is_left_out() -> None:
    passes = [9, 1, 1, 2, 3, 90], [9, 2, 2, 3, 4, 90], [9, 3, 3, 4, 5, 90], [90, 5, 5, 6, 7, 9]
    drafter = TimedDrafter([1e-3 * each for of_width in passes for each in of_width])
    assert profile(drafter, drafter.clock) == pytest.approx({1: 0.002, 2: 0.003, 4: 0.004, 8: 0.006})
    assert len(drafter.opened[0].entries) == 64, "each pass is taken back"


def test_a_chain_only_drafter_is_profiled_by_its_one_width() -> None:
    drafter = TimedDrafter([5.0, 0.1, 0.1, 0.2, 0.3, 0.4], max_width=1)
    assert profile(drafter, drafter.clock) == pytest.approx({1: 0.1})
    assert set(profile(NgramDrafter(), lambda: 0.0)) == {1}


def test_a_slow_model_is_profiled_by_two_passes_of_a_width() -> None:
    drafter = TimedDrafter([60.0] * 8)
    assert profile(drafter, drafter.clock) == dict.fromkeys((1, 2, 4, 8), 60.0)
    assert not drafter.left_s, "no pass more"


def test_a_profile_in_words() -> None:
    assert in_words({1: 0.002, 4: 0.0035}) == "2.0 ms for 1 row, 3.5 ms for 4 rows"
    assert in_words({1: 0.002}) == "2.0 ms for 1 row (no wider passes)"


@given(profiles)
def test_what_was_profiled_is_what_passes_take(of_rows: dict[int, float]) -> None:
    times = PassTimes(of_rows)
    for rows, took_s in of_rows.items():
        assert times(rows) == pytest.approx(took_s)


@given(profiles, st.integers(1, 16))
def test_more_rows_between_two_widths_take_what_lies_between(of_rows: dict[int, float], rows: int) -> None:
    took_s = PassTimes(of_rows)(rows)
    assert took_s > 0.0
    if min(of_rows) <= rows <= max(of_rows):
        assert min(of_rows.values()) * 0.999 <= took_s <= max(of_rows.values()) * 1.001


def test_without_a_profile_nothing_is_known_until_passes_were_seen() -> None:
    times = PassTimes()
    assert times(1) == times(8) == 0.0
    times.observe(1, 0.004)
    assert times(1) == times(8) == pytest.approx(0.004)
    times.observe(8, 0.006)
    assert times(8) == pytest.approx(0.006)


@pytest.mark.parametrize("of_rows", [INT8, LLAMA_CPP], ids=["int8", "llama.cpp"])
@pytest.mark.parametrize("seen", [1, 8])
def test_a_machine_that_gets_slower_is_followed_at_all_widths(of_rows: dict[int, float], seen: int) -> None:
    times = PassTimes(of_rows)
    for _ in range(300):
        times.observe(seen, 2 * of_rows[seen])
    for rows, took_s in of_rows.items():
        assert times(rows) == pytest.approx(2 * took_s, rel=0.1)


@pytest.mark.parametrize("rows", [1, 8])
def test_one_pass_that_takes_a_hundred_times_as_long_says_little(rows: int) -> None:
    """A CUDA graph was recorded in it, or the laptop slept."""
    times = PassTimes(INT8)
    for _ in range(50):
        times.observe(rows, INT8[rows])
    times.observe(rows, 100 * INT8[rows])
    assert times(rows) == pytest.approx(INT8[rows], rel=0.1)
    for _ in range(100):
        times.observe(rows, 10 * INT8[rows])
    assert times(rows) > 5 * INT8[rows], "a machine that did get slower"


def test_a_context_that_makes_wide_passes_dearer_is_noticed() -> None:
    times = PassTimes(INT8)
    for _ in range(300):
        times.observe(1, INT8[1])
        times.observe(8, 3 * INT8[8])
    assert times(1) == pytest.approx(INT8[1], rel=0.1)
    assert times(8) == pytest.approx(3 * INT8[8], rel=0.1)


def test_rows_follow_from_what_they_cost_before_the_first_request() -> None:
    """llama.cpp's rows on a CPU are so expensive that a chain is drafted; the int8 runtime's are nearly free."""
    assert Pace(PassTimes(LLAMA_CPP)).width(LIKELY, 8) == 1
    assert Pace(PassTimes(INT8)).width(LIKELY, 8) == 8
    assert Pace().width(LIKELY, 8) == 8, "without a profile: as if rows cost nothing"
