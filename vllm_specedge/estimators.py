"""Running estimates of repeated measurements. Pure; used by engine and edge."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp

_GAIN = 0.125
_DEVIATION_GAIN = 0.25
"""The gains of TCP's retransmission timer (RFC 6298), which solves the same problem: when to expect an answer."""


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


@dataclass(slots=True)
class Line:
    """Seconds as a straight line over sizes, fitted to measurements; old ones count less.

    While only one size was observed, the slope is 0.
    """

    forgetting: float = 0.98
    _weight: float = 0.0
    _size: float = 0.0
    _s: float = 0.0
    _size2: float = 0.0
    _size_s: float = 0.0

    def observe(self, size: float, took_s: float) -> None:
        keep = self.forgetting
        self._weight = keep * self._weight + 1.0
        self._size = keep * self._size + size
        self._s = keep * self._s + took_s
        self._size2 = keep * self._size2 + size * size
        self._size_s = keep * self._size_s + size * took_s

    @property
    def slope_s(self) -> float:
        """Seconds per unit of size; 0 if not known."""
        if not self._weight:
            return 0.0
        mean = self._size / self._weight
        spread = self._size2 / self._weight - mean * mean
        return max(0.0, (self._size_s - mean * self._s) / self._weight / spread) if spread > 1e-6 else 0.0

    def __call__(self, size: float) -> float:
        """Estimated seconds for a size; 0 before any measurement."""
        if not self._weight:
            return 0.0
        mean_s = self._s / self._weight
        return max(mean_s / 8, mean_s + self.slope_s * (size - self._size / self._weight))


@dataclass(slots=True)
class Rate:
    """Events per second; those of the last `memory_s` seconds count most."""

    memory_s: float = 10.0
    _count: float = 0.0
    _weight_s: float = 0.0
    _last_s: float | None = None

    def observe(self, num_events: int, now_s: float) -> None:
        """Record the number of events since the last observation."""
        if self._last_s is not None:
            passed_s = max(0.0, now_s - self._last_s)
            keep = exp(-passed_s / self.memory_s)
            self._count = self._count * keep + num_events
            self._weight_s = self._weight_s * keep + passed_s
        self._last_s = now_s

    @property
    def per_s(self) -> float:
        """Events per second; 0 before any were observed."""
        return self._count / self._weight_s if self._weight_s > 0.0 else 0.0


def crossing(holds: Callable[[float], bool], low: float, high: float, num_halvings: int) -> float:
    """The point, from above, where a condition that holds at `low` and not at `high` stops holding, by bisection."""
    for _ in range(num_halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high


def quantile(values: Sequence[float], part: float) -> float:
    """The approximate quantile: the value that a share `part` of all does not exceed; 0 if there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0
