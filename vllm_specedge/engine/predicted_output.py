"""An answer that its user predicted (OpenAI's predicted outputs): where the real one is in it, and what follows. Pure.

Who edits a text knows most of the answer beforehand. The answer walks along the prediction while it says the same;
where it differs, one token is taken for another at first, and soon the last tokens show where it goes on: of the places
where they stand, the one with the longest common past is chosen, then the nearest.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from itertools import pairwise

from vllm_specedge.wire.frames import num_equal

MAX_COMMON = 8
"""So many last tokens are compared."""
MAX_PLACES = 16
"""So many places are looked at, the nearest: a text may repeat itself ever so often."""
MAX_OFF_TRACK = 4
"""Tokens in a row that were not predicted; then nothing is predicted until two of them are found."""


class Prediction:
    """Where an answer is in what was predicted of it. A token costs constant time; the first that differs costs one
    look at the whole prediction."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens
        self._at = 0
        """What comes next, it is thought."""
        self._num_off_track = 0
        self._last: deque[int] = deque(maxlen=MAX_COMMON)
        self._places: dict[tuple[int, int], list[int]] | None = None
        """Of each pair of tokens, where what follows it stands."""
        self.num_accepted = 0
        """Tokens of the answer that were predicted."""

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
        """What is predicted next, at most `limit` tokens."""
        return () if self._is_lost else self._tokens[self._at : self._at + limit]

    @property
    def _is_lost(self) -> bool:
        return self._num_off_track >= MAX_OFF_TRACK

    def _seek(self) -> None:
        """The last token was another than predicted."""
        found = self._find()
        if found is not None:
            self._at, self._num_off_track = found, 0
        else:
            self._at, self._num_off_track = min(self._at + 1, len(self._tokens)), self._num_off_track + 1

    def _find(self) -> int | None:
        """Where the answer goes on, by its last two tokens and those before them."""
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
        """How many tokens before `end` are those said last."""
        return num_equal(self._tokens[max(0, end - len(last)) : end][::-1], last[::-1])
