"""Verification of sampled drafts by equality, in the worker's process: a draft token is right if the target samples it.

At each position the target samples the argmax of its logits (at the temperature, with all constraints) plus noise. The
noise follows from a number that the request's generator draws for the position (V1 on CPUs), or from the request's seed
and the position (V2). vLLM's rejection sampler accepts a draft token by its probability, with its own random numbers:
it keeps the distribution, but a request with a seed generates other tokens with drafts than without. Here every row is
sampled as in a plain step, with the same noise, until one differs from the draft. So the output is a function of seed
and prompt, regardless of the drafts (Daliri, Musco and Suresh 2024, "Coupling without communication").

Without draft probabilities, vLLM's own method accepts a token with the target's probability for it. So does this one,
for a draft that knows nothing about the noise.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_specedge.adapter import hooks
from vllm_specedge.adapter.wrapping import wrap

logger = logging.getLogger("vllm.specedge.coupling")

_NOTHING = -1
"""Marks the absence of a token: vLLM's PLACEHOLDER_TOKEN_ID."""
_MAX_ROW_SEED = 2**31
_MAX_SEED = 2**63 - 1
SEED_KEY = "specedge_seed"
"""The key under which a V2 worker finds the seed of a request that has set none (SamplingParams.extra_args;
adapter/seeds.py).

If it were set as the request's own seed, vLLM would not use its fused sampler for the whole batch
(v1/worker/gpu/sample/sampler.py).
"""


class _Verification:
    """The step that is being verified."""

    row_seeds: torch.Tensor | None = None
    """int64 [draft tokens]; None: no step is being verified, or not by equality."""


_now = _Verification()


def couple_v1() -> None:
    """Wrap vLLM's rejection sampler in this process, if it samples on a CPU. Calling it again is harmless."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    problems = hooks.problems(hooks.COUPLING)
    if problems:
        logger.warning("A seed gives other tokens with edges than without: %s", "; ".join(problems))
        return
    from vllm.v1.sample import rejection_sampler

    wrap(rejection_sampler.RejectionSampler, "forward", _replaying)
    wrap(rejection_sampler, "rejection_sample", _by_equality)


def _replaying(forward: Any) -> Any:
    def sample(self: Any, metadata: Any, draft_probs: Any, logits: Any, sampling_metadata: Any) -> Any:
        if not metadata.max_spec_len or sampling_metadata.all_greedy or self.use_fp64_gumbel:
            return forward(self, metadata, draft_probs, logits, sampling_metadata)
        counts = metadata.num_draft_tokens
        generators = {row: each for row, each in sampling_metadata.generators.items() if counts[row]}
        states = {row: generator.get_state() for row, generator in generators.items()}
        # The next number is then the one for the bonus token, which vLLM samples itself.
        _now.row_seeds = _row_seeds(counts, generators)
        try:
            output = forward(self, metadata, draft_probs, logits, sampling_metadata)
        finally:
            _now.row_seeds = None
        num_said = (output.sampled_token_ids != _NOTHING).sum(1).tolist()
        for row, generator in generators.items():  # set to where plain steps would have left it
            generator.set_state(states[row])
            _draw(generator, num_said[row])
        return output

    return sample


def _row_seeds(num_draft_tokens: Sequence[int], generators: Mapping[int, torch.Generator]) -> torch.Tensor:
    """Row seeds of all draft tokens, drawn from the generators of the rows that have one."""
    row_seeds = torch.randint(0, _MAX_ROW_SEED, (sum(num_draft_tokens),), dtype=torch.int64)
    start = 0
    for row, number in enumerate(num_draft_tokens):
        if row in generators:
            row_seeds[start : start + number] = torch.tensor(_draw(generators[row], number), dtype=torch.int64)
        start += number
    return row_seeds


def _draw(generator: torch.Generator, number: int) -> list[int]:
    """Row seeds, each as TopKTopPSampler.forward_cpu draws one (v1/sample/ops/topk_topp_sampler.py)."""
    return [
        int(torch.randint(0, _MAX_ROW_SEED, (1,), generator=generator, dtype=torch.int64).item()) for _ in range(number)
    ]


def _by_equality(rejection_sample: Any) -> Any:
    def sample(*args: Any, **kwargs: Any) -> Any:
        if _now.row_seeds is None:
            return rejection_sample(*args, **kwargs)
        drafts, num_draft_tokens, _, _, _, logits, bonus, made = args[:8]
        is_greedy = made.temperature == 0.0 if not made.all_random else None
        return verified(drafts, num_draft_tokens, logits, bonus.flatten(), is_greedy, _now.row_seeds)

    return sample


def verified(
    drafts: torch.Tensor,
    num_draft_tokens: Sequence[int],
    logits: torch.Tensor,
    bonus: torch.Tensor,
    is_greedy: torch.Tensor | None,
    row_seeds: torch.Tensor,
) -> torch.Tensor:
    """Each request's tokens: its draft up to the first wrong token, and one more; int32 [requests, 1 + most draft
    tokens], padded with -1.

    `drafts`, `logits` (float32, one row each), `row_seeds`: for the draft tokens, request by request. `bonus`
    [requests]: the token after a draft that is entirely right. `is_greedy` [requests]; None: no request is.
    """
    counts = torch.tensor(num_draft_tokens)
    starts = counts.cumsum(0) - counts
    output = torch.full((len(counts), 1 + int(counts.max())), _NOTHING, dtype=torch.int32)
    rows = torch.arange(len(counts))
    for depth in range(output.shape[1]):
        is_through = counts[rows] == depth
        output[rows[is_through], depth] = bonus[rows[is_through]].to(torch.int32)
        rows = rows[~is_through]
        if not len(rows):
            break
        at = starts[rows] + depth  # rows after a wrong token are not sampled at all
        said = sampled(logits[at], row_seeds[at], is_greedy[rows] if is_greedy is not None else None)
        output[rows, depth] = said.to(torch.int32)
        rows = rows[said == drafts[at]]
    return output


def sampled(logits: torch.Tensor, row_seeds: torch.Tensor, is_greedy: torch.Tensor | None) -> torch.Tensor:
    """Tokens sampled as by vLLM's CPU build: int64 [rows]."""
    said: torch.Tensor = torch.ops._C.fused_gumbel_argmax(logits, row_seeds)
    return said if is_greedy is None else torch.where(is_greedy, logits.argmax(-1), said)


