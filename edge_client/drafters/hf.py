"""A Hugging Face causal language model as the draft, on CUDA, MPS or the CPU; its KV cache survives rollbacks."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from edge_client.drafters import Candidate
from edge_client.drafters.entries import Entries
from edge_client.drafters.hub import model_name
from edge_client.drafters.torch_passes import candidates, tree_bias
from vllm_specedge.errors import UserError
from vllm_specedge.wire.fingerprint import vocabulary_fingerprint

ENTRIES_OF = (DynamicLayer, DynamicSlidingWindowLayer)
"""Kinds of layers that keep an entry for each token, all or the last ones."""
UNLIMITED = 1 << 20
TREE_WIDTHS = {"cuda": 16, "mps": 16, "cpu": 4}
"""By device: how many entries a pass takes at most."""
PROBED = 8
"""So many of the most probable tokens are compared."""
PROBE_TOLERANCE = 0.2
"""Of a probability. Float16's rounding makes less of a difference, a wrong position or mask more."""


class HfSequence:
    """One request's KV cache.

    A sliding window hides entries by the mask; the cache keeps them all, for a rollback needs those that were out of
    sight. A layer with a state (Mamba, convolutions) has no entries to cut: there the context is run anew.
    """

    def __init__(self, model: Any, kept: Tensor | None) -> None:
        self._model = model
        self._kept = kept
        self._entries = Entries()
        self._has_state = not all(type(layer) in ENTRIES_OF for layer in layers_of(model))
        self._tokens: list[int] = []
        """Of all entries, where there may be need to run them again."""
        self._num_run = 0
        """How many of them the cache has seen."""
        self._cache = self._new_cache()

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self._model.config) if self._has_state else DynamicCache()

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def keep(self, length: int, moved: Sequence[int] = ()) -> None:
        num_before = len(self._entries)
        if self._entries.keep(length, moved):
            self._move(moved, length)
        num_forgotten = num_before - len(self._entries)
        if num_forgotten == num_before or (num_forgotten and self._has_state):
            self._cache, self._num_run = self._new_cache(), 0
        elif num_forgotten:
            self._cache.crop(-num_forgotten)
        del self._tokens[len(self._entries) :]

    def _move(self, moved: Sequence[int], start: int) -> None:
        """Copy keys and values, [1, kv heads, entries, head dim] each, of the entries `moved` to `start` and on."""
        sources = torch.tensor(moved, device=self._model.device)
        for layer in self._cache.layers:
            for held in (layer.keys, layer.values):
                held[..., start : start + len(moved), :] = held.index_select(-2, sources)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def append(self, tokens: Sequence[int], width: int) -> list[Candidate]:
        self._entries.append(len(tokens))
        if self._has_state:
            self._tokens += tokens
            tokens = self._tokens[self._num_run :]
            self._num_run = len(self._tokens)
        return self._forward(tokens, width, logits_to_keep=1)[0]

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def branch(self, tokens: Sequence[int], parents: Sequence[int], width: int) -> list[list[Candidate]]:
        start = len(self._entries)
        self._entries.branch(parents)
        positions = [self._entries.position(entry) for entry in range(start, len(self._entries))]
        # A mask of four dimensions, [1, 1, new, all], goes to the attention as it is: a bias, in the model's own number
        # format, which both of transformers' implementations take (truth values only the fused one would).
        bias = tree_bias(self._entries, start, self._model.dtype)
        return self._forward(
            tokens,
            width,
            position_ids=torch.tensor([positions], device=self._model.device),
            attention_mask=None if bias is None else bias[None, None].to(self._model.device),
        )

    def _forward(self, tokens: Sequence[int], width: int, **options: Any) -> list[list[Candidate]]:
        """Run the last entries' tokens, keys and values into the cache; candidates by each row of logits."""
        ids = torch.tensor([list(tokens)], device=self._model.device)
        output = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, **options)
        return candidates(output.logits[0].float(), width, self._kept)


def layers_of(model: Any) -> list[Any]:
    """What transformers would keep for each of a model's layers."""
    return list(DynamicCache(config=model.config).layers)


class HfDrafter:
    """A draft model and its tokenizer's fingerprint; `kept` cuts its output head down to those token ids."""

    def __init__(self, model: Any, fingerprint: str, name: str, kept: list[int] | None) -> None:
        """Raises UserError for a model that does not go on from a cache: it would see the last tokens alone."""
        if "past_key_values" not in inspect.signature(model.forward).parameters:
            raise UserError(f"'{name}' keeps no keys and values to go on from (Mamba, say): choose another draft.")
        self._model = model
        self._kept = None if kept is None else torch.tensor(kept, device=model.device)
        self.fingerprint = fingerprint
        # Models that see distances and no positions, such as Bloom, name no limit.
        self.max_context_tokens = int(getattr(model.config, "max_position_embeddings", UNLIMITED))
        self.description = f"{name} on {model.device}, {str(model.dtype).removeprefix('torch.')}"
        if kept is not None:
            rows = model.get_output_embeddings().weight[self._kept]
            head = torch.nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
            head.weight = torch.nn.Parameter(rows.detach().clone(), requires_grad=False)
            model.set_output_embeddings(head)
            self.description += f", {len(kept)} of {model.config.vocab_size} tokens"
        self.max_width = TREE_WIDTHS[model.device.type] if self._can_branch() else 1

    def open(self) -> HfSequence:
        return HfSequence(self._model, self._kept)

    def _can_branch(self) -> bool:
        """Whether the model takes branches: not every attention has a mask or positions, nor every cache all entries.

        No property of a model tells, so it is tried: at both leaves of a small tree it has to say what it says to the
        paths that lead there.
        """
        if any(type(layer) is not DynamicLayer for layer in layers_of(self._model)):
            return False  # a sliding window, which our mask knows nothing of, or a state: no entries to hide or to move
        size = self._model.get_input_embeddings().num_embeddings
        first, second, third, left, right = (size * part // 6 for part in range(1, 6))
        tree = self.open()
        tree.append([first, second, third], PROBED)
        try:
            tree.branch([left, right], [1, 2], PROBED)
            leaves = tree.branch([right, left], [3, 4], PROBED)
        except (TypeError, ValueError, RuntimeError):
            return False
        paths = [[first, second, left, right], [first, second, third, right, left]]
        return all(
            abs(ours.probability - theirs.probability) <= PROBE_TOLERANCE * theirs.probability
            for said, path in zip(leaves, paths, strict=True)
            for ours, theirs in zip(said, self.open().append(path, PROBED), strict=True)
        )


def devices_of_torch() -> list[str]:
    """What the torch that is installed here can use, best first."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [device for device, is_there in there.items() if is_there]


def load_hf_drafter(name: str, device: str, kept: list[int] | None, fingerprint: str) -> HfDrafter:
    """Load a model by directory or hub name. Raises UserError."""
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32 if device == "cpu" else torch.float16)
    except (OSError, ValueError) as error:
        raise no_model(name, error) from None
    return HfDrafter(model.to(device).eval(), fingerprint, model_name(Path(name)), kept)


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
        return vocabulary_fingerprint(tokenizer_vocabulary(name)), int(AutoConfig.from_pretrained(name).vocab_size)
    except (OSError, ValueError) as error:
        raise no_model(name, error) from None


def tokenizer_vocabulary(name: str) -> dict[str, int]:
    """A tokenizer's tokens and their ids, by directory or hub name. Raises UserError."""
    try:
        vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(name).get_vocab()
    except (OSError, ValueError) as error:
        raise no_model(name, error) from None
    return vocabulary
