from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import isfinite
from random import Random
from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_specedge.policy.step_cost import CONTEXT_UNIT, KNOTS, StepCost, on_curve

Curve = Callable[[int], float]


def flat_then_steep(tokens: int) -> float:
    return 0.01 + 0.0002 * max(0, tokens - 64)


def straight(tokens: int) -> float:
    return 0.01 + 0.0004 * tokens


CURVES = [flat_then_steep, straight]
SIZES = (1, 5, 16, 40, 64, 100, 200, 400)


def profile_of(curve: Curve, scale: float = 1.0) -> dict[int, float]:
    return {size: scale * curve(size) for size in (1, 4, 16, 64, 256)}


def serve(
    cost: StepCost, curve: Curve, num_steps: int, seed: int = 0, noise: float = 0.1, sizes: Sequence[int] = SIZES
) -> None:
    """Steps of these sizes take the time of the curve, with noise."""
    random = Random(seed)
    for _ in range(num_steps):
        size = random.choice(sizes)
        cost.observe(1, size, 0, curve(size) * random.uniform(1 - noise, 1 + noise))


def assert_near(cost: StepCost, curve: Curve, sizes: Sequence[int], tolerance: float) -> None:
    assert [cost(1, size, 0) for size in sizes] == pytest.approx([curve(size) for size in sizes], rel=tolerance)


# -- what is learnt -----------------------------------------------------------------------------------------------


def uneven(tokens: int) -> float:
    """As SmolLM2 in float32 on one core of an EPYC: two rows take longer than four."""
    return {1: 0.047, 2: 0.056, 3: 0.043}.get(tokens, 0.026 + 0.0034 * tokens)


@pytest.mark.parametrize("seed", range(3))
def test_where_fewer_tokens_take_longer_that_is_learnt_and_makes_nothing_else_look_free(seed: int) -> None:
    cost = StepCost(profile_of(uneven))
    serve(cost, uneven, 600, seed, noise=0.05, sizes=(1, 2, 3, 4, 5, 6, 8, 12, 16))
    assert_near(cost, uneven, (1, 2, 3, 4, 6, 8, 12, 16), 0.06)
    assert cost.growth(4, 8)[-1] == pytest.approx(uneven(12) - uneven(4), rel=0.2)
    assert cost.growth(2, 2)[-1] < 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [None, 0.7, 1.5])
@pytest.mark.parametrize("curve", CURVES)
def test_a_curve_is_found_through_noise_with_a_wrong_profile_or_none(
    curve: Curve, scale: float | None, seed: int
) -> None:
    cost = StepCost(None if scale is None else profile_of(curve, scale))
    serve(cost, curve, 600, seed)
    assert_near(cost, curve, SIZES, 0.12)
    assert_near(cost, curve, (3, 10, 30, 80, 150, 300), 0.15)  # never seen, between those that were


def test_a_server_much_steeper_than_thought_is_learnt_without_a_profile() -> None:
    def steep(tokens: int) -> float:
        return 0.01 + 0.002 * tokens

    cost = StepCost()
    cost.observe(1, 1, 0, steep(1))
    serve(cost, steep, 1000, noise=0.05)
    assert_near(cost, steep, SIZES, 0.2)


@pytest.mark.parametrize("scale", [0.4, 2.5])
@pytest.mark.parametrize("curve", CURVES)
def test_sizes_never_seen_have_the_profile_s_shape_and_the_level_of_those_that_were(curve: Curve, scale: float) -> None:
    cost = StepCost(profile_of(curve, scale))
    serve(cost, curve, 600, sizes=(1, 2, 4))
    assert_near(cost, curve, (1, 2, 4), 0.1)
    assert_near(cost, curve, (16, 64, 256), 0.3)
    assert_near(cost, curve, (4000,), 0.5)


def test_without_a_profile_one_step_sets_the_scale_and_more_tokens_cost_a_little_more() -> None:
    cost = StepCost()
    cost.observe(1, 4, 0, 0.02)
    assert cost(1, 4, 0) == pytest.approx(0.02, rel=0.01)
    assert 0.019 < cost(1, 1, 0) < cost(1, 4, 0) < cost(1, 64, 0) < 0.04


