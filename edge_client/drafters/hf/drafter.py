"""A Hugging Face causal language model as the draft model, on CUDA, MPS or the CPU."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from edge_client.drafters.hf.chains import HfDrafter
from edge_client.drafters.hf.tokenizers import no_model
from edge_client.drafters.hf.trees import SlotDrafter, with_trees
from edge_client.drafters.hub import model_name


def devices_of_torch() -> list[str]:
    """The devices that the installed torch can use, best first."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [device for device, is_there in there.items() if is_there]


def load_hf_drafter(name: str, device: str, kept: list[int] | None, fingerprint: str) -> HfDrafter | SlotDrafter:
    """Load a model by directory or hub name. A model that cannot branch drafts chains. Raises UserError."""
    try:
        dtype = number_format(AutoConfig.from_pretrained(name), device)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    except (OSError, ValueError) as error:
        raise no_model(name, error) from None
    return with_trees(HfDrafter(model, fingerprint, model_name(Path(name)), kept))


def number_format(config: Any, device: str) -> torch.dtype:
    """The dtype of a model's weights on a device.

    Bfloat16 if the model was trained in it: some models, Gemma among them, exceed the range of float16. Float32 on a
    CPU, as few CPUs have products of shorter types.
    """
    if device.startswith("cpu"):
        return torch.float32
    is_bfloat16 = getattr(config, "dtype", None) == torch.bfloat16
    if device.startswith("cuda") and not torch.cuda.is_bf16_supported(including_emulation=False):
        is_overflowing = is_bfloat16 and str(config.model_type).startswith("gemma")
        return torch.float32 if is_overflowing else torch.float16
    return torch.bfloat16 if is_bfloat16 else torch.float16
