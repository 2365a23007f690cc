"""Arrival times, classes and sizes of requests. Pure: random numbers follow from seeds."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import log
from typing import Literal, TypeAlias

from vllm_specedge.policy.slo import Target
from vllm_specedge.simulation.models import chance, key_of

Kind: TypeAlias = Literal["poisson", "bursty"]
BURST_FACTOR = 3.0
"""Rate in a burst as a multiple of the mean rate; between bursts it is 0."""
BURST_S = 2.0
"""Mean length of a burst in seconds."""


@dataclass(frozen=True, slots=True)
class RequestClass:
    """One class of requests in a simulation."""

    name: str
    priority: int
    share: float
    """Share of all requests."""
    target: Target


@dataclass(frozen=True, slots=True)
class Arrival:
    """An arriving request."""

    at_s: float
    class_: RequestClass
    answer_tokens: int


def arrivals(
    kind: Kind, per_s: float, until_s: float, classes: tuple[RequestClass, ...], answer_tokens: int, seed: int
) -> Iterator[Arrival]:
    """Requests of all classes, in order of arrival. Answers have 0.5 to 1.5 times `answer_tokens`."""
    key, now_s, number = key_of(seed, 1), 0.0, 0
    burst = _Bursts(key_of(seed, 2)) if kind == "bursty" else None
    rate = per_s * (BURST_FACTOR if burst is not None else 1.0)
    busy_s = 0.0
    while True:
        busy_s -= log(1.0 - chance(key, 3 * number)) / rate
        now_s = busy_s if burst is None else burst.at(busy_s)
        if now_s >= until_s:
            return
        kind_of = chance(key, 3 * number + 1) * sum(each.share for each in classes)
        class_ = classes[-1]
        for each in classes:
            kind_of -= each.share
            if kind_of < 0.0:
                class_ = each
                break
        yield Arrival(now_s, class_, max(2, round(answer_tokens * (0.5 + chance(key, 3 * number + 2)))))
        number += 1


class _Bursts:
    """Conversion of time within bursts to clock time, with pauses in between that restore the mean rate."""

    def __init__(self, key: int) -> None:
        self._key = key
        self._number = 0
        self._end_s = 0.0
        """End of the present burst, in time within bursts."""
        self._pauses_s = 0.0

    def at(self, busy_s: float) -> float:
        while busy_s >= self._end_s:
            self._end_s -= BURST_S * log(1.0 - chance(self._key, 2 * self._number))
            self._pauses_s -= (BURST_FACTOR - 1.0) * BURST_S * log(1.0 - chance(self._key, 2 * self._number + 1))
            self._number += 1
        return busy_s + self._pauses_s
