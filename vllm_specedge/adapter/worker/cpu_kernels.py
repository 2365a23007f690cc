"""Fix for `expand_kernel` of vLLM's CPU backend, a bug that would break the promise of unchanged outputs.

Without Triton the CPU backend replaces vLLM's sampling kernels by C++ ones. Its `expand_kernel` (0.32,
utils/cpu_triton_utils.py, _expand_kernel_impl) writes floats into an integer copy and drops it, so the temperatures,
top-p and top-k of draft tokens are uninitialized memory. Greedy batches do not use them; any batch with a sampled
request does, with every speculative method. `vllm.triton_utils.dispatcher.register_kernels` is vLLM's own way to
replace a kernel; it is used here only if a test shows that the kernel is wrong.
"""

import logging

import torch

logger = logging.getLogger("vllm.specedge.cpu_kernels")

_EXPAND = "vllm.v1.sample.rejection_sampler.expand_kernel"


def expand(
    output: torch.Tensor,
    input_val: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """Copy each row's value, with `replace_from` replaced, to its tokens' places in `output`: [rows] -> [tokens]."""
    del MAX_NUM_TOKENS
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(input_val == replace_from, torch.full_like(input_val, replace_to), input_val)
    output.copy_(torch.repeat_interleave(values, counts))


def _is_right() -> bool:
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    values, ends = torch.tensor([0.0, 0.5, 0.25]), torch.tensor([2, 2, 5], dtype=torch.int32)
    wanted = torch.tensor([1.0, 1.0, 0.25, 0.25, 0.25])
    return bool(torch.equal(expand_batch_to_tokens(values, ends, 5, replace_from=0, replace_to=1), wanted))


def mend() -> None:
    """Replace the kernel in this process if it is wrong. Raises RuntimeError if it is still wrong afterwards."""
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    if not current_platform.is_cpu() or HAS_TRITON or _is_right():
        return
    from vllm.triton_utils.dispatcher import register_kernels

    register_kernels({_EXPAND: expand})
    if not _is_right():
        raise RuntimeError(
            "This vLLM's CPU kernels give draft tokens a wrong temperature: install triton-cpu or update."
        )
    logger.info("Replaced vLLM's CPU expand_kernel, which gives draft tokens a wrong temperature")
