"""Prompt lookup: the draft is what followed the same n-gram earlier in the request. No weights, any vocabulary."""

from collections.abc import Iterator, Sequence
from itertools import islice

from edge_client.drafters import Candidate

MIN_NGRAM = 2
MAX_NGRAM = 4
MAX_PLACES = 12
"""Maximum earlier positions to look at; the follower of the next one would have a probability below 0.0002."""


class NgramSequence:
    """A context with an index from each n-gram to the positions after it."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}

    def keep(self, length: int, moved: Sequence[int] = ()) -> None:
        """Shorten the context. In a chain, entries in `moved` with kept parents are already in place."""
        while len(self._tokens) > length + len(moved):
            for ngram in self._ngrams():
                ends = self._ends[ngram]
                ends.pop()
                if not ends:
                    del self._ends[ngram]
            self._tokens.pop()

    def append(self, tokens: Sequence[int], width: int) -> list[Candidate]:
        for token in tokens:
            self._tokens.append(token)
            for ngram in self._ngrams():
                self._ends.setdefault(ngram, []).append(len(self._tokens))
        return self._candidates()[:width]

    def branch(self, tokens: Sequence[int], parents: Sequence[int], width: int) -> list[list[Candidate]]:
        raise NotImplementedError

    def _ngrams(self) -> list[tuple[int, ...]]:
        """The n-grams that end the context, longest first."""
        longest = min(MAX_NGRAM, len(self._tokens))
        return [tuple(self._tokens[-n:]) for n in range(longest, MIN_NGRAM - 1, -1)]

    def _candidates(self) -> list[Candidate]:
        """The followers at earlier positions: longest match first, then latest. Each takes half of the remaining
        probability.

        So the first follower found stays the most probable, and one found several times, also as part of a longer
        match, is more probable than one found once.
        """
        shares: dict[int, float] = {}
        left = 1.0
        for end in islice(self._places(), MAX_PLACES):
            left /= 2
            follower = self._tokens[end]
            shares[follower] = shares.get(follower, 0.0) + left
        return [Candidate(follower, share) for follower, share in shares.items()]

    def _places(self) -> Iterator[int]:
        """Earlier positions after the n-grams that end the context; a long match yields one per n-gram length."""
        for ngram in self._ngrams():
            ends = self._ends[ngram]
            yield from islice(reversed(ends), 1, None)  # the last is the end of the context itself


class NgramDrafter:
    """Drafts by prompt lookup."""

    fingerprint = ""
    max_context_tokens = 1 << 20
    max_width = 1
    description = "prompt lookup (no model)"

    def open(self) -> NgramSequence:
        return NgramSequence()
