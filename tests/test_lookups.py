"""A lookup takes time that every request waits for: it is done where that is little, or where it brings more."""

from vllm_specedge.policy.ngram_budget import SELDOM, Lookups

TOKEN_S, STEP_S, LOOKUP_S = 0.01, 0.02, 0.002


def done(lookups: Lookups, num_steps: int, num_right: int, token_s: float = TOKEN_S) -> int:
    """How often it is done in so many steps, where each finds so many right tokens."""
    number = 0
    for _ in range(num_steps):
        if lookups.is_due(token_s, STEP_S):
            number += 1
            lookups.answered(LOOKUP_S)
            lookups.accepted(num_right)
    return number


def test_lookups_that_are_right_are_done_after_each_step() -> None:
    assert done(Lookups(), 100, num_right=2) == 100


def test_lookups_that_are_never_right_are_done_seldom() -> None:
    lookups = Lookups()
    done(lookups, 300, num_right=0)
    assert done(lookups, 10 * SELDOM, num_right=0) == 10


def test_lookups_that_are_right_again_are_done_after_each_step_again() -> None:
    lookups = Lookups()
    done(lookups, 300, num_right=0)
    done(lookups, 10 * SELDOM, num_right=2)
    assert done(lookups, 100, num_right=2) == 100


def test_what_saves_less_time_than_it_takes_is_not_done() -> None:
    """On a server that is full a token takes so little that few of them are not worth it."""
    lookups = Lookups()
    done(lookups, 300, num_right=1, token_s=LOOKUP_S / 2)
    assert done(lookups, 10 * SELDOM, num_right=1, token_s=LOOKUP_S / 2) == 10
    assert done(lookups, 100, num_right=1, token_s=2 * LOOKUP_S) > 90


def test_what_takes_next_to_nothing_is_done_after_each_step() -> None:
    lookups = Lookups()
    for _ in range(1000):
        assert lookups.is_due(TOKEN_S, STEP_S)
        lookups.answered(STEP_S / 500)
