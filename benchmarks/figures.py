"""Results of bench.py from its runs: ratios, costs, break-even. Pure: plain values in and out."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from harness.results import Column, table
from harness.runs import Run, Slot, counted, middle, ratio, share

VANILLA, NGRAM, DRAFT_MODEL, WAIT, OURS = ARMS = ("vanilla", "ngram", "draft_model", "wait", "edge")
REMOTE = (WAIT, OURS)
"""Arms with an edge, for which the round trip matters."""
TITLES = {
    VANILLA: "vLLM",
    NGRAM: "vLLM ngram",
    DRAFT_MODEL: "vLLM draft_model",
    WAIT: "edge, waiting (the paper's)",
    OURS: "edge",
}
RATE = "whole_tokens_per_s"
"""Output tokens per second as reported by `vllm bench serve`, including prompts."""
HELPS, LOSES = 1.02, 0.98


@dataclass(frozen=True)
class Prices:
    """Prices in dollars per hour."""

    server: float
    edge: float

    def tokens_per_dollar(self, tokens_per_s: float, num_edges: int) -> float:
        """The paper's cost efficiency, of a server and its edges."""
        return tokens_per_s * 3600 / (self.server + num_edges * self.edge)


def cases(runs: Iterable[Run]) -> list[Slot]:
    return list(dict.fromkeys(run.case for run in runs))


def rtts_ms(runs: Iterable[Run]) -> list[float]:
    return sorted({run.rtt_ms for run in runs if run.rtt_ms is not None})


def of(runs: Iterable[Run], arm: str, case: Slot, rtt_ms: float | None = None) -> list[Run]:
    """All repeats of an arm; `rtt_ms` matters only for arms with an edge."""
    rtt_ms = rtt_ms if arm in REMOTE else None
    return [run for run in runs if (run.arm, run.case, run.rtt_ms) == (arm, case, rtt_ms)]


def break_even_ms(points: Sequence[tuple[float, float]]) -> float | None:
    """Largest RTT at which a ratio is at least 1, interpolated linearly between (RTT, ratio); None: nowhere.

    If the last ratio is still at least 1, it is the last measured RTT.
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


def cell_of(own: Sequence[Run], vanilla: Sequence[Run], prices: Prices) -> dict[str, Any]:
    """One arm's results in a case: medians over the repeats, and the range of the ratio."""
    one, load, rate = own[0], ratio(own, vanilla, "cpu_s_per_token"), middle(own, RATE)
    is_remote = one.arm in REMOTE
    itl_ms = [statistics.median(run.gap_ms[part] for run in own) for part in ("p50", "p95", "p99")]
    up, down = (shares(own, f"{way}_bytes", "tokens") for way in ("up", "down"))
    return {
        "requests": one.requests,
        "prompts": one.kind,
        "temperature": one.temperature,
        "arm": TITLES[one.arm],
        "rtt_ms": one.rtt_ms,
        "tokens_per_s": rate,
        "ratio": ratio(own, vanilla, RATE),
        "ttft_ms": 1e3 * middle(own, "first_token_p50_s"),
        "itl_ms": " / ".join(f"{each:.0f}" for each in itl_ms),
        "tokens_per_step": shares(own, "committed_tokens", "steps"),
        "acceptance": shares(own, "accepted_tokens", "verified_tokens"),
        "verified_per_accepted": shares(own, "verified_tokens", "accepted_tokens"),
        "bytes_per_token": f"{up:.1f} / {down:.1f}" if is_remote else None,
        "cpu_ms_per_token": 1e3 * middle(own, "cpu_s_per_token"),
        # Tokens per second of the server's time, relative to plain vLLM: factor of more users on the same server.
        "capacity": 1 / load.median if load else None,
        "edge_busy": middle(own, "edge_busy") if is_remote else None,
        "tokens_per_dollar": prices.tokens_per_dollar(rate, int(is_remote)),
    }


def shares(own: Sequence[Run], name: str, whole: str) -> float | None:
    """Median share over the repeats that have both counters."""
    found = [value for run in own if (value := share(counted([run]), name, whole)) is not None]
    return statistics.median(found) if found else None


COLUMNS = (
    Column("requests", "requests"),
    Column("prompts", "prompts"),
    Column("T", "temperature", "g"),
    Column("arm", "arm"),
    Column("RTT ms", "rtt_ms", "g"),
    Column("tok/s", "tokens_per_s", ".1f"),
    Column("x vLLM", "ratio"),
    Column("TTFT p50", "ttft_ms", ".0f"),
    Column("ITL p50 / p95 / p99", "itl_ms"),
    Column("tok/step", "tokens_per_step", ".2f"),
    Column("accepted", "acceptance", ".2f"),
    Column("verified/acc.", "verified_per_accepted", ".2f"),
    Column("B/tok up/down", "bytes_per_token"),
    Column("CPU ms/tok", "cpu_ms_per_token", ".0f"),
    Column("capacity", "capacity", ".2f"),
    Column("edge busy", "edge_busy", ".0%"),
    Column("tok/$", "tokens_per_dollar", ",.0f"),
)


def summarise(runs: Sequence[Run], prices: Prices) -> list[dict[str, Any]]:
    """One cell per arm and case, for the table and the file."""
    places = [
        (case, arm, rtt_ms)
        for case in cases(runs)
        for arm in ARMS
        for rtt_ms in (rtts_ms(runs) if arm in REMOTE else (None,))
    ]
    found = [(of(runs, arm, case, rtt_ms), of(runs, VANILLA, case)) for case, arm, rtt_ms in places]
    return [cell_of(own, vanilla, prices) for own, vanilla in found if own]


def as_table(runs: Sequence[Run], prices: Prices) -> str:
    return table(COLUMNS, summarise(runs, prices))


def break_evens(runs: Sequence[Run]) -> list[str]:
    """One sentence per case and baseline."""
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
