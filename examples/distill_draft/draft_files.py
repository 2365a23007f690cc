"""The draft on disk: its own blocks in int8, or joined with its target into an ordinary checkpoint.

Only trained weights are stored (blocks and final norm). The embedding and the head's rows are the target's own; an edge
that drafts for a target has, or can fetch, the target's checkpoint.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edge_client.drafters.llama.weights import Layer, Llama, Shape, load_llama, read_config
from edge_client.drafters.vocabulary import FILE_NAME

FORMAT = "specedge-draft-1"
WEIGHTS = "blocks.safetensors"
CONFIG = "config.json"
KEPT = FILE_NAME
MATRICES = ("qkv", "out", "gate_up", "down")


def save_draft(
    directory: Path, layers: list[Layer], norm: Tensor, kept: list[int], target_config: dict[str, Any]
) -> None:
    """Write a draft: matrices as int8 with a scale per output row, the preceding norms folded in, and its config.

    Folded in here, the norms take no space, and a runtime that folds and rounds again gets exactly the same integers.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {"norm": norm.detach().float().contiguous()}
    for index, layer in enumerate(layers):
        folded = {"qkv": layer.norm_in.detach().float(), "gate_up": layer.norm_mid.detach().float()}
        for name in MATRICES:
            weight = getattr(layer, name).detach().float() * folded.get(name, 1.0)
            scale = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp_min(1e-12)
            tensors[f"{index}.{name}"] = (weight / scale).round().to(torch.int8)
            tensors[f"{index}.{name}.scale"] = scale[:, 0].contiguous()
    save_file(tensors, str(directory / WEIGHTS))
    model = {**target_config, "num_hidden_layers": len(layers)}
    config = {"model_type": "specedge_draft", "format": FORMAT, "head_rows": len(kept), "model": model}
    (directory / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    (directory / KEPT).write_text(json.dumps(kept, separators=(",", ":")) + "\n")


def load_blocks(directory: Path) -> tuple[list[Layer], Tensor]:
    """A draft's blocks and final norm in float32; the inner norms are ones, as they are folded into the matrices."""
    stored = load_file(str(directory / WEIGHTS))
    count = read_config(directory)["model"]["num_hidden_layers"]

    def weight(name: str) -> Tensor:
        return stored[name].float() * stored[f"{name}.scale"][:, None]

    layers = []
    for index in range(count):
        matrices = {name: weight(f"{index}.{name}") for name in MATRICES}
        layers.append(
            Layer(**matrices, norm_in=torch.ones_like(stored["norm"]), norm_mid=torch.ones_like(stored["norm"]))
        )
    return layers, stored["norm"]


def load_draft(directory: Path, target: Path) -> tuple[Llama, Tensor]:
    """The draft as a complete model, with the target's embedding and head, and the token ids that its head keeps."""
    described = read_config(directory)
    if described.get("format") != FORMAT:
        raise ValueError(f"{directory} is not a draft in the format {FORMAT}")
    shape = Shape.from_config(described["model"])
    base = load_llama(target, keep=[])
    if (base.shape.width, base.shape.vocab) != (shape.width, shape.vocab):
        raise ValueError(f"{directory} was made from a target with another shape than {target}")
    layers, norm = load_blocks(directory)
    kept = torch.tensor(sorted(json.loads((directory / KEPT).read_text())))
    return Llama(shape, base.embed, layers, norm, base.head), kept


def assemble(draft: Path, target: Path, out: Path, dtype: torch.dtype = torch.float32) -> None:
    """Join a draft with its target's embedding and full head into a checkpoint that transformers and vLLM load."""
    model, _ = load_draft(draft, target)
    shape = model.shape
    tensors = {"model.embed_tokens.weight": model.embed, "model.norm.weight": model.norm}
    if not shape.tied:
        tensors["lm_head.weight"] = model.head
    for index, layer in enumerate(model.layers):
        at = f"model.layers.{index}."
        q, k, v = torch.split(layer.qkv, [shape.heads * shape.head_dim, *[shape.kv_heads * shape.head_dim] * 2])
        gate, up = layer.gate_up.chunk(2)
        named = {"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": layer.out}
        tensors |= {f"{at}self_attn.{name}.weight": value for name, value in named.items()}
        named = {"gate_proj": gate, "up_proj": up, "down_proj": layer.down}
        tensors |= {f"{at}mlp.{name}.weight": value for name, value in named.items()}
        tensors[at + "input_layernorm.weight"] = layer.norm_in
        tensors[at + "post_attention_layernorm.weight"] = layer.norm_mid
    out.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.to(dtype).contiguous() for name, value in tensors.items()},
        str(out / "model.safetensors"),
        {"format": "pt"},
    )
    shutil.copy(draft / KEPT, out / KEPT)
    config = read_config(target) | {"num_hidden_layers": len(model.layers), "dtype": str(dtype).removeprefix("torch.")}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in target.iterdir():
        wanted = path.suffix in (".json", ".jinja", ".model", ".txt")
        if wanted and path.name != "config.json" and "index" not in path.name:
            shutil.copy(path, out / path.name)
