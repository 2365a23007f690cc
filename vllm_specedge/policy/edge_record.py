"""The record of an edge, which tells what to expect of it. Pure."""

from dataclasses import dataclass, field
from math import inf

from vllm_specedge.estimators import Smoothed
from vllm_specedge.policy.acceptance import Acceptance

_DEVIATIONS = 4.0
"""Mean deviations after which an answer is late, as in TCP's retransmission timer (RFC 6298)."""


@dataclass(slots=True)
class EdgeRecord:
    """The record of one edge over all requests that it drafts for."""

    acceptance: Acceptance = field(default_factory=Acceptance)
    answer_s: Smoothed = field(default_factory=Smoothed)
    """Seconds from a commit that left a request without a draft to the proposal that answers it."""
    length: Smoothed = field(default_factory=Smoothed)
    """Tokens in such a proposal."""
    hit: Smoothed = field(default_factory=lambda: Smoothed(mean=0.0))
    """Share of rejected drafts after which a branch held the next draft."""
    punctual: Smoothed = field(default_factory=lambda: Smoothed(mean=1.0))
    """Share of drafts that arrived before they were late."""
    num_misses: int = 0
    """Consecutive answers that were waited for in vain."""
    num_unused: int = 0
    """Consecutive steps of its requests that verified none of its drafts."""
    last_unused_s: float = -inf
    """Time at which the last of them was done."""

    def answered(self, after_s: float, in_time: bool, num_tokens: int) -> None:
        """Record an answer, `after_s` after its commit. `in_time`: before the request went on without it."""
        is_punctual = self.answer_s.mean is not None and after_s <= self.late_after_s
        self.answer_s.observe(after_s)
        self.length.observe(num_tokens)
        self.punctual.observe(float(in_time or is_punctual))
        if in_time or is_punctual:
            self.num_misses = 0

    def stepped(self, is_verified: bool, now_s: float) -> None:
        """Record a step of one of its requests that was done at `now_s`; to be called for each of them."""
        if is_verified:
            self.num_unused = 0
        elif now_s != self.last_unused_s:
            self.num_unused += 1
            self.last_unused_s = now_s

    @property
    def late_after_s(self) -> float:
        """Seconds after a commit from which an answer is late; 0 before the first answer."""
        return (self.answer_s.mean or 0.0) + _DEVIATIONS * self.answer_s.deviation

    def missed(self) -> None:
        self.num_misses += 1
        self.punctual.observe(0.0)
