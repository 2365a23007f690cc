"""The time of a forward pass by its rows, from a profile and from the passes observed since. Pure."""

from collections.abc import Mapping
from itertools import pairwise

from vllm_specedge.estimators import Line

MOST_OVER_EXPECTED = 4.0
"""Cap on a pass's time, as a multiple of the expected time: some record a CUDA graph, some span a laptop's sleep."""


class PassTimes:
    """Seconds of a forward pass by its rows; 0 before anything is known.

    Between two profiled widths the time is interpolated. Real costs may jump from one width to the next: eight rows
    take llama.cpp on a CPU six times as long as one row, and the int8 runtime 1.4 times. The ratio of observed to
    profiled times is fitted by a line over rows: a machine slows down as a whole, and longer contexts slow wide passes
    more.
    """

    def __init__(self, profile: Mapping[int, float] | None = None) -> None:
        """Without a profile, more rows count as free until passes of several widths were observed."""
        self._knots = [(rows, took_s) for rows, took_s in sorted((profile or {}).items()) if took_s > 0.0]
        self._least_s = min((took_s for _, took_s in self._knots), default=0.0) / 8
        self._over_profile = Line()
        self._has_observed = False

    def observe(self, rows: int, took_s: float) -> None:
        """Record the time of a pass."""
        expected_s = self(rows)
        counted_s = min(took_s, MOST_OVER_EXPECTED * expected_s) if expected_s else took_s
        self._has_observed = True
        self._over_profile.observe(rows, counted_s / (self._profiled_s(rows) or 1.0))

    def __call__(self, rows: int) -> float:
        if not self._has_observed:
            return self._profiled_s(rows)
        return self._over_profile(rows) * (self._profiled_s(rows) or 1.0)

    def _profiled_s(self, rows: int) -> float:
        """The time by the profile alone; 0 without one."""
        knots = self._knots
        if len(knots) <= 1:
            return knots[0][1] if knots else 0.0
        low, high = next((pair for pair in pairwise(knots) if rows <= pair[1][0]), (knots[-2], knots[-1]))
        slope_s = (high[1] - low[1]) / (high[0] - low[0])
        return max(low[1] + slope_s * (rows - low[0]), self._least_s)