@pytest.mark.parametrize("curve", CURVES)
def test_one_outlier_moves_what_is_thought_by_little(curve: Curve) -> None:
    for num_steps in (100, 3000):
        for size in (1, 16, 400):
            cost = StepCost(profile_of(curve))
            serve(cost, curve, num_steps)
            before = [cost(1, each, 0) for each in KNOTS]
            cost.observe(1, size, 0, 10 * curve(size))
            assert [cost(1, each, 0) for each in KNOTS] == pytest.approx(before, rel=0.15)


@pytest.mark.parametrize("curve", CURVES)
def test_an_outlier_leaves_nothing_more_certain_than_it_was(curve: Curve) -> None:
    """Because it may be noise; an ordinary step does."""
    for size in (1, 16, 400):
        left = []
        for factor in (1.0, 10.0, 1000.0):
            cost = StepCost(profile_of(curve))
            serve(cost, curve, 20)
            before = [cost._covariance[index][index] for index in range(len(KNOTS))]
            cost.observe(1, size, 0, factor * curve(size))
            left.append(min(cost._covariance[index][index] / was for index, was in enumerate(before)))
        assert left[0] < left[1] < left[2]
        assert left[0] < 0.95
        assert left[1:] == pytest.approx([1.0, 1.0], abs=0.01)


@pytest.mark.parametrize("curve", CURVES)
def test_an_outlier_among_the_first_steps_is_forgotten_after_some_more(curve: Curve) -> None:
    for profile in (None, profile_of(curve)):
        for size in (1, 16, 400):
            cost = StepCost(profile)
            serve(cost, curve, 5)
            cost.observe(1, size, 0, 10 * curve(size))
            serve(cost, curve, 200)
            assert_near(cost, curve, SIZES, 0.15)


@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize("sizes", [SIZES, (1, 6)])
@pytest.mark.parametrize("num_before", [100, 5000])
def test_a_machine_that_becomes_slower_or_faster_is_followed_within_some_hundred_steps(
    factor: float, sizes: Sequence[int], num_before: int
) -> None:
    def later(tokens: int) -> float:
        return factor * flat_then_steep(tokens)

    cost = StepCost(profile_of(flat_then_steep))
    serve(cost, flat_then_steep, num_before, 1, 0.03, sizes)
    assert_near(cost, flat_then_steep, sizes, 0.1)
    serve(cost, later, 800, 2, 0.03, sizes)
    assert_near(cost, later, sizes, 0.1)


def decode_s(requests: int, tokens: int, context: int) -> float:
    """Step time of a server with costs for attention and sampling."""
    return 0.01 + 0.00005 * tokens + 0.0001 * requests + 0.0003 * context / CONTEXT_UNIT


def mixed_traffic(cost: StepCost, num_steps: int, prefilled_s: float | None = None) -> None:
    """Requests with drafts and contexts of all sizes; with `prefilled_s`, now and then a part of a prompt."""
    random = Random(3)
    for _ in range(num_steps):
        requests, context = random.randint(1, 40), random.randint(0, 60_000)
        tokens = requests + random.randint(0, 5) * requests
        took_s = decode_s(requests, tokens, context)
        prefilled = random.randint(1, 400) if prefilled_s is not None and random.random() < 0.2 else 0
        took_s += prefilled * (0.00005 + (prefilled_s or 0.0))
        cost.observe(requests, tokens + prefilled, context, took_s * random.uniform(0.95, 1.05), prefilled)


def test_what_requests_and_their_contexts_take_is_learnt_where_they_vary() -> None:
    cost = StepCost()
    mixed_traffic(cost, 3000)
    for requests, tokens, context in ((1, 5, 0), (1, 5, 60_000), (30, 60, 0), (30, 60, 60_000), (30, 180, 30_000)):
        assert cost(requests, tokens, context) == pytest.approx(decode_s(requests, tokens, context), rel=0.12)
    assert cost(10, 40, 50_000) - cost(10, 40, 0) == pytest.approx(0.0003 * 50_000 / CONTEXT_UNIT, rel=0.2)
    assert cost(40, 60, 0) - cost(10, 60, 0) == pytest.approx(30 * 0.0001, rel=0.5)


