"""vLLM's rejection sampler with drafts without probabilities, as sent by edges: the output is the target's."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from vllm.platforms import current_platform

from edge_client.drafters import Candidate
from edge_client.drafting.noise import Noise
from vllm_specedge.adapter import hooks
from vllm_specedge.adapter.worker import coupling, cpu_kernels, verification
from vllm_specedge.adapter.worker.sampling import shorten
from vllm_specedge.wire.sampling import Sampling

# As in vLLM's workers, before importing modules that use the kernels: without Triton, C++ kernels replace them.
current_platform.import_kernels()
if hasattr(current_platform, "register_triton_kernel_overrides"):
    current_platform.register_triton_kernel_overrides()
cpu_kernels.mend()
shorten()
coupling.couple_v1()
verification.mend()

from vllm import SamplingParams  # noqa: E402
from vllm.v1.sample import rejection_sampler  # noqa: E402
from vllm.v1.sample.logits_processor import (  # noqa: E402
    BatchUpdate,
    LogitBiasLogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata  # noqa: E402
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p  # noqa: E402
from vllm.v1.sample.rejection_sampler import RejectionSampler, expand_batch_to_tokens  # noqa: E402
from vllm.v1.sample.sampler import Sampler  # noqa: E402
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata  # noqa: E402

VOCABULARY = 6
NUM_ROWS = 20_000
MAX_DRAFT = 4
Drafts = Callable[[int, int], list[int]]


def sampling(num_rows: int, seeds: Sequence[int] = ()) -> SamplingMetadata:
    """Sampling at temperature 1; the first rows have the given seeds."""
    none = torch.zeros(num_rows)
    return SamplingMetadata(
        temperature=torch.ones(num_rows),
        all_greedy=False,
        all_random=True,
        top_p=None,
        top_k=None,
        generators={row: torch.Generator().manual_seed(seed) for row, seed in enumerate(seeds)},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=none,
        presence_penalties=none,
        repetition_penalties=torch.ones(num_rows),
        output_token_ids=[[] for _ in range(num_rows)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


def metadata(drafts: list[list[int]]) -> SpecDecodeMetadata:
    made = SpecDecodeMetadata.make_dummy(drafts, torch.device("cpu"))
    targets, bonuses, position = [], [], 0
    for draft in drafts:
        targets += range(position, position + len(draft))
        position += len(draft)
        bonuses.append(position)
        position += 1
    made.target_logits_indices = torch.tensor(targets, dtype=torch.int32)
    made.bonus_logits_indices = torch.tensor(bonuses, dtype=torch.int32)
    return made


@pytest.mark.parametrize("likely", [0, 5], ids=["drafts the unlikely", "drafts the likely"])
def test_tokens_have_the_target_s_distribution(likely: int) -> None:
    """Rows with two, one and no draft tokens in one batch; the target's distribution differs by position."""
    torch.manual_seed(0)
    drafts = [[likely, 4], [likely], []] * (NUM_ROWS // 3)
    logits = torch.tensor(
        [[0.0, 0.3, 0.6, 0.9, 1.2, 2.0], [1.0, 0.0, 0.5, 0.0, 1.5, 0.2], [0.1, 0.2, 0.9, 0.4, 0.5, 0.6]]
    )
    rows = torch.cat([logits[: len(draft) + 1] for draft in drafts])
    sampler = RejectionSampler(Sampler())
    ids = sampler(metadata(drafts), None, rows, sampling(len(drafts))).sampled_token_ids
    tokens, _ = RejectionSampler.parse_output(ids, VOCABULARY)
    probabilities = torch.softmax(logits.double(), -1).numpy()
    for length in (2, 1, 0):
        of_length = [row for row, draft in zip(tokens, drafts, strict=True) if len(draft) == length]
        for position in range(length + 1):
            reached = [row[position] for row in of_length if len(row) > position]
            counts = np.bincount(reached, minlength=VOCABULARY)
            result = chisquare(counts, probabilities[position] * len(reached))
            print(f"draft of {length}, position {position}: {len(reached)} tokens, p = {result.pvalue:.3f}")
            assert result.pvalue > 1e-4


def test_expanding_values_of_every_type() -> None:
    ends = torch.tensor([2, 2, 3], dtype=torch.int32)
    for values in (torch.tensor([0.5, 9.0, 0.0]), torch.tensor([7, 9, 0], dtype=torch.int32)):
        got = expand_batch_to_tokens(values, ends, 3, replace_from=0, replace_to=1)
        assert got.tolist() == [values[0].item(), values[0].item(), 1]


def test_a_step_without_drafts_is_sampled_as_without_speculation() -> None:
    """Seeded requests have the same tokens if nothing is verified for any request."""
    torch.manual_seed(0)
    logits = torch.randn(3, VOCABULARY)
    seeds = (1, 2, 3)
    plain = Sampler()(logits=logits.clone(), sampling_metadata=sampling(3, seeds)).sampled_token_ids
    ids = RejectionSampler(Sampler())(metadata([[], [], []]), None, logits, sampling(3, seeds)).sampled_token_ids
    assert ids.tolist() == plain.tolist()


def seeded(temperature: torch.Tensor, seeds: Sequence[int], **limits: Any) -> SamplingMetadata:
    """Requests with seeds, which greedy ones do not use."""
    made = sampling(len(seeds), seeds)
    made.generators = {row: each for row, each in made.generators.items() if temperature[row]}
    return replace(made, temperature=temperature, all_random=bool((temperature > 0).all()), **limits)


def said_plainly(logits: torch.Tensor, made: SamplingMetadata) -> list[list[int]]:
    """Outputs of requests token by token, from logits [requests, positions, vocabulary]."""
    steps = [Sampler()(logits=logits[:, at].clone(), sampling_metadata=made) for at in range(logits.shape[1])]
    said: list[list[int]] = torch.cat([step.sampled_token_ids for step in steps], 1).tolist()
    return said


def said_with_drafts(logits: torch.Tensor, made: SamplingMetadata, drafts_of: Drafts) -> list[list[int]]:
    """The same with the drafts from `drafts_of` for a request at a position; the last positions are left out."""
    said: list[list[int]] = [[] for _ in logits]
    num_positions = logits.shape[1]
    while min(map(len, said)) < num_positions - MAX_DRAFT - 1:
        drafts = [drafts_of(request, len(tokens)) for request, tokens in enumerate(said)]
        rows = torch.cat([logits[n, len(said[n]) : len(said[n]) + len(draft) + 1] for n, draft in enumerate(drafts)])
        ids = RejectionSampler(Sampler())(metadata(drafts), None, rows.clone(), made).sampled_token_ids
        tokens, _ = RejectionSampler.parse_output(ids, logits.shape[2])
        for request, new in enumerate(tokens):
            said[request] = (said[request] + new)[: num_positions - MAX_DRAFT - 1]
    return said


@pytest.mark.parametrize("limits", [{}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 4, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("chance", range(6))
def test_a_seed_says_the_same_with_drafts_and_without(chance: int, limits: dict[str, float]) -> None:
    """Drafts that are right, wrong and absent, for sampled and greedy requests in one batch."""
    torch.manual_seed(chance)
    random = np.random.default_rng(chance)
    seeds = [int(seed) for seed in random.integers(2**40, size=5)]
    logits = 2 * torch.randn(len(seeds), 48, 12)
    temperature = torch.tensor([0.7, 1.0, 0.0 if chance % 2 else 1.3, 0.3, 1.0])
    of_rows = {name: torch.full((len(seeds),), value) for name, value in limits.items()}
    plain = said_plainly(logits, seeded(temperature, seeds, **of_rows))

    def drafts_of(request: int, position: int) -> list[int]:
        draft = plain[request][position : position + random.integers(0, MAX_DRAFT + 1)]
        return [token if random.random() < 0.8 else int(random.integers(12)) for token in draft]

    got = said_with_drafts(logits, seeded(temperature, seeds, **of_rows), drafts_of)
    assert got == [tokens[: 48 - MAX_DRAFT - 1] for tokens in plain]


@pytest.mark.parametrize("limits", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 20, "top_p": 0.5}], ids=str)
def test_an_edge_with_the_target_s_own_logits_foresees_all_it_says(limits: dict[str, Any]) -> None:
    """From the seed alone, in plain Python."""
    torch.manual_seed(0)
    seeds, temperature = [11, 2**40 + 3, 7], torch.tensor([0.7, 1.0, 1.5])
    logits = 2 * torch.randn(len(seeds), 60, 40)
    of_rows = {name: torch.full((len(seeds),), value) for name, value in limits.items()}
    said = said_plainly(logits, seeded(temperature, seeds, **of_rows))
    for request, seed in enumerate(seeds):
        heat, top_k, top_p = float(temperature[request]), limits.get("top_k", 0), limits.get("top_p", 1.0)
        noise = Noise(Sampling(round(heat, 3), top_k, top_p, seed, 5))
        for at, token in enumerate(said[request]):
            best, ids = logits[request, at].softmax(-1).sort(descending=True)
            candidates = [Candidate(*pair) for pair in zip(ids.tolist(), best.tolist(), strict=True)]
            assert noise.chosen(candidates, 5 + at, 1, sharpness=1.0)[0].token == token


def test_rows_behind_a_token_that_was_not_right_are_not_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.full((6, VOCABULARY), -50.0)
    logits[:, 1] = 50.0  # sampled requests get token 1
    sampled: list[int] = []
    monkeypatch.setattr(
        coupling, "sampled", lambda logits, *_: (sampled.append(len(logits)), torch.ones(len(logits), dtype=int))[1]
    )
    drafts = torch.tensor([1, 1, 2, 1, 3, 1])
    output = coupling.verified(drafts, [3, 0, 2, 1], logits, torch.tensor([9, 9, 9, 9]), None, torch.zeros(6))
    assert output.tolist() == [[1, 1, 1, -1], [9, -1, -1, -1], [1, 1, -1, -1], [1, 9, -1, -1]]
    assert sampled == [3, 2, 1]


def test_a_sampler_of_another_shape_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hooks.problems(hooks.SAMPLING) == []
    original = RejectionSampler.forward.__wrapped__
    monkeypatch.setattr(RejectionSampler, "forward", original)
    sources = ((f"{RejectionSampler.__module__}:RejectionSampler", "no such"),)
    monkeypatch.setitem(hooks.PARTS, hooks.SAMPLING, hooks.Part("Nothing", (), sources))
    shorten()
    assert RejectionSampler.forward is original


def of_parameters(requests: Sequence[SamplingParams]) -> SamplingMetadata:
    """The metadata that vLLM's worker makes from the parameters of a batch."""
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=8))
    processors = (
        MinPLogitsProcessor(config, torch.device("cpu"), False),
        LogitBiasLogitsProcessor(None, torch.device("cpu"), False),
    )
    added = [(row, each, [0], []) for row, each in enumerate(requests)]
    for processor in processors:
        processor.update_state(BatchUpdate(len(requests), removed=[], added=added, moved=[]))
    return replace(
        sampling(len(requests)),
        temperature=torch.tensor([each.temperature for each in requests]),
        all_random=all(each.temperature > 0 for each in requests),
        top_p=torch.tensor([each.top_p for each in requests]),
        no_penalties=False,
        prompt_token_ids=torch.tensor([[1, 2]] * len(requests)),
        frequency_penalties=torch.tensor([each.frequency_penalty for each in requests]),
        presence_penalties=torch.tensor([each.presence_penalty for each in requests]),
        repetition_penalties=torch.tensor([each.repetition_penalty for each in requests]),
        logitsprocs=LogitsProcessors(processors),
    )


