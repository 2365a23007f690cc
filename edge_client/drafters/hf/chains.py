"""A transformers model that drafts chains, with any kind of cache; the cache survives rollbacks."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from edge_client.drafters import Candidate
from edge_client.drafters.entries import Entries
from edge_client.drafters.torch_passes import candidates
from vllm_specedge.errors import UserError

ENTRIES_OF = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layer types that keep an entry for each token, or for the last tokens."""
UNLIMITED = 1 << 20


class HfSequence:
    """One request's KV cache, of a chain.

    A sliding window is applied by the mask. The cache keeps all entries, as a rollback needs those outside of the
    window. A layer with a state (Mamba, convolutions) has no entries to cut: then a rollback runs the context again.
    """

    def __init__(self, model: Any, kept: Tensor | None) -> None:
        self._model = model
        self._kept = kept
        self._entries = Entries()
        self._has_state = not all(type(layer) in ENTRIES_OF for layer in DynamicCache(config=model.config).layers)
        self._tokens: list[int] = []
        """Tokens of all entries, if they may have to run again."""
        self._num_run = 0
        """Number of them that the cache has seen."""
        self._cache = self._new_cache()

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self._model.config) if self._has_state else DynamicCache()

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def keep(self, length: int, moved: Sequence[int] = ()) -> None:
        num_before = len(self._entries)
        self._entries.keep(length, moved)
        num_forgotten = num_before - len(self._entries)
        if num_forgotten == num_before or (num_forgotten and self._has_state):
            self._cache, self._num_run = self._new_cache(), 0
        elif num_forgotten:
            self._cache.crop(-num_forgotten)
        del self._tokens[len(self._entries) :]

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def append(self, tokens: Sequence[int], width: int) -> list[Candidate]:
        self._entries.append(len(tokens))
        if self._has_state:
            self._tokens += tokens
            tokens = self._tokens[self._num_run :]
            self._num_run = len(self._tokens)
        ids = torch.tensor([list(tokens)], device=self._model.device)
        output = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return candidates(output.logits[0].float(), width, self._kept)[0]

    def branch(self, tokens: Sequence[int], parents: Sequence[int], width: int) -> list[list[Candidate]]:
        raise NotImplementedError("a drafter of width 1 does not branch")


class HfDrafter:
    """A draft model and its tokenizer's fingerprint. `kept` reduces its output head to these token ids."""

    max_width = 1

    def __init__(self, model: Any, fingerprint: str, name: str, kept: list[int] | None) -> None:
        """Raises UserError for a model that cannot resume from a cache: it would only see the last tokens."""
        if "past_key_values" not in inspect.signature(model.forward).parameters:
            raise UserError(
                f"'{name}' has no key-value cache to resume from (Mamba, for instance): choose another draft."
            )
        self.model = model
        self.kept = None if kept is None else torch.tensor(kept, device=model.device)
        self.fingerprint = fingerprint
        # Models that use distances instead of positions, such as Bloom, have no limit.
        self.max_context_tokens = int(getattr(model.config, "max_position_embeddings", UNLIMITED))
        self.description = f"{name} on {model.device}, {str(model.dtype).removeprefix('torch.')}"
        if kept is not None:
            rows = model.get_output_embeddings().weight[self.kept]
            head = torch.nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
            head.weight = torch.nn.Parameter(rows.detach().clone(), requires_grad=False)
            model.set_output_embeddings(head)
            self.description += f", {len(kept)} of {model.config.vocab_size} tokens"

    def open(self) -> HfSequence:
        return HfSequence(self.model, self.kept)
