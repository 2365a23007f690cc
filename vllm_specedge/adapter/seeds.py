"""Seeds of sampled requests: the edge that drafts for one is told its seed, and so guesses with the target's noise."""

from secrets import randbits
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.request import Request

from vllm_specedge.adapter import hooks
from vllm_specedge.wire.sampling import Sampling

_LEAST_TEMPERATURE, _GREATEST_TEMPERATURE = 0.01, 10.0
"""What is cooler is as good as greedy; what is hotter no draft follows."""


def can_tell_noise(vllm_config: Any) -> bool:
    """Whether edges can compute the noise of this server's workers: so far on CPUs, on the V1 model runner."""
    is_v1_on_cpu = current_platform.is_cpu() and not vllm_config.use_v2_model_runner
    return is_v1_on_cpu and not hooks.problems(hooks.COUPLING)


def seed(request: Request) -> tuple[int, ...]:
    """How a request is sampled, as edges are told; nothing if it is greedy. One without a seed is given one.

    To be called before the workers hear of the request.
    """
    parameters = request.sampling_params
    if parameters is None or not _LEAST_TEMPERATURE <= parameters.temperature <= _GREATEST_TEMPERATURE:
        return ()
    if parameters.seed is None:
        parameters = request.sampling_params = parameters.clone()  # the caller's may be those of other requests too
        parameters.seed = randbits(63)
    top_k = max(0, parameters.top_k)
    number = parameters.seed & 2**64 - 1
    return Sampling(parameters.temperature, top_k, parameters.top_p, number, request.num_prompt_tokens).fields()
