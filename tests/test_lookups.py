"""Asking the workers for n-gram drafts costs every request a round trip: it is done where it brings more."""

from vllm_specedge.lookups import SELDOM, Lookups

TOKEN_S, ROUND_TRIP_S = 0.01, 0.002


def asked(lookups: Lookups, num_steps: int, num_right: int, token_s: float = TOKEN_S) -> int:
    """How often the workers are asked in so many steps, where each answer has so many right tokens."""
    number = 0
    for _ in range(num_steps):
        if lookups.is_due(token_s):
            number += 1
            lookups.answered(ROUND_TRIP_S)
            lookups.accepted(num_right)
    return number


def test_while_lookups_are_right_the_workers_are_asked_after_each_step() -> None:
    assert asked(Lookups(), 100, num_right=2) == 100


def test_lookups_that_are_never_right_are_asked_for_seldom() -> None:
    lookups = Lookups()
    asked(lookups, 300, num_right=0)
    assert asked(lookups, 10 * SELDOM, num_right=0) == 10


def test_lookups_that_are_right_again_are_asked_for_after_each_step_again() -> None:
    lookups = Lookups()
    asked(lookups, 300, num_right=0)
    asked(lookups, 10 * SELDOM, num_right=2)
    assert asked(lookups, 100, num_right=2) == 100


def test_what_saves_less_time_than_asking_takes_is_not_asked_for() -> None:
    """On a server that is full a token takes so little that few of them are not worth a round trip."""
    lookups = Lookups()
    asked(lookups, 300, num_right=1, token_s=ROUND_TRIP_S / 2)
    assert asked(lookups, 10 * SELDOM, num_right=1, token_s=ROUND_TRIP_S / 2) == 10
    assert asked(lookups, 100, num_right=1, token_s=2 * ROUND_TRIP_S) > 90
