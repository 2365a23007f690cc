"""What each class of requests asks of an engine, refused ones included, in requests and tokens of answers. Pure.

A request is counted when it comes, so that a surge is seen at once: its answer is taken for as long as those of its
class are of late. What its prompt costs is part of the capacity that demand is compared with (`capacity`).
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf

from vllm_specedge.estimators import Rate, Smoothed
from vllm_specedge.policy.capacity import Mix

FIRST_ANSWER_TOKENS = 128.0
"""An answer is thought to have so many until one has ended."""
LATELY_S = 30.0
"""A class of which nobody came for so long is not expected."""


@dataclass(slots=True)
class _Sizes:
    """Tokens of requests that have ended of late."""

    prompt: Smoothed = field(default_factory=Smoothed)
    answer: Smoothed = field(default_factory=Smoothed)


@dataclass(slots=True)
class _Arriving:
    """Requests that came, as far as they were sampled."""

    num_seen: int = 0
    last_s: float = -inf
    rate: Rate = field(default_factory=Rate)


class Demand:
    """Of one engine, since it started."""

    def __init__(self, classes: Iterable[str]) -> None:
        self.counters: Mapping[str, Counter[str]] = {name: Counter() for name in classes}
        """By class, by the names in wire/telemetry.py, DEMAND_COUNTERS."""
        self._of_class = {name: _Sizes() for name in self.counters}
        self._of_all = _Sizes()
        self._arriving = {name: _Arriving() for name in self.counters}

    def admitted(self, class_: str) -> None:
        self._count(class_, 1, "offered", "admitted")

    def refused(self, class_: str, num_requests: int) -> None:
        self._count(class_, num_requests, "offered", "refused")

    def deferred(self, class_: str, num_requests: int) -> None:
        """Of those admitted, so many had to wait before the engine began with them."""
        self._count(class_, num_requests, "deferred")

    def ended(self, class_: str, prompt_tokens: int, answer_tokens: int) -> None:
        for sizes in (self._of_class[class_], self._of_all):
            sizes.prompt.observe(prompt_tokens)
            sizes.answer.observe(answer_tokens)

    @property
    def mix(self) -> Mix:
        """What requests are like of late."""
        return Mix(self._of_all.prompt.mean or 1.0, max(1.0, self._of_all.answer.mean or FIRST_ANSWER_TOKENS))

    def sample(self, now_s: float) -> None:
        """To be called now and then."""
        for name, counters in self.counters.items():
            arriving, offered = self._arriving[name], counters["offered_requests"]
            if offered > arriving.num_seen:
                arriving.last_s = now_s
            arriving.rate.observe(offered - arriving.num_seen, now_s)
            arriving.num_seen = offered

    @property
    def offered_per_s(self) -> dict[str, float]:
        """By class, requests that come, refused ones too."""
        return {name: arriving.rate.per_s for name, arriving in self._arriving.items()}

    def lately(self, now_s: float) -> list[str]:
        """The classes of which a request came in the last LATELY_S."""
        return [name for name, arriving in self._arriving.items() if now_s - arriving.last_s < LATELY_S]

    def _count(self, class_: str, num_requests: int, *outcomes: str) -> None:
        mean = self._of_class[class_].answer.mean
        if mean is None:
            mean = self._of_all.answer.mean
        num_tokens = round(num_requests * (FIRST_ANSWER_TOKENS if mean is None else mean))
        for outcome in outcomes:
            self.counters[class_][f"{outcome}_requests"] += num_requests
            self.counters[class_][f"{outcome}_tokens"] += num_tokens
