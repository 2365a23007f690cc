"""An mlx-lm model whose contexts share one cache of slots.

mlx-lm's models get everything that a tree needs from their cache: the offset for RoPE, a mask, and the keys and values.
A chain is a batch of one text with many tokens. Other rows are a batch of texts with one token each, every one at its
own position.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from edge_client.drafters import Candidate
from edge_client.drafters.slot_contexts import Rows
from edge_client.drafters.slots import Slots, Truths


class _Layer:
    """One layer's keys and values, [1, kv heads, slots, head dim] each, with the interface of an mlx-lm cache."""

    def __init__(self, passes: "MlxPasses") -> None:
        self._passes = passes
        self._keys: Any = None
        self._values: Any = None

    @property
    def offset(self) -> Any:
        """The RoPE offset: the first position of a chain, or one position per row."""
        return self._passes.offset

    def make_mask(self, number: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """The mask for mlx-lm's `create_attention_mask`: [rows, slots], or [rows, 1, 1, slots]."""
        return self._passes.mask(window_size)

    def update_and_fetch(self, keys: Any, values: Any) -> tuple[Any, Any]:
        self._keys = self._written(self._keys, keys)
        self._values = self._written(self._values, values)
        return self._read(self._keys, len(keys)), self._read(self._values, len(values))

    def _written(self, held: Any, new: Any) -> Any:
        if len(new) > 1:
            new = new.transpose(2, 1, 0, 3)
        _, kv_heads, _, dim = new.shape
        size, before = self._passes.slots.size, 0 if held is None else held.shape[2]
        if before < size:
            more = mx.zeros((1, kv_heads, size - before, dim), new.dtype)
            held = more if held is None else mx.concatenate([held, more], axis=2)
        # NaN and infinite values would reach every context: attention multiplies masked values by 0.
        held[:, :, self._passes.into] = mx.nan_to_num(new, 0.0, 0.0, 0.0)
        return held

    def _read(self, held: Any, num_texts: int) -> Any:
        _, kv_heads, _, dim = held.shape
        return mx.broadcast_to(held[:, :, : self._passes.extent], (num_texts, kv_heads, self._passes.extent, dim))


class MlxPasses:
    """A model, its cache of slots, and the passes through them."""

    def __init__(self, model: Any, num_caches: int, kept: Sequence[int] | None) -> None:
        """`num_caches`: the model's number of caches; some models have fewer caches than layers."""
        self.slots = Slots()
        self.offset: Any = 0
        self.into: Any = None
        """Slots that a pass writes to."""
        self.extent = 0
        self._model = model
        self._kept = None if kept is None else mx.array(list(kept))
        self._cache = [_Layer(self) for _ in range(num_caches)]
        self._rows: Rows | None = None

    def mask(self, window: int | None) -> Any:
        """Whether each row of the pass attends to a slot."""
        assert self._rows is not None
        seen: Truths = self._rows.seen
        if window is not None:
            seen = self.slots.in_window(seen, self._rows.positions, window)
        return mx.array(seen if self._rows.is_chain else seen[:, None, None])

    def run(self, rows: Rows, asked: Sequence[int], width: int) -> list[list[Candidate]]:
        self._rows, self.extent, self.into = rows, rows.seen.shape[1], mx.array(rows.slots)
        self.offset = int(rows.positions[0]) if rows.is_chain else mx.array(rows.positions)
        tokens = mx.array(rows.tokens)
        logits = self._model(tokens[None] if rows.is_chain else tokens[:, None], cache=self._cache)
        logits = logits[0] if rows.is_chain else logits[:, 0]
        return self.candidates(logits[mx.array(list(asked))], width)

    def candidates(self, logits: Any, width: int) -> list[list[Candidate]]:
        """The `width` most probable tokens (all if fewer) for each row of logits, most probable first."""
        logits = logits.astype(mx.float32) if self._kept is None else logits.astype(mx.float32)[:, self._kept]
        width = min(width, logits.shape[-1])
        best = mx.argpartition(-logits, width - 1, axis=-1)[:, :width]
        shares = mx.exp(mx.take_along_axis(logits, best, axis=-1) - mx.logsumexp(logits, axis=-1, keepdims=True))
        ids = best if self._kept is None else self._kept[best]
        mx.eval(ids, shares)
        of_rows = zip(np.array(ids), np.array(shares), strict=True)
        return [
            [
                Candidate(int(row_ids[place]), float(row_shares[place]))
                for place in np.argsort(-row_shares, kind="stable")
            ]
            for row_ids, row_shares in of_rows
        ]
