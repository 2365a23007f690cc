"""What the next step verifies and which requests wait, in any situation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import inf
from operator import mul
from random import Random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vllm_specedge.estimators import Smoothed
from vllm_specedge.policy.acceptance import Acceptance
from vllm_specedge.policy.decision import Decision
from vllm_specedge.policy.decision import decide as decision_on
from vllm_specedge.policy.edge_record import EdgeRecord
from vllm_specedge.policy.holding import awaited
from vllm_specedge.policy.probing import Probe
from vllm_specedge.policy.situation import (
    BUDGET_MODES,
    CAUTION,
    FAST,
    HOLDING_MODES,
    MODES,
    Awaited,
    Candidate,
    HoldLimits,
    Load,
)
from vllm_specedge.policy.situation import Situation as Everything
from vllm_specedge.policy.step_cost import KNOTS, StepCost
from vllm_specedge.policy.verifying import LEAST_GAIN, PROBE_PART

LIMITS = HoldLimits(hold_limit_s=0.1, max_slowdown=inf, max_stretch=inf)
LIMITS_OF_A_SECOND = replace(LIMITS, hold_limit_s=1.0)
STEP_S = 0.05
EPSILON = 1e-9

# -- what steps cost ----------------------------------------------------------------------------------------------


def convex_cost(first_s: float, bends: Mapping[int, float]) -> StepCost:
    """Flat, and steeper from each of these sizes on by the given seconds per token."""
    return StepCost(
        {knot: first_s + sum(slope_s * max(0, knot - size) for size, slope_s in bends.items()) for knot in KNOTS}
    )


FLAT = convex_cost(STEP_S, {})
FULL = convex_cost(0.001, {1: 0.001})
"""A saturated server: twice the tokens take twice as long."""
HALF_FULL = convex_cost(STEP_S, {1: STEP_S / 20})


@st.composite
def convex_costs(draw: st.DrawFn) -> StepCost:
    slopes = st.sampled_from([0.0, 0.0001, 0.001, 0.01])
    return convex_cost(
        draw(st.sampled_from([0.001, 0.01, 0.1])), draw(st.dictionaries(st.sampled_from(KNOTS), slopes, max_size=3))
    )


@st.composite
def learnt_costs(draw: st.DrawFn) -> StepCost:
    """A learned cost of any shape that noise can produce, with costs for requests, contexts and prompts."""
    random = Random(draw(st.integers(0, 1000)))
    cost = draw(convex_costs())
    for _ in range(draw(st.sampled_from([0, 3, 40]))):
        requests = random.randint(1, 30)
        tokens, prefilled = requests * random.randint(1, 6), random.choice([0, 0, 100])
        took_s = random.choice([0.01, 0.02]) * random.uniform(0.5, 2) + 0.0001 * (tokens + prefilled)
        is_verifying = tokens > requests
        took_s += requests * random.choice([0.0, 0.001]) * is_verifying
        cost.observe(requests, tokens + prefilled, random.randint(0, 10_000), took_s, prefilled, is_verifying)
    return cost


def is_known(cost: StepCost) -> bool:
    return cost(1, 1, 0) > 0.0


costs = st.just(StepCost()) | convex_costs() | learnt_costs()

# -- who could decode ---------------------------------------------------------------------------------------------

seconds = st.integers(0, 30).map(lambda number: number / 100)
chances = st.integers(0, 10).map(lambda number: number / 10)
limits_of_any_kind = st.builds(
    HoldLimits,
    hold_limit_s=seconds,
    mode=st.sampled_from(MODES),
    max_misses=st.integers(1, 3),
    max_slowdown=st.sampled_from([1.0, 1.15, 2.0, inf]),
    max_stretch=st.sampled_from([1.0, 1.5, 3.0, inf]),
)


def survivals_of(*rates: float) -> tuple[float, ...]:
    return tuple(accumulate(rates, mul))


drafts = st.lists(st.sampled_from([0.2, 0.5, 0.5, 0.9, 1.0]), max_size=6).map(lambda rates: survivals_of(*rates))


def acceptance_of(*rates: float) -> Acceptance:
    acceptance = Acceptance()
    acceptance.rates = [*rates, *[rates[-1]] * 8][:8]
    return acceptance


def record(
    answer_s: float | None = 0.01,
    deviation_s: float = 0.005,
    length: float = 4.0,
    hit: float = 0.0,
    punctual: float = 1.0,
    misses: int = 0,
) -> EdgeRecord:
    return EdgeRecord(
        answer_s=Smoothed(answer_s, deviation_s),
        length=Smoothed(None if answer_s is None else length),
        hit=Smoothed(hit),
        punctual=Smoothed(punctual),
        num_misses=misses,
    )


records = st.builds(record, st.none() | seconds, seconds, st.integers(1, 6), chances, chances, st.integers(0, 2))
acceptances = st.lists(chances, min_size=1, max_size=3).map(lambda rates: acceptance_of(*rates))


def decide(
    candidates: Sequence[Candidate], load: Load, cost: StepCost, speedup: float, limits: HoldLimits, now_s: float
) -> Decision:
    return decision_on(Everything(candidates, load, cost, speedup, limits, now_s))


@dataclass(frozen=True)
class Situation:
    candidates: list[Candidate]
    load: Load
    cost: StepCost
    speedup: float
    limits: HoldLimits
    now_s: float

    def decide(self) -> Decision:
        return decide(self.candidates, self.load, self.cost, self.speedup, self.limits, self.now_s)

    @property
    def num_rows(self) -> int:
        return len(self.candidates) + self.load.num_others

    def step_s(self, num_verified: int = 0) -> float:
        size = self.num_rows + self.load.prefill + num_verified
        verifying_s = self.cost.verifying_s(self.num_rows) if num_verified else 0.0
        return self.cost(self.num_rows, size, self.load.context, self.load.prefill) + verifying_s

    @property
    def waited_s(self) -> float:
        """Longest time that a request has waited for its next token."""
        return max([0.0, *(row.waited_s for row in self.candidates)])

    def survivals(self, lengths: Mapping[str, int]) -> list[float]:
        return [survival for row in self.candidates for survival in row.survivals[: lengths.get(row.key, 0)]]


loads = st.builds(
    Load,
    context=st.sampled_from([0, 5000]),
    num_others=st.sampled_from([0, 0, 1, 20]),
    prefill=st.sampled_from([0, 0, 1, 300]),
    is_pressed=st.sampled_from([False, False, True]),
    room=st.sampled_from([0, 5, 12, 30, 1 << 30]),
    probe=st.sampled_from(Probe),
    step_limit_s=st.sampled_from([0.01, 0.1, inf, inf]),
)


unforced = loads.filter(lambda load: load.probe is not Probe.FORCED)


@st.composite
def situations(
    draw: st.DrawFn,
    load: st.SearchStrategy[Load] = loads,
    cost: st.SearchStrategy[StepCost] = costs,
    limits: st.SearchStrategy[HoldLimits] = limits_of_any_kind,
) -> Situation:
    now_s, of_all, candidates = 100.0, draw(limits), []
    for order in draw(st.lists(st.integers(0, 99), unique=True, max_size=8)):
        since_s, own = now_s - draw(seconds), draw(acceptances)
        edge = draw(st.none() | records)
        expected = awaited(edge, own, since_s, draw(st.integers(1, 5)), of_all) if edge is not None else None
        priority, speedup = draw(st.sampled_from([0, 0, -1, 5])), draw(st.sampled_from([0.5, 1.0, 3.0]))
        waited_s = draw(st.sampled_from([0.0, 0.0, 0.5, 1.0])) * (now_s - since_s)
        candidates.append(Candidate(str(order), order, since_s, priority, draw(drafts), expected, speedup, waited_s))
    return Situation(candidates, draw(load), draw(cost), draw(st.sampled_from([0.5, 1.0, 2.5])), of_all, now_s)


calm = loads.map(lambda load: replace(load, prefill=0, is_pressed=False))
NOTHING_ELSE = Load()
quiet = st.just(NOTHING_ELSE)
unbounded = st.builds(Load, context=st.sampled_from([0, 5000]), num_others=st.integers(0, 40))
in_mode = {
    mode: st.builds(lambda hold_limit_s, mode=mode: replace(LIMITS, hold_limit_s=hold_limit_s, mode=mode), seconds)
    for mode in MODES
}


# -- the order of rows --------------------------------------------------------------------------------------------


@given(situations(), st.randoms(use_true_random=False))
def test_the_order_in_which_rows_are_given_changes_nothing(situation: Situation, random: Random) -> None:
    shuffled = list(situation.candidates)
    random.shuffle(shuffled)
    assert replace(situation, candidates=shuffled).decide() == situation.decide()


@given(st.sampled_from([0, 1, -3]), st.integers(1, 7), st.sampled_from(MODES))
def test_when_room_is_short_the_more_important_of_equals_goes_first_and_then_the_older(
    other_priority: int, room: int, mode: str
) -> None:
    rows = [Candidate(str(order), order, 0.0, 0, (0.9,)) for order in range(8)]
    rows[5] = rows[5]._replace(priority=other_priority)
    decision = decide(rows, Load(room=8 + room), FLAT, 1.0, HoldLimits(mode=mode), 0.0)
    ranked = sorted(rows, key=lambda row: (row.priority, row.order))
    assert decision.lengths == {row.key: 1 for row in ranked[:room]}


def test_when_room_is_short_the_tokens_most_probably_right_go_first() -> None:
    likely, unlikely = Candidate("likely", 7, 0.0, 3, (0.9, 0.8, 0.1)), Candidate("unlikely", 1, 0.0, 0, (0.5, 0.3))
    for mode in MODES:
        for room, lengths in ((1, (1, 0)), (2, (2, 0)), (3, (2, 1)), (4, (2, 2)), (9, (3, 2))):
            decision = decide([unlikely, likely], Load(room=2 + room), FLAT, 1.0, HoldLimits(mode=mode), 0.0)
            assert (decision.lengths.get("likely", 0), decision.lengths.get("unlikely", 0)) == lengths


# -- what is verified ---------------------------------------------------------------------------------------------


@given(situations())
def test_drafts_stay_within_every_bound(situation: Situation) -> None:
    decision, load = situation.decide(), situation.load
    survivals = {row.key: row.survivals for row in situation.candidates}
    assert all(0 < length <= len(survivals[key]) for key, length in decision.lengths.items())
    num_verified = sum(decision.lengths.values())
    assert num_verified <= max(0, load.room - situation.num_rows - load.prefill)


@given(situations(load=unforced, limits=limits_of_any_kind.filter(lambda limits: limits.mode in BUDGET_MODES)))
def test_a_step_with_drafts_takes_no_longer_than_it_may_with_the_wait_before_it(situation: Situation) -> None:
    lengths = situation.decide().lengths
    if not lengths or not is_known(situation.cost):
        return
    step_s = situation.step_s(sum(lengths.values()))
    took_s, load = situation.waited_s + step_s, situation.load
    assert took_s <= load.step_limit_s * (1 + EPSILON)
    made = situation.num_rows + load.prefill
    rate = (made + sum(situation.survivals(lengths))) / took_s
    is_fast = rate >= FAST * made / situation.step_s() * (1 - EPSILON)
    assert is_fast or took_s <= situation.step_s() * situation.limits.max_stretch * (1 + EPSILON)


def test_a_step_may_be_long_that_makes_tokens_come_twice_as_fast() -> None:
    """Each draft token makes the step an eighth longer; eight of them twice as long."""
    cost, limits = convex_cost(STEP_S, {1: STEP_S / 8}), HoldLimits(max_stretch=1.26)
    for right, num_verified in ((1.0, 8), (0.75, 2)):
        rows = [Candidate("r", 0, 0.0, 0, survivals_of(*[right] * 8))]
        assert decide(rows, NOTHING_ELSE, cost, 1.0, limits, 0.0).lengths == {"r": num_verified}


@given(situations(load=unforced, limits=limits_of_any_kind.filter(lambda limits: limits.mode in BUDGET_MODES)))
def test_nobody_s_tokens_come_much_slower_because_of_drafts_than_those_before_came_sooner(situation: Situation) -> None:
    lengths = situation.decide().lengths
    if not lengths or not is_known(situation.cost):
        return
    took_s = situation.waited_s + situation.step_s(sum(lengths.values()))
    slowdown = took_s / situation.step_s() / situation.limits.max_slowdown
    assert slowdown <= 1 + EPSILON or not situation.load.num_others
    for row in situation.candidates:
        assert row.key in lengths or slowdown <= max(1.0, row.speedup) + EPSILON


def test_a_request_whose_draft_is_not_verified_is_not_slowed_as_one_whose_draft_is() -> None:
    likely = [Candidate(str(order), order, 0.0, 0, survivals_of(*[0.95] * 6)) for order in range(3)]
    unlikely = Candidate("unlikely", 9, 0.0, 0, (0.4, 0.3))
    cost, limits = convex_cost(STEP_S, {1: STEP_S / 10}), HoldLimits(max_slowdown=1.15)
    lengths = decide([*likely, unlikely], NOTHING_ELSE, cost, 1.0, limits, 0.0).lengths
    assert "unlikely" not in lengths
    assert cost(4, 4 + sum(lengths.values()), 0) <= 1.15 * cost(4, 4, 0) * (1 + EPSILON)


@pytest.mark.parametrize(
    ("speedup", "num_others", "num_verified"), [(1.0, 0, 3), (1.2, 0, 7), (1.2, 1, 3), (9.0, 0, 8)]
)
def test_drafts_slow_a_request_that_has_none_only_if_it_was_faster_of_late(
    speedup: float, num_others: int, num_verified: int
) -> None:
    """Each draft token makes the step a twentieth longer."""
    rows = [
        Candidate("has", 0, 0.0, 0, survivals_of(*[1.0] * 8), speedup=9.0),
        Candidate("has not", 1, 0.0, speedup=speedup),
    ]
    cost = convex_cost(STEP_S, {2 + num_others: STEP_S / 20})
    load, limits = Load(num_others=num_others), HoldLimits(max_slowdown=1.151)
    assert decide(rows, load, cost, 1.0, limits, 0.0).lengths == {"has": num_verified}


def test_who_has_a_draft_in_a_step_may_have_a_longer_one() -> None:
    """Its draft pays for it, or it would not be verified; in a request's first steps there is no other evidence."""
    cost, limits = convex_cost(STEP_S, {1: STEP_S / 5}), HoldLimits(max_slowdown=1.15, max_stretch=inf)
    alone = [Candidate("r", 0, 0.0, 0, survivals_of(*[1.0] * 8))]
    assert decide(alone, NOTHING_ELSE, cost, 1.0, limits, 0.0).lengths == {"r": 8}
    with_another = [*alone, Candidate("other", 1, 0.0)]
    beside = convex_cost(STEP_S, {2: STEP_S / 5})
    assert decide(with_another, NOTHING_ELSE, beside, 1.0, limits, 0.0).lengths == {}


