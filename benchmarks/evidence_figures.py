"""Results of `make evidence` from its runs: ratios to plain vLLM with intervals, and verdicts. Pure."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, exp, log
from random import Random
from typing import Any, NamedTuple

from harness.results import Column, table
from harness.runs import Run, Slot, counted, pooled, quantile_ms, share

PLAIN = "plain"
NUM_SAMPLES = 2000
CONFIDENCE = 0.95
LEAST_STARTS = 3
"""Fewer starts get no verdict."""
FIRST_TOKEN_S, TOKEN_TIMES = 2.0, 1.5
"""Limits for a request to count as served in time."""
SERVER = ("worker", "front_end", "gateway")
"""Processes whose CPU time counts as the server's; the engine core busy-waits, so its own means nothing."""
MET, MISSED, UNDECIDED = "met", "missed", "undecided"


class Interval(NamedTuple):
    """A median over starts, with its interval at CONFIDENCE."""

    median: float
    low: float
    high: float
    num_starts: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}..{self.high:.2f})"


def interval(values: Sequence[float]) -> Interval:
    """The bootstrap's percentiles of the median (Efron 1979), from one value per start.

    With few values they are nearly the range: then no more is known.
    """
    chance = Random(0)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(NUM_SAMPLES))
    beside = round((1 - CONFIDENCE) / 2 * NUM_SAMPLES)
    return Interval(statistics.median(values), medians[beside], medians[-1 - beside], len(values))


@dataclass(frozen=True)
class Goal:
    """A bound on a figure of some cells."""

    figure: str
    bound: float
    is_least: bool
    arm: str
    requests: tuple[int, ...] = ()
    """Concurrencies that it applies to; empty: all."""

    def concerns(self, cell: Slot) -> bool:
        return cell.arm == self.arm and not cell.rate and (not self.requests or cell.requests in self.requests)

    def verdict(self, measured: Interval) -> str:
        """Verdict on the whole interval, so that nothing uncertain is claimed."""
        if measured.num_starts < LEAST_STARTS:
            return UNDECIDED
        low, high = (measured.low, measured.high) if self.is_least else (-measured.high, -measured.low)
        bound = self.bound if self.is_least else -self.bound
        return MET if low >= bound else MISSED if high < bound else UNDECIDED


RATE, WHOLE, P99_GAP = "tokens_per_s", "whole_tokens_per_s", "gap_p99"
"""Tokens per second of a streaming request; of the server, including prompts; time between two chunks of a stream."""
ALL_EDGES = (
    *(f"{kind} edges, 20 ms" for kind in ("good", "poor", "stalling", "dead")),
    *(f"{place}, {rtt_ms} ms" for place in ("edge", "edge elsewhere") for rtt_ms in (5, 20, 80)),
)
GOALS = (
    *(Goal(figure, 0.98, True, "no edges") for figure in (RATE, WHOLE)),
    *(
        goal
        for arm in ALL_EDGES
        for goal in (*(Goal(figure, 0.97, True, arm) for figure in (RATE, WHOLE)), Goal(P99_GAP, 1.15, False, arm))
    ),
)
GOALS_OF_GOOD_EDGES = {
    "qwen": {1: 2.0, 4: 1.6, 8: 1.3},
    "smollm2": {1: 2.0, 4: 1.45, 8: 1.15, 16: 1.03},
}
"""Least ratio of tokens per second to plain vLLM's, by concurrent requests, at 20 ms."""


def goals_of(pair: str) -> tuple[Goal, ...]:
    arm = "good edges, 20 ms"
    return GOALS + tuple(Goal(RATE, least, True, arm, (at,)) for at, least in GOALS_OF_GOOD_EDGES[pair].items())


# -- cells -----------------------------------------------------------------------------------------------------------


def cells_of(runs: Iterable[Run]) -> list[Slot]:
    """The cells: each place under each load, over all kinds and starts."""
    return list(dict.fromkeys(_cell(run) for run in runs))


