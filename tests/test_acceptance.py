from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_specedge.policy.acceptance import MAX_DEPTH, MAX_SEEN, OWN_WEIGHT, PRIOR_RATE, Acceptance

drafts = st.tuples(st.integers(0, 12), st.integers(0, 12)).map(lambda pair: (min(pair), max(pair)))
"""Number of leading right tokens of a draft, and of tokens for which that is known."""
histories = st.lists(drafts, max_size=60)


def learnt(history: list[tuple[int, int]], parent: Acceptance | None = None) -> Acceptance:
    acceptance = Acceptance(parent)
    for num_right, num_known in history:
        acceptance.observe(num_right, num_known)
    return acceptance


def test_before_anything_was_seen_half_of_the_tokens_are_thought_to_be_right() -> None:
    acceptance = Acceptance()
    assert acceptance.survivals(3) == [PRIOR_RATE, PRIOR_RATE**2, PRIOR_RATE**3] == [0.5, 0.25, 0.125]
    assert acceptance.survivals(0) == []


@given(histories, st.lists(histories, max_size=3), st.integers(0, 20))
def test_a_longer_draft_survives_no_more_often_and_chances_are_chances(
    history: list[tuple[int, int]], elders: list[list[tuple[int, int]]], num_tokens: int
) -> None:
    parent = None
    for elder in elders:
        parent = learnt(elder, parent)
    survivals = learnt(history, parent).survivals(num_tokens)
    assert len(survivals) == num_tokens
    assert all(0.0 < survival < 1.0 for survival in survivals)
    assert survivals == sorted(survivals, reverse=True)


def test_each_depth_is_learnt_by_itself() -> None:
    """The first token is always right, the second never."""
    rates = learnt([(1, 4)] * 40).rates
    assert rates[0] > 0.9
    assert rates[1] < 0.1
    assert rates[2:] == [PRIOR_RATE] * (MAX_DEPTH - 2)  # tokens after a wrong one carry no information


def test_of_what_was_not_decided_nothing_is_learnt() -> None:
    assert learnt([(0, 0)] * 40).rates == Acceptance().rates
    assert learnt([(2, 2)] * 40).rates[2:] == [PRIOR_RATE] * (MAX_DEPTH - 2)


def test_the_deepest_tokens_count_together() -> None:
    acceptance = learnt([(MAX_DEPTH + 4, MAX_DEPTH + 4)] * 40)
    tail = acceptance.survivals(MAX_DEPTH + 3)[MAX_DEPTH - 1 :]
    assert [after / before for before, after in pairwise(tail)] == pytest.approx([acceptance.rates[-1]] * 3)
    assert acceptance.rates[-1] > 0.9


@given(histories, drafts, st.integers(0, 3))
def test_a_right_token_never_lowers_a_rate_and_a_wrong_one_never_raises_it(
    history: list[tuple[int, int]], draft: tuple[int, int], num_elders: int
) -> None:
    parent = None
    for _ in range(num_elders):
        parent = Acceptance(parent)
    acceptance = learnt(history, parent)
    before, (num_right, num_known) = list(acceptance.rates), draft
    num_known = min(num_known, MAX_DEPTH)  # then each depth is seen once at most
    num_right = min(num_right, num_known)
    acceptance.observe(num_right, num_known)
    for depth in range(MAX_DEPTH):
        if depth < num_right:
            assert acceptance.rates[depth] >= before[depth] - _halved(acceptance, depth)
        elif depth == num_right < num_known:
            assert acceptance.rates[depth] <= before[depth] + _halved(acceptance, depth)
        else:
            assert acceptance.rates[depth] == before[depth]


def _halved(acceptance: Acceptance, depth: int) -> float:
    """Halving the evidence moves a rate closer to its fallback, whether the token was right or wrong."""
    return 1.0 if acceptance._seen[depth] == MAX_SEEN / 2 + 1 else 1e-9


@given(histories, histories)
def test_a_new_one_starts_with_what_its_parent_knows(
    before: list[tuple[int, int]], after: list[tuple[int, int]]
) -> None:
    parent = learnt(before)
    child = Acceptance(parent)
    assert child.rates == parent.rates
    grandchild = Acceptance(child)
    for num_right, num_known in after:
        grandchild.observe(num_right, num_known)
    assert parent.rates == learnt(before + after).rates  # all that it falls back to learn with it


def test_few_tokens_of_its_own_leave_what_is_known_elsewhere_and_many_do_not() -> None:
    parent = learnt([(1, 1)] * 40)
    child = Acceptance(parent)
    child.observe(0, 1)
    assert child.rates[0] == pytest.approx(parent.rates[0] * OWN_WEIGHT / (OWN_WEIGHT + 1))
    assert child.rates[0] > 0.75
    for _ in range(60):
        child.observe(0, 1)
    assert child.rates[0] < 0.1


def test_one_request_that_drafts_badly_for_says_little_of_the_next_after_many_that_it_drafts_well_for() -> None:
    edge = Acceptance()
    for _ in range(6):
        learnt([(3, 3)] * 6, edge)
    bad = learnt([(0, 3)] * 6, edge)
    assert bad.rates[0] < 0.6 < 0.75 < Acceptance(edge).rates[0]


@pytest.mark.parametrize("num_old", [10, 1000, 100_000])
def test_what_is_old_is_forgotten_however_much_there_was_of_it(num_old: int) -> None:
    acceptance = learnt([(1, 1)] * num_old + [(0, 1)] * 120)
    assert acceptance.rates[0] < 0.15
    assert acceptance._seen[0] <= MAX_SEEN
