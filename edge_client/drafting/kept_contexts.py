"""Contexts of requests that ended, from which a follow-up may go on. Pure."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_specedge.wire.frames import num_equal

MIN_SHARED_TOKENS = 16
"""A context that shares fewer is not worth going on from."""


@dataclass(slots=True)
class KeptContexts:
    """The tokens whose entries drafters' sequences still begin with, of the requests that ended last."""

    max_kept: int
    _tokens: OrderedDict[int, list[int]] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._tokens)

    def __contains__(self, number: int) -> bool:
        return number in self._tokens

    def keep(self, number: int, tokens: list[int]) -> None:
        """A request ended; one that is short is not kept, and the oldest makes room."""
        if not self.max_kept or len(tokens) < MIN_SHARED_TOKENS:
            return
        self._tokens[number] = tokens
        if len(self._tokens) > self.max_kept:
            self._tokens.popitem(last=False)

    def forget(self, number: int) -> None:
        self._tokens.pop(number, None)

    def clear(self) -> None:
        """The drafter's cache is full: these are the first to go."""
        self._tokens.clear()

    def take(self, tokens: Sequence[int]) -> tuple[int, int] | None:
        """The one that shares most with a new context, which is not kept any longer, and how many tokens that is."""
        shared = {number: num_equal(kept, tokens) for number, kept in self._tokens.items()}
        source = max(shared, key=lambda number: shared[number], default=None)
        if source is None or shared[source] < MIN_SHARED_TOKENS:
            return None
        del self._tokens[source]
        # At least one token is run, for what follows it.
        return source, min(shared[source], len(tokens) - 1)