def test_a_probe_does_not_make_a_step_longer_than_it_may_unless_it_is_forced() -> None:
    rows = [Candidate(str(order), order, 0.0, 0, (0.9, 0.8)) for order in range(16)]
    for load, limits in (
        (Load(probe=Probe.VERIFY, step_limit_s=0.9 * FULL(16, 16, 0)), HoldLimits(mode="budget")),
        (Load(probe=Probe.VERIFY), HoldLimits(mode="budget", max_stretch=1.0)),
        (Load(probe=Probe.VERIFY), HoldLimits(mode="budget", max_slowdown=1.0)),
    ):
        assert decide(rows, load, FULL, 1.0, limits, 0.0).lengths == {}
        forced = decide(rows, replace(load, probe=Probe.FORCED), FULL, 1.0, limits, 0.0).lengths
        assert sum(forced.values()) == len(rows) // PROBE_PART
    for limits, num_verified in ((HoldLimits(max_stretch=1.1), 1), (HoldLimits(max_slowdown=1.13), 2)):
        assert sum(decide(rows, Load(probe=Probe.VERIFY), FULL, 1.0, limits, 0.0).lengths.values()) == num_verified


@given(situations())
def test_a_forced_probe_verifies_a_little_whatever_it_seems_to_cost(situation: Situation) -> None:
    """The estimated cost may be wrong, and would stay wrong without a probe."""
    forced = replace(situation, load=replace(situation.load, probe=Probe.FORCED)).decide()
    plain = replace(situation, load=replace(situation.load, probe=Probe.NONE)).decide()
    num_rows = len(situation.candidates) + situation.load.num_others
    num_tokens = sum(len(row.survivals) for row in situation.candidates)
    has_room = situation.load.room > num_rows + situation.load.prefill
    if plain.lengths or forced.wait_until_s is not None or not num_tokens or not has_room:
        return
    number = sum(forced.lengths.values())
    assert 1 <= number <= max(1, num_rows // PROBE_PART)


unprobed = loads.map(
    lambda load: replace(load, probe=Probe.NONE if load.probe in (Probe.VERIFY, Probe.FORCED) else load.probe)
)


@given(situations(load=unprobed, limits=in_mode["budget"]))
def test_what_is_verified_gives_no_fewer_tokens_a_second_than_a_plain_step(situation: Situation) -> None:
    """With prompt tokens and without them."""
    assume(is_known(situation.cost) and situation.candidates)
    survivals = situation.survivals(situation.decide().lengths)
    for made in (situation.num_rows, situation.num_rows + situation.load.prefill):
        rate = (made + sum(survivals)) / situation.step_s(len(survivals))
        assert rate >= made / situation.step_s() * (1 - EPSILON)


@given(situations(load=unbounded, cost=convex_costs(), limits=in_mode["budget"]))
def test_neither_one_token_more_nor_one_less_gives_more_tokens_a_second(situation: Situation) -> None:
    """If the time of verifying is weighted a little more than its estimate."""

    def rate(survivals: Sequence[float]) -> float:
        step_s = situation.step_s()
        growth_s = CAUTION * (situation.step_s(len(survivals)) - step_s)
        return (situation.num_rows + sum(survivals)) / (step_s + growth_s)

    assume(situation.candidates)
    lengths = situation.decide().lengths
    best = max(rate(situation.survivals(lengths)), (1 + LEAST_GAIN) * rate([]))
    for row in situation.candidates:
        length = lengths.get(row.key, 0)
        for other in (length - 1, length + 1):
            if 0 <= other <= len(row.survivals):
                assert rate(situation.survivals({**lengths, row.key: other})) <= best * (1 + 1e-6)


def test_a_curve_that_is_flat_up_to_a_size_is_filled_up_to_it() -> None:
    rows = [Candidate(str(order), order, 0.0, 0, survivals_of(*[0.8] * 6)) for order in range(4)]
    cost = convex_cost(STEP_S, {16: STEP_S})
    assert decide(rows, NOTHING_ELSE, cost, 1.0, LIMITS, 0.0).lengths == {row.key: 3 for row in rows}


@given(situations(load=unbounded, cost=convex_costs(), limits=in_mode["budget"]), st.integers(1, 50))
def test_more_requests_beside_never_mean_more_draft_tokens(situation: Situation, more: int) -> None:
    busier = replace(situation, load=replace(situation.load, num_others=situation.load.num_others + more))
    assert sum(busier.decide().lengths.values()) <= sum(situation.decide().lengths.values())


@given(situations(load=unbounded, cost=convex_costs(), limits=in_mode["budget"]), st.integers(1, 500))
def test_more_of_a_prompt_never_means_more_draft_tokens(situation: Situation, more: int) -> None:
    """It makes the step longer, but its tokens count as generated."""
    busier = replace(situation, load=replace(situation.load, prefill=more))
    assert sum(busier.decide().lengths.values()) <= sum(situation.decide().lengths.values())


@given(situations(load=quiet, cost=st.just(FLAT), limits=in_mode["budget"]))
def test_where_more_tokens_cost_nothing_all_are_verified(situation: Situation) -> None:
    """Unless all of them together would gain next to nothing."""
    load, gained = situation.load, sum(sum(row.survivals) for row in situation.candidates)
    assume(gained > 1.01 * LEAST_GAIN * (len(situation.candidates) + load.num_others + load.prefill))
    assert situation.decide().lengths == {row.key: len(row.survivals) for row in situation.candidates if row.survivals}


@pytest.mark.parametrize(("gain", "is_worth_it"), [(0.95, False), (1.1, False), (1.2, False), (1.5, True)])
def test_a_draft_that_just_about_pays_is_left_out(gain: float, is_worth_it: bool) -> None:
    cost = convex_cost(STEP_S, {4: STEP_S / 8})  # a token in a step of four is worth a quarter of it
    rows = [Candidate(str(order), order, 0.0, 0, (0.5 * gain,) if not order else ()) for order in range(4)]
    assert decide(rows, NOTHING_ELSE, cost, 1.0, LIMITS, 0.0).lengths == ({"0": 1} if is_worth_it else {})


class CostlyToVerify(StepCost):
    """If anything is verified, each request's rows pass through the rejection sampler."""

    def verifying_s(self, requests: int) -> float:
        return requests * STEP_S / 50


@pytest.mark.parametrize(("num_drafts", "is_worth_it"), [(1, False), (2, False), (6, True)])
def test_what_verifying_costs_at_all_must_come_back(num_drafts: int, is_worth_it: bool) -> None:
    """A tenth of a step for five others and this one: less than one draft gains, more than six do."""
    cost = CostlyToVerify(dict.fromkeys(KNOTS, STEP_S))
    rows = [Candidate(str(order), order, 0.0, 0, (0.2,) if order < num_drafts else ()) for order in range(6)]
    lengths = decide(rows, NOTHING_ELSE, cost, 1.0, replace(LIMITS, max_slowdown=2.0), 0.0).lengths
    assert sum(lengths.values()) == num_drafts * is_worth_it


class WithGap(StepCost):
    """A synchronous step takes half as long again."""

    @property
    def gap_s(self) -> float:
        return STEP_S / 2


@pytest.mark.parametrize(("num_drafts", "is_worth_it"), [(1, False), (6, True)])
def test_the_gap_must_come_back_unless_the_step_has_it_anyway(num_drafts: int, is_worth_it: bool) -> None:
    cost = WithGap(dict.fromkeys(KNOTS, STEP_S))
    rows = [Candidate(str(order), order, 0.0, 0, (0.9,) if order < num_drafts else ()) for order in range(6)]
    limits = replace(LIMITS, max_slowdown=4.0, max_stretch=4.0)

    def num_verified(is_synchronous: bool) -> int:
        load = replace(NOTHING_ELSE, is_synchronous=is_synchronous)
        return sum(decide(rows, load, cost, 1.0, limits, 0.0).lengths.values())

    assert num_verified(is_synchronous=False) == num_drafts * is_worth_it
    assert num_verified(is_synchronous=True) == num_drafts


def test_an_idle_server_verifies_the_longest_drafts() -> None:
    cost = convex_cost(STEP_S, {1: STEP_S / 200, 64: STEP_S / 20})
    rows = [Candidate("r", 0, 0.0, 0, survivals_of(*[0.8] * 16))]
    assert decide(rows, NOTHING_ELSE, cost, 1.0, LIMITS, 0.0).lengths == {"r": 16}


def are_uncertain(situation: Situation) -> bool:
    return all(survival < 1.0 for row in situation.candidates for survival in row.survivals)


@given(situations(load=unbounded, cost=st.just(FULL), limits=in_mode["budget"]).filter(are_uncertain))
def test_a_full_server_verifies_nothing(situation: Situation) -> None:
    assert situation.decide().lengths == {}


def test_a_full_server_that_computes_a_prompt_verifies_nothing() -> None:
    """Not even a draft that is right half the time."""
    rows = [Candidate(str(order), order, 0.0, 0, (0.5,)) for order in range(10)]
    assert decide(rows, Load(prefill=100), FULL, 1.0, LIMITS, 0.0).lengths == {}


@given(situations(cost=st.just(StepCost()), limits=in_mode["budget"]))
def test_before_anything_is_known_of_steps_all_that_fits_is_verified(situation: Situation) -> None:
    assert situation.decide() == replace(situation, limits=HoldLimits(mode="never-wait")).decide()


@pytest.mark.parametrize("mode", ["wait", "never-wait"])
def test_without_a_budget_all_that_fits_is_verified_whatever_it_costs(mode: str) -> None:
    rows = [Candidate(str(order), order, 0.0, 0, (0.3, 0.1)) for order in range(6)]
    limits = HoldLimits(mode=mode, max_stretch=1.0)
    for load, num_verified in ((NOTHING_ELSE, 12), (Load(room=13, num_others=2), 5)):
        lengths = decide(rows, replace(load, step_limit_s=0.001), FULL, 1.0, limits, 0.0).lengths
        assert sum(lengths.values()) == num_verified


@pytest.mark.parametrize(("num_rows", "num_probed"), [(1, 1), (7, 1), (16, 2), (80, 80 // PROBE_PART)])
def test_a_probe_verifies_a_little_where_nothing_seems_to_pay(num_rows: int, num_probed: int) -> None:
    rows = [Candidate(str(order), order, 0.0, 0, (0.9, 0.8)) for order in range(num_rows)]
    probing, without_room = Load(probe=Probe.VERIFY), Load(probe=Probe.VERIFY, room=num_rows)
    for load, number in ((NOTHING_ELSE, 0), (probing, num_probed), (without_room, 0)):
        assert sum(decide(rows, load, FULL, 1.0, LIMITS, 0.0).lengths.values()) == number


@given(situations(load=quiet, cost=convex_costs(), limits=in_mode["budget"]))
def test_a_probe_changes_nothing_where_something_pays(situation: Situation) -> None:
    decision = situation.decide()
    assume(decision.lengths)
    assert replace(situation, load=Load(probe=Probe.VERIFY)).decide() == decision


@given(situations(cost=convex_costs() | learnt_costs().filter(is_known)))
def test_a_plain_probe_verifies_nothing_unless_all_is_verified_whatever_it_costs(situation: Situation) -> None:
    lengths = replace(situation, load=replace(situation.load, probe=Probe.PLAIN)).decide().lengths
    if situation.limits.mode in BUDGET_MODES:
        assert lengths == {}
    else:
        assert lengths == replace(situation, load=replace(situation.load, probe=Probe.NONE)).decide().lengths


# -- who waits ----------------------------------------------------------------------------------------------------


@given(situations())
def test_a_hold_ends_after_now_and_within_the_limit_of_its_request(situation: Situation) -> None:
    decision = situation.decide()
    since_s = {row.key: row.since_s for row in situation.candidates}
    for key, until_s in decision.holds.items():
        assert situation.now_s < until_s <= since_s[key] + situation.limits.hold_limit_s + EPSILON
    assert not decision.holds.keys() & decision.lengths.keys()


@given(situations())
def test_unless_all_wait_somebody_runs(situation: Situation) -> None:
    decision, keys = situation.decide(), {row.key for row in situation.candidates}
    if decision.wait_until_s is None:
        assert decision.holds.keys() < keys or situation.load.num_others or not keys
    else:
        assert decision.holds.keys() == keys != set()
        assert situation.now_s < decision.wait_until_s == min(decision.holds.values())
        assert not situation.load.num_others or situation.limits.mode == "auto"


@given(situations(load=calm), st.lists(records, min_size=8, max_size=8), st.sampled_from([0.001, 0.02, 0.07]))
def test_nobody_starves_while_others_come_back_again_and_again(
    situation: Situation, edges: list[EdgeRecord], step_s: float
) -> None:
    """A step starts whenever it may; a request that ran has a new token, no draft, and an edge about to answer."""
    assume(situation.candidates)
    limits, rows = situation.limits, [row._replace(since_s=situation.now_s) for row in situation.candidates]
    now_s = situation.now_s
    for _ in range(60):
        rows = [
            row._replace(survivals=(), awaited=awaited(edge, Acceptance(), row.since_s, 4, limits))
            for row, edge in zip(rows, edges, strict=False)
        ]
        decision = replace(situation, candidates=rows, now_s=now_s).decide()
        if decision.wait_until_s is not None:
            assert decision.wait_until_s > now_s
            now_s = decision.wait_until_s
            continue
        now_s += step_s
        rows = [row if row.key in decision.holds else row._replace(since_s=now_s) for row in rows]
        assert all(now_s - row.since_s <= limits.hold_limit_s + step_s + EPSILON for row in rows)


@given(situations())
def test_whoever_has_waited_for_the_limit_is_not_held(situation: Situation) -> None:
    late = [row._replace(since_s=situation.now_s - situation.limits.hold_limit_s) for row in situation.candidates[:1]]
    decision = replace(situation, candidates=[*late, *situation.candidates[1:]]).decide()
    assert all(row.key not in decision.holds for row in late if situation.limits.mode == "auto")
    assert decision.wait_until_s is None or not late or situation.limits.mode == "wait"


@given(situations(), st.sampled_from([Load(prefill=1), Load(prefill=300), Load(is_pressed=True)]))
def test_while_prompts_are_computed_or_wait_nobody_is_held(situation: Situation, load: Load) -> None:
    decision = replace(situation, load=load).decide()
    assert decision.holds == {}
    assert decision.wait_until_s is None


@given(situations(load=calm, limits=limits_of_any_kind.filter(lambda limits: limits.mode != "wait")))
def test_who_never_waits_never_holds(situation: Situation) -> None:
    for limits in (HoldLimits(mode="never-wait"), HoldLimits(mode="budget"), HoldLimits(hold_limit_s=0.0)):
        decision = replace(situation, limits=limits).decide()
        assert decision.holds == {}
        assert decision.wait_until_s is None


@given(situations(load=calm, limits=in_mode["wait"]))
def test_who_waits_holds_every_request_that_has_no_draft_until_its_limit(situation: Situation) -> None:
    decision = situation.decide()
    for row in situation.candidates:
        until_s = row.since_s + situation.limits.hold_limit_s
        is_held = row.awaited is not None and row.key not in decision.lengths and situation.now_s < until_s
        assert decision.holds.get(row.key) == (until_s if is_held else None)


def one(expected: Awaited | None, survivals: Sequence[float] = (), since_s: float = 0.0) -> list[Candidate]:
    return [Candidate("r", 0, since_s, 0, survivals, expected)]


def is_waited_for(
    edge: EdgeRecord,
    cost: StepCost = FLAT,
    own: Acceptance | None = None,
    limits: HoldLimits = LIMITS,
    load: Load = NOTHING_ELSE,
    now_s: float = 0.0,
    speedup: float = 1.0,
) -> bool:
    """Whether the only request of a server waits."""
    expected = awaited(edge, own or acceptance_of(0.6), 0.0, 8, limits)
    decision = decide(one(expected), load, cost, speedup, limits, now_s)
    assert (decision.wait_until_s is not None) == bool(decision.holds)
    return bool(decision.holds)


def test_a_quick_punctual_and_good_edge_is_waited_for_by_an_idle_server_and_no_other() -> None:
    assert is_waited_for(record())
    assert not is_waited_for(record(answer_s=0.09))
    assert not is_waited_for(record(deviation_s=0.02, punctual=0.1))
    assert not is_waited_for(record(), own=acceptance_of(0.0))
    assert not is_waited_for(record(), own=acceptance_of(0.02))
    assert not is_waited_for(record(answer_s=None))
    assert not is_waited_for(record(misses=2))
    assert is_waited_for(record(misses=1))


def test_a_draft_is_not_waited_for_where_the_step_is_short_or_verifying_it_does_not_pay() -> None:
    assert not is_waited_for(record(), cost=convex_cost(0.005, {}))
    assert not is_waited_for(record(), cost=FULL)
    assert not is_waited_for(record(), cost=StepCost())


def test_a_draft_that_is_there_is_verified_now() -> None:
    expected = awaited(record(), acceptance_of(0.6), 0.0, 8, LIMITS)
    decision = decide(one(expected, (0.6,)), NOTHING_ELSE, FLAT, 1.0, LIMITS, 0.0)
    assert decision == Decision(lengths={"r": 1})


def test_a_draft_that_would_be_of_use_after_the_next_token_too_is_not_waited_for() -> None:
    """The edge has drafted ahead, and always has the target's next tokens."""
    assert not is_waited_for(record(hit=1.0))
    assert is_waited_for(record(hit=1.0), speedup=3.0)  # a plain step would make less than the average one


def test_a_wait_lasts_until_the_answer_is_late_or_the_limit_is_reached() -> None:
    for edge, until_s in ((record(), 0.03), (record(deviation_s=0.05), 0.1), (record(0.02, 0.01), 0.06)):
        decision = decide(one(awaited(edge, acceptance_of(0.6), 0.0, 8, LIMITS)), NOTHING_ELSE, FLAT, 1.0, LIMITS, 0.0)
        assert decision.wait_until_s == pytest.approx(until_s)
        assert decision.holds == {"r": decision.wait_until_s}


def test_a_wait_makes_no_step_longer_than_it_may() -> None:
    for limits, load in (
        (replace(LIMITS, max_stretch=1.3), NOTHING_ELSE),
        (replace(LIMITS, max_slowdown=1.3), NOTHING_ELSE),
        (LIMITS, Load(step_limit_s=1.3 * STEP_S)),
    ):
        expected = awaited(record(deviation_s=0.05), acceptance_of(0.6), 0.0, 8, limits)
        decision = decide(one(expected), load, FLAT, 1.0, limits, 0.0)
        assert decision.wait_until_s == pytest.approx(0.3 * STEP_S)
    assert not is_waited_for(record(), limits=replace(LIMITS, max_stretch=1.1))
    assert not is_waited_for(record(), limits=replace(LIMITS, max_slowdown=1.1))
    assert not is_waited_for(record(), load=Load(step_limit_s=1.1 * STEP_S))


def test_a_request_that_was_faster_of_late_may_wait_longer() -> None:
    expected = awaited(record(), acceptance_of(0.6), 0.0, 8, HoldLimits())
    for speedup, is_held in ((1.0, False), (1.2, True)):
        rows = [row._replace(speedup=speedup) for row in one(expected)]
        assert bool(decide(rows, NOTHING_ELSE, FLAT, 1.0, HoldLimits(), 0.0).holds) == is_held


def test_a_wait_and_the_step_that_verifies_what_it_brought_take_no_longer_together_than_a_step_may() -> None:
    cost, limits = convex_cost(STEP_S, {2: STEP_S / 20}), replace(LIMITS, max_stretch=1.3)
    expected = awaited(record(deviation_s=0.001), acceptance_of(0.6), 0.0, 8, limits)
    now_s = decide(one(expected), NOTHING_ELSE, cost, 1.0, limits, 0.0).wait_until_s
    assert now_s is not None
    rows = [row._replace(waited_s=now_s) for row in one(None, survivals_of(0.6, *[0.3] * 7))]
    lengths = decide(rows, NOTHING_ELSE, cost, 1.0, limits, now_s).lengths
    assert lengths
    assert now_s + cost(1, 1 + sum(lengths.values()), 0) <= 1.3 * cost(1, 1, 0) * (1 + EPSILON)


@pytest.mark.parametrize(("token_s", "until_s"), [(0.0, 0.15), (0.02, 0.13), (0.149, 0.001), (0.151, None)])
def test_a_wait_leaves_time_to_verify_a_token_of_what_it_brings(token_s: float, until_s: float | None) -> None:
    """Each further token makes a plain step of 0.5 s longer by `token_s`; it may take 0.65 s in total."""
    expected = Awaited(0.0, 1.0, survivals_of(1.0, 1.0), 0.0, 1.0)
    limits, cost = HoldLimits(1.0, max_slowdown=1.3), convex_cost(0.5, {1: token_s})
    decision = decide(one(expected), NOTHING_ELSE, cost, 1.0, limits, 0.0)
    assert decision.wait_until_s == (until_s if until_s is None else pytest.approx(until_s))


def test_who_has_waited_too_long_already_gets_a_plain_step() -> None:
    cost, load = convex_cost(STEP_S, {1: STEP_S / 20}), Load(step_limit_s=1.151 * STEP_S)
    for waited, num_verified in ((0.0, 3), (0.06, 1), (0.12, 0), (9.0, 0)):
        rows = [row._replace(waited_s=waited * STEP_S) for row in one(None, survivals_of(*[1.0] * 8))]
        assert sum(decide(rows, load, cost, 1.0, LIMITS, 0.0).lengths.values()) == num_verified
        decision = decide(rows, NOTHING_ELSE, cost, 1.0, HoldLimits(max_stretch=1.151), 0.0)
        assert bool(decision.lengths) == (waited < 9.0), "the wait counts where a step is long because it is fast"


waits = st.builds(
    Awaited,
    arrives_s=st.floats(0, 0.1),
    late_s=st.floats(0.1, 0.2),
    survivals=st.lists(chances, min_size=1, max_size=4).map(lambda rates: survivals_of(*rates)),
    kept=chances,
    punctual=chances,
)


@given(waits, convex_costs(), chances, chances, st.sampled_from([1.0, 3.0]))
def test_a_better_edge_is_waited_for_where_a_worse_one_is(
    worse: Awaited, cost: StepCost, part: float, rate: float, speedup: float
) -> None:
    """It answers sooner, is right more often, or more punctual."""

    def is_held(draft: Awaited) -> bool:
        return decide(one(draft), NOTHING_ELSE, cost, speedup, LIMITS_OF_A_SECOND, 0.0).wait_until_s is not None

    if not is_held(worse):
        return
    assert is_held(worse._replace(arrives_s=worse.arrives_s * part))
    assert is_held(worse._replace(late_s=0.1 + (worse.late_s - 0.1) * part))
    assert is_held(worse._replace(survivals=[max(survival, rate) for survival in worse.survivals]))
    assert is_held(worse._replace(survivals=[*worse.survivals, worse.survivals[-1] * rate]))
    assert is_held(worse._replace(punctual=max(worse.punctual, rate)))


@given(waits, st.sampled_from([0.001, 0.01, 0.1]), st.floats(1, 10), st.sampled_from([1.0, 3.0]))
def test_the_longer_a_plain_step_takes_the_more_a_draft_is_waited_for(
    draft: Awaited, step_s: float, factor: float, speedup: float
) -> None:
    if decide(one(draft), NOTHING_ELSE, convex_cost(step_s, {}), speedup, LIMITS_OF_A_SECOND, 0.0).holds:
        cost = convex_cost(step_s * factor, {})
        assert decide(one(draft), NOTHING_ELSE, cost, speedup, LIMITS_OF_A_SECOND, 0.0).holds


@given(waits, st.sampled_from([0.001, 0.01, 0.1]), st.sampled_from([1.0, 1.5, 3.0]))
def test_a_wait_begins_where_the_draft_brings_more_than_is_not_made_meanwhile(
    draft: Awaited, step_s: float, speedup: float
) -> None:
    """The renewal argument, for one request that always waits, a punctual edge and verifying that costs nothing."""
    draft, value = draft._replace(punctual=1.0), sum(draft.survivals)
    gain = value * (1 - draft.kept) + draft.kept * (speedup - 1) if value else 0.0
    loss = speedup / step_s * draft.arrives_s
    assume(abs(gain - loss) > 1e-6)
    decision = decide(one(draft), NOTHING_ELSE, convex_cost(step_s, {}), speedup, LIMITS_OF_A_SECOND, 0.0)
    assert (decision.wait_until_s is not None) == (gain > loss)


def test_the_more_requests_would_wait_for_one_draft_the_less_it_is_waited_for() -> None:
    [row] = one(awaited(record(), acceptance_of(0.6), 0.0, 8, LIMITS))
    others = [Candidate(str(order), order, 0.0) for order in range(1, 20)]
    for beside, load in ((others, NOTHING_ELSE), ([], Load(num_others=19))):
        assert decide([row, *beside], load, FLAT, 1.0, LIMITS, 0.0).wait_until_s is None
    alike = [row._replace(key=str(order), order=order) for order in range(20)]
    assert decide(alike, NOTHING_ELSE, FLAT, 1.0, LIMITS, 0.0).wait_until_s is not None


# -- groups -------------------------------------------------------------------------------------------------------


def group(arrives_s: Sequence[float], kept: float = 0.1, since_s: float = 0.0) -> list[Candidate]:
    """Requests without a draft, whose edges are expected to answer then."""
    return [
        Candidate(str(order), order, since_s, 0, (), Awaited(at_s, 0.2, survivals_of(0.9, 0.9, 0.9), kept, 1.0))
        for order, at_s in enumerate(arrives_s)
    ]


WITH_DRAFT = Candidate("ready", 99, 0.0, 0, (0.9, 0.8))


def test_a_request_whose_draft_comes_during_the_step_is_left_out_of_it() -> None:
    rows = [*group([0.8 * STEP_S]), *[WITH_DRAFT._replace(key=str(order), order=order) for order in range(1, 9)]]
    decision = decide(rows, NOTHING_ELSE, HALF_FULL, 1.0, LIMITS, 0.0)
    assert decision.holds == {"0": pytest.approx(HALF_FULL(9, 9, 0))}
    assert decision.wait_until_s is None
    assert decision.lengths.keys() == {row.key for row in rows[1:]}


@pytest.mark.parametrize(
    "rows",
    [
        group([2 * STEP_S]),
        group([0.8 * STEP_S], kept=1.0),
        group([0.8 * STEP_S], since_s=-0.06),
        [group([0.8 * STEP_S])[0]._replace(awaited=None)],
    ],
)
def test_a_request_is_not_left_out_if_its_draft_comes_later_or_keeps_or_it_has_waited_long(
    rows: list[Candidate],
) -> None:
    beside = [WITH_DRAFT._replace(key=str(order), order=order) for order in range(1, 9)]
    assert decide([*rows, *beside], NOTHING_ELSE, HALF_FULL, 1.0, LIMITS, 0.0).holds == {}


def test_of_requests_that_could_all_be_left_out_those_whose_drafts_come_last_run() -> None:
    rows, costly = group([0.033, 0.02, 0.03, 0.025, 0.034]), convex_cost(0.02, {1: 0.004})
    decision = decide(rows, NOTHING_ELSE, costly, 1.0, LIMITS, 0.0)
    assert decision == Decision(holds={"1": costly(5, 5, 0), "3": costly(5, 5, 0)})


# -- what is expected of an edge ----------------------------------------------------------------------------------


def test_nothing_is_expected_of_an_edge_before_its_first_answer() -> None:
    edge, own = EdgeRecord(), Acceptance()
    assert awaited(edge, own, 0.0, 4, LIMITS) is None
    edge.answered(0.02, in_time=True, num_tokens=3)
    draft = awaited(edge, own, 5.0, 4, LIMITS)
    assert draft is not None
    assert draft.late_s == pytest.approx(5.0 + 0.02 + 4 * 0.01)
    assert draft == Awaited(5.02, draft.late_s, [0.5, 0.25, 0.125], 0.5, 1.0)


@pytest.mark.parametrize(("length", "limit", "expected"), [(3.4, 8, 3), (3.6, 8, 4), (3.6, 2, 2), (0.0, 8, 1)])
def test_a_draft_is_expected_to_be_as_long_as_those_before_and_no_longer_than_fits(
    length: float, limit: int, expected: int
) -> None:
    draft = awaited(record(length=length), acceptance_of(0.5), 0.0, limit, LIMITS)
    assert draft is not None
    assert draft.survivals == [0.5**number for number in range(1, expected + 1)]


def test_an_edge_s_branches_make_up_for_what_its_trunk_misses() -> None:
    for first, hit, kept in ((0.5, 0.0, 0.5), (0.5, 1.0, 1.0), (0.0, 0.5, 0.5), (0.75, 0.5, 0.875)):
        draft = awaited(record(hit=hit), acceptance_of(first), 0.0, 4, LIMITS)
        assert draft is not None
        assert draft.kept == kept


@given(records, acceptances, seconds, st.integers(1, 8), limits_of_any_kind)
def test_an_answer_is_awaited_no_longer_than_a_request_may_be_held(
    edge: EdgeRecord, own: Acceptance, since_s: float, limit: int, limits: HoldLimits
) -> None:
    draft = awaited(edge, own, since_s, limit, limits)
    if limits.mode == "wait":
        assert draft == Awaited(since_s, since_s + limits.hold_limit_s, (), 0.0, 1.0)
    elif edge.answer_s.mean is None or edge.num_misses >= limits.max_misses:
        assert draft is None
    else:
        assert draft is not None
        assert draft.late_s == min(since_s + edge.late_after_s, since_s + limits.hold_limit_s)
        assert 1 <= len(draft.survivals) <= limit
        assert 0.0 <= draft.kept <= 1.0
        assert 0.0 <= draft.punctual <= 1.0


def test_an_edge_that_missed_twice_in_a_row_is_not_waited_for_until_it_is_in_time_again() -> None:
    edge = record()
    edge.missed()
    assert is_waited_for(edge)
    edge.missed()
    assert not is_waited_for(edge)
    edge.answered(0.2, in_time=False, num_tokens=4)
    assert not is_waited_for(edge)
    edge.answered(0.01, in_time=True, num_tokens=4)
    assert edge.num_misses == 0


def test_an_edge_that_is_not_waited_for_can_show_that_it_is_punctual_again() -> None:
    """Its answers arrive after the request continued without it, but no later than its record predicts."""
    edge = record()
    edge.missed()
    edge.missed()
    edge.answered(0.02, in_time=False, num_tokens=4)
    assert is_waited_for(edge)


@pytest.mark.parametrize(
    ("after_s", "in_time", "is_punctual"), [(0.2, True, True), (0.02, False, True), (0.2, False, False)]
)
def test_each_answer_shows_how_punctual_an_edge_is(after_s: float, in_time: bool, is_punctual: bool) -> None:
    """Regardless of whether the server waited for it."""
    edge = record(punctual=0.5, misses=1)
    edge.answered(after_s, in_time, num_tokens=4)
    assert edge.punctual.mean == pytest.approx(0.5 + (0.125 if is_punctual else -0.125) / 2)
    assert edge.num_misses == (0 if is_punctual else 1)


def test_an_edge_s_first_answer_is_punctual_only_if_the_request_did_not_go_on_without_it() -> None:
    for in_time in (True, False):
        edge = EdgeRecord(punctual=Smoothed(0.5))
        edge.answered(0.01, in_time, num_tokens=4)
        assert edge.punctual.mean == pytest.approx(0.5 + (0.125 if in_time else -0.125) / 2)


def test_an_edge_that_misses_again_and_again_is_less_and_less_relied_on() -> None:
    edge, limits = record(), replace(LIMITS, max_misses=1000)
    punctual = []
    for _ in range(30):
        edge.missed()
        draft = awaited(edge, Acceptance(), 0.0, 4, limits)
        assert draft is not None
        punctual.append(draft.punctual)
    assert punctual == sorted(punctual, reverse=True)
    assert punctual[-1] < 0.05
    assert not is_waited_for(edge, limits=limits)


def test_modes_are_of_four_kinds() -> None:
    assert set(HOLDING_MODES) & set(BUDGET_MODES) == {"auto"}
    assert set(HOLDING_MODES) | set(BUDGET_MODES) | {"never-wait"} == set(MODES)