def couple_v2() -> None:
    """Replace the V2 runner's rejection sampling in this process, and use our seeds. Calling it again is harmless."""
    problems = hooks.problems(hooks.COUPLING_V2)
    if problems:
        logger.warning("A seed gives other tokens with edges than without: %s", "; ".join(problems))
        return
    from vllm.v1.worker.gpu.sample.states import SamplingStates
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler

    wrap(rejection_sampler, "rejection_sample", _by_equality_v2)
    wrap(SamplingStates, "add_request", _seeded)


def _seeded(add_request: Any) -> Any:
    def add(self: Any, req_idx: int, sampling_params: Any) -> Any:
        added = add_request(self, req_idx, sampling_params)
        seed = (sampling_params.extra_args or {}).get(SEED_KEY)
        if isinstance(seed, int) and sampling_params.seed is None:
            self.seeds.np[req_idx] = seed & _MAX_SEED
        return added

    return add


def _by_equality_v2(rejection_sample: Any) -> Any:
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    def sample(*args: Any, use_fp64: bool = False, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if kwargs.get("watermark_key") is not None:
            return rejection_sample(*args, use_fp64=use_fp64, **kwargs)  # type: ignore[no-any-return]
        logits, _, drafts, cu_num_logits, pos, _, expanded_idx_mapping, _, temperature, seed, max_draft = args[:11]
        said = gumbel_sample(
            logits,
            expanded_idx_mapping,
            temperature,
            seed,
            pos,
            apply_temperature=False,
            is_drafting=False,
            use_fp64=use_fp64,
        )
        return accepted(said, drafts, cu_num_logits, max_draft)

    return sample


def accepted(
    said: torch.Tensor, drafts: torch.Tensor, cu_num_logits: torch.Tensor, max_draft: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each request's tokens, [requests, 1 + max_draft], and how many of them are valid, int32 [requests].

    `said` [rows]: the sampled tokens, request by request. `drafts` [rows]: each request's last token, then its draft.
    So a sampled token matches the draft if it equals the next row's entry. `cu_num_logits`: [requests + 1].
    """
    depths = torch.arange(max_draft + 1, device=said.device)
    counts = (cu_num_logits[1:] - cu_num_logits[:-1]).unsqueeze(1)
    at = cu_num_logits[:-1].unsqueeze(1) + depths
    last = said.shape[0] - 1
    tokens = said[at.clamp(max=last)]
    is_right = (tokens == drafts[(at + 1).clamp(max=last)]) & (depths < counts - 1)
    return tokens, (1 + is_right.long().cumprod(1).sum(1)).to(torch.int32)
