"""When the workers are asked for what their n-gram lookup found: an answer takes a round trip between processes, which
every request waits for. Pure.
"""

from dataclasses import dataclass, field

from vllm_specedge.estimates import Smoothed

SELDOM = 8
"""Where it does not pay, one of so many steps asks, to see whether it would again."""
MEMORY_GAIN = 0.03


@dataclass(slots=True)
class Lookups:
    """What asking brings, and what it takes."""

    num_accepted: float = 1.0
    """Tokens of an answer that were verified and right, over all requests; a mean of many, for few have any."""
    took_s: Smoothed = field(default_factory=lambda: Smoothed(mean=0.0))
    _since: int = 0
    _accepted_now: int = 0

    def is_due(self, token_s: float) -> bool:
        """Asked once after each step: whether the workers are to be asked now. `token_s`: what a token takes here."""
        self._since += 1
        return self._since >= SELDOM or self.num_accepted * token_s >= (self.took_s.mean or 0.0)

    def answered(self, took_s: float) -> None:
        """The workers have answered. What became of the answer before this one is known now."""
        if self._since:
            self.num_accepted += MEMORY_GAIN * (self._accepted_now - self.num_accepted)
        self.took_s.observe(took_s)
        self._since = self._accepted_now = 0

    def accepted(self, num_tokens: int) -> None:
        """So many tokens that an answer had for a request were verified and right."""
        self._accepted_now += num_tokens
