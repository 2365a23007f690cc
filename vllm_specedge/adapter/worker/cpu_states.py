"""A fault of vLLM 0.32's CPU backend, mended: the convolution of a gated delta net forgets where its window ends.

Each request has a buffer of convolution inputs: the last `width - 2` before a step, then those of the step's tokens,
from column 0 on (model_executor/layers/mamba/ops/causal_conv1d.py has it so on GPUs); the next step's window begins at
the number of accepted drafts. 0.32's `_spec_forward` (ops/cpu/gdn_attention.py) writes them to the buffer's end
instead. The two agree where every row has all K drafts. With fewer the next window is wrong, and where it was longer
than the next step is, the copy raises and ends the engine. Rows without any draft take the same way: with speculation
of any kind configured, plain vLLM's too, answers are wrong from the second token on. 0.33 has it right.

The rest of the step, the recurrent states, is vLLM's own operator here as there.
"""

import inspect
import logging
from typing import Any

import torch

logger = logging.getLogger("vllm.specedge.cpu_states")

_AT_THE_END = "keep = B[:, offset + 1 :"
"""What the faulty function does, as it is written there."""


def mend() -> None:
    """Replace the function in this process if it is the faulty one; again is harmless."""
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

    if _AT_THE_END in inspect.getsource(gdn_attention._spec_forward):
        gdn_attention._spec_forward = spec_forward
        logger.info("Replaced vLLM's CPU convolution of gated delta nets, which takes steps of K drafts only")


def spec_forward(
    layer: Any,
    attn_metadata_i: Any,
    mixed_qkv_spec: torch.Tensor,
    b_spec: torch.Tensor,
    a_spec: torch.Tensor,
    conv_buf: torch.Tensor,
    ssm_state: torch.Tensor,
    width: int,
    state_len: int,
) -> torch.Tensor:
    """What attention gives to the rows of decoding requests: [tokens, ...], in the order of `spec_query_start_loc`.

    `mixed_qkv_spec` [tokens, dim]; `conv_buf` [slots, dim, state_len] and `ssm_state` are written to.
    """
    del state_len
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

    number = attn_metadata_i.num_spec_decodes
    states = attn_metadata_i.spec_state_indices_tensor[:number].to(torch.int32).contiguous()
    starts = attn_metadata_i.spec_query_start_loc[: number + 1].to(torch.int32).contiguous()
    accepted = attn_metadata_i.num_accepted_tokens[:number].to(torch.int32).contiguous()
    convolved = _convolved(layer, mixed_qkv_spec, conv_buf, states[:, 0].long(), starts, accepted.long(), width)
    query, key, value = (each.squeeze(0) for each in layer.rearrange_mixed_qkv(convolved))
    attended: torch.Tensor = gdn_attention.ops.fused_sigmoid_gating_delta_rule_update_spec_cpu(
        A_log=layer.A_log,
        dt_bias=layer.dt_bias,
        q=query,
        k=key,
        v=value,
        a=a_spec,
        b=b_spec,
        initial_state_source=ssm_state,
        spec_state_indices=states,
        num_accepted_tokens=accepted,
        cu_seqlens=starts,
        use_qk_l2norm_in_kernel=True,
    )
    return attended


def _convolved(
    layer: Any,
    inputs: torch.Tensor,
    buffer: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    accepted: torch.Tensor,
    width: int,
) -> torch.Tensor:
    """The inputs [tokens, dim] behind each row's window; afterwards the buffer is as the next step reads it."""
    window = (accepted - 1)[:, None] + torch.arange(width - 1)
    history = buffer[slots[:, None], :, window]  # [rows, width - 1, dim]
    before = history[:, 1:].clone()
    output = _by_kernel(layer, inputs, history.transpose(1, 2), starts)
    columns = buffer.transpose(1, 2)
    columns[slots[:, None], torch.arange(width - 2)] = before
    rows = torch.repeat_interleave(torch.arange(len(slots)), starts.diff().long())
    place = torch.arange(len(inputs)) - starts[:-1].long()[rows]
    columns[slots[rows], width - 2 + place] = inputs.to(buffer.dtype)
    return output


def _by_kernel(layer: Any, inputs: torch.Tensor, windows: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """By the operators that chunks of prompts go through, of any lengths; `windows` is written to."""
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

    num_rows = len(windows)
    options = {
        "bias": layer.conv1d.bias,
        "conv_states": windows,
        "query_start_loc": starts,
        "cache_indices": torch.arange(num_rows, dtype=torch.int32),
        "has_initial_state": torch.ones(num_rows, dtype=torch.bool),
    }
    x = inputs.transpose(0, 1)
    if torch.cpu._is_amx_tile_supported() or gdn_attention.is_arm_bf16():
        is_silu = layer.activation == "silu"
        output = gdn_attention._causal_conv1d_fwd_cpu(
            x=x, weight=layer.conv1d.weight, silu_activation=is_silu, is_weight_packed=True, **options
        )
    else:
        weight = gdn_attention._unpacked_conv_weight(layer)
        output = gdn_attention.causal_conv1d_torch(x=x, weight=weight, activation=layer.activation, **options)
    convolved: torch.Tensor = output.transpose(0, 1)
    return convolved
