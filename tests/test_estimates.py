from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_specedge.estimates import Line, Smoothed

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
    """`part` of what the first token takes, for all the others together."""
    random, line = Random(seed), Line()
    for scale in (3.0, 1.0):  # the machine was slower once
        for _ in range(500):
            size = random.randint(1, max_size)
            true_s = scale * first_s * (1 + part * (size - 1) / (max_size - 1))
            line.observe(size, true_s * random.uniform(0.9, 1.1))
    assert line(1) == pytest.approx(first_s, rel=0.15)
    assert line(max_size) == pytest.approx(first_s * (1 + part), rel=0.15)
    assert line.slope_s == pytest.approx(first_s * part / (max_size - 1), abs=0.15 * first_s / (max_size - 1))
