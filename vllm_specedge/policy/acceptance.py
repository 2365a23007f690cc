"""How often the target accepts draft tokens, by how deep they are in a draft. Pure.

What a request has shown counts most; where that is little, what its edge has shown; then what drafts here are like.
"""

MAX_DEPTH = 8
"""Deeper tokens count as this deep."""
PRIOR_RATE = 0.5
OWN_WEIGHT = 6.0
"""What is known from elsewhere counts as so many tokens seen."""
MAX_SEEN = 48.0


class Acceptance:
    """The chance that the target says a draft token, given that it said the ones before it."""

    __slots__ = ("_right", "_seen", "parent", "rates")

    def __init__(self, parent: "Acceptance | None" = None) -> None:
        self.parent = parent
        self._seen = [0.0] * MAX_DEPTH
        self._right = [0.0] * MAX_DEPTH
        self.rates: list[float] = list(parent.rates) if parent is not None else [PRIOR_RATE] * MAX_DEPTH
        """By depth, the first token of a draft first."""

    def observe(self, num_right: int, num_known: int) -> None:
        """Of the first `num_known` tokens of a draft `num_right` were right, up to the first wrong one; of the tokens
        behind that nothing is known. Those that it falls back to learn with it."""
        if self.parent is not None:
            self.parent.observe(num_right, num_known)
        for depth in range(min(num_known, num_right + 1)):
            self._count(min(depth, MAX_DEPTH - 1), depth < num_right)

    def _count(self, depth: int, is_right: bool) -> None:
        if self._seen[depth] >= MAX_SEEN:  # what is old counts less
            self._seen[depth] /= 2
            self._right[depth] /= 2
        self._seen[depth] += 1
        self._right[depth] += is_right
        elsewhere = self.parent.rates[depth] if self.parent is not None else PRIOR_RATE
        self.rates[depth] = (OWN_WEIGHT * elsewhere + self._right[depth]) / (OWN_WEIGHT + self._seen[depth])

    def survivals(self, num_tokens: int) -> list[float]:
        """For each of the first tokens of a draft, the chance that the target says it and all before it."""
        survival, survivals = 1.0, []
        for depth in range(num_tokens):
            survival *= self.rates[depth] if depth < MAX_DEPTH else self.rates[-1]
            survivals.append(survival)
        return survivals
