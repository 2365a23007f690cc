"""How vLLM's verification handles each request parameter, and what is done about those that it does not support.

Read field by field: vllm.SamplingParams against v1/sample/rejection_sampler.py and v1/worker/gpu_model_runner.py, 0.32
and 0.33. Tested field by field on the real engine: tests/vllm/test_parameters.py. docs/upstream.md lists the faults.
"""

from enum import Enum
from functools import cache
from typing import Any


class Treatment(Enum):
    """How a request that sets a parameter is served."""

    DRAFTED = "vLLM supports it when it verifies drafts, or it does not concern sampling"
    MENDED = "vLLM does not support it when it verifies drafts; verification.py does"
    UNDRAFTED = "the request gets no drafts and is not held, but shares its steps with requests that do"
    ALONE = "in addition, nothing is verified in any step while the request is there"


_UNDRAFTED = {
    # The state that forces the end of thinking restarts when a request leaves the batch, as held ones do.
    "thinking_token_budget": Treatment.UNDRAFTED,
}
_ALONE = {
    # No logprobs at all in a verifying step; with another request's `logprobs` the engine ends (a shape mismatch).
    "logprob_token_ids": Treatment.ALONE,
}
_MENDED = {"min_p": Treatment.MENDED, "logit_bias": Treatment.MENDED}
_CHOOSING = (
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "bad_words",
    "min_tokens",
    "allowed_token_ids",
    "structured_outputs",
    "logprobs",
    "flat_logprobs",
)
"""Parameters that the rejection sampler supports for each draft token."""
_NOT_CHOOSING = (
    "prompt_logprobs",
    "prompt_logprob_token_ids",
    "prompt_logprob_start",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "max_tokens",
    "repetition_detection",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "output_kind",
    "stream_interval",
    "n",
    "extra_args",
    "skip_reading_prefix_cache",
    "routed_experts_prompt_start",
    "skip_clone",
)
"""Parameters of prompts, of the end of an answer (which the scheduler checks token by token), and of its text."""
_REFUSED = (
    "trace_decode_token_ids",
    "watermarking",
)
"""Parameters that vLLM's front end refuses with speculation, or on this runner."""
_DRAFTED = dict.fromkeys((*_CHOOSING, *_NOT_CHOOSING, *_REFUSED), Treatment.DRAFTED)
TREATMENTS: dict[str, Treatment] = {**_DRAFTED, **_MENDED, **_UNDRAFTED, **_ALONE}
_DERIVED = ("output_text_buffer_length",)
"""Fields that vLLM sets from other fields."""


def treatment(parameters: Any) -> Treatment:
    """How a request with these SamplingParams is served. A request with a parameter that is not in the table, for
    instance of a newer vLLM, is served alone, since nothing is known about it."""
    kind: type = type(parameters)
    for name, default, how in _careful(kind):
        value = getattr(parameters, name)
        if type(value) is not type(default) or value != default:
            return how
    return Treatment.DRAFTED


def unknown_parameters(kind: type) -> list[str]:
    """The fields of vLLM's SamplingParams that are not in the table."""
    fields: tuple[str, ...] = getattr(kind, "__struct_fields__", ())
    return [name for name in fields if name not in TREATMENTS and name not in _DERIVED and not name.startswith("_")]


@cache
def _careful(kind: type) -> tuple[tuple[str, object, Treatment], ...]:
    """Name, default and treatment of the fields that need care, those of requests that are served alone first."""
    fields = {**_ALONE, **dict.fromkeys(unknown_parameters(kind), Treatment.ALONE), **_UNDRAFTED}
    default = kind()
    return tuple((name, getattr(default, name), how) for name, how in fields.items() if hasattr(default, name))
