"""When vLLM's n-gram lookup, which delays every request, is worth its time. Pure."""

from dataclasses import dataclass, field

from vllm_specedge.estimators import Smoothed

SELDOM = 8
"""If the lookup does not pay, it still runs after one of this many steps, to see whether it would again."""
MEMORY_GAIN = 0.03
CHEAP_PART = 0.005
"""Share of a step: a lookup that takes no longer always runs, as copied text starts without notice."""


@dataclass(slots=True)
class NgramBudget:
    """The gain and the cost of lookups."""

    num_accepted: float = 1.0
    """Accepted tokens per lookup, over all requests; a slow mean, as few lookups find any."""
    took_s: Smoothed = field(default_factory=lambda: Smoothed(mean=0.0))
    _num_steps: int = 0
    """Steps since the last lookup."""
    _accepted_now: int = 0

    def stepped(self) -> None:
        self._num_steps += 1

    def is_due(self, token_s: float, step_s: float) -> bool:
        """Whether to run a lookup after this step. `token_s`: seconds per token in such a step."""
        took_s = self.took_s.mean or 0.0
        return self._num_steps >= SELDOM or took_s <= max(CHEAP_PART * step_s, self.num_accepted * token_s)

    def answered(self, took_s: float) -> None:
        """Record a lookup and its time. The outcome of the previous lookup is known now."""
        if self._num_steps:
            self.num_accepted += MEMORY_GAIN * (self._accepted_now - self.num_accepted)
        self.took_s.observe(took_s)
        self._num_steps = self._accepted_now = 0

    def accepted(self, num_tokens: int) -> None:
        """Record accepted tokens that a lookup found for a request."""
        self._accepted_now += num_tokens
