"""Drafts from a predicted output (OpenAI's predicted outputs): the answer's position in it, and what follows. Pure.

When you edit text you know most of the answer. The position moves along the prediction while the answer matches it. At
a difference, one token is assumed to be replaced by another. Soon the last tokens show where the answer continues: of
the places where they occur, the one with the longest common past is chosen, then the nearest.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from itertools import pairwise

from vllm_specedge.wire.frames import num_equal

MAX_COMMON = 8
"""Number of last tokens to compare."""
MAX_PLACES = 16
"""Maximum places to look at, the nearest ones: a text may repeat itself many times."""
MAX_OFF_TRACK = 4
"""Consecutive tokens that were not predicted, after which nothing is predicted until the last two are found."""


class Prediction:
    """The position of an answer in its prediction. Each token takes constant time; the first that differs takes a scan
    of the whole prediction."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens
        self._at = 0
        """Index of the next predicted token."""
        self._num_off_track = 0
        self._last: deque[int] = deque(maxlen=MAX_COMMON)
        self._places: dict[tuple[int, int], list[int]] | None = None
        """For each pair of tokens, the indices after its occurrences."""
        self.num_accepted = 0
        """Tokens of the answer that were predicted so far."""

    def __len__(self) -> int:
        return len(self._tokens)

    def advance(self, decided: Sequence[int]) -> None:
        for token in decided:
            self._last.append(token)
            is_predicted = not self._is_lost and self._at < len(self._tokens) and self._tokens[self._at] == token
            if is_predicted:
                self.num_accepted += 1
                self._at += 1
                self._num_off_track = 0
            else:
                self._seek()

    def draft(self, limit: int) -> Sequence[int]:
        """The next predicted tokens, at most `limit`."""
        return () if self._is_lost else self._tokens[self._at : self._at + limit]

    @property
    def _is_lost(self) -> bool:
        return self._num_off_track >= MAX_OFF_TRACK

    def _seek(self) -> None:
        """Find the new position, as the last token differs from the predicted one."""
        found = self._find()
        if found is not None:
            self._at, self._num_off_track = found, 0
        else:
            self._at, self._num_off_track = min(self._at + 1, len(self._tokens)), self._num_off_track + 1

    def _find(self) -> int | None:
        """The index at which the answer continues, by its last two tokens and those before them."""
        if len(self._last) < 2:
            return None
        if self._places is None:
            self._places = {}
            for end, pair in enumerate(pairwise(self._tokens), 2):
                self._places.setdefault(pair, []).append(end)
        last = tuple(self._last)
        places = self._places.get((last[-2], last[-1]), ())
        middle = bisect_left(places, self._at)
        nearest = places[max(0, middle - MAX_PLACES // 2) : middle + MAX_PLACES // 2]
        return max(nearest, key=lambda end: (self._num_common(end, last), -abs(end - self._at)), default=None)

    def _num_common(self, end: int, last: Sequence[int]) -> int:
        """How many tokens before `end` equal the answer's last ones."""
        return num_equal(self._tokens[max(0, end - len(last)) : end][::-1], last[::-1])
