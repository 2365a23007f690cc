"""The noise of sampled requests: the target's tokens from a seed, in plain Python."""

import re
from collections import Counter
from itertools import pairwise
from math import exp, log
from pathlib import Path
from random import Random

import pytest
import raw_client
from hypothesis import given
from hypothesis import strategies as st

from edge_client.drafters import Candidate
from edge_client.drafting.noise import SHARPNESS, Hash, Murmur, Noise, SplitMix, splitmix64
from vllm_specedge.wire.engine_frames import EngineOpen
from vllm_specedge.wire.frames import Open
from vllm_specedge.wire.sampling import MURMUR, SPLITMIX, Sampling, sampling_of

DOCUMENT = (Path(__file__).parent.parent / "docs" / "protocol.md").read_text()
torch = pytest.importorskip("torch")
OTHERS = [Candidate(token, 1e-12) for token in range(4, 20)]
SEEDS = (0, 1, 1234, 2**31, 2**32 + 5, 2**64 - 1)


@given(
    st.floats(0.001, 5), st.integers(0, 2**32 - 1), st.floats(0, 1), st.integers(0, 2**64 - 1), st.integers(0, 2**20)
)
def test_what_is_told_is_what_is_known(heat: float, top_k: int, top_p: float, seed: int, first: int) -> None:
    told = sampling_of(Sampling(heat, top_k, top_p, seed, first).fields())
    assert told is not None
    assert (told.top_k, told.seed, told.first) == (top_k, seed, first)
    assert told.temperature == pytest.approx(heat, abs=6e-4)
    assert told.top_p == pytest.approx(top_p, abs=6e-4)


def test_a_seed_is_in_no_text_that_could_be_logged() -> None:
    sampling = Sampling(1.0, 0, 1.0, 987654321, 3)
    shown = repr((sampling, Open(0, 3, 5, 5, "", sampling.fields()), EngineOpen(0, 3, 5, "", sampling.fields())))
    assert "987654321" not in shown


@pytest.mark.parametrize("fields", [(), (1,), (3, 700, 0, 1000, 3, 0, 5), (1, 0, 0, 1000, 3, 0, 5), (1,) * 8])
def test_a_greedy_request_and_what_is_not_known_have_no_noise(fields: tuple[int, ...]) -> None:
    assert sampling_of(fields) is None


@pytest.mark.parametrize("seed", SEEDS)
def test_row_seeds_are_those_that_a_generator_of_torch_draws(seed: int) -> None:
    generator = torch.Generator()
    generator.manual_seed(seed)
    drawn = [int(torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.int64)) for _ in range(400)]
    noise = SplitMix(Sampling(1.0, 0, 1.0, seed, 7))
    assert [noise.row_seed(7 + number) for number in (399, *range(399))] == [drawn[399], *drawn[:399]]


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(", ")]


def test_the_protocol_document_s_numbers() -> None:
    text = " ".join(DOCUMENT.split())
    found = re.search(
        r"For the seed (\d+) the row seeds of the first three positions are ([\d, ]+), and .*? is ([-\d., ]+)\.", text
    )
    assert found is not None
    noise = SplitMix(Sampling(1.0, 0, 1.0, int(found[1]), 0))
    assert _numbers(found[2]) == [noise.row_seed(position) for position in range(3)]
    said = [noise.gumbel(noise.key(0), token) for token in (0, 1, 50000)]
    assert _numbers(found[3]) == pytest.approx(said, abs=1e-6)


def test_the_protocol_document_s_numbers_of_the_second_kind() -> None:
    text = " ".join(DOCUMENT.split())
    found = re.search(
        r"For the seed (\d+) the keys of the positions 10, 11, 12 are ([\d, ]+), and .*? is ([-\d., ]+)\.", text
    )
    assert found is not None
    noise = Murmur(Sampling(1.0, 0, 1.0, int(found[1]), 3, MURMUR))
    assert _numbers(found[2]) == [noise.key(position) for position in (10, 11, 12)]
    said = [noise.gumbel(noise.key(10), token) for token in (0, 1, 50000)]
    assert _numbers(found[3]) == pytest.approx(said, abs=1e-6)


def _kinds(seed: int) -> dict[str, Hash]:
    return {
        "splitmix": SplitMix(Sampling(1.0, 0, 1.0, seed, 0)),
        "murmur": Murmur(Sampling(1.0, 0, 1.0, seed, 0, MURMUR)),
    }


def _uniform(noise: Hash, position: int, token: int) -> float:
    """The number that the noise is computed from: uniform between 0 and 1."""
    return exp(-exp(-noise.gumbel(noise.key(position), token)))


each_kind = pytest.mark.parametrize("kind", ["splitmix", "murmur"])
SERIES = {
    "tokens": [(7, 3, token) for token in range(4096)],
    "positions": [(7, position, 11) for position in range(4096)],
    "seeds": [(seed, 3, 11) for seed in range(4096)],
    "seeds apart in their high bits": [(seed << 32, 3, 11) for seed in range(4096)],
}


def _series(kind: str, of: str) -> list[float]:
    if of == "seeds apart in their high bits" and kind == "splitmix":
        pytest.skip("vLLM seeds a generator with 32 bits of a seed (see docs/security.md)")
    noises = {seed: _kinds(seed)[kind] for seed, _, _ in SERIES[of]}
    return [_uniform(noises[seed], position, token) for seed, position, token in SERIES[of]]


@each_kind
@pytest.mark.parametrize("of", SERIES)
def test_noise_is_uniform_along_tokens_positions_and_seeds(kind: str, of: str) -> None:
    """Kolmogorov and Smirnov's distance; 1.95 has a probability of 0.001, and the series are fixed."""
    values = sorted(_series(kind, of))
    distance = max(abs(value - (rank + 0.5) / len(values)) for rank, value in enumerate(values))
    assert distance * len(values) ** 0.5 < 1.95


