"""The noise of sampled requests: what the target would say, from a seed, in plain Python."""

import re
from math import log
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.drafters import Candidate
from edge_client.drafting.noise import Noise, gumbel, splitmix64
from vllm_specedge.wire.engine_frames import EngineOpen
from vllm_specedge.wire.frames import Open
from vllm_specedge.wire.sampling import Sampling, sampling_of

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


@pytest.mark.parametrize("fields", [(), (1,), (2, 700, 0, 1000, 3, 0, 5), (1, 0, 0, 1000, 3, 0, 5), (1,) * 8])
def test_a_greedy_request_and_what_is_not_known_have_no_noise(fields: tuple[int, ...]) -> None:
    assert sampling_of(fields) is None


@pytest.mark.parametrize("seed", SEEDS)
def test_row_seeds_are_those_that_a_generator_of_torch_draws(seed: int) -> None:
    generator = torch.Generator()
    generator.manual_seed(seed)
    drawn = [int(torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.int64)) for _ in range(400)]
    noise = Noise(Sampling(1.0, 0, 1.0, seed, 7))
    assert [noise.row_seed(7 + number) for number in (399, *range(399))] == [drawn[399], *drawn[:399]]


def test_the_protocol_document_s_numbers() -> None:
    text = " ".join(DOCUMENT.split())
    found = re.search(
        r"For the seed (\d+) the row seeds of the first three positions are ([\d, ]+), and .*? is ([-\d., ]+)\.", text
    )
    assert found is not None
    noise = Noise(Sampling(1.0, 0, 1.0, int(found[1]), 0))
    row_seeds = [int(number) for number in found[2].split(", ")]
    assert row_seeds == [noise.row_seed(position) for position in range(3)]
    said = [gumbel(splitmix64(row_seeds[0]), token) for token in (0, 1, 50000)]
    assert [float(number) for number in found[3].split(", ")] == pytest.approx(said, abs=1e-6)


def test_the_hash_is_splitmix64() -> None:
    """Test vectors of the published generator: its first outputs for the seed 1234567."""
    gamma = 0x9E3779B97F4A7C15
    assert [splitmix64(1234567 + number * gamma & 2**64 - 1) for number in (1, 2, 3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_the_chosen_is_the_best_with_noise_and_the_others_follow() -> None:
    noise = Noise(Sampling(0.8, 0, 1.0, 99, 0))
    candidates = [Candidate(token, 0.5**token) for token in range(1, 30)]
    for position in range(50):
        key = splitmix64(noise.row_seed(position))
        scores = {token: log(p) / 0.8 + gumbel(key, token) for token, p in candidates}
        chosen = noise.chosen(candidates, position, 3)
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
    said = [noise.chosen(candidates, position, 1)[0].token for position in range(4000)]
    for token, probability in candidates[:3]:
        assert said.count(token) / 4000 == pytest.approx(probability, abs=0.03)


def test_a_token_of_the_prompt_and_few_candidates_have_no_noise() -> None:
    candidates = [Candidate(1, 0.5), Candidate(2, 0.3)]
    assert Noise(Sampling(1.0, 0, 1.0, 5, 9)).chosen([*candidates, *OTHERS], 8, 1) == candidates[:1]
    for position in range(9, 60):
        assert Noise(Sampling(1.0, 0, 1.0, 5, 9)).chosen(candidates, position, 2) == candidates