@pytest.mark.parametrize("each_s", [0.0, 0.0002])
def test_what_verifying_costs_beside_its_tokens_is_learnt(each_s: float) -> None:
    """On one core the rejection sampler takes 0.2 ms for each request if any has a draft (benchmarks/LOG.md)."""
    random, cost = Random(4), StepCost(profile_of(straight))
    for _ in range(2000):
        requests, num_drafts = random.choice([1, 4, 16, 32]), random.choice([0, 1, 3, 8, 20])
        took_s = straight(requests + num_drafts) + requests * each_s * (num_drafts > 0)
        cost.observe(requests, requests + num_drafts, 0, took_s * random.uniform(0.95, 1.05), 0, num_drafts > 0)
    assert cost.verifying_s(32) == pytest.approx(32 * each_s, rel=0.3, abs=0.0008)
    assert cost.growth(32, 8)[-1] == pytest.approx(straight(40) - straight(32), rel=0.3)


@pytest.mark.parametrize("prefilled_s", [-0.00003, 0.0, 0.0002])
def test_prompts_do_not_spoil_what_is_thought_of_decoding(prefilled_s: float) -> None:
    """A prompt token may take more time than a decoded one, for its attention, or less, as it is not sampled."""
    cost = StepCost()
    mixed_traffic(cost, 3000, prefilled_s)
    for requests, tokens, context in ((1, 5, 0), (1, 5, 60_000), (30, 60, 0), (30, 180, 30_000)):
        assert cost(requests, tokens, context) == pytest.approx(decode_s(requests, tokens, context), rel=0.15)
    expected_s = decode_s(10, 20, 0) + 300 * (0.00005 + prefilled_s)
    assert cost(10, 320, 0, 300) == pytest.approx(expected_s, rel=0.15)


# -- whatever is seen ---------------------------------------------------------------------------------------------

seconds = st.floats(1e-5, 10, allow_subnormal=False)
sizes = st.integers(1, 300) | st.integers(1, 20_000)
contexts = st.integers(0, 2_000_000)
Seen: TypeAlias = tuple[int, int, int, float, int, bool]


@st.composite
def steps(draw: st.DrawFn) -> Seen:
    tokens = draw(sizes)
    prefilled = draw(st.just(0) | st.integers(0, tokens))
    return draw(st.integers(1, tokens)), tokens, draw(contexts), draw(seconds), prefilled, draw(st.booleans())


profiles = st.none() | st.dictionaries(st.sampled_from([1, 4, 16, 64, 256]), seconds, min_size=1)
histories = st.lists(steps(), max_size=60)


def seen(profile: Mapping[int, float] | None, history: list[Seen]) -> StepCost:
    cost = StepCost(profile)
    for step in history:
        cost.observe(*step)
    return cost


