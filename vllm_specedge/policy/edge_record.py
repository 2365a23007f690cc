"""How an edge has done so far: what to expect of it. Pure."""

from dataclasses import dataclass, field
from math import inf

from vllm_specedge.estimators import Smoothed
from vllm_specedge.policy.acceptance import Acceptance

_DEVIATIONS = 4.0
"""After this many mean deviations an answer is late, as for TCP's retransmission timer (RFC 6298)."""


@dataclass(slots=True)
class EdgeRecord:
    """How one edge has done so far, over all requests that it drafts for."""

    acceptance: Acceptance = field(default_factory=Acceptance)
    answer_s: Smoothed = field(default_factory=Smoothed)
    """From the publication of a commit that left a request without a draft to the proposal that follows it."""
    length: Smoothed = field(default_factory=Smoothed)
    """Tokens in such a proposal."""
    hit: Smoothed = field(default_factory=lambda: Smoothed(mean=0.0))
    """How often, when a draft was rejected, a branch held the next one."""
    punctual: Smoothed = field(default_factory=lambda: Smoothed(mean=1.0))
    """How often a draft came before it was late."""
    num_misses: int = 0
    """Answers in a row that were waited for in vain."""
    num_unused: int = 0
    """Steps in a row, of the requests that it answers, that verified no draft of it."""
    last_unused_s: float = -inf
    """When the last of them was done."""

    def answered(self, after_s: float, in_time: bool, num_tokens: int) -> None:
        """An answer came so long after the commit it answers; `in_time`: before the request went on without it."""
        is_punctual = self.answer_s.mean is not None and after_s <= self.late_after_s
        self.answer_s.observe(after_s)
        self.length.observe(num_tokens)
        self.punctual.observe(float(in_time or is_punctual))
        if in_time or is_punctual:
            self.num_misses = 0

    def stepped(self, is_verified: bool, now_s: float) -> None:
        """A step of a request that it answers was done at `now_s`; told for each of them."""
        if is_verified:
            self.num_unused = 0
        elif now_s != self.last_unused_s:
            self.num_unused += 1
            self.last_unused_s = now_s

    @property
    def late_after_s(self) -> float:
        """So long after a commit an answer is late; 0 before the first."""
        return (self.answer_s.mean or 0.0) + _DEVIATIONS * self.answer_s.deviation

    def missed(self) -> None:
        self.num_misses += 1
        self.punctual.observe(0.0)
