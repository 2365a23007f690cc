"""When vLLM's n-gram lookup is worth its time, which every request waits for. Pure."""

from dataclasses import dataclass, field

from vllm_specedge.estimators import Smoothed

SELDOM = 8
"""Where it does not pay, it is done after one of this many steps, to see whether it would again."""
MEMORY_GAIN = 0.03
CHEAP_PART = 0.005
"""Part of a step: what takes no longer is always done, for what was copied begins without notice."""


@dataclass(slots=True)
class NgramBudget:
    """What looking up brings, and what it takes."""

    num_accepted: float = 1.0
    """Tokens found that were verified and right, over all requests; a mean of many, for few have any."""
    took_s: Smoothed = field(default_factory=lambda: Smoothed(mean=0.0))
    _num_steps: int = 0
    """Steps since the last lookup."""
    _accepted_now: int = 0

    def stepped(self) -> None:
        self._num_steps += 1

    def is_due(self, token_s: float, step_s: float) -> bool:
        """Whether to look up after this step. `token_s`: seconds that a token takes in such a step."""
        took_s = self.took_s.mean or 0.0
        return self._num_steps >= SELDOM or took_s <= max(CHEAP_PART * step_s, self.num_accepted * token_s)

    def answered(self, took_s: float) -> None:
        """It was done. What became of what the one before this found is known now."""
        if self._num_steps:
            self.num_accepted += MEMORY_GAIN * (self._accepted_now - self.num_accepted)
        self.took_s.observe(took_s)
        self._num_steps = self._accepted_now = 0

    def accepted(self, num_tokens: int) -> None:
        """Tokens that were found for a request were verified and right."""
        self._accepted_now += num_tokens