@each_kind
@pytest.mark.parametrize("of", SERIES)
def test_neighbours_have_nothing_to_do_with_each_other(kind: str, of: str) -> None:
    """16 by 16 cells of each value and the one that follows: chi-square of 255 degrees, 330 has 0.001."""
    values = _series(kind, of)
    pairs = list(pairwise(values))
    cells = Counter((int(one * 16), int(other * 16)) for one, other in pairs)
    expected = len(pairs) / 256
    assert sum((cells[row, column] - expected) ** 2 / expected for row in range(16) for column in range(16)) < 330


@each_kind
def test_no_two_of_many_requests_draw_the_same(kind: str) -> None:
    """The keys of 200 positions of 100 requests are all different, or have no more duplicates than by chance."""
    chance = Random(5)
    requests = [_kinds(chance.getrandbits(63))[kind] for _ in range(100)]
    keys = [noise.key(position) for noise in requests for position in range(1, 201)]
    by_chance = len(keys) ** 2 / 2 / (2**31 if kind == "splitmix" else 2**32)
    assert len(keys) - len(set(keys)) <= by_chance + 1
    assert len({tuple(keys[start : start + 200]) for start in range(0, len(keys), 200)}) == 100


def test_the_hash_is_splitmix64() -> None:
    """Test vectors of the published generator: its first outputs for the seed 1234567."""
    gamma = 0x9E3779B97F4A7C15
    assert [splitmix64(1234567 + number * gamma & 2**64 - 1) for number in (1, 2, 3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@pytest.mark.parametrize(
    "fields", [(1, 700, 0, 1000, 5, 9, 1234), (2, 1300, 3, 900, 5, 9, 2**32 - 1), (1, 900, 2, 1000, 5, 0, 0)]
)
def test_the_example_client_chooses_as_an_edge_does(fields: tuple[int, ...]) -> None:
    """It is written from the protocol document alone."""
    counts = Counter({token: 1000 // token for token in range(1, 12)})
    sampling = sampling_of(fields)
    assert sampling is not None
    known = [Candidate(token, count / counts.total()) for token, count in counts.most_common()]
    example, noise = raw_client.Sampling(list(fields)), Noise(sampling)
    chosen = [noise.chosen(known, position, 1, sharpness=1.0)[0].token for position in range(5, 400)]
    assert [example.best(counts, position) for position in range(5, 400)] == chosen
    assert len(set(chosen)) > 1


@pytest.mark.parametrize("kind", [SPLITMIX, MURMUR])
def test_the_chosen_is_the_best_with_noise_and_the_others_follow(kind: int) -> None:
    sampling = Sampling(0.8, 0, 1.0, 99, 0, kind)
    noise, drawn = Noise(sampling), {SPLITMIX: SplitMix, MURMUR: Murmur}[kind](sampling)
    candidates = [Candidate(token, 0.5**token) for token in range(1, 30)]
    for position in range(50):
        key = drawn.key(position)
        scores = {token: log(p) / 0.8 + drawn.gumbel(key, token) for token, p in candidates}
        chosen = noise.chosen(candidates, position, 3, sharpness=1.0)
        assert [each.token for each in chosen] == sorted(scores, key=scores.__getitem__, reverse=True)[:3]
        assert 1.0 >= chosen[0].probability >= chosen[1].probability >= chosen[2].probability > 0.0


def test_top_k_and_top_p_leave_what_they_leave_of_the_target() -> None:
    candidates = [Candidate(1, 0.5), Candidate(2, 0.3), Candidate(3, 0.2), *OTHERS]
    of = {"top-k": Sampling(1.0, 1, 1.0, 5, 0), "top-p": Sampling(1.0, 0, 0.4, 5, 0)}
    for sampling in of.values():
        noise = Noise(sampling)
        assert {noise.chosen(candidates, position, 1)[0].token for position in range(200)} == {1}


def test_tokens_come_as_often_as_they_are_probable() -> None:
    candidates = [Candidate(1, 0.5), Candidate(2, 0.3), Candidate(3, 0.2), *OTHERS]
    noise = Noise(Sampling(1.0, 0, 1.0, 5, 0))
    said = [noise.chosen(candidates, position, 1, sharpness=1.0)[0].token for position in range(4000)]
    for token, probability in candidates[:3]:
        assert said.count(token) / 4000 == pytest.approx(probability, abs=0.03)


def test_a_token_of_the_prompt_and_few_candidates_have_no_noise() -> None:
    candidates = [Candidate(1, 0.5), Candidate(2, 0.3)]
    assert Noise(Sampling(1.0, 0, 1.0, 5, 9)).chosen([*candidates, *OTHERS], 8, 1) == candidates[:1]
    for position in range(9, 60):
        assert Noise(Sampling(1.0, 0, 1.0, 5, 9)).chosen(candidates, position, 2) == candidates


def test_the_target_is_taken_to_be_surer_than_the_draft() -> None:
    """As if the draft's probabilities were its own to the power of SHARPNESS."""
    candidates = [Candidate(1, 0.5), Candidate(2, 0.3), Candidate(3, 0.2), *OTHERS]
    sharp = sorted((each.probability**SHARPNESS for each in candidates), reverse=True)
    sharper = [Candidate(each.token, share / sum(sharp)) for each, share in zip(candidates, sharp, strict=True)]
    noise = Noise(Sampling(1.0, 0, 1.0, 5, 0))
    for position in range(200):
        chosen, expected = noise.chosen(candidates, position, 1), noise.chosen(sharper, position, 1, sharpness=1.0)
        assert chosen[0].token == expected[0].token
        assert chosen[0].probability == pytest.approx(expected[0].probability)
