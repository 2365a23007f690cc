"""What the runs of bench.py come to: ratios, costs, break-even. Pure: plain values in and out."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from harness.results import Column, table
from harness.runs import Ratio, Run, Slot, counted, middle, ratio, share

VANILLA, NGRAM, DRAFT_MODEL, WAIT, OURS = ARMS = ("vanilla", "ngram", "draft_model", "wait", "edge")
REMOTE = (WAIT, OURS)
"""Arms with an edge, whose round trip counts."""
TITLES = {
    VANILLA: "vLLM",
    NGRAM: "vLLM ngram",
    DRAFT_MODEL: "vLLM draft_model",
    WAIT: "edge, waiting (the paper's)",
    OURS: "edge",
}
RATE = "whole_tokens_per_s"
"""Output tokens a second as `vllm bench serve` says them, prompts included."""
HELPS, LOSES = 1.02, 0.98


@dataclass(frozen=True)
class Prices:
    """Dollars an hour."""

    server: float
    edge: float

    def tokens_per_dollar(self, tokens_per_s: float, num_edges: int) -> float:
        """The paper's cost efficiency: of a server and its edges."""
        return tokens_per_s * 3600 / (self.server + num_edges * self.edge)


def cases(runs: Iterable[Run]) -> list[Slot]:
    return list(dict.fromkeys(run.case for run in runs))


def rtts_ms(runs: Iterable[Run]) -> list[float]:
    return sorted({run.rtt_ms for run in runs if run.rtt_ms is not None})


def of(runs: Iterable[Run], arm: str, case: Slot, rtt_ms: float | None = None) -> list[Run]:
    """All repeats of an arm; `rtt_ms` counts only for those with an edge."""
    rtt_ms = rtt_ms if arm in REMOTE else None
    return [run for run in runs if (run.arm, run.case, run.rtt_ms) == (arm, case, rtt_ms)]


def break_even_ms(points: Sequence[tuple[float, float]]) -> float | None:
    """Up to which RTT a ratio is 1 or more, on straight lines between (RTT, ratio); None: nowhere.

    Where the last one is 1 or more still, it is the last RTT that was measured.
    """
    reached = None
    for (rtt_ms, gain), (next_ms, next_gain) in pairwise([*points, (float("inf"), 0.0)]):
        if gain < 1.0:
            continue
        reached = rtt_ms
        if next_gain < 1.0 and next_ms < float("inf"):
            reached += (next_ms - rtt_ms) * (gain - 1.0) / (gain - next_gain)
    return reached


def verdict(gain: float) -> str:
    return "helps" if gain >= HELPS else "loses" if gain <= LOSES else "no difference"


# -- as text ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One arm's repeats of a case: medians, and the range of the ratio."""

    own: list[Run]
    vanilla: list[Run]
    prices: Prices

    @property
    def one(self) -> Run:
        return self.own[0]

    @property
    def is_remote(self) -> bool:
        return self.one.arm in REMOTE

    def middle(self, name: str) -> float:
        return middle(self.own, name)

    def ratio(self) -> Ratio | None:
        return ratio(self.own, self.vanilla, RATE)

    def percentiles(self, name: str, *parts: str) -> str:
        """Medians over the repeats, in ms."""
        return " / ".join(f"{statistics.median(getattr(run, name)[part] for run in self.own):.0f}" for part in parts)

    def shares(self, name: str, whole: str) -> float | None:
        """The median over the repeats that counted both."""
        found = [value for run in self.own if (value := share(counted([run]), name, whole)) is not None]
        return statistics.median(found) if found else None

    def bytes_per_token(self) -> str | None:
        up, down = (self.shares(f"{way}_bytes", "tokens") for way in ("up", "down"))
        return f"{up:.1f} / {down:.1f}" if self.is_remote else None

    def capacity(self) -> float | None:
        """Tokens that a second of the server's time makes, times plain vLLM's: so many more users on one server."""
        load = ratio(self.own, self.vanilla, "cpu_s_per_token")
        return 1 / load.median if load else None

    def tokens_per_dollar(self) -> float:
        return self.prices.tokens_per_dollar(self.middle(RATE), int(self.is_remote))


COLUMNS = (
    Column("requests", lambda row: row.one.requests),
    Column("prompts", lambda row: row.one.kind),
    Column("T", lambda row: row.one.temperature, "g"),
    Column("arm", lambda row: TITLES[row.one.arm]),
    Column("RTT ms", lambda row: row.one.rtt_ms, "g"),
    Column("tok/s", lambda row: row.middle(RATE), ".1f"),
    Column("x vLLM", lambda row: row.ratio()),
    Column("TTFT p50", lambda row: 1e3 * row.middle("first_token_p50_s"), ".0f"),
    Column("ITL p50 / p95 / p99", lambda row: row.percentiles("gap_ms", "p50", "p95", "p99")),
    Column("tok/step", lambda row: row.shares("committed_tokens", "steps"), ".2f"),
    Column("accepted", lambda row: row.shares("accepted_tokens", "verified_tokens"), ".2f"),
    Column("verified/acc.", lambda row: row.shares("verified_tokens", "accepted_tokens"), ".2f"),
    Column("B/tok up/down", lambda row: row.bytes_per_token()),
    Column("CPU ms/tok", lambda row: 1e3 * row.middle("cpu_s_per_token"), ".0f"),
    Column("capacity", lambda row: row.capacity(), ".2f"),
    Column("edge busy", lambda row: row.middle("edge_busy") if row.is_remote else None, ".0%"),
    Column("tok/$", lambda row: row.tokens_per_dollar(), ",.0f"),
)


def rows(runs: Sequence[Run], prices: Prices) -> list[Row]:
    places = [
        (case, arm, rtt_ms)
        for case in cases(runs)
        for arm in ARMS
        for rtt_ms in (rtts_ms(runs) if arm in REMOTE else (None,))
    ]
    found = [Row(of(runs, arm, case, rtt_ms), of(runs, VANILLA, case), prices) for case, arm, rtt_ms in places]
    return [row for row in found if row.own]


def as_table(runs: Sequence[Run], prices: Prices) -> str:
    return table(COLUMNS, rows(runs, prices))


def break_evens(runs: Sequence[Run]) -> list[str]:
    """For each case, a sentence about each baseline."""
    found = []
    for case in cases(runs):
        for other in (VANILLA, NGRAM, DRAFT_MODEL, WAIT):
            points = [
                (rtt_ms, gain.median)
                for rtt_ms in rtts_ms(runs)
                if (gain := ratio(of(runs, OURS, case, rtt_ms), of(runs, other, case, rtt_ms), RATE)) is not None
            ]
            if points:
                where = f"{case.requests} requests, {case.kind}, T {case.temperature:g}"
                found.append(f"{where}: {_sentence(other, points)}")
    return found


def _sentence(other: str, points: Sequence[tuple[float, float]]) -> str:
    gains = ", ".join(f"{verdict(gain)} ({gain:.2f}) at {rtt_ms:g} ms" for rtt_ms, gain in points)
    until_ms = break_even_ms(points)
    where = "nowhere better" if until_ms is None else f"better up to {until_ms:.0f} ms"
    if until_ms == points[-1][0]:
        where += " at least"
    return f"against {TITLES[other]}: {gains}; {where}"