@given(profiles, histories, st.lists(st.tuples(st.integers(1, 500), sizes, contexts), min_size=1, max_size=20))
def test_whatever_is_seen_a_step_takes_a_finite_time_above_zero(
    profile: dict[int, float] | None,
    history: list[Seen],
    at: list[tuple[int, int, int]],
) -> None:
    cost = seen(profile, history)
    is_known = profile is not None or bool(history)
    for requests, tokens, context in at:
        for prefilled in (0, tokens // 2, tokens):
            took_s = cost(requests, tokens, context, prefilled)
            assert isfinite(took_s)
            assert (took_s > 0.0) == is_known


@given(profiles, histories, st.lists(sizes, min_size=2, max_size=20), st.integers(0, 500), contexts)
def test_more_tokens_never_take_less_time_while_no_size_is_known_by_itself(
    profile: dict[int, float] | None,
    history: list[Seen],
    at: list[int],
    requests: int,
    context: int,
) -> None:
    cost = seen(profile, history[:3])
    took = [cost(requests, tokens, context) for tokens in sorted(at)]
    assert all(less_s <= more_s * (1 + 1e-9) for less_s, more_s in pairwise(took))


@given(profiles, histories, st.integers(1, 9000), st.integers(0, 400), st.integers(0, 500), contexts)
def test_the_growth_of_a_step_is_what_the_larger_step_takes_more(
    profile: dict[int, float] | None,
    history: list[Seen],
    tokens: int,
    more: int,
    requests: int,
    context: int,
) -> None:
    cost = seen(profile, history)
    base_s = cost(requests, tokens, context)
    longer = [cost(requests, tokens + number, context) - base_s for number in range(1, more + 1)]
    assert cost.growth(tokens, more) == pytest.approx(longer, rel=1e-6, abs=1e-6 * (1 + base_s))


@given(profiles, histories, st.integers(1, 500))
def test_verifying_never_makes_a_step_shorter_and_costs_each_request_the_same(
    profile: dict[int, float] | None, history: list[Seen], requests: int
) -> None:
    cost = seen(profile, history)
    assert cost.verifying_s(1) >= 0.0
    assert cost.verifying_s(requests) == pytest.approx(requests * cost.verifying_s(1))


def test_the_parts_are_what_a_step_is_made_of() -> None:
    cost = StepCost()
    mixed_traffic(cost, 500)
    curve_s, request_s, context_s, _ = cost.parts_s
    for requests, tokens, context in ((1, 1, 0), (7, 30, 9000), (40, 200, 60_000)):
        made_of = on_curve(curve_s, tokens) + requests * request_s + context / CONTEXT_UNIT * context_s
        assert cost(requests, tokens, context) == pytest.approx(made_of)


def test_before_anything_is_known_everything_takes_no_time() -> None:
    cost = StepCost()
    assert cost.parts_s == ([], 0.0, 0.0, 0.0)
    assert cost(1, 1, 0) == 0.0
    assert cost.growth(1, 3) == [0.0, 0.0, 0.0]
    assert cost.growth(1, 0) == cost.growth(1, -1) == []
    cost.observe(0, 0, 0, 0.1)
    cost.observe(1, 1, 0, 0.0)
    cost.observe(1, 1, 0, -1.0)
    assert cost(1, 1, 0) == StepCost({})(1, 1, 0) == 0.0


def assert_bounded(cost: StepCost) -> None:
    """Estimates never get less certain than the prior, and certainty is never negative."""
    for index, (row, prior) in enumerate(zip(cost._covariance, cost._prior, strict=True)):
        assert 0.0 <= row[index] <= prior[index] * (1 + 1e-6)
        for other, value in enumerate(row):
            assert value**2 <= row[index] * cost._covariance[other][other] * (1 + 1e-6) + 1e-18
            assert value == pytest.approx(cost._covariance[other][index], rel=1e-6, abs=1e-12)


def test_what_is_uncertain_stays_bounded_over_very_many_steps() -> None:
    random = Random(0)
    of_one_size, of_all = StepCost(profile_of(straight)), StepCost()
    for _ in range(20_000):
        of_one_size.observe(1, 6, 1000, 0.01)
        requests = random.randint(1, 64)
        tokens, prefilled = requests * random.randint(1, 8), random.choice([0, 0, 0, 500])
        took_s = 0.01 * random.lognormvariate(0, 1)
        of_all.observe(requests, tokens + prefilled, random.randint(0, 200_000), took_s, prefilled)
    assert_bounded(of_one_size)
    assert_bounded(of_all)
    assert of_one_size(1, 6, 1000) == pytest.approx(0.01, rel=0.01)


def test_what_a_synchronous_step_adds_is_learnt_apart() -> None:
    cost = StepCost({1: 0.02, 64: 0.02})
    for number in range(60):
        cost.observe(2, 2, 100, 0.02 + 0.003 * (number % 2), has_gap=bool(number % 2))
    assert cost.gap_s == pytest.approx(0.003, rel=0.1)
    assert cost(2, 2, 100) == pytest.approx(0.02, rel=0.02)
    assert not cost.verifying_s(2)
