"""Fix for a bug of vLLM 0.32's CPU backend: the convolution of a gated delta net loses the position of its window.

Each request has a buffer of convolution inputs: the last `width - 2` before a step, then those of the step's tokens,
from column 0 on (as on GPUs, model_executor/layers/mamba/ops/causal_conv1d.py). The next step's window begins at the
number of accepted drafts. 0.32's `_spec_forward` (ops/cpu/gdn_attention.py) writes them to the end of the buffer
instead. Both agree if every row has all K drafts. With fewer, the next window is wrong, and if it was longer than the
next step is, the copy raises and ends the engine. Rows without any draft take the same path: with any speculation
configured, in plain vLLM too, answers are wrong from the second token on. 0.33 is right.

The rest of the step, the recurrent states, uses vLLM's own operator in both versions.
"""

import inspect
import logging
from typing import Any

import torch

logger = logging.getLogger("vllm.specedge.cpu_states")

_AT_THE_END = "keep = B[:, offset + 1 :"
"""The faulty line in the source of vLLM's function."""


def mend() -> None:
    """Replace the function in this process if it is the faulty one. Calling it again is harmless."""
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

    if _AT_THE_END in inspect.getsource(gdn_attention._spec_forward):
        gdn_attention._spec_forward = spec_forward
        logger.info("Replaced vLLM's CPU convolution of gated delta nets, which only supports steps of K drafts")


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
    """The attention output for the rows of decoding requests: [tokens, ...], in the order of `spec_query_start_loc`.

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
    """The convolved inputs, [tokens, dim], each row's after its window. Updates the buffer for the next step."""
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
    """The convolution by the operators for chunks of prompts, which take any lengths; `windows` is written to."""
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