def _cell(run: Run) -> Slot:
    return Slot(
        arm=run.arm,
        requests=run.requests,
        temperature=run.temperature,
        rate=run.rate,
        rtt_ms=run.rtt_ms,
        edge=run.edge,
    )


def by_start(runs: Iterable[Run]) -> dict[int, list[Run]]:
    found: dict[int, list[Run]] = {}
    for run in runs:
        found.setdefault(run.repeat, []).append(run)
    return found


Figure = Callable[[Run], float]


def ratios(own: Iterable[Run], plain: Sequence[Run], of: Figure) -> dict[int, float]:
    """By start: the geometric mean, over kinds of question, of a figure's ratio to plain vLLM in the same start."""
    found = {}
    for start, runs in by_start(own).items():
        logs = [
            log(of(run) / of(other))
            for run in runs
            for other in plain
            if (other.repeat, other.kind) == (start, run.kind) and of(other) and of(run)
        ]
        if logs:
            found[start] = exp(statistics.fmean(logs))
    return found


def _rate(run: Run) -> float:
    return run.tokens_per_s


def _whole_rate(run: Run) -> float:
    return run.whole_tokens_per_s


def _whole_p95_s(run: Run) -> float:
    whole_s = sorted(whole_s for _, whole_s, _ in run.each)
    return whole_s[ceil(0.95 * len(whole_s)) - 1] if whole_s else 0.0


def _token_s(each: Sequence[float]) -> float:
    """Seconds per token of a request, after the first."""
    first_s, whole_s, num_tokens = each
    return (whole_s - first_s) / max(num_tokens - 1, 1)


def served_in_time(own: Iterable[Run], plain: Iterable[Run]) -> float | None:
    """Share of requests with a first token within FIRST_TOKEN_S and a time per token of at most TOKEN_TIMES plain
    vLLM's median in the same start; None if single requests were not recorded."""
    plain_s = {start: [_token_s(each) for run in runs for each in run.each] for start, runs in by_start(plain).items()}
    in_time = [
        each[0] <= FIRST_TOKEN_S and _token_s(each) <= TOKEN_TIMES * statistics.median(plain_s[run.repeat])
        for run in own
        if plain_s.get(run.repeat)
        for each in run.each
    ]
    return sum(in_time) / len(in_time) if in_time else None


def _cpu_s_per_token(runs: Sequence[Run], *processes: str) -> float:
    used_s = sum(run.cpu_s.get(name, 0.0) for run in runs for name in processes)
    return used_s / sum(run.num_tokens for run in runs)


def summarise(runs: Sequence[Run], pair: str) -> list[dict[str, Any]]:
    """The cells, for the table and the file."""
    found = [_summary(cell, runs, goals_of(pair)) for cell in cells_of(runs) if cell.arm != PLAIN]
    return sorted(
        (each for each in found if each),
        key=lambda cell: (str(cell["temperature"]), cell["rate"], cell["requests"], cell["arm"]),
    )


