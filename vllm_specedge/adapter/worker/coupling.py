"""Sampled drafts verified by equality, in the worker's process: a draft token is right if the target says the same.

What the target says at a position is the argmax of its logits, by temperature and with all constraints, plus noise that
a number decides, which the request's generator draws for the position (V1 on CPUs), or the request's seed and the
position (V2). vLLM's rejection sampler accepts a draft token by its probability, with numbers of its own: it keeps the
distribution, but a request with a seed says something else with drafts than without. Here every row is sampled as a
plain step would sample it, with the same noise, until one is not the draft's: the output is a function of seed and
prompt, whoever drafted (Daliri, Musco and Suresh 2024, "Coupling without communication").

Without a draft's probabilities vLLM's own way accepts a token with the target's probability of it; so does this one,
for a draft that knows nothing of the noise.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_specedge.adapter import hooks
from vllm_specedge.adapter.wrapping import wrap

logger = logging.getLogger("vllm.specedge.coupling")

_NOTHING = -1
"""Where a request has no token: vLLM's PLACEHOLDER_TOKEN_ID."""
_MAX_ROW_SEED = 2**31
_MAX_SEED = 2**63 - 1
SEED_KEY = "specedge_seed"
"""Where a V2 worker finds the seed of a request that has none of its own (SamplingParams.extra_args; adapter/seeds.py).

As the request's own seed it would keep the whole batch from vLLM's fused sampler (v1/worker/gpu/sample/sampler.py).
"""


class _Verification:
    """The step that is verified just now."""

    row_seeds: torch.Tensor | None = None
    """int64 of [draft tokens]; None: none is, or not by equality."""


_now = _Verification()


def couple_v1() -> None:
    """Wrap vLLM's rejection sampler in this process, if it samples on a CPU; again is harmless."""
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
        # The next number is then that of the token behind the draft, which vLLM samples itself.
        _now.row_seeds = _row_seeds(counts, generators)
        try:
            output = forward(self, metadata, draft_probs, logits, sampling_metadata)
        finally:
            _now.row_seeds = None
        num_said = (output.sampled_token_ids != _NOTHING).sum(1).tolist()
        for row, generator in generators.items():  # back to where plain steps would have left it
            generator.set_state(states[row])
            _draw(generator, num_said[row])
        return output

    return sample


def _row_seeds(num_draft_tokens: Sequence[int], generators: Mapping[int, torch.Generator]) -> torch.Tensor:
    """Those of all draft tokens, drawn from the generators of the rows that have one."""
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
    """What each request says: its draft as far as it is right, and one token more; int32 of [requests, 1 + most draft
    tokens], -1 where a request has none.

    `drafts`, `logits` (float32, with a row each), `row_seeds`: of the draft tokens, request by request. `bonus`: of
    [requests], the token behind a draft that is right. `is_greedy`: of [requests]; None: no request is.
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
        at = starts[rows] + depth  # rows behind a token that was not right are not sampled at all
        said = sampled(logits[at], row_seeds[at], is_greedy[rows] if is_greedy is not None else None)
        output[rows, depth] = said.to(torch.int32)
        rows = rows[said == drafts[at]]
    return output


def sampled(logits: torch.Tensor, row_seeds: torch.Tensor, is_greedy: torch.Tensor | None) -> torch.Tensor:
    """As vLLM's CPU build samples rows: int64 of [rows]."""
    said: torch.Tensor = torch.ops._C.fused_gumbel_argmax(logits, row_seeds)
    return said if is_greedy is None else torch.where(is_greedy, logits.argmax(-1), said)


def couple_v2() -> None:
    """Replace the V2 runner's rejection sampling in this process, and take seeds over; again is harmless."""
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
    """What each request says, of [requests, 1 + max_draft], and how many tokens of that count, int32 of [requests].

    `said`, `drafts`: of [rows], request by request; a row's own token comes first, then its draft, so the token that
    follows what a row says is the draft's if it is the next row's. `cu_num_logits`: of [requests + 1].
    """
    depths = torch.arange(max_draft + 1, device=said.device)
    counts = (cu_num_logits[1:] - cu_num_logits[:-1]).unsqueeze(1)
    at = cu_num_logits[:-1].unsqueeze(1) + depths
    last = said.shape[0] - 1
    tokens = said[at.clamp(max=last)]
    is_right = (tokens == drafts[(at + 1).clamp(max=last)]) & (depths < counts - 1)
    return tokens, (1 + is_right.long().cumprod(1).sum(1)).to(torch.int32)
