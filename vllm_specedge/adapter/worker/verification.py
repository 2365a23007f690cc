"""Support for `min_p` and `logit_bias` in vLLM's verification of drafts, in the worker's process.

vLLM's rejection sampler applies neither to the logits of draft tokens (v1/sample/rejection_sampler.py, 0.32 and 0.33),
and with speculation its worker has no processors for them (v1/sample/logits_processor, build_logitsprocs). So its front
end refuses requests that set one (SamplingParams._validate_spec_decode): a server with edges would refuse requests that
plain vLLM serves. For draft tokens both take a few lines. They are applied where plain sampling applies them: the bias
before the penalties, min_p between temperature and top-k.
"""

import logging
import math
from typing import Any

import torch

from vllm_specedge.adapter import hooks
from vllm_specedge.adapter.wrapping import wrap

logger = logging.getLogger("vllm.specedge.verification")

_MARK = "_specedge_verifies_all"


def mend() -> None:
    """Wrap vLLM's functions in this process; calling it again is harmless. If they are not as expected, do nothing: the
    front end then still refuses such requests."""
    if hooks.problems(hooks.VERIFICATION):
        return
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.worker import gpu_model_runner

    wrap(gpu_model_runner, "build_logitsprocs", _complete)
    wrap(rejection_sampler.RejectionSampler, "apply_logits_processors", _biased)
    wrap(rejection_sampler, "apply_sampling_constraints", _without_improbable)


def admit(speculative_config: Any, runner: str) -> None:
    """Let the front end accept such requests with edges, in this process; calling it again is harmless.

    vLLM's V2 runner itself applies both to draft tokens.
    """
    problems = hooks.problems(hooks.VERIFICATION if runner == hooks.V1 else hooks.VERIFICATION_V2)
    if problems:
        logger.warning("Requests with min_p or logit_bias are refused: %s", "; ".join(problems))
        return
    from vllm import SamplingParams

    object.__setattr__(speculative_config, _MARK, True)
    wrap(SamplingParams, "_validate_spec_decode", _unless_ours)


def _unless_ours(validate: Any) -> Any:
    def validated(self: Any, speculative_config: Any) -> None:
        if not getattr(speculative_config, _MARK, False):
            validate(self, speculative_config)

    return validated


def _complete(build_logitsprocs: Any) -> Any:
    """Build the processors that vLLM has without speculation. The worker extension is built before them."""
    from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessors

    def build(
        vllm_config: Any, device: Any, is_pin_memory: bool, is_pooling_model: bool, custom_logitsprocs: Any = ()
    ) -> Any:
        if is_pooling_model or custom_logitsprocs:  # refused
            return build_logitsprocs(vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs)
        return LogitsProcessors(kind(vllm_config, device, is_pin_memory) for kind in BUILTIN_LOGITS_PROCESSORS)

    return build


def _biased(apply_logits_processors: Any) -> Any:
    from vllm.v1.sample.logits_processor import LogitBiasLogitsProcessor

    def apply(self: Any, logits: torch.Tensor, sampling_metadata: Any, metadata: Any) -> torch.Tensor:
        for processor in sampling_metadata.logitsprocs.non_argmax_invariant:
            if isinstance(processor, LogitBiasLogitsProcessor):
                add_biases(logits, processor.biases, metadata.num_draft_tokens)
        result: torch.Tensor = apply_logits_processors(self, logits, sampling_metadata, metadata)
        return result

    return apply


def add_biases(logits: torch.Tensor, biases: dict[int, dict[int, float]], num_draft_tokens: list[int]) -> None:
    """Add each request's biases (by row of the batch, then by token id) to the logits of its draft tokens: [draft
    tokens, vocabulary], in place."""
    start = 0
    for row, number in enumerate(num_draft_tokens):
        if number and row in biases:
            tokens = torch.tensor(list(biases[row]), device=logits.device)
            values = torch.tensor(list(biases[row].values()), device=logits.device, dtype=logits.dtype)
            logits[start : start + number, tokens] += values
        start += number


def _without_improbable(apply_sampling_constraints: Any) -> Any:
    from vllm.v1.sample.logits_processor import MinPLogitsProcessor

    def apply(logits: torch.Tensor, cu_num_draft_tokens: torch.Tensor, sampling_metadata: Any) -> torch.Tensor:
        for processor in sampling_metadata.logitsprocs.argmax_invariant:
            if (
                isinstance(processor, MinPLogitsProcessor)
                and processor.min_p_count
                and not sampling_metadata.all_greedy
            ):
                rows = processor.min_p[: len(cu_num_draft_tokens), 0]
                drop_improbable(logits, rows, sampling_metadata.temperature, cu_num_draft_tokens)
        result: torch.Tensor = apply_sampling_constraints(logits, cu_num_draft_tokens, sampling_metadata)
        return result

    return apply


def drop_improbable(
    logits: torch.Tensor, min_p: torch.Tensor, temperature: torch.Tensor, cu_num_draft_tokens: torch.Tensor
) -> None:
    """Mask, in the draft tokens' logits [draft tokens, vocabulary] in place, all tokens less than min_p times as
    probable as the most probable one at the request's temperature. `min_p`, `temperature` (0: greedy) and
    `cu_num_draft_tokens`: [requests]. Computed as in MinPLogitsProcessor, so that not even rounding differs."""
    counts = torch.diff(cu_num_draft_tokens, prepend=cu_num_draft_tokens.new_zeros(1))
    heat = torch.repeat_interleave(torch.where(temperature == 0, 1.0, temperature), counts).unsqueeze(1)
    probabilities = torch.nn.functional.softmax(logits / heat, dim=-1)
    least = probabilities.amax(-1, keepdim=True) * torch.repeat_interleave(min_p, counts).unsqueeze(1)
    logits.masked_fill_(probabilities < least, -math.inf)
