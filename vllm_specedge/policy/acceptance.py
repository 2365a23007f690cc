"""The acceptance rate of draft tokens by their depth in the draft. Pure.

A request's own record counts most; if there is little of it, its edge's record; then that of all drafts here.
"""

from itertools import accumulate
from operator import mul

MAX_DEPTH = 8
"""Deeper tokens count as this deep."""
PRIOR_RATE = 0.5
OWN_WEIGHT = 6.0
"""Weight of the parent's rate, in observed tokens."""
MAX_SEEN = 48.0


class Acceptance:
    """The probability that the target chooses a draft token, given that it chose those before it."""

    __slots__ = ("_right", "_seen", "parent", "rates")

    def __init__(self, parent: "Acceptance | None" = None) -> None:
        self.parent = parent
        self._seen = [0.0] * MAX_DEPTH
        self._right = [0.0] * MAX_DEPTH
        self.rates: list[float] = list(parent.rates) if parent is not None else [PRIOR_RATE] * MAX_DEPTH
        """Acceptance rates by depth, from the first token of a draft on."""

    def observe(self, num_right: int, num_known: int) -> None:
        """Record that of the first `num_known` tokens of a draft `num_right` were right, up to the first wrong one.
        Nothing is known of the tokens after that. The parents learn it, too."""
        if self.parent is not None:
            self.parent.observe(num_right, num_known)
        for depth in range(min(num_known, num_right + 1)):
            self._count(min(depth, MAX_DEPTH - 1), depth < num_right)

    def _count(self, depth: int, is_right: bool) -> None:
        if self._seen[depth] >= MAX_SEEN:  # older observations count less
            self._seen[depth] /= 2
            self._right[depth] /= 2
        self._seen[depth] += 1
        self._right[depth] += is_right
        elsewhere = self.parent.rates[depth] if self.parent is not None else PRIOR_RATE
        self.rates[depth] = (OWN_WEIGHT * elsewhere + self._right[depth]) / (OWN_WEIGHT + self._seen[depth])

    def survivals(self, num_tokens: int) -> list[float]:
        """For each of the first tokens of a draft, the probability that the target chooses it and all before it."""
        deeper = self.rates[-1:] * (num_tokens - MAX_DEPTH)
        return list(accumulate(self.rates[:num_tokens] + deeper, mul))
