"""Reading a Hugging Face checkpoint of the Llama family (Llama, Qwen2, Qwen3) into the plain tensors of a forward pass.

The training recipe and the CPU runtime share this. Neither uses transformers' modules (their Python costs more than the
arithmetic if a pass is one token long), and both need query/key/value and gate/up fused into one matrix each.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

BIASED = {"llama": False, "qwen2": True, "qwen3": False}
"""Whether queries, keys and values have a bias, by model type; Qwen2's config.json does not say so."""


@dataclass(frozen=True)
class Shape:
    """The numbers of a config.json that define a forward pass."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    eps: float
    theta: float
    tied: bool
    has_qkv_bias: bool
    has_qk_norm: bool
    """Whether each head's query and key are normed before they are rotated (Qwen3)."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Read a config.json. Raises ValueError for variants whose passes would silently differ."""
        family, rope = config.get("model_type"), config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if family not in BIASED or kind != "default" or config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"Llama, Qwen2 and Qwen3 with default RoPE are supported, not {family} with {kind} RoPE")
        if config.get("attention_bias") or config.get("mlp_bias"):
            raise ValueError(f"{family} checkpoints with additional biases are not supported")
        if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
            raise ValueError("sliding-window attention is not supported")
        return cls(
            layers=config["num_hidden_layers"],
            width=config["hidden_size"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            inner=config["intermediate_size"],
            vocab=config["vocab_size"],
            eps=config["rms_norm_eps"],
            theta=rope.get("rope_theta") or config.get("rope_theta", 10000.0),
            tied=config.get("tie_word_embeddings", False),
            has_qkv_bias=BIASED[family],
            has_qk_norm=family == "qwen3",
        )


@dataclass
class Layer:
    """One block's weights, the projections that share an input stacked into one matrix."""

    norm_in: Tensor
    qkv: Tensor
    out: Tensor
    norm_mid: Tensor
    gate_up: Tensor
    down: Tensor
    qkv_bias: Tensor | None = None
    norm_q: Tensor | None = None
    """Norm weights of each head's query, [head_dim]; `norm_k`: of its key."""
    norm_k: Tensor | None = None


@dataclass
class Llama:
    """A whole checkpoint; `head` is the embedding itself if the two are tied.

    Only these two keep their stored dtype: a pass reads a few of 150,000 rows.
    """

    shape: Shape
    embed: Tensor
    layers: Sequence[Layer]
    norm: Tensor
    head: Tensor


class _Files:
    """The tensors of a checkpoint directory, one safetensors file or many."""

    def __init__(self, directory: Path) -> None:
        self._where: dict[str, Any] = {}
        for path in sorted(directory.glob("*.safetensors")):
            handle: Any = safe_open(str(path), framework="pt")
            self._where |= dict.fromkeys(handle.keys(), handle)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __getitem__(self, name: str) -> Tensor:
        """A tensor in float32. Raises ValueError if the checkpoint lacks it."""
        return self.stored(name).float()

    def stored(self, name: str) -> Tensor:
        """A tensor in its stored dtype. Raises ValueError if the checkpoint lacks it."""
        if name not in self._where:
            raise ValueError(f"the checkpoint has no {name}")
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor

    def stacked(self, names: Sequence[str]) -> Tensor:
        return torch.cat([self[name] for name in names])


def read_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


class _Layers(Sequence[Layer]):
    """A checkpoint's layers in float32, each read on access: a model of 500 million weights takes 2 GB."""

    def __init__(self, files: _Files, shape: Shape, numbers: Sequence[int]) -> None:
        self._files, self._shape, self._numbers = files, shape, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        files, at = self._files, f"model.layers.{self._numbers[index]}."
        projections = [f"{at}self_attn.{name}_proj" for name in "qkv"]
        return Layer(
            norm_in=files[at + "input_layernorm.weight"],
            qkv=files.stacked([f"{name}.weight" for name in projections]),
            out=files[at + "self_attn.o_proj.weight"],
            norm_mid=files[at + "post_attention_layernorm.weight"],
            gate_up=files.stacked([f"{at}mlp.{name}_proj.weight" for name in ("gate", "up")]),
            down=files[at + "mlp.down_proj.weight"],
            qkv_bias=files.stacked([f"{name}.bias" for name in projections]) if self._shape.has_qkv_bias else None,
            norm_q=files[at + "self_attn.q_norm.weight"] if self._shape.has_qk_norm else None,
            norm_k=files[at + "self_attn.k_norm.weight"] if self._shape.has_qk_norm else None,
        )


def load_llama(directory: Path, keep: Sequence[int] | None = None) -> Llama:
    """Open a checkpoint. `keep`: the numbers of the layers to load; default: all."""
    shape = Shape.from_config(read_config(directory))
    files = _Files(directory)
    layers = _Layers(files, shape, range(shape.layers) if keep is None else keep)
    embed = files.stored("model.embed_tokens.weight")
    head = files.stored("lm_head.weight") if "lm_head.weight" in files and not shape.tied else embed
    return Llama(shape, embed, layers, files["model.norm.weight"], head)


def rope_tables(shape: Shape, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, [positions, head_dim], in Llama's two-halves layout."""
    inverse = 1.0 / shape.theta ** (torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), inverse)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()
