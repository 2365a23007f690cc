"""A Hugging Face model whose contexts share one cache of slots: trees, shared passes, and CUDA graphs.

In token-by-token decoding, a framework's Python takes longer than a small model's arithmetic. Here the tensors of a
pass have few shapes and fixed addresses, so that CUDA can record the kernels once for each shape and replay them. A
context's entries lie anywhere in the cache and never move; a row of a mask selects what an entry attends to.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from edge_client.drafters import Candidate
from edge_client.drafters.slot_contexts import Rows
from edge_client.drafters.slots import TRASH, Slots, Truths
from edge_client.drafters.torch_passes import candidates

logger = logging.getLogger(__name__)

ATTENTION = "specedge_slots"
FULL, SLIDING = "full_attention", "sliding_attention"
"""Transformers' names for the kinds of layers."""
KIND_OF = {DynamicLayer: FULL, DynamicSlidingWindowLayer: SLIDING}
RECORDED_ROWS = (1, 2, 4, 8, 16, 32)
"""Row counts of recorded passes; a pass is padded to the next of them."""
NUM_WARM_UPS = 2
"""Passes before a recording: libraries choose and set up their kernels in the first ones."""


class Pass(NamedTuple):
    """The inputs of a forward pass."""

    ids: Tensor
    """[1, rows]."""
    positions: Tensor
    """[1, rows]."""
    slots: Tensor
    """[rows]: slots that keys and values are written to."""
    seen: Mapping[str, Tensor]
    """By kind of layer, whether a row attends to a slot: [rows, extent]."""


class SlotLayer(StaticLayer):  # type: ignore[misc]
    """One layer's keys and values, [1, kv heads, slots, head dim] each."""

    keys: Tensor
    values: Tensor
    is_initialized: bool

    def __init__(self, where: "SlotCache") -> None:
        super().__init__(max_cache_len=0)
        self._where = where

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        slots, extent = self._where.slots, self._where.extent
        if not self.is_initialized or self.keys.shape[2] < self._where.size:
            self._grow(keys, values)
        # NaN and infinite values would reach every context: attention multiplies masked values by 0.
        self.keys[:, :, slots] = keys.nan_to_num(0.0, 0.0, 0.0)
        self.values[:, :, slots] = values.nan_to_num(0.0, 0.0, 0.0)
        return self.keys[:, :, :extent], self.values[:, :, :extent]

    def get_seq_length(self) -> int:
        return 0

    def _grow(self, keys: Tensor, values: Tensor) -> None:
        """Grow keys and values together: if memory runs out, the layer stays as it was."""
        held = (self.keys, self.values) if self.is_initialized else (keys[:, :, :0], values[:, :, :0])
        grown = [
            torch.zeros(*new.shape[:2], self._where.size, new.shape[-1], dtype=new.dtype, device=new.device)
            for new in (keys, values)
        ]
        for new, old in zip(grown, held, strict=True):
            new[:, :, : old.shape[2]] = old
        self.keys, self.values = grown
        self.is_initialized = True