def _summary(cell: Slot, runs: Sequence[Run], goals: Sequence[Goal]) -> dict[str, Any]:
    own, plain = _of_both(
        [run for run in runs if _cell(run) == cell],
        [run for run in runs if run.arm == PLAIN and _load(run) == _load(cell)],
    )
    measured = {
        RATE: ratios(own, plain, _rate),
        WHOLE: ratios(own, plain, _whole_rate),
        "first_token": ratios(own, plain, lambda run: run.first_token_p50_s),
        "request_p95": ratios(own, plain, _whole_p95_s),
    }
    measured[P99_GAP] = _gap_ratios(own, plain)
    if not measured[RATE]:
        return {}
    intervals = {name: interval(list(values.values())) for name, values in measured.items() if values}
    counts = counted(own)
    verdicts = {
        f"{goal.figure} {'>=' if goal.is_least else '<='} {goal.bound:g}": goal.verdict(intervals[goal.figure])
        for goal in goals
        if goal.concerns(cell) and goal.figure in intervals
    }
    return {
        **{name: getattr(cell, name) for name in ("arm", "requests", "temperature", "rate", "rtt_ms", "edge")},
        **intervals,
        "by_kind": {
            kind: interval(list(values.values()))
            for kind in dict.fromkeys(run.kind for run in own)
            if (values := ratios([run for run in own if run.kind == kind], plain, _rate))
        },
        "tokens_per_step": share(counts, "committed_tokens", "steps"),
        "acceptance": share(counts, "accepted_tokens", "verified_tokens"),
        "served_in_time": served_in_time(own, plain),
        "plain_served_in_time": served_in_time(plain, plain),
        "server_ms_a_token": 1000 * _cpu_s_per_token(own, *SERVER),
        "plain_server_ms_a_token": 1000 * _cpu_s_per_token(plain, *SERVER),
        "edge_ms_a_token": 1000 * _cpu_s_per_token(own, "edges"),
        "answers_unlike_plain": _num_unlike(own, plain),
        "verdicts": verdicts,
    }


def _of_both(own: Sequence[Run], plain: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """The runs of the starts that both have: machines differ, and so do starts."""
    starts = by_start(own).keys() & by_start(plain).keys()
    return [run for run in own if run.repeat in starts], [run for run in plain if run.repeat in starts]


def _load(slot: Slot) -> tuple[object, ...]:
    return slot.requests, slot.temperature, slot.rate


def _gap_ratios(own: Sequence[Run], plain: Sequence[Run]) -> dict[int, float]:
    """By start: ratio of the 99th percentile of gaps between chunks, of all kinds together."""
    others = by_start(plain)
    return {
        start: _p99_ms(runs) / _p99_ms(others[start])
        for start, runs in by_start(own).items()
        if start in others and any(run.gaps for run in runs) and any(run.gaps for run in others[start])
    }


def _p99_ms(runs: Iterable[Run]) -> float:
    return quantile_ms(pooled(run.gaps for run in runs), 0.99)


def _num_unlike(own: Iterable[Run], plain: Sequence[Run]) -> int:
    """Number of answers that differ from plain vLLM's in the same start, with equal question and seed."""
    return sum(
        one != other
        for run in own
        for beside in plain
        if (beside.repeat, beside.kind) == (run.repeat, run.kind)
        for one, other in zip(run.answers, beside.answers, strict=False)
    )


def _beside(cell: dict[str, Any], name: str, form: str) -> str | None:
    """A figure, and plain vLLM's."""
    value, plain = cell[name], cell[f"plain_{name}"]
    return None if value is None else f"{value:{form}} ({plain:{form}})"


def as_table(cells: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    columns = (
        Column("place", "arm"),
        Column("load", lambda cell: f"{cell['rate']:g} of capacity" if cell["rate"] else f"{cell['requests']} at once"),
        Column("sampling", lambda cell: "own" if cell["temperature"] is None else f"T {cell['temperature']:g}"),
        Column("starts", lambda cell: cell[RATE].num_starts),
        Column("tokens/s x", RATE),
        Column("with prompts x", WHOLE),
        Column("first token x", "first_token"),
        Column("p99 gap x", lambda cell: cell.get(P99_GAP)),
        Column("p95 request x", "request_p95"),
        Column("tokens per step", "tokens_per_step", ".2f"),
        Column("accepted", "acceptance", ".0%"),
        Column("in time", lambda cell: _beside(cell, "served_in_time", ".0%")),
        Column("server ms per token", lambda cell: _beside(cell, "server_ms_a_token", ".0f")),
        Column("edges' ms", "edge_ms_a_token", ".0f"),
        Column("unlike plain", "answers_unlike_plain"),
        Column("verdicts", lambda cell: ", ".join(f"{goal}: {said}" for goal, said in cell["verdicts"].items()) or "-"),
    )
    return table(columns, cells)
