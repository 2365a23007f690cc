"""The target model as the recipe needs it: many sequences at once, its last hidden states beside its tokens.

Generating text and storing what the target thought at each token are one pass here, not two: a decode step has just
computed the hidden state that training will want, and a second reading would cost as much as the generation did.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from edge_client.drafters.llama_weights import Layer, Llama, load_llama, rope_tables


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to the last dimension; cos and sin must broadcast against x."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


class TargetRows:
    """The target with a fixed number of cache rows, one sequence a row, each at its own length."""

    def __init__(self, directory: Path, rows: int, context: int) -> None:
        self.model: Llama = load_llama(directory)
        self.model.layers = list(self.model.layers)  # read once: every pass goes through them
        self.rows = rows
        self.context = context
        shape = self.model.shape
        self._cos, self._sin = rope_tables(shape, context)
        cache = (shape.layers, rows, shape.kv_heads, context, shape.head_dim)
        self._keys = torch.zeros(cache)
        self._values = torch.zeros(cache)
        self._prefix = 0

    def set_prefix(self, tokens: Sequence[int]) -> None:
        """Compute the prompts' common beginning (the system prompt) once, and lay it into every row."""
        if tokens:
            self.forward(torch.tensor([0]), torch.tensor([list(tokens)]), torch.tensor([0]))
            self._keys[:, 1:, :, : len(tokens)] = self._keys[:, :1, :, : len(tokens)]
            self._values[:, 1:, :, : len(tokens)] = self._values[:, :1, :, : len(tokens)]
        self._prefix = len(tokens)

    @property
    def prefix(self) -> int:
        """How many tokens of every row are the common beginning."""
        return self._prefix

    @torch.inference_mode()
    def forward(self, rows: Tensor, tokens: Tensor, start: Tensor) -> Tensor:
        """One pass of tokens [B, T] for cache rows [B] holding start [B] tokens; final hidden states [B, T, width]."""
        shape = self.model.shape
        batch, length = tokens.shape
        at = start[:, None] + torch.arange(length)
        reach = int(at.max()) + 1
        cos, sin = self._cos[at][:, None], self._sin[at][:, None]
        seen = torch.arange(reach) <= at[..., None]
        bias = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf")) if length > 1 else seen
        x = self.model.embed[tokens]
        for index, layer in enumerate(self.model.layers):
            flat = functional.rms_norm(x, (shape.width,), layer.norm_in, shape.eps)
            qkv = (flat @ layer.qkv.T).view(batch, length, -1, shape.head_dim).transpose(1, 2)
            q, k, v = torch.split(qkv, [shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            keys, values = self._keys[index], self._values[index]
            keys[rows[:, None], :, at] = k.transpose(1, 2)
            values[rows[:, None], :, at] = v.transpose(1, 2)
            if length == 1:
                attended = self._attend_each(q, keys, values, rows, at[:, 0] + 1)
            else:
                attended = self._attend(q, keys[rows, :, :reach], values[rows, :, :reach], bias)
            x = self._finish(layer, x, attended)
        return functional.rms_norm(x, (shape.width,), self.model.norm, shape.eps)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """Grouped attention: the query heads of a group share one product with their keys."""
        shape = self.model.shape
        batch, _, length, dim = q.shape
        group = shape.heads // shape.kv_heads
        q = q.reshape(batch, shape.kv_heads, group * length, dim) * dim**-0.5
        scores = (q @ keys.transpose(-1, -2)).view(batch, shape.kv_heads, group, length, -1)
        weights = (scores + bias[:, None, None]).softmax(-1).view(batch, shape.kv_heads, group * length, -1)
        return (weights @ values).view(batch, shape.heads, length, dim).transpose(1, 2).reshape(batch, length, -1)

    def _attend_each(self, q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, lengths: Tensor) -> Tensor:
        """Attention of one new token a row, row by row: each reads its own length only, not the longest row's."""
        shape = self.model.shape
        q = q.view(len(q), 1, shape.kv_heads, -1, shape.head_dim)
        attend = functional.scaled_dot_product_attention
        outputs = [
            attend(query, keys[row : row + 1, :, :length], values[row : row + 1, :, :length])
            for query, row, length in zip(q, rows.tolist(), lengths.tolist(), strict=True)
        ]
        return torch.cat(outputs).view(len(q), 1, -1)

    def _finish(self, layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
        """What follows attention in a block: the output projection and the gated MLP, both residual."""
        shape = self.model.shape
        x = x + attended @ layer.out.T
        gate, up = (functional.rms_norm(x, (shape.width,), layer.norm_mid, shape.eps) @ layer.gate_up.T).chunk(
            2, dim=-1
        )
        return x + (functional.silu(gate) * up) @ layer.down.T

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Full-vocabulary scores of final hidden states."""
        return hidden @ self.model.head.T
