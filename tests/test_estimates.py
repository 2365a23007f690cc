from math import e
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_specedge.estimators import Line, Rate, Smoothed

sizes = st.integers(1, 64)
took = st.floats(0, 1, allow_subnormal=False)


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


@given(st.lists(st.tuples(sizes, took), max_size=40), st.lists(st.integers(0, 4096), min_size=2, max_size=2))
@example([(10, 0.0), (20, 1.0)], [0, 1])
def test_a_line_is_never_negative_and_never_falls(seen: list[tuple[int, float]], at: list[int]) -> None:
    line = Line()
    for size, took_s in seen:
        line.observe(size, took_s)
    assert line.slope_s >= 0.0
    low, high = (line(size) for size in sorted(at))
    assert 0.0 <= low <= high + 1e-12
    assert (low > 0.0) == any(took_s > 0.0 for _, took_s in seen)


@given(st.integers(1, 10_000), st.lists(took, min_size=1, max_size=100))
def test_while_one_size_was_seen_others_are_thought_to_take_as_long(size: int, seen: list[float]) -> None:
    line = Line()
    for took_s in seen:
        line.observe(size, took_s)
    assert line.slope_s == 0.0
    assert min(seen) - 1e-9 <= line(1) == line(size) == line(2 * size) <= max(seen) + 1e-9


@given(st.floats(0.001, 0.1), st.floats(0, 1), st.integers(0, 2**32), st.sampled_from([2, 8, 64]))
def test_a_line_is_found_through_noise_and_when_it_changes(
    first_s: float, part: float, seed: int, max_size: int
) -> None:
    """The other tokens together take `part` of the first token's time."""
    random, line = Random(seed), Line()
    for scale in (3.0, 1.0):  # the machine was slower once
        for _ in range(500):
            size = random.randint(1, max_size)
            true_s = scale * first_s * (1 + part * (size - 1) / (max_size - 1))
            line.observe(size, true_s * random.uniform(0.9, 1.1))
    assert line(1) == pytest.approx(first_s, rel=0.15)
    assert line(max_size) == pytest.approx(first_s * (1 + part), rel=0.15)
    assert line.slope_s == pytest.approx(first_s * part / (max_size - 1), abs=0.15 * first_s / (max_size - 1))


MEMORY_S = 10.0
looks = st.lists(st.tuples(st.floats(0.001, 100), st.integers(0, 50)), min_size=1, max_size=40)
"""Time since the previous observation, and events in it."""


def observed(seen: list[tuple[float, int]]) -> tuple[Rate, float]:
    """A rate after these observations, and the time of the last one."""
    rate, now_s = Rate(MEMORY_S), 1000.0
    rate.observe(0, now_s)
    for span_s, num_events in seen:
        now_s += span_s
        rate.observe(num_events, now_s)
    return rate, now_s


def test_before_any_time_has_passed_there_is_no_rate() -> None:
    rate = Rate()
    assert rate.per_s == 0.0
    rate.observe(5, 100.0)  # over an unknown time
    assert rate.per_s == 0.0
    rate.observe(3, 100.0)
    assert rate.per_s == 0.0
    rate.observe(0, 102.0)
    assert 0.0 < rate.per_s <= 1.5


def test_what_came_before_the_first_look_does_not_count() -> None:
    rate = Rate()
    rate.observe(1000, 100.0)
    rate.observe(6, 102.0)
    assert rate.per_s == pytest.approx(3.0)


@given(looks)
def test_a_rate_stays_within_what_was_observed(seen: list[tuple[float, int]]) -> None:
    rates, (rate, _) = [num_events / span_s for span_s, num_events in seen], observed(seen)
    assert min(rates) * (1 - 1e-6) <= rate.per_s <= max(rates) * (1 + 1e-6)


@given(st.integers(0, 20), st.lists(st.integers(1, 40), min_size=1, max_size=40))
def test_a_rate_that_stays_the_same_is_found_however_often_it_is_looked_at(per_s: int, spans: list[int]) -> None:
    rate, _ = observed([(span, per_s * span) for span in spans])
    assert rate.per_s == pytest.approx(per_s)


@given(looks, st.integers(0, 20), st.sampled_from([1, 5, 60]))
def test_what_is_older_than_a_few_memories_is_forgotten(seen: list[tuple[float, int]], per_s: int, span: int) -> None:
    before, _ = observed(seen)
    after, _ = observed([*seen, *[(span, per_s * span)] * (60 // span)])
    assert abs(after.per_s - per_s) <= 0.05 * abs(before.per_s - per_s) + 1e-9


def test_after_as_long_as_its_memory_without_an_event_a_steady_rate_is_a_third_of_what_it_was() -> None:
    rate, now_s = observed([(0.5, 4)] * 200)
    for number in range(1, 101):
        rate.observe(0, now_s + number * MEMORY_S / 100)
    assert rate.per_s == pytest.approx(8 / e, rel=0.02)


def test_a_clock_that_stands_still_or_goes_back_does_no_harm() -> None:
    rate, now_s = observed([(1.0, 4)] * 10)
    rate.observe(4, now_s)
    rate.observe(4, now_s - 1)
    rate.observe(0, now_s + 1)
    assert rate.per_s == pytest.approx(4, rel=0.1)
