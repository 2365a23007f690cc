"""When what was said before is looked up, for all requests: that takes time, which every request waits for. Pure."""

from dataclasses import dataclass, field

from vllm_specedge.estimators import Smoothed

SELDOM = 8
"""Where it does not pay, one of so many steps does it, to see whether it would again."""
MEMORY_GAIN = 0.03
CHEAP_PART = 0.005
"""Of a step: what takes no longer is always done, for what was copied begins without notice."""


@dataclass(slots=True)
class Lookups:
    """What looking up brings, and what it takes."""

    num_accepted: float = 1.0
    """Tokens found that were verified and right, over all requests; a mean of many, for few have any."""
    took_s: Smoothed = field(default_factory=lambda: Smoothed(mean=0.0))
    _since: int = 0
    _accepted_now: int = 0

    def is_due(self, token_s: float, step_s: float) -> bool:
        """Asked once after each step: whether to look up now. `token_s`: what a token takes in such a step."""
        self._since += 1
        took_s = self.took_s.mean or 0.0
        return self._since >= SELDOM or took_s <= max(CHEAP_PART * step_s, self.num_accepted * token_s)

    def answered(self, took_s: float) -> None:
        """It was done. What became of what the one before this found is known now."""
        if self._since:
            self.num_accepted += MEMORY_GAIN * (self._accepted_now - self.num_accepted)
        self.took_s.observe(took_s)
        self._since = self._accepted_now = 0

    def accepted(self, num_tokens: int) -> None:
        """So many tokens that were found for a request were verified and right."""
        self._accepted_now += num_tokens
