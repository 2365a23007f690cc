"""How strongly noise reorders a draft's candidates, learnt from the tokens of the target. Pure.

A draft knows the target's noise but only estimates its probabilities. If the target is more certain than the draft, for
instance where it copies text, noise changes the draft's token but not the target's; if the draft is too certain, it is
the other way round. So the draft's log probabilities are multiplied by a factor before noise is added. Each committed
token shows for every factor, not only the one in use, whether its guess would have been right.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log

FACTORS = (0.7, 1.0, 1.5, 2.5, 4.0)
"""With the largest, noise hardly changes the order."""
OWN_MEMORY, COMMON_MEMORY = 0.97, 0.995
PRIOR_WEIGHT = 8.0


@dataclass(slots=True)
class Belief:
    """How often each factor was right; older tokens count less."""

    memory: float = COMMON_MEMORY
    common: "Belief | None" = None
    """The belief over all requests, the prior until a request has its own evidence."""
    _seen: float = 0.0
    _right: list[float] = field(default_factory=lambda: [0.0] * len(FACTORS))

    def of_request(self) -> "Belief":
        return Belief(OWN_MEMORY, self)

    def observe(self, guesses: Sequence[int], token: int) -> None:
        """Record the target's `token` and the guess that each factor gave; no guesses: noise had no part in it."""
        if not guesses:
            return
        self._seen = self.memory * self._seen + 1.0
        for index, guess in enumerate(guesses):
            self._right[index] = self.memory * self._right[index] + (guess == token)
        if self.common is not None:
            self.common.observe(guesses, token)

    @property
    def factor(self) -> float:
        """The factor that is right most often; of equals the nearest to 1."""
        return max(FACTORS, key=lambda factor: (round(self._rate(FACTORS.index(factor)), 9), -abs(log(factor))))

    def _rate(self, index: int) -> float:
        before = self.common._rate(index) if self.common is not None else 0.0
        return (PRIOR_WEIGHT * before + self._right[index]) / (PRIOR_WEIGHT + self._seen)
