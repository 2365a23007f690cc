"""What the runs of bench.py come to: ratios, costs, break-even. Pure: plain values in and out.

Rule: every ratio is to the runs of the compared arm for the same case in the same repeat, for machines drift.
"""

import hashlib
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

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
HELPS, LOSES = 1.02, 0.98


class Case(NamedTuple):
    """What all arms are asked alike."""

    requests: int
    """At once, all the time: as one is done the next is asked."""
    kind: str
    """Of prompts."""
    temperature: float


@dataclass(frozen=True)
class Run:
    """One arm, one case, once. Times are a client's, as `vllm bench serve` measures them."""

    arm: str
    requests: int
    kind: str
    temperature: float
    rtt_ms: float | None
    """None: no edge."""
    repeat: int
    num_tokens: int
    seconds: float
    tokens_per_s: float
    ttft_ms: dict[str, float]
    """p50, p99."""
    itl_ms: dict[str, float]
    """Between two chunks: p50, p95, p99."""
    tokens_per_step: float
    """That a request gets from one of its decode steps."""
    acceptance: float | None
    """Of the draft tokens that were verified."""
    verified_per_accepted: float | None
    up_bytes_per_token: float
    down_bytes_per_token: float
    server_cpu_s_per_token: float
    """Of worker and engine core."""
    edge_busy: float
    """Of one core."""
    answers: list[str]
    """A digest of each; none where they are sampled."""

    @property
    def case(self) -> Case:
        return Case(self.requests, self.kind, self.temperature)


@dataclass(frozen=True)
class Prices:
    """Dollars an hour."""

    server: float
    edge: float

    def tokens_per_dollar(self, tokens_per_s: float, num_edges: int) -> float:
        """The paper's cost efficiency: of a server and its edges."""
        return tokens_per_s * 3600 / (self.server + num_edges * self.edge)


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def num_different(runs: Iterable[Run]) -> int:
    """Greedy answers that are not those of the first run of the same case and repeat."""
    first: dict[tuple[Case, int], list[str]] = {}
    return sum(
        one != other
        for run in runs
        for one, other in zip(first.setdefault((run.case, run.repeat), run.answers), run.answers, strict=True)
    )


class Ratio(NamedTuple):
    """Median and range over the repeats."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}..{self.high:.2f})"


def cases(runs: Iterable[Run]) -> list[Case]:
    return list(dict.fromkeys(run.case for run in runs))


def rtts_ms(runs: Iterable[Run]) -> list[float]:
    return sorted({run.rtt_ms for run in runs if run.rtt_ms is not None})


def of(runs: Iterable[Run], arm: str, case: Case, rtt_ms: float | None = None) -> list[Run]:
    """All repeats of an arm; `rtt_ms` counts only for those with an edge."""
    rtt_ms = rtt_ms if arm in REMOTE else None
    return [run for run in runs if (run.arm, run.case, run.rtt_ms) == (arm, case, rtt_ms)]


def ratio(own: Sequence[Run], others: Sequence[Run], name: str = "tokens_per_s") -> Ratio | None:
    """Of each run to the mean of the others in its repeat; None if there are none."""
    values = []
    for run in own:
        beside = [getattr(other, name) for other in others if other.repeat == run.repeat]
        if beside:
            values.append(getattr(run, name) / statistics.fmean(beside))
    return Ratio(statistics.median(values), min(values), max(values)) if values else None


def capacity(own: Sequence[Run], vanilla: Sequence[Run]) -> str:
    """Tokens that a second of the server's time makes, times plain vLLM's: so many more users on the same server."""
    load = ratio(own, vanilla, "server_cpu_s_per_token")
    return f"{1 / load.median:.2f}" if load else ""


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

HEADER = (
    "requests",
    "prompts",
    "T",
    "arm",
    "RTT ms",
    "tok/s",
    "x vLLM",
    "TTFT p50",
    "ITL p50 / p95 / p99",
    "tok/step",
    "accepted",
    "verified/acc.",
    "B/tok up/down",
    "CPU ms/tok",
    "capacity",
    "edge busy",
    "tok/$",
)


def lines(runs: Sequence[Run], prices: Prices) -> list[list[str]]:
    found = []
    for case in cases(runs):
        for arm in ARMS:
            for rtt_ms in rtts_ms(runs) if arm in REMOTE else (None,):
                own = of(runs, arm, case, rtt_ms)
                if own:
                    found.append(line(own, of(runs, VANILLA, case), prices))
    return found


def line(own: Sequence[Run], vanilla: Sequence[Run], prices: Prices) -> list[str]:
    """One arm's repeats as a row: medians, and the range of the ratio."""
    one = own[0]
    tokens_per_s = middle(own, "tokens_per_s")
    is_remote = one.arm in REMOTE
    itl = " / ".join(f"{statistics.median(run.itl_ms[name] for run in own):.0f}" for name in ("p50", "p95", "p99"))
    return [
        str(one.requests),
        one.kind,
        f"{one.temperature:g}",
        TITLES[one.arm],
        f"{one.rtt_ms:g}" if one.rtt_ms is not None else "",
        f"{tokens_per_s:.1f}",
        str(ratio(own, vanilla) or ""),
        f"{statistics.median(run.ttft_ms['p50'] for run in own):.0f}",
        itl,
        f"{middle(own, 'tokens_per_step'):.2f}",
        shown(own, "acceptance"),
        shown(own, "verified_per_accepted"),
        f"{middle(own, 'up_bytes_per_token'):.1f} / {middle(own, 'down_bytes_per_token'):.1f}" if is_remote else "",
        f"{1e3 * middle(own, 'server_cpu_s_per_token'):.0f}",
        capacity(own, vanilla),
        f"{middle(own, 'edge_busy'):.0%}" if is_remote else "",
        f"{prices.tokens_per_dollar(tokens_per_s, int(is_remote)):,.0f}",
    ]


def middle(runs: Sequence[Run], name: str) -> float:
    return statistics.median(getattr(run, name) for run in runs)


def shown(runs: Sequence[Run], name: str) -> str:
    """Of what an arm may not have."""
    values = [value for run in runs if (value := getattr(run, name)) is not None]
    return f"{statistics.median(values):.2f}" if values else ""


def table(runs: Sequence[Run], prices: Prices) -> str:
    rows = [HEADER, ["---:"] * len(HEADER), *lines(runs, prices)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def break_evens(runs: Sequence[Run]) -> list[str]:
    """For each case, a sentence about each baseline."""
    found = []
    for case in cases(runs):
        for other in (VANILLA, NGRAM, DRAFT_MODEL, WAIT):
            points = [
                (rtt_ms, gain.median)
                for rtt_ms in rtts_ms(runs)
                if (gain := ratio(of(runs, OURS, case, rtt_ms), of(runs, other, case, rtt_ms))) is not None
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
