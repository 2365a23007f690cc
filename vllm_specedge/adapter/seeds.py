"""Seeds of sampled requests, which are sent to their edges so that these draft with the target's noise."""

from secrets import randbits
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.request import Request

from vllm_specedge.adapter import hooks
from vllm_specedge.adapter.worker.coupling import SEED_KEY
from vllm_specedge.wire.sampling import MURMUR, SPLITMIX, Sampling

_LEAST_TEMPERATURE, _GREATEST_TEMPERATURE = 0.01, 10.0
"""Below the first, sampling is as good as greedy; above the second, no draft can follow."""


def noise_kind(vllm_config: Any) -> int | None:
    """The kind of noise of this server's workers; None: one that edges cannot compute."""
    model_config = vllm_config.model_config
    if vllm_config.use_v2_model_runner:
        is_other = model_config.use_fp64_gumbel or getattr(vllm_config, "watermark_config", None) is not None
        return None if is_other or hooks.problems(hooks.COUPLING_V2, hooks.NOISE_V2) else MURMUR
    return SPLITMIX if current_platform.is_cpu() and not hooks.problems(hooks.COUPLING) else None


def seed(request: Request, kind: int) -> tuple[int, ...]:
    """A request's sampling parameters for edges; empty if it is greedy. A request without a seed is given one.

    To be called before the workers get the request.
    """
    parameters = request.sampling_params
    if parameters is None or not _LEAST_TEMPERATURE <= parameters.temperature <= _GREATEST_TEMPERATURE:
        return ()
    number = parameters.seed
    if number is None:
        number = randbits(63)
        parameters = request.sampling_params = parameters.clone()  # other requests may share the caller's
        if kind == MURMUR:
            parameters.extra_args = {**(parameters.extra_args or {}), SEED_KEY: number}
        else:
            parameters.seed = number
    top_k, first = max(0, parameters.top_k), request.num_prompt_tokens
    return Sampling(parameters.temperature, top_k, parameters.top_p, number & 2**64 - 1, first, kind).fields()
