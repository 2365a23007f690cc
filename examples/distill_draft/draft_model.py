"""The draft as a trainable module: a few of the target's blocks behind its frozen embedding (or all: the target)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from edge_client.drafters.llama.weights import Layer, load_llama, rope_tables


def fast_numbers() -> torch.autocast:
    """Matrix products in bfloat16 if the processor has tiles for it (eight times as fast as float32 there)."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_amx_tile_supported())


class Block(nn.Module):
    """One Llama block with stacked projections, for whole sequences."""

    def __init__(self, layer: Layer, heads: int, kv_heads: int, eps: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.eps = heads, kv_heads, eps
        self.norm_in = nn.Parameter(layer.norm_in)
        self.qkv = nn.Parameter(layer.qkv)
        self.out = nn.Parameter(layer.out)
        self.norm_mid = nn.Parameter(layer.norm_mid)
        self.gate_up = nn.Parameter(layer.gate_up)
        self.down = nn.Parameter(layer.down)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The block over x [B, T, width], causal within each row (rows are padded on the right)."""
        batch, length, width = x.shape
        normed = functional.rms_norm(x, (width,), self.norm_in, self.eps)
        qkv = (
            functional.linear(normed, self.qkv).view(batch, length, self.heads + 2 * self.kv_heads, -1).transpose(1, 2)
        )
        qk, v = qkv[:, : self.heads + self.kv_heads], qkv[:, self.heads + self.kv_heads :]
        half = qk.shape[-1] // 2
        cos, sin = cos.to(qk.dtype), sin.to(qk.dtype)
        qk = qk * cos + torch.cat([-qk[..., half:], qk[..., :half]], dim=-1) * sin
        q, k = qk[:, : self.heads], qk[:, self.heads :]
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + functional.linear(attended.transpose(1, 2).reshape(batch, length, -1), self.out)
        normed = functional.rms_norm(x, (width,), self.norm_mid, self.eps)
        gate, up = functional.linear(normed, self.gate_up).chunk(2, dim=-1)
        return x + functional.linear(functional.silu(gate) * up, self.down)


class Draft(nn.Module):
    """The draft's body: token ids in, final (normed) hidden states out, in the target's own last-state space."""

    embed: Tensor
    embed_out: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, target_dir: Path, layers: list[int], positions: int) -> None:
        super().__init__()
        source = load_llama(target_dir, keep=layers)
        shape = source.shape
        if shape.has_qkv_bias or shape.has_qk_norm:
            raise ValueError(f"{target_dir} has QKV biases or QK norms, which a draft made here would lack")
        self.shape = shape
        self.blocks = nn.ModuleList(Block(layer, shape.heads, shape.kv_heads, shape.eps) for layer in source.layers)
        self.norm = nn.Parameter(source.norm)
        self.register_buffer("embed", source.embed.float(), persistent=False)
        self.register_buffer("embed_out", source.head.float(), persistent=False)
        cos, sin = rope_tables(shape, positions)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def put(self, layers: Sequence[Layer], norm: Tensor) -> None:
        """Copy the weights of a draft with the same number of layers."""
        for block, layer in zip(self.blocks, layers, strict=True):
            for name, parameter in block.named_parameters():
                parameter.copy_(getattr(layer, name))
        self.norm.copy_(norm)

    def forward(self, tokens: Tensor) -> Tensor:
        """Hidden states [B, T, width] of tokens [B, T]."""
        length = tokens.shape[1]
        x = self.embed[tokens]
        for block in self.blocks:
            x = block(x, self.cos[:length], self.sin[:length])
        return functional.rms_norm(x, (self.shape.width,), self.norm, self.shape.eps)
