"""Sampled requests on the V2 runner: edges receive the parameters that the workers sample with."""

from typing import Any

import pytest
from vllm import SamplingParams

from edge_client.drafting.noise import Murmur
from vllm_specedge.adapter import seeds
from vllm_specedge.wire.engine_frames import EngineOpen
from vllm_specedge.wire.sampling import MURMUR, Sampling, sampling_of

from .engines import Engine
from .test_same_tokens import PROMPTS
from .tiny_model import VOCAB_SIZE

HEAT = 0.8


@pytest.fixture
def told(edge: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Sampling]:
    """Sampling fields that edges receive for each request, in turn."""
    edge.tokens(PROMPTS[:1], SamplingParams(max_tokens=1))  # the engine knows of its edge then
    heard, send = list[Sampling](), edge.edges.send

    def hear(frames: Any) -> None:
        frames = list(frames)
        opened = [sampling_of(frame.sampling) for frame in frames if isinstance(frame, EngineOpen)]
        heard.extend(sampling for sampling in opened if sampling is not None)
        send(frames)

    monkeypatch.setattr(edge.edges, "send", hear)
    return heard


@pytest.mark.parametrize("seed", [0, 1234, -5, 2**40 + 3])
def test_what_is_sampled_is_the_best_with_the_noise_that_edges_are_told(
    edge: Engine, told: list[Sampling], seed: int
) -> None:
    params = SamplingParams(max_tokens=24, ignore_eos=True, temperature=HEAT, seed=seed, logprobs=VOCAB_SIZE)
    edge.oracle.answers = {}
    for prompt, answer in zip(PROMPTS, edge.answers(PROMPTS, params), strict=True):
        sampling = next(each for each in told if each.first == len(prompt))
        assert (sampling.noise, sampling.temperature, sampling.seed) == (MURMUR, HEAT, seed & 2**64 - 1)
        assert list(answer.outputs[0].token_ids) == foreseen(sampling, answer.outputs[0].logprobs)


def foreseen(sampling: Sampling, logprobs: Any) -> list[int]:
    """The tokens of an answer, from all log probabilities of the model at its positions."""
    noise, tokens = Murmur(sampling), []
    for position, row in enumerate(logprobs, sampling.first):
        key = noise.key(position)
        tokens.append(max(row, key=lambda token: row[token].logprob / HEAT + noise.gumbel(key, token)))
    return tokens


@pytest.mark.parametrize("way", ["synchronous", "switching", "asynchronous"])
def test_a_request_without_a_seed_has_one_that_edges_are_told(
    plain: Engine, edge: Engine, told: list[Sampling], way: str
) -> None:
    """A different one each time; the request's parameters have none, which would keep its batch from fused samplers."""
    edge.oracle.answers, answers = {}, []
    edge.step_as(way)
    for _ in range(2):
        params = SamplingParams(max_tokens=16, ignore_eos=True, temperature=HEAT)
        answers.append(edge.tokens(PROMPTS[:1], params)[0])
        assert params.seed is None
        assert not params.extra_args
    assert len({sampling.seed for sampling in told}) == 2
    for sampling, answer in zip(told, answers, strict=True):
        params = SamplingParams(max_tokens=16, ignore_eos=True, temperature=HEAT, seed=sampling.seed)
        assert plain.tokens(PROMPTS[:1], params) == [answer]


def test_two_choices_have_other_seeds(edge: Engine, told: list[Sampling]) -> None:
    edge.oracle.answers = {}
    edge.tokens(PROMPTS[:1], SamplingParams(max_tokens=4, temperature=HEAT, n=2))
    assert len({sampling.seed for sampling in told}) == 2


def test_noise_of_64_bits_is_not_told(edge: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    config = edge.core.vllm_config
    assert seeds.noise_kind(config) == MURMUR
    monkeypatch.setattr(config.model_config, "use_fp64_gumbel", True)
    assert seeds.noise_kind(config) is None
