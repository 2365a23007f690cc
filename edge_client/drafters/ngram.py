"""Prompt lookup: the draft is what followed the same few tokens earlier in the request. No weights, any vocabulary."""

from collections.abc import Sequence

MIN_NGRAM = 2
MAX_NGRAM = 4


class NgramSequence:
    """A context with an index from each n-gram to the positions after it."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}

    def extend(self, tokens: Sequence[int]) -> int | None:
        for token in tokens:
            self._tokens.append(token)
            for ngram in self._ngrams():
                self._ends.setdefault(ngram, []).append(len(self._tokens))
        return self._next()

    def truncate(self, length: int) -> None:
        while len(self._tokens) > length:
            for ngram in self._ngrams():
                ends = self._ends[ngram]
                ends.pop()
                if not ends:
                    del self._ends[ngram]
            self._tokens.pop()

    def _ngrams(self) -> list[tuple[int, ...]]:
        """The n-grams that end the context, longest first."""
        longest = min(MAX_NGRAM, len(self._tokens))
        return [tuple(self._tokens[-n:]) for n in range(longest, MIN_NGRAM - 1, -1)]

    def _next(self) -> int | None:
        for ngram in self._ngrams():
            ends = self._ends[ngram]
            if len(ends) > 1:
                return self._tokens[ends[-2]]
        return None


class NgramDrafter:
    """Drafts by looking back."""

    fingerprint = ""
    max_context_tokens = 1 << 20
    description = "prompt lookup (no model)"

    def open(self) -> NgramSequence:
        return NgramSequence()
