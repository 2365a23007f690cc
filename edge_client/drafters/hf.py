"""A Hugging Face causal language model as the draft, on CUDA, MPS or the CPU; its KV cache survives rollbacks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from vllm_specedge.errors import UserError
from vllm_specedge.fingerprint import vocabulary_fingerprint


class HfSequence:
    """One request's KV cache."""

    def __init__(self, model: Any, kept: list[int] | None) -> None:
        self._model = model
        self._kept = kept
        self._cache = DynamicCache(config=model.config)
        self._length = 0

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def extend(self, tokens: Sequence[int]) -> int | None:
        ids = torch.tensor([list(tokens)], device=self._model.device)
        output = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._length += len(tokens)
        best = int(output.logits[0, -1].argmax())
        return best if self._kept is None else self._kept[best]

    def truncate(self, length: int) -> None:
        if length == 0:
            self._cache = DynamicCache(config=self._model.config)
        elif length < self._length:
            self._cache.crop(length - self._length)
        self._length = min(self._length, length)


class HfDrafter:
    """A draft model and its tokenizer's fingerprint; `kept` cuts its output head down to those token ids."""

    def __init__(self, model: Any, fingerprint: str, name: str, kept: list[int] | None) -> None:
        self._model = model
        self._kept = kept
        self.fingerprint = fingerprint
        self.max_context_tokens = int(model.config.max_position_embeddings)
        self.description = f"{name} on {model.device}, {str(model.dtype).removeprefix('torch.')}"
        if kept is not None:
            rows = model.get_output_embeddings().weight[torch.tensor(kept, device=model.device)]
            head = torch.nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
            head.weight = torch.nn.Parameter(rows.detach().clone(), requires_grad=False)
            model.set_output_embeddings(head)
            self.description += f", {len(kept)} of {model.config.vocab_size} tokens"

    def open(self) -> HfSequence:
        return HfSequence(self._model, self._kept)


def choose_device(wanted: str) -> str:
    """`auto`: the first there is of CUDA, MPS, CPU. Raises UserError for one that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(device for device, is_there in there.items() if is_there)
    if not there.get(wanted.partition(":")[0], False):
        raise UserError(f"There is no device '{wanted}' here: choose {', '.join(d for d, ok in there.items() if ok)}.")
    return wanted


def load_hf_drafter(name: str, device: str, kept: list[int] | None, fingerprint: str) -> HfDrafter:
    """Load a model by directory or hub name. Raises UserError."""
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32 if device == "cpu" else torch.float16)
    except (OSError, ValueError) as error:
        raise no_model(name, error) from None
    return HfDrafter(model.to(device).eval(), fingerprint, Path(name).name, kept)


def no_model(name: str, error: Exception) -> UserError:
    """The sentence for a model that cannot be loaded."""
    is_directory = Path(name).is_dir()
    where = (
        "has no model that transformers can load" if is_directory else "is no model directory, nor can it be fetched"
    )
    detail = str(error).strip().partition("\n")[0]
    return UserError(f"'{name}' {where} ({detail:.120}): give a model directory or 'ngram'.")


def tokenizer_fingerprint(name: str) -> tuple[str, int]:
    """Of a model's tokenizer, by directory or hub name; and the model's vocabulary size. Raises UserError."""
    try:
        vocabulary = AutoTokenizer.from_pretrained(name).get_vocab()
        return vocabulary_fingerprint(vocabulary), int(AutoConfig.from_pretrained(name).vocab_size)
    except (OSError, ValueError) as error:
        raise no_model(name, error) from None
