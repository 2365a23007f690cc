"""Llama, Qwen2 and Qwen3 on a CPU, with as little work between the matrix products as torch allows.

Drafting takes thousands of passes of one token each. Their cost is a framework's Python and the memory traffic of
float32 weights. So this runtime preallocates its key/value cache, stacks projections that share an input, folds the
norms' weights into them, and holds the matrices in int8, a quarter of the bytes.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from edge_client.drafters import Candidate, Part
from edge_client.drafters.entries import Entries
from edge_client.drafters.hub import model_name
from edge_client.drafters.llama.weights import Layer, Llama, Shape, load_llama, read_config, rope_tables
from edge_client.drafters.torch_passes import candidates, tree_bias

Format = Literal["float32", "int8"]
Matrix = Callable[[Tensor], Tensor]

CACHE_STEP = 512
CHUNK = 256


def _float_matrix(weight: Tensor, bias: Tensor | None = None) -> Matrix:
    held = weight.contiguous()
    return lambda x: functional.linear(x, held, bias)


def _int8_matrix(weight: Tensor, bias: Tensor | None = None) -> Matrix:
    """A product with int8 weights (one scale per output row) and activations quantized on the fly.

    Activations have seven bits: without VNNI the int8 product adds pairs in 16 bits, which eight bits would overflow.
    Torch warns that its quantized tensors are deprecated; their replacement has no int8 product for plain CPUs yet.
    """
    scales = (weight.abs().amax(dim=1) / 127).clamp_min(1e-12).double()
    zeros = torch.zeros(len(scales), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
        quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantized, bias)
    multiply = torch.ops.quantized.linear_dynamic
    return lambda x: multiply(x, packed, True)


@dataclass
class _Block:
    """One block's four products."""

    qkv: Matrix
    out: Matrix
    gate_up: Matrix
    down: Matrix
    norm_qk: Tensor | None
    """Norm weights of each query and key head, [heads + kv_heads, head_dim]; None if the model has none."""


