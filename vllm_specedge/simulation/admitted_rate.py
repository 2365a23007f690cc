"""An admission rate for each class of requests, raised and lowered by the latencies that result. Pure.

Its only input is the lateness of tokens: TTFT, or the time from one token to the next, relative to the target of the
class. As in TopFull, without its learning: additive increase, multiplicative decrease, by importance. As all classes
share one engine, the least important one is lowered first, and the most important one raised first.
Rule 1: a class without a limit has no rate. A rate is set when something is late, from the requests admitted by then.
Rule 2: the effect of a decrease shows when requests admitted before have ended, so the next decrease waits for that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from vllm_specedge.estimators import Rate, Smoothed, quantile

INTERVAL_S = 0.5
LATE = 1.0
EARLY = 0.95
"""Share of a target: rates are raised if eight of ten latencies are below it, and lowered if they exceed LATE."""
PART = 0.8
LEAST_DECREASE, MOST_DECREASE = 0.05, 0.3
INCREASE = 0.2
"""Share of the admitted requests of all classes together."""
LEAST_RATE = 0.1
BURST_S = 1.0
"""Seconds for which an unused part of a rate is kept."""
MEMORY_S = 5.0
MAX_OBSERVED = 512
"""Maximum latencies kept per interval and class."""


@dataclass(slots=True)
class _Class:
    rate: float = inf
    tokens: float = 0.0
    """Tokens in its bucket: requests that may be admitted now."""
    num_offered: int = 0
    num_admitted: int = 0
    offered: Rate = field(default_factory=lambda: Rate(MEMORY_S))
    admitted: Rate = field(default_factory=lambda: Rate(MEMORY_S))
    lateness: list[float] = field(default_factory=list)

    @property
    def is_limited(self) -> bool:
        return self.rate < self.offered.per_s


class AdmittedRates:
    """The admission rates of one server's classes."""

    def __init__(self, classes: Sequence[str]) -> None:
        """`classes`: the most important first."""
        self._classes = {name: _Class() for name in classes}
        self._filled_s: float | None = None
        self._decided_s: float | None = None
        self._lowered_s = -inf
        self._durations = Smoothed()

    def rate(self, class_: str) -> float:
        """Requests per second; inf: no limit."""
        return self._classes[class_].rate

    def ask(self, class_: str, now_s: float) -> bool:
        """Whether a request is admitted. If so, it counts."""
        self._fill(now_s)
        own = self._classes[class_]
        own.num_offered += 1
        if own.rate < inf:
            if own.tokens < 1.0:
                return False
            own.tokens -= 1.0
        own.num_admitted += 1
        return True

    def observe(self, class_: str, lateness: float) -> None:
        """Record a latency of an admitted request, relative to its target."""
        seen = self._classes[class_].lateness
        if len(seen) < MAX_OBSERVED:
            seen.append(lateness)

    def ended(self, took_s: float) -> None:
        """Record that an admitted request has ended."""
        self._durations.observe(took_s)

    def decide(self, now_s: float) -> None:
        """Adjust rates, every INTERVAL_S at most; to be called regularly."""
        if self._decided_s is not None and now_s - self._decided_s < INTERVAL_S:
            return
        self._decided_s = now_s
        self._fill(now_s)
        for each in self._classes.values():
            each.offered.observe(each.num_offered, now_s)
            each.admitted.observe(each.num_admitted, now_s)
            each.num_offered = each.num_admitted = 0
        worst = max((quantile(each.lateness, PART) for each in self._classes.values()), default=0.0)
        for each in self._classes.values():
            each.lateness.clear()
        if worst > LATE:
            self._lower(worst, now_s)
        elif worst < EARLY:
            self._raise()

    def _lower(self, worst: float, now_s: float) -> None:
        if now_s - self._lowered_s < (self._durations.mean or 0.0):
            return
        left = [each for each in self._classes.values() if min(each.rate, each.admitted.per_s) > LEAST_RATE]
        if not left:
            return
        self._lowered_s = now_s
        total = sum(each.admitted.per_s for each in left)
        # Relative to all admitted requests; the less important classes give theirs first.
        owed = total * min(MOST_DECREASE, max(LEAST_DECREASE, 1.0 - LATE / worst))
        for each in reversed(left):
            now_per_s = min(each.rate, each.admitted.per_s)
            each.rate = max(LEAST_RATE, now_per_s - owed)
            owed -= now_per_s - each.rate
            each.tokens = min(each.tokens, 1.0)
            if owed <= 0.0:
                return

    def _raise(self) -> None:
        more = max(LEAST_RATE, INCREASE * sum(each.admitted.per_s for each in self._classes.values()))
        for each in self._classes.values():
            if each.rate < inf and each.is_limited:
                each.rate += more
                return
        for each in self._classes.values():
            if each.rate > 2.0 * each.offered.per_s + 1.0:
                each.rate = inf

    def _fill(self, now_s: float) -> None:
        passed_s = max(0.0, now_s - self._filled_s) if self._filled_s is not None else 0.0
        self._filled_s = now_s
        for each in self._classes.values():
            if each.rate < inf:
                each.tokens = min(max(1.0, each.rate * BURST_S), each.tokens + each.rate * passed_s)
