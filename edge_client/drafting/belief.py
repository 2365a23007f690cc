"""How far noise may move a draft's own order of tokens, learnt from what the target said. Pure.

A draft knows the target's noise and guesses its probabilities. Where the target is surer than the draft thinks, as of a
text that it copies, noise makes the draft say another token where it does not move the target; where the draft is too
sure it is the other way round. So the draft's log probabilities are taken times a factor before noise is added. Each
committed token shows for every factor whether it would have been right, whichever was used.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log

FACTORS = (0.7, 1.0, 1.5, 2.5, 4.0)
"""With the last, noise hardly moves anything."""
OWN_MEMORY, COMMON_MEMORY = 0.97, 0.995
PRIOR_WEIGHT = 8.0


@dataclass(slots=True)
class Belief:
    """How often each factor was right, what is old counting less."""

    memory: float = COMMON_MEMORY
    common: "Belief | None" = None
    """Of all requests: what is thought before a request has shown something itself."""
    _seen: float = 0.0
    _right: list[float] = field(default_factory=lambda: [0.0] * len(FACTORS))

    def of_request(self) -> "Belief":
        return Belief(OWN_MEMORY, self)

    def observe(self, guesses: Sequence[int], token: int) -> None:
        """The target said `token`, where each factor would have guessed one of `guesses`; none: noise had no part."""
        if not guesses:
            return
        self._seen = self.memory * self._seen + 1.0
        for index, guess in enumerate(guesses):
            self._right[index] = self.memory * self._right[index] + (guess == token)
        if self.common is not None:
            self.common.observe(guesses, token)

    @property
    def factor(self) -> float:
        """That which is right most often; of equals the nearest to 1."""
        return max(FACTORS, key=lambda factor: (round(self._rate(FACTORS.index(factor)), 9), -abs(log(factor))))

    def _rate(self, index: int) -> float:
        before = self.common._rate(index) if self.common is not None else 0.0
        return (PRIOR_WEIGHT * before + self._right[index]) / (PRIOR_WEIGHT + self._seen)
