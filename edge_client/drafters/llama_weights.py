"""Reading a Hugging Face Llama checkpoint into the few plain tensors that a forward pass needs.

The training recipe and the CPU runtime share this: neither wants transformers' modules (their Python costs more than
the arithmetic when a pass is one token long), and both want query/key/value and gate/up fused into one matrix each.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """The numbers of a config.json that decide a forward pass."""

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

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Read a Llama config; refuse the variants whose passes would silently differ."""
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type", "default")
        if config.get("model_type") != "llama" or kind != "default" or config.get("hidden_act", "silu") != "silu":
            raise ValueError(
                f"only plain Llama checkpoints are understood, not {config.get('model_type')} with {kind} RoPE"
            )
        if config.get("attention_bias") or config.get("mlp_bias"):
            raise ValueError("Llama checkpoints with biases are not understood")
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


@dataclass
class Llama:
    """A whole checkpoint; `head` is the embedding itself where the two are tied."""

    shape: Shape
    embed: Tensor
    layers: list[Layer]
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
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor.float()


def read_config(directory: Path) -> dict[str, Any]:
    """The checkpoint's config.json as it stands."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def load_llama(directory: Path, keep: list[int] | None = None) -> Llama:
    """Load a checkpoint in float32; `keep` names the layers wanted (all of them by default)."""
    shape = Shape.from_config(read_config(directory))
    files = _Files(directory)
    layers = []
    for index in range(shape.layers) if keep is None else keep:
        at = f"model.layers.{index}."
        attention = [files[f"{at}self_attn.{name}_proj.weight"] for name in "qkv"]
        gate_up = [files[f"{at}mlp.{name}_proj.weight"] for name in ("gate", "up")]
        layers.append(
            Layer(
                norm_in=files[at + "input_layernorm.weight"],
                qkv=torch.cat(attention),
                out=files[at + "self_attn.o_proj.weight"],
                norm_mid=files[at + "post_attention_layernorm.weight"],
                gate_up=torch.cat(gate_up),
                down=files[at + "mlp.down_proj.weight"],
            )
        )
    embed = files["model.embed_tokens.weight"]
    head = files["lm_head.weight"] if "lm_head.weight" in files and not shape.tied else embed
    return Llama(shape, embed, layers, files["model.norm.weight"], head)


def rope_tables(shape: Shape, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, [positions, head_dim], in Llama's two-halves layout."""
    inverse = 1.0 / shape.theta ** (torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), inverse)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()