def as_plainly(logits: torch.Tensor, sampled_by: SamplingMetadata) -> torch.Tensor:
    """The logits that plain sampling chooses from: the steps of Sampler.forward and Sampler.sample up to the choice."""
    sampler = Sampler()
    logits = sampler.apply_logits_processors(logits, sampled_by, predict_bonus_token=False)
    logits = sampler.apply_temperature(logits, sampled_by.temperature, sampled_by.all_random)
    for processor in sampled_by.logitsprocs.argmax_invariant:
        logits = processor.apply(logits)
    return apply_top_k_top_p(logits, None, sampled_by.top_p)


@pytest.mark.parametrize("seed", range(20))
def test_drafts_are_verified_by_what_plain_sampling_chooses_from(seed: int) -> None:
    """With min_p and biases, together with penalties, top-p and greedy requests. Rows: requests 0, 0, 2, 3."""
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    requests = [
        SamplingParams(
            temperature=float(random.choice([0.0, 0.5, 1.5])),
            min_p=float(random.choice([0.0, 0.1, 0.6])),
            top_p=float(random.choice([0.5, 0.9, 1.0])),
            repetition_penalty=float(random.choice([1.0, 1.7])),
            logit_bias={int(token): float(random.normal(0, 3)) for token in random.choice(VOCABULARY, 2, replace=False)}
            if random.random() < 0.6
            else None,
        )
        for _ in range(4)
    ]
    drafts = [[1, 2], [], [3], [0]]
    logits = 3 * torch.randn(4, VOCABULARY)
    wanted_by = of_parameters([requests[row] for row in (0, 0, 2, 3)])
    wanted_by.output_token_ids = [[], [1], [], []]
    wanted = as_plainly(logits.clone(), wanted_by)
    metadata_, sampled_by = metadata(drafts), of_parameters(requests)
    sampled_by.spec_token_ids = drafts
    got = RejectionSampler(Sampler()).apply_logits_processors(logits.clone(), sampled_by, metadata_)
    got = rejection_sampler.apply_sampling_constraints(got, metadata_.cu_num_draft_tokens, sampled_by)
    assert torch.equal(got, wanted)
