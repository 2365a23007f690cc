"""Contexts of ended requests, kept for follow-up requests that start with the same tokens. Pure."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_specedge.wire.frames import num_equal

MIN_SHARED_TOKENS = 16
"""Minimum tokens in common for a context to be worth reusing."""


@dataclass(slots=True)
class KeptContexts:
    """For the requests that ended last, the tokens whose entries their drafter sequences still begin with."""

    max_kept: int
    _tokens: OrderedDict[int, list[int]] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._tokens)

    def __contains__(self, number: int) -> bool:
        return number in self._tokens

    def keep(self, number: int, tokens: list[int]) -> None:
        """Keep the context of an ended request unless it is short; the oldest makes room."""
        if not self.max_kept or len(tokens) < MIN_SHARED_TOKENS:
            return
        self._tokens[number] = tokens
        if len(self._tokens) > self.max_kept:
            self._tokens.popitem(last=False)

    def forget(self, number: int) -> None:
        self._tokens.pop(number, None)

    def clear(self) -> None:
        """Drop all: the drafter's cache is full."""
        self._tokens.clear()

    def take(self, tokens: Sequence[int]) -> tuple[int, int] | None:
        """Remove the context that shares the most tokens with a new one. Returns its request and how many to reuse."""
        shared = {number: num_equal(kept, tokens) for number, kept in self._tokens.items()}
        source = max(shared, key=lambda number: shared[number], default=None)
        if source is None or shared[source] < MIN_SHARED_TOKENS:
            return None
        del self._tokens[source]
        # At least one token must run, to get candidates behind it.
        return source, min(shared[source], len(tokens) - 1)
