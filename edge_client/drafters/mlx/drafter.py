"""A Hugging Face model in MLX as the draft model: on Apple silicon, and for tests on any machine's CPU."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.utils import load_model

from edge_client.drafters import Candidate, Part
from edge_client.drafters.hub import model_name
from edge_client.drafters.mlx.passes import MlxPasses
from edge_client.drafters.probe import PROBED, is_sound, probed_paths
from edge_client.drafters.slot_contexts import SlotSequence, branch_together
from edge_client.drafters.slots import MAX_SLOTS
from vllm_specedge.errors import UserError

ENTRIES_OF = (KVCache, RotatingKVCache)
"""Layer types that keep an entry for each token, or for the last tokens."""
MAX_WIDTH = 8
MAX_SHARED_ROWS = 16


class MlxDrafter:
    """An mlx-lm model. `kept`: the token ids that it drafts; None: all."""

    max_width = MAX_WIDTH
    max_shared_rows = MAX_SHARED_ROWS

    def __init__(self, model: Any, config: dict[str, Any], fingerprint: str, name: str, kept: list[int] | None) -> None:
        """Raises UserError for a model that cannot draft trees in MLX."""
        self.fingerprint = fingerprint
        self.max_context_tokens = min(int(config.get("max_position_embeddings", MAX_SLOTS)), MAX_SLOTS // 2)
        self.description = f"{name} in MLX on {'the GPU' if is_gpu_there() else 'the CPU'}"
        caches = make_prompt_cache(model)
        if any(type(layer) not in ENTRIES_OF for layer in caches):
            raise UserError(
                f"'{name}' has layers with a state, which cannot be rolled back in MLX: use --runtime transformers."
            )
        self._passes = MlxPasses(model, len(caches), kept)
        try:
            paths = probed_paths(int(config["vocab_size"]))
            # The model's output without our cache.
            alone = [self._passes.candidates(model(mx.array([path]))[0, -1:], PROBED)[0] for path in paths]
            can_branch = is_sound(self.open, paths, alone)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            can_branch = False
        if not can_branch:
            raise UserError(f"'{name}' cannot draft trees in MLX: use --runtime transformers.")

    def open(self) -> SlotSequence:
        return SlotSequence(self._passes)

    def branch_together(self, parts: Sequence[Part]) -> list[list[list[Candidate]]]:
        return branch_together(self._passes, parts)


def is_gpu_there() -> bool:
    """Whether MLX has a GPU here."""
    return bool(mx.default_device() == mx.gpu)


def _old_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's RoPE options as transformers wrote them before release 5, the form that most mlx-lm models read."""
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope:  # by kind of layer, as Gemma 3 has it
        local = rope.get("sliding_attention", {}).get("rope_theta")
        return _old_rope({"rope_parameters": rope["full_attention"]}) | (
            {"rope_local_base_freq": local} if local else {}
        )
    if "rope_theta" not in rope:
        return {}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    is_scaled = scaling.get("rope_type", "default") != "default"
    return {"rope_theta": rope["rope_theta"]} | ({"rope_scaling": scaling} if is_scaled else {})


def load_mlx_drafter(directory: str, kept: list[int] | None, fingerprint: str) -> MlxDrafter:
    """Load a model directory, with weights of transformers or of mlx-lm. Raises UserError."""
    try:
        model, config = load_model(
            Path(directory), model_config=_old_rope(json.loads((Path(directory) / "config.json").read_text()))
        )
    except (OSError, ValueError, KeyError) as error:
        detail = str(error).strip().partition("\n")[0]
        raise UserError(
            f"'{directory}' has no model that MLX can load ({detail:.120}): use --runtime transformers."
        ) from None
    return MlxDrafter(model, config, fingerprint, model_name(Path(directory)), kept)