class SlotCache(Cache):  # type: ignore[misc]
    """The cache of all layers, with the slots that the rows of the current pass are written to."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[SlotLayer(self) for _ in range(num_layers)])
        self.slots = torch.empty(0, dtype=torch.long)
        self.extent = self.size = 0


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of rows to slots. The query heads of a group become rows of their key head, so that no key is repeated.

    `attention_mask`: [1, 1, query heads per key head * rows, slots]. Raises ValueError for unsupported options: capped
    scores, sinks.
    """
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if unknown:
        raise ValueError(f"attention with {unknown[0]}")
    heads, kv_heads, rows = query.shape[1], key.shape[1], query.shape[2]
    attended = functional.scaled_dot_product_attention(
        query.reshape(1, kv_heads, -1, query.shape[-1]),
        key,
        value,
        attn_mask=attention_mask,
        scale=scaling,
    )
    return attended.reshape(1, heads, rows, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attend)


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A recorded pass: its graph, its inputs to fill in, and its output."""

    graph: Any
    logits: Tensor
    inputs: Pass


class HfPasses:
    """A model, its cache of slots, and the passes through them."""

    def __init__(self, model: Any, kept: Tensor | None) -> None:
        """Raises ValueError for a model whose layers keep no entry per token, or whose attention is not supported."""
        layers = DynamicCache(config=model.config).layers
        kinds = {KIND_OF.get(type(layer), "") for layer in layers}
        if "" in kinds:
            raise ValueError("a layer with a state")
        self.slots = Slots()
        self._model = model
        self._kept = kept
        self._group = _query_heads_of_a_key_head(model.config)
        windows = {layer.sliding_window for layer in layers if hasattr(layer, "sliding_window")}
        if len(windows) > 1 or getattr(model.config, "attention_chunk_size", None):
            raise ValueError("windows of several kinds")
        self._window = next(iter(windows), 0)
        self._kinds = sorted(kinds)
        self._cache = SlotCache(len(layers))
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        """Recorded passes by rows and extent."""
        self._num_of_shape = Counter[tuple[int, int]]()
        """Number of passes by rows and extent."""
        self._is_recording = model.device.type == "cuda"
        model.set_attn_implementation(ATTENTION)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def run(self, rows: Rows, asked: Sequence[int], width: int) -> list[list[Candidate]]:
        if self._cache.size < self.slots.size:
            self._cache.size = self.slots.size
            self._recorded.clear()  # they hold addresses of the old cache
        number = len(rows.slots)
        given = Pass(
            torch.from_numpy(rows.tokens)[None],
            torch.from_numpy(rows.positions)[None],
            torch.from_numpy(rows.slots),
            {kind: torch.from_numpy(seen) for kind, seen in self._seen(rows).items()},
        )
        recorded_rows = next((each for each in RECORDED_ROWS if each >= number), None)
        logits = None
        if self._is_recording and recorded_rows is not None:
            logits = self._replayed(_filled(given, recorded_rows))
        if logits is not None:
            logits = logits[list(asked)]
        elif list(asked) == [number - 1]:
            logits = self._forward(_on(given, self._model.device), logits_to_keep=1)
        else:
            logits = self._forward(_on(given, self._model.device))[list(asked)]
        return candidates(logits.float(), width, self._kept)

    def _seen(self, rows: Rows) -> dict[str, Truths]:
        """Whether rows attend to slots, by kind of layer."""
        seen = {FULL: rows.seen}
        if SLIDING in self._kinds:
            seen[SLIDING] = self.slots.in_window(rows.seen, rows.positions, self._window)
        return {kind: seen[kind] for kind in self._kinds}

    def _forward(self, given: Pass, **options: Any) -> Tensor:
        dtype = self._model.dtype
        self._cache.slots, self._cache.extent = given.slots, given.seen[self._kinds[0]].shape[1]
        least = torch.finfo(dtype).min
        bias = {
            kind: torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            .masked_fill_(~seen, least)
            .repeat(self._group, 1)[None, None]
            for kind, seen in given.seen.items()
        }
        output = self._model(
            input_ids=given.ids,
            position_ids=given.positions,
            attention_mask=bias if len(bias) > 1 else bias[self._kinds[0]],
            past_key_values=self._cache,
            use_cache=True,
            **options,
        )
        logits: Tensor = output.logits[0]
        return logits

    def _replayed(self, given: Pass) -> Tensor | None:
        """Logits of a recorded pass, valid until the next one runs; None if no pass of this shape is recorded. A shape
        is recorded when it comes for the second time."""
        shape = (len(given.slots), given.seen[self._kinds[0]].shape[1])
        self._num_of_shape[shape] += 1
        if shape not in self._recorded:
            if self._num_of_shape[shape] == 1:
                return None
            try:
                self._recorded[shape] = self._record(given)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError) as error:
                logger.warning("Passes of this model cannot be recorded as CUDA graphs, and take longer: %.120s", error)
                self._is_recording = False
                return None
        recorded = self._recorded[shape]
        for held, new in zip(_tensors(recorded.inputs), _tensors(given), strict=True):
            held.copy_(new)
        recorded.graph.replay()
        return recorded.logits

    def _record(self, given: Pass) -> _Recorded:
        inputs = _on(given, self._model.device)
        return _Recorded(*captured(lambda: self._forward(inputs), self._model.device), inputs)


def captured(run: Callable[[], Tensor], device: torch.device) -> tuple[Any, Tensor]:
    """A CUDA graph of `run`, and the tensor that its result is written to. Raises RuntimeError if it has none."""
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream()):  # restored after a failure
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(NUM_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=_memory()):
            returned = run()
    return graph, returned


@cache
def _memory() -> Any:
    """The memory pool that all graphs share: they run in turn, and each result is read before the next run."""
    return torch.cuda.graph_pool_handle()


def _query_heads_of_a_key_head(config: Any) -> int:
    heads = int(config.num_attention_heads)
    return heads // int(getattr(config, "num_key_value_heads", None) or heads)


def _filled(given: Pass, rows: int) -> Pass:
    """The same pass padded to `rows` rows. Padding rows write to and read the TRASH slot, which no other row reads."""
    lacking = rows - len(given.slots)
    if not lacking:
        return given
    nothing = torch.zeros(lacking, dtype=torch.long)
    of_trash = torch.zeros(lacking, given.seen[next(iter(given.seen))].shape[1], dtype=torch.bool)
    of_trash[:, TRASH] = True
    return Pass(
        torch.cat([given.ids, nothing[None]], dim=1),
        torch.cat([given.positions, nothing[None]], dim=1),
        torch.cat([given.slots, nothing + TRASH]),
        {kind: torch.cat([seen, of_trash]) for kind, seen in given.seen.items()},
    )


def _on(given: Pass, device: torch.device) -> Pass:
    return Pass(
        given.ids.to(device, copy=True),
        given.positions.to(device, copy=True),
        given.slots.to(device, copy=True),
        {kind: seen.to(device, copy=True) for kind, seen in given.seen.items()},
    )


def _tensors(given: Pass) -> list[Tensor]:
    return [given.ids, given.positions, given.slots, *given.seen.values()]