def _paired(weight: Tensor, dim: int) -> Tensor:
    """Reorder each head's rows so that RoPE's two halves lie side by side and rotate as complex numbers.

    `weight` [heads * dim, ...]. Queries and keys are reordered in the same way, so their products, and with them
    attention, stay the same.
    """
    return weight.unflatten(0, (-1, 2, dim // 2)).transpose(1, 2).flatten(0, 2)


class FastLlama:
    """The weights, ready to run; contexts come from `open`."""

    def __init__(
        self, model: Llama, number_format: Format = "int8", kept: Tensor | None = None, context: int = 4096
    ) -> None:
        """Prepare a loaded checkpoint. `kept` reduces the head to these token ids."""
        if "fbgemm" in torch.backends.quantized.supported_engines:
            torch.backends.quantized.engine = "fbgemm"
        make = _float_matrix if number_format == "float32" else _int8_matrix
        self.shape = model.shape
        self.context = context
        self.embed = model.embed
        self.kept = kept
        self.blocks = [self._block(layer, make) for layer in model.layers]
        rows = model.head if kept is None else model.head[kept]
        self.head = make(rows.float() * model.norm)
        cos, sin = rope_tables(model.shape, context)
        half = model.shape.head_dim // 2
        self.turns = torch.complex(cos[:, :half], sin[:, :half])[:, None]

    def _block(self, layer: Layer, make: Callable[..., Matrix]) -> _Block:
        """Fold a layer's norms into the products after them, and pair its rotating rows."""
        bias = None if layer.qkv_bias is None else self._rotating_paired(layer.qkv_bias)
        return _Block(
            make(self._rotating_paired(layer.qkv * layer.norm_in), bias),
            make(layer.out),
            make(layer.gate_up * layer.norm_mid),
            make(layer.down),
            self._norm_qk(layer),
        )

    def _rotating_paired(self, qkv: Tensor) -> Tensor:
        """The projection with paired rows of queries and keys; the rows of values stay as they are."""
        shape = self.shape
        turning = (shape.heads + shape.kv_heads) * shape.head_dim
        return torch.cat([_paired(qkv[:turning], shape.head_dim), qkv[turning:]])

    def _norm_qk(self, layer: Layer) -> Tensor | None:
        if layer.norm_q is None or layer.norm_k is None:
            return None
        shape = self.shape
        query, key = (_paired(weight, shape.head_dim) for weight in (layer.norm_q, layer.norm_k))
        return torch.cat([query.expand(shape.heads, -1), key.expand(shape.kv_heads, -1)])

    def open(self) -> "FastSequence":
        return FastSequence(self)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def branch_together(self, parts: Sequence[Part]) -> list[list[list[Candidate]]]:
        """Run the rows of all contexts in the same matrix products; only attention is computed per context."""
        pieces = [
            part.sequence.grown(part.parents) if part.parents else part.sequence.lengthened(len(part.tokens))
            for part in parts
            if isinstance(part.sequence, FastSequence)
        ]
        tokens = [token for part in parts for token in part.tokens]
        rows = iter(self.candidates(self.forward(tokens, pieces), max(part.width for part in parts)))
        said = [[next(rows)[: part.width] for _ in part.tokens] for part in parts]
        return [of_part if part.parents else of_part[-1:] for part, of_part in zip(parts, said, strict=True)]

    def forward(self, tokens: Sequence[int], pieces: Sequence["Piece"]) -> Tensor:
        """Run the pieces' tokens through the blocks, and write their keys and values to the caches.

        Returns the hidden states before the last norm, [count, model width].
        """
        shape, count = self.shape, len(tokens)
        heads, kv_heads, dim = shape.heads, shape.kv_heads, shape.head_dim
        turns = torch.cat([piece.turns for piece in pieces])
        x = self.embed[torch.tensor(tokens)].float()
        for number, block in enumerate(self.blocks):
            qkv = block.qkv(functional.rms_norm(x, (shape.width,), None, shape.eps)).view(
                count, heads + 2 * kv_heads, dim
            )
            turning = qkv[:, : heads + kv_heads]
            if block.norm_qk is not None:
                turning.copy_(functional.rms_norm(turning, (dim,), None, shape.eps) * block.norm_qk)
            torch.view_as_complex(turning.view(count, heads + kv_heads, dim // 2, 2)).mul_(turns)
            rows = qkv.split([piece.count for piece in pieces])
            attended = [piece.attended(number, own) for piece, own in zip(pieces, rows, strict=True)]
            x = x + block.out(torch.cat(attended) if len(attended) > 1 else attended[0])
            gate, up = block.gate_up(functional.rms_norm(x, (shape.width,), None, shape.eps)).chunk(2, dim=-1)
            x = x + block.down(functional.silu(gate) * up)
        return x

    def candidates(self, hidden: Tensor, width: int) -> list[list[Candidate]]:
        """The `width` most probable next tokens, in the target's vocabulary, after each final hidden state.

        `hidden`: [rows, model width], before the last norm.
        """
        shape = self.shape
        return candidates(self.head(functional.rms_norm(hidden, (shape.width,), None, shape.eps)), width, self.kept)


class FastSequence:
    """One request's context: the keys and values of its entries, cut back if drafts are rejected."""

    def __init__(self, model: FastLlama) -> None:
        self._model = model
        self._entries = Entries()
        self._cache: list[Tensor] = []
        """For each block, keys then values: [2 * kv_heads, room, head_dim]."""
        self._room = 0

    def __len__(self) -> int:
        return len(self._entries)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def keep(self, length: int, moved: Sequence[int] = ()) -> None:
        if self._entries.keep(length, moved):
            sources = torch.tensor(moved)
            for cache in self._cache:
                cache[:, length : length + len(moved)] = cache[:, sources]

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def append(self, tokens: Sequence[int], width: int) -> list[Candidate]:
        """Append a chain in one pass, or in chunks if it is long."""
        if not tokens:
            raise ValueError("a context must grow by at least one token")
        self._check_fits(len(self) + len(tokens))
        for at in range(0, len(tokens), CHUNK):
            chunk = tokens[at : at + CHUNK]
            hidden = self._model.forward(chunk, [self.lengthened(len(chunk))])
        return self._model.candidates(hidden[-1:], width)[0]

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def branch(self, tokens: Sequence[int], parents: Sequence[int], width: int) -> list[list[Candidate]]:
        return self._model.candidates(self._model.forward(tokens, [self.grown(parents)]), width)

    def lengthened(self, count: int) -> "Piece":
        """Add a chain of `count` entries. Returns the piece that the caller must run."""
        start = len(self)
        self._check_fits(start + count)
        self._entries.append(count)
        return self._piece(self._model.turns[start : start + count], _causal_bias(count, start + count))

    def grown(self, parents: Sequence[int]) -> "Piece":
        """Add an entry behind each of `parents`. Returns the piece that the caller must run."""
        start = len(self)
        self._check_fits(2 + max(map(self._entries.position, parents)))
        self._entries.branch(parents)
        turns = self._model.turns[[self._entries.position(entry) for entry in range(start, len(self))]]
        return self._piece(turns, tree_bias(self._entries, start, torch.float32))

    def _piece(self, turns: Tensor, bias: Tensor | None) -> "Piece":
        """The last entries as a piece, one for each of `turns`."""
        self._reserve(len(self))
        shape = self._model.shape
        if bias is not None:
            bias = bias.repeat(shape.heads // shape.kv_heads, 1)
        return Piece(self._cache, len(self), turns, bias, shape)

    def _check_fits(self, length: int) -> None:
        if length > self._model.context:
            raise ValueError(f"{length} tokens do not fit a context of {self._model.context}")

    def _reserve(self, length: int) -> None:
        """Grow the cache in steps: most requests never get near the maximum context."""
        if length <= self._room:
            return
        shape = self._model.shape
        room = -(-length // CACHE_STEP) * CACHE_STEP
        grown = [torch.zeros(2 * shape.kv_heads, room, shape.head_dim) for _ in self._model.blocks]
        for new, old in zip(grown, self._cache, strict=False):
            new[:, : self._room] = old
        self._cache, self._room = grown, room


@dataclass(frozen=True, slots=True)
class Piece:
    """The new entries of one context in a pass."""

    cache: list[Tensor]
    end: int
    """Number of entries of the context, including these."""
    turns: Tensor
    """[count, 1, head_dim / 2]: the rotations of their positions."""
    bias: Tensor | None
    """[heads / kv_heads * count, end]: added to the attention scores."""
    shape: Shape

    @property
    def count(self) -> int:
        return len(self.turns)

    def attended(self, number: int, qkv: Tensor) -> Tensor:
        """The attention output in block `number`: [count, heads * head_dim].

        `qkv`: [count, heads + 2 * kv_heads, head_dim]; its keys and values are written to the cache.
        """
        heads, kv_heads, dim = self.shape.heads, self.shape.kv_heads, self.shape.head_dim
        cache, count = self.cache[number], self.count
        cache[:, self.end - count : self.end] = qkv[:, heads:].transpose(0, 1)
        query = qkv[:, :heads].transpose(0, 1).reshape(1, kv_heads, -1, dim)
        attended = functional.scaled_dot_product_attention(
            query, cache[None, :kv_heads, : self.end], cache[None, kv_heads:, : self.end], attn_mask=self.bias
        )
        return attended.view(heads, count, dim).transpose(0, 1).reshape(count, -1)


def _causal_bias(count: int, length: int) -> Tensor | None:
    """A bias that hides from each of the last `count` entries of a chain those after it: [count, length]."""
    if count == 1:
        return None
    seen = torch.ones(count, length, dtype=torch.bool).tril(length - count)
    return torch.zeros(count, length).masked_fill_(~seen, float("-inf"))


class LlamaDrafter(FastLlama):
    """A checkpoint of the Llama family on the CPU."""

    max_width = 8
    max_shared_rows = 16

    def __init__(self, directory: Path, kept: list[int] | None, fingerprint: str) -> None:
        super().__init__(load_llama(directory), kept=None if kept is None else torch.tensor(kept))
        self.fingerprint = fingerprint
        self.max_context_tokens = self.context
        head = f"{len(kept)} of {self.shape.vocab} tokens" if kept else "full vocabulary"
        self.description = f"{model_name(directory)} on cpu, int8, {head}"


def is_of_llama_family(directory: Path) -> bool:
    """Whether a directory holds a checkpoint that this runtime can run."""
    try:
        Shape.from_config(read_config(directory))
    except (OSError, ValueError, KeyError):
        return False
    return any(directory.glob("*.safetensors"))
