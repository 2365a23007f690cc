"""When a request waits for its draft and when it decodes now. Pure: plain values in, a decision out.

Rule: a request is held only while what the draft is expected to bring beats decoding at once, and never past a limit.
"""

from dataclasses import dataclass, field

_GAIN = 0.125
_DEVIATION_GAIN = 0.25
_DEVIATIONS = 4.0
"""Smoothing and margin as TCP's retransmission timer has them (RFC 6298): the problem is the same, an answer's time."""


MODES = ("auto", "wait", "never-wait")
"""Hold while it pays; for as long as the limit allows, whatever the edge's record (the paper's way); never."""


@dataclass(frozen=True, slots=True)
class HoldLimits:
    """What an operator sets. `hold_limit_s` 0 never holds; `mode` is one of MODES."""

    hold_limit_s: float = 0.1
    mode: str = "auto"
    max_misses: int = 2
    """After so many late answers in a row an edge is not waited for until it is in time again."""


@dataclass(slots=True)
class Smoothed:
    """A running mean and mean deviation of a quantity; `mean` is None before the first observation."""

    mean: float | None = None
    deviation: float = 0.0

    def observe(self, value: float) -> None:
        if self.mean is None:
            self.mean, self.deviation = value, value / 2
            return
        self.deviation += _DEVIATION_GAIN * (abs(value - self.mean) - self.deviation)
        self.mean += _GAIN * (value - self.mean)


PRIOR_ACCEPTED = 1.0
"""Accepted tokens of a draft, before anything is known: enough to wait for an edge a few times and see."""


@dataclass(slots=True)
class EdgeRecord:
    """How one request's edge has done so far."""

    answer_s: Smoothed = field(default_factory=Smoothed)
    """From a commit's publication to the proposal that follows it."""
    accepted: Smoothed = field(default_factory=lambda: Smoothed(mean=PRIOR_ACCEPTED))
    """Draft tokens of a proposal that were right, whether it was verified or came too late to be."""
    num_misses: int = 0

    def answered(self, after_s: float, in_time: bool) -> None:
        """An answer came so long after the commit it answers; `in_time`: before the request went on without it."""
        is_punctual = self.answer_s.mean is not None and after_s <= self.late_after_s
        self.answer_s.observe(after_s)
        if in_time or is_punctual:
            self.num_misses = 0

    @property
    def late_after_s(self) -> float:
        """So long after a commit an answer is late; 0 before the first."""
        return (self.answer_s.mean or 0.0) + _DEVIATIONS * self.answer_s.deviation

    def missed(self) -> None:
        self.num_misses += 1


def hold_until(record: EdgeRecord, committed_s: float, now_s: float, step_s: float, limits: HoldLimits) -> float | None:
    """Until when to hold a request that has no draft, or None to decode now.

    `committed_s` is when its last tokens were published, `step_s` how long a decode step takes. Waiting w seconds for
    a draft of which m tokens are accepted beats decoding at once while w < m * step_s.
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
    if max(0.0, expected_at_s - now_s) >= accepted * step_s:  # also where nothing can be gained, however short the wait
        return None
    deadline_s = min(committed_s + record.late_after_s, limit_s)
    return deadline_s if now_s < deadline_s else None
