"""A lookup delays every request: it is done if that takes little time, or if it gains more."""

from vllm_specedge.policy.ngram_budget import SELDOM, NgramBudget

TOKEN_S, STEP_S, LOOKUP_S = 0.01, 0.02, 0.002


def done(budget: NgramBudget, num_steps: int, num_right: int, token_s: float = TOKEN_S) -> int:
    """Number of lookups in `num_steps` steps if each finds `num_right` right tokens."""
    number = 0
    for _ in range(num_steps):
        budget.stepped()
        if budget.is_due(token_s, STEP_S):
            number += 1
            budget.answered(LOOKUP_S)
            budget.accepted(num_right)
    return number


def test_lookups_that_are_right_are_done_after_each_step() -> None:
    assert done(NgramBudget(), 100, num_right=2) == 100


def test_lookups_that_are_never_right_are_done_seldom() -> None:
    budget = NgramBudget()
    done(budget, 300, num_right=0)
    assert done(budget, 10 * SELDOM, num_right=0) == 10


def test_lookups_that_are_right_again_are_done_after_each_step_again() -> None:
    budget = NgramBudget()
    done(budget, 300, num_right=0)
    done(budget, 10 * SELDOM, num_right=2)
    assert done(budget, 100, num_right=2) == 100


def test_what_saves_less_time_than_it_takes_is_not_done() -> None:
    """On a full server a token takes so little time that a few of them are not worth a lookup."""
    budget = NgramBudget()
    done(budget, 300, num_right=1, token_s=LOOKUP_S / 2)
    assert done(budget, 10 * SELDOM, num_right=1, token_s=LOOKUP_S / 2) == 10
    assert done(budget, 100, num_right=1, token_s=2 * LOOKUP_S) > 90


def test_what_takes_next_to_nothing_is_done_after_each_step() -> None:
    budget = NgramBudget()
    for _ in range(1000):
        budget.stepped()
        assert budget.is_due(TOKEN_S, STEP_S)
        budget.answered(STEP_S / 500)
