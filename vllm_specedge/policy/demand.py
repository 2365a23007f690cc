"""The demand of each class on an engine, refused requests included, in requests and answer tokens. Pure.

A request is counted when it arrives, so that a surge shows at once, with the recent mean answer length of its class.
The length of its prompt is known then, so even a new engine does not take a surge for free of prompts. The cost of
prompts is part of the capacity that demand is compared with (`capacity`).
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf

from vllm_specedge.estimators import Rate, Smoothed
from vllm_specedge.policy.capacity import Mix

FIRST_ANSWER_TOKENS = 128.0
"""Assumed length of an answer until one has ended."""
LATELY_S = 30.0
"""A class without a request for this long is not expected."""


@dataclass(slots=True)
class _Arriving:
    """Arrivals of one class, as of the last sample."""

    num_seen: int = 0
    last_s: float = -inf
    rate: Rate = field(default_factory=Rate)


class Demand:
    """The demand on one engine since it started."""

    def __init__(self, classes: Iterable[str]) -> None:
        self.counters: Mapping[str, Counter[str]] = {name: Counter() for name in classes}
        """Counters by class, with the names of DEMAND_COUNTERS in wire/telemetry.py."""
        self._prompt, self._answer = Smoothed(), Smoothed()
        """Tokens of the requests that were admitted, and that have ended, recently."""
        self._answer_of = {name: Smoothed() for name in self.counters}
        self._arriving = {name: _Arriving() for name in self.counters}

    def admitted(self, class_: str, prompt_tokens: int) -> None:
        self._prompt.observe(prompt_tokens)
        self._count(class_, 1, "offered", "admitted")

    def refused(self, class_: str, num_requests: int) -> None:
        self._count(class_, num_requests, "offered", "refused")

    def deferred(self, class_: str, num_requests: int) -> None:
        """Record admitted requests that had to wait before the engine began with them."""
        self._count(class_, num_requests, "deferred")

    def ended(self, class_: str, answer_tokens: int) -> None:
        for answer in (self._answer_of[class_], self._answer):
            answer.observe(answer_tokens)

    @property
    def mix(self) -> Mix:
        """The recent mean sizes of requests."""
        return Mix(self._prompt.mean or 1.0, max(1.0, self._answer.mean or FIRST_ANSWER_TOKENS))

    def sample(self, now_s: float) -> None:
        """Update arrival rates; to be called regularly."""
        for name, counters in self.counters.items():
            arriving, offered = self._arriving[name], counters["offered_requests"]
            if offered > arriving.num_seen:
                arriving.last_s = now_s
            arriving.rate.observe(offered - arriving.num_seen, now_s)
            arriving.num_seen = offered

    @property
    def offered_per_s(self) -> dict[str, float]:
        """Arriving requests per second by class, refused ones included."""
        return {name: arriving.rate.per_s for name, arriving in self._arriving.items()}

    def lately(self, now_s: float) -> list[str]:
        """The classes with a request in the last LATELY_S."""
        return [name for name, arriving in self._arriving.items() if now_s - arriving.last_s < LATELY_S]

    def _count(self, class_: str, num_requests: int, *outcomes: str) -> None:
        mean = self._answer_of[class_].mean
        if mean is None:
            mean = self._answer.mean
        num_tokens = round(num_requests * (FIRST_ANSWER_TOKENS if mean is None else mean))
        for outcome in outcomes:
            self.counters[class_][f"{outcome}_requests"] += num_requests
            self.counters[class_][f"{outcome}_tokens"] += num_tokens
