"""How many engines will be needed when one that is started now is there, by a short forecast of demand. Pure.

Holt and Winters' exponential smoothing, additive, with a damped trend: a level, how it changes, and how the time of day
changes it, which is learnt from day to day. Times are arguments; of the time of day only the period counts.
Rule 1: what is foreseen is never below what is there.
Rule 2: how far levels were from what was foreseen of them is added, as they were lately.
"""

from collections import deque
from dataclasses import dataclass, field
from math import ceil

SLOT_S = 10.0
"""Demand is looked at in slots of this length: a request more or less is not a trend."""
LEVEL_GAIN, TREND_GAIN, SEASON_GAIN = 0.3, 0.1, 0.3
DAMPING = 0.95
"""Part of a trend that is left from one slot to the next."""
DAY_S = 86_400.0
SEASONS = 144
"""Of a day: ten minutes each, straight lines between."""
SLOTS_A_SEASON = DAY_S / SLOT_S / SEASONS
MARGIN_GAIN = 0.05
HEADROOM = 1.2
"""So many times what is foreseen: requests come by chance, and a full engine refuses some."""
MAX_HORIZON_S = 1800.0
DEFAULT_HORIZON_S = 60.0
"""Before an engine has said how long it took to start."""


@dataclass(slots=True)
class Foresight:
    """The demand of some engines together, in tokens a second."""

    _level: float | None = None
    _trend: float = 0.0
    _seasons: list[float] = field(default_factory=lambda: [0.0] * SEASONS)
    """What demand is at each time of the day."""
    _days: list[float] = field(default_factory=lambda: [0.0] * SEASONS)
    """On so many days that was seen."""
    _slot: int | None = None
    """The number of the slot that is open."""
    _sum: float = 0.0
    _count: int = 0
    _margin: float = 0.0
    _expected: deque[tuple[int, float]] = field(default_factory=deque)
    """What was foreseen of slots to come."""

    def observe(self, demand: float, now_s: float, horizon_s: float) -> None:
        """What is asked for now; every second or so. `horizon_s`: how far ahead will be asked."""
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
        """Tokens a second at the end of that time, or before it."""
        if self._level is None or self._slot is None:
            return self._sum / self._count if self._count else 0.0
        return max(self._level, self._forecast(self._slot, self._steps(horizon_s))) + self._margin

    def _steps(self, horizon_s: float) -> int:
        return ceil(min(MAX_HORIZON_S, max(0.0, horizon_s)) / SLOT_S)

    def _close(self, slot: int, value: float) -> None:
        """A slot is over."""
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
        """Of the slot that lies so many ahead of one that is not over."""
        assert self._level is not None
        damped = DAMPING * (1.0 - DAMPING ** (steps + 1)) / (1.0 - DAMPING)
        return max(0.0, self._level + damped * self._trend + self._change(slot - 1, slot + steps))

    def _change(self, slot: int, later: int) -> float:
        """By the time of day. One day says little, for it may have had a surge."""
        (low, days), (high, other_days) = self._season(slot), self._season(later)
        return (high - low) * (1.0 - float((1.0 - SEASON_GAIN) ** min(days, other_days)))

    def _season(self, slot: int) -> tuple[float, float]:
        """What demand is at that time of the day, and on how many days that was seen."""
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
    """Of this capacity each; 0 where that is not known. One at least, for there is no engine that starts at once."""
    if capacity_tokens_per_s <= 0.0:
        return 0
    return max(1, ceil(headroom * tokens_per_s / capacity_tokens_per_s - 1e-9))
