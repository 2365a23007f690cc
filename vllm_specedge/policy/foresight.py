"""A short forecast of demand: how many engines will be needed when one that is started now is ready. Pure.

Additive Holt-Winters exponential smoothing with a damped trend: a level, its trend, and a daily season that is learnt
from day to day. Times are arguments; for the time of day only the period matters.
Rule 1: the forecast is never below the current level.
Rule 2: the recent mean absolute error of forecasts is added to it.
"""

from collections import deque
from dataclasses import dataclass, field
from math import ceil

SLOT_S = 10.0
"""Demand is averaged over slots of this length: a request more or less is not a trend."""
LEVEL_GAIN, TREND_GAIN, SEASON_GAIN = 0.3, 0.1, 0.3
DAMPING = 0.95
"""Share of a trend that remains from one slot to the next."""
DAY_S = 86_400.0
SEASONS = 144
"""Points of the daily season: one per ten minutes, interpolated linearly."""
SLOTS_A_SEASON = DAY_S / SLOT_S / SEASONS
MARGIN_GAIN = 0.05
HEADROOM = 1.2
"""Factor over the forecast: requests arrive at random, and a full engine refuses some."""
MAX_HORIZON_S = 1800.0
DEFAULT_HORIZON_S = 60.0
"""Horizon until an engine has reported how long it took to start."""


@dataclass(slots=True)
class Foresight:
    """Forecast of the total demand on some engines, in tokens per second."""

    _level: float | None = None
    _trend: float = 0.0
    _seasons: list[float] = field(default_factory=lambda: [0.0] * SEASONS)
    """Mean demand at each time of the day."""
    _days: list[float] = field(default_factory=lambda: [0.0] * SEASONS)
    """Number of days on which each was observed."""
    _slot: int | None = None
    """Number of the open slot."""
    _sum: float = 0.0
    _count: int = 0
    _margin: float = 0.0
    _expected: deque[tuple[int, float]] = field(default_factory=deque)
    """Forecasts of future slots, to be compared with their levels."""

    def observe(self, demand: float, now_s: float, horizon_s: float) -> None:
        """Record the current demand, about every second. `horizon_s`: the horizon of later forecasts."""
        slot = int(now_s / SLOT_S)
        if self._slot is not None and slot > self._slot:
            value = self._sum / self._count
            for passed in range(self._slot, min(slot, self._slot + SEASONS)):
                self._close(passed, value)
            ahead = self._steps(horizon_s)
            self._expected.append((slot + ahead, self._forecast(slot, ahead)))
            self._sum, self._count = 0.0, 0
        self._slot = slot if self._slot is None else max(self._slot, slot)
        self._sum += demand
        self._count += 1

    def foreseen(self, horizon_s: float) -> float:
        """The forecast in tokens per second at the end of that time, and not below the current level."""
        if self._level is None or self._slot is None:
            return self._sum / self._count if self._count else 0.0
        return max(self._level, self._forecast(self._slot, self._steps(horizon_s))) + self._margin

    def _steps(self, horizon_s: float) -> int:
        return ceil(min(MAX_HORIZON_S, max(0.0, horizon_s)) / SLOT_S)

    def _close(self, slot: int, value: float) -> None:
        """Close a slot: update level, trend, season and margin."""
        before, change = self._level, self._change(slot - 1, slot)
        if before is None:
            self._level = value
        else:
            damped = DAMPING * self._trend
            expected = before + damped + change
            self._level = expected + LEVEL_GAIN * (value - expected)
            self._trend = damped + TREND_GAIN * (self._level - before - change - damped)
        self._learn_season(slot, value)
        while self._expected and self._expected[0][0] <= slot:
            at, foreseen = self._expected.popleft()
            if at == slot:
                self._margin += MARGIN_GAIN * (abs(self._level - foreseen) - self._margin)

    def _forecast(self, slot: int, steps: int) -> float:
        """The forecast for the slot `steps` after the open `slot`."""
        assert self._level is not None
        damped = DAMPING * (1.0 - DAMPING ** (steps + 1)) / (1.0 - DAMPING)
        return max(0.0, self._level + damped * self._trend + self._change(slot - 1, slot + steps))

    def _change(self, slot: int, later: int) -> float:
        """The change by the time of day. One day counts little, as it may have had a surge."""
        (low, days), (high, other_days) = self._season(slot), self._season(later)
        return (high - low) * (1.0 - float((1.0 - SEASON_GAIN) ** min(days, other_days)))

    def _season(self, slot: int) -> tuple[float, float]:
        """Mean demand at that time of the day, and on how many days it was observed."""
        index, part = divmod(slot / SLOTS_A_SEASON - 0.5, 1.0)
        low, high = int(index) % SEASONS, int(index + 1) % SEASONS
        days = min(self._days[low], self._days[high])
        return self._seasons[low] + part * (self._seasons[high] - self._seasons[low]), days

    def _learn_season(self, slot: int, value: float) -> None:
        index = int(slot / SLOTS_A_SEASON) % SEASONS
        num_slots = self._days[index] * SLOTS_A_SEASON
        gain = max(1.0 / (num_slots + 1.0), SEASON_GAIN / SLOTS_A_SEASON)
        self._seasons[index] += gain * (value - self._seasons[index])
        self._days[index] += 1.0 / SLOTS_A_SEASON


def engines_needed(tokens_per_s: float, capacity_tokens_per_s: float, headroom: float = HEADROOM) -> int:
    """Engines needed, with this capacity each; 0 if the capacity is not known. At least one, as none starts at once."""
    if capacity_tokens_per_s <= 0.0:
        return 0
    return max(1, ceil(headroom * tokens_per_s / capacity_tokens_per_s - 1e-9))
