"""When a request waits for its draft and when it decodes now. Pure: plain values in, a decision out.

Rule: a request is held only while what the draft is expected to bring beats decoding at once, and never past a limit.
"""

from dataclasses import dataclass, field

from vllm_specedge.estimates import Line, Smoothed

_DEVIATIONS = 4.0
"""After so many mean deviations an answer is late, as for TCP's retransmission timer (RFC 6298)."""


MODES = ("auto", "wait", "never-wait")
"""Hold while it pays; for as long as the limit allows, whatever the edge's record (the paper's way); never."""


@dataclass(frozen=True, slots=True)
class HoldLimits:
    """What an operator sets. `hold_limit_s` 0 never holds; `mode` is one of MODES."""

    hold_limit_s: float = 0.1
    mode: str = "auto"
    max_misses: int = 2
    """After so many late answers in a row an edge is not waited for until it is in time again."""


PRIOR_FIRST = 0.5
PRIOR_ACCEPTED = 1.0
"""Accepted tokens of a draft, before anything is known: enough to wait for an edge a few times and see."""


@dataclass(slots=True)
class EdgeRecord:
    """How one request's edge has done so far."""

    answer_s: Smoothed = field(default_factory=Smoothed)
    """From a commit's publication to the proposal that follows it."""
    accepted: Smoothed = field(default_factory=lambda: Smoothed(mean=PRIOR_ACCEPTED))
    """Draft tokens of a proposal that were right, whether it was verified or came too late to be."""
    first: Smoothed = field(default_factory=lambda: Smoothed(mean=PRIOR_FIRST))
    """How often the first of them was."""
    hit: Smoothed = field(default_factory=lambda: Smoothed(mean=0.0))
    """How often, when a draft was rejected, a branch held the next one."""
    num_misses: int = 0

    def answered(self, after_s: float, in_time: bool) -> None:
        """An answer came so long after the commit it answers; `in_time`: before the request went on without it."""
        is_punctual = self.answer_s.mean is not None and after_s <= self.late_after_s
        self.answer_s.observe(after_s)
        if in_time or is_punctual:
            self.num_misses = 0

    def verified(self, num_right: int) -> None:
        """It is known how many first tokens of a draft were right."""
        self.accepted.observe(num_right)
        self.first.observe(float(num_right > 0))

    def fresh(self) -> "EdgeRecord":
        """One that expects what this one has seen of drafts, and knows nothing of answers."""
        return EdgeRecord(accepted=Smoothed(self.accepted.mean), first=Smoothed(self.first.mean))

    @property
    def survival(self) -> float:
        """The chance that what the edge sends is of use although the request decoded one more token meanwhile."""
        first = self.first.mean or 0.0
        return first + (1.0 - first) * (self.hit.mean or 0.0)

    @property
    def late_after_s(self) -> float:
        """So long after a commit an answer is late; 0 before the first."""
        return (self.answer_s.mean or 0.0) + _DEVIATIONS * self.answer_s.deviation

    def missed(self) -> None:
        self.num_misses += 1


def hold_until(record: EdgeRecord, committed_s: float, now_s: float, step_s: float, limits: HoldLimits) -> float | None:
    """Until when to hold a request that has no draft, or None to decode now.

    `committed_s` is when its last tokens were published, `step_s` how long a decode step takes. Decoding now takes a
    step for one token, and leaves the draft, of which m tokens are right, of use with probability r only. Holding for
    w seconds instead saves step_s - w, which is worth so many tokens at the rate of holding, (1 + m) / (w + step_s). So
    hold while (step_s - w) * rate + m * (1 - r) > 1.
    """
    if limits.mode == "never-wait":
        return None
    limit_s = committed_s + limits.hold_limit_s
    if limits.mode == "wait":
        return limit_s if now_s < limit_s else None
    if record.answer_s.mean is None or record.num_misses >= limits.max_misses:
        return None
    expected_at_s = committed_s + record.answer_s.mean
    accepted = record.accepted.mean or 0.0
    wait_s = max(0.0, expected_at_s - now_s)
    rate = (1.0 + accepted) / max(step_s + wait_s, 1e-6)
    if not accepted or (step_s - wait_s) * rate + accepted * (1.0 - record.survival) <= 1.0:
        return None
    deadline_s = min(committed_s + record.late_after_s, limit_s)
    return deadline_s if now_s < deadline_s else None


def is_worth_verifying(accepted: float, num_tokens: int, step_s: Line) -> bool:
    """Whether `num_tokens` draft tokens of which so many are expected to be accepted save more time than they take.

    An accepted token saves a decode step; each verified one makes this step longer.
    """
    return accepted * step_s(1) >= num_tokens * step_s.slope_s
