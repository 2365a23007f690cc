"""How far noise is believed: the factor that the target proves right."""

from math import log
from random import Random

import pytest

from edge_client.drafters import Candidate
from edge_client.drafting.belief import FACTORS, Belief
from edge_client.drafting.noise import Murmur, Noise, Scored
from vllm_specedge.wire.sampling import MURMUR, Sampling

SAMPLING = Sampling(1.0, 0, 1.0, 77, 0, MURMUR)
NUM_TOKENS = 12


def probabilities(chance: Random, sharpness: float) -> list[float]:
    weights = [2.0 ** (sharpness * chance.gauss(0.0, 1.5)) for _ in range(NUM_TOKENS)]
    return [weight / sum(weights) for weight in weights]


def right(factor_of_target: float, num_positions: int = 600) -> tuple[Belief, list[int]]:
    """A target whose log probabilities are so many times the draft's; how often each factor is right."""
    chance, belief, noise, murmur = Random(1), Belief().of_request(), Noise(SAMPLING), Murmur(SAMPLING)
    counts = [0] * len(FACTORS)
    for position in range(num_positions):
        draft = probabilities(chance, 1.0)
        order = sorted(range(NUM_TOKENS), key=lambda token: -draft[token])
        scored = noise.scored([Candidate(token, draft[token]) for token in order], position)
        assert scored is not None
        sharp = [share**factor_of_target for share in draft]
        key = murmur.key(position)
        said = Scored([(log(share), murmur.gumbel(key, token), token) for token, share in enumerate(sharp)]).best(
            1, 1.0
        )
        guesses = scored.guesses(FACTORS)
        belief.observe(guesses, said[0].token)
        counts = [count + (guess == said[0].token) for count, guess in zip(counts, guesses, strict=True)]
    return belief, counts


@pytest.mark.parametrize("factor", FACTORS)
def test_the_factor_by_which_the_target_is_surer_is_found(factor: float) -> None:
    belief, counts = right(factor)
    assert counts[FACTORS.index(factor)] == 600, "with it the draft is the target"
    assert belief.factor == factor


def test_before_anything_was_seen_a_draft_is_taken_at_its_word() -> None:
    assert Belief().factor == Belief().of_request().factor == 1.0
    belief = Belief()
    belief.observe((), 5)
    assert belief.factor == 1.0


def test_a_request_begins_with_what_others_showed_and_goes_its_own_way() -> None:
    common = Belief()
    for _ in range(100):
        common.of_request().observe((0, 0, 0, 0, 7), 7)
    request = common.of_request()
    assert request.factor == FACTORS[-1]
    for _ in range(30):
        request.observe((7, 0, 0, 0, 0), 7)
    assert request.factor == FACTORS[0]
    assert common.of_request().factor == FACTORS[-1], "one request does not outweigh them"


def test_what_is_old_is_forgotten() -> None:
    belief = Belief()
    for _ in range(2000):
        belief.observe((7, 0, 0, 0, 0), 7)
    for _ in range(600):
        belief.observe((0, 0, 0, 0, 7), 7)
    assert belief.factor == FACTORS[-1]
