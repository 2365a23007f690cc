"""Results of switched.py from its runs: periods with drafts against neighbouring ones without. Pure."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from evidence_figures import MET, MISSED, P99_GAP, RATE, Goal, interval
from harness.load import Answer
from harness.results import Column, table
from harness.runs import Run, counted, pooled, quantile_ms, share

ACTIVE, INERT = "active", "inert"
MARGIN_S = 0.3
"""Time after a switch that does not count: steps in flight, and drafts that are still missing."""
LEAST_RATE = Goal(RATE, 0.97, True, ACTIVE)
MAX_P99_GAP = 1.15


class Period(NamedTuple):
    """One period of a server that is switched."""

    number: int
    num_tokens: int
    gaps_s: tuple[float, ...]


def periods(answers: Iterable[Answer], period_s: float, from_s: float, until_s: float) -> list[Period]:
    """The periods that lie entirely within these times, with the tokens that came after their first MARGIN_S."""
    tokens: dict[int, int] = {}
    gaps: dict[int, list[float]] = {}
    for number in range(math.ceil(from_s / period_s), int(until_s / period_s)):
        tokens[number], gaps[number] = 0, []
    for answer in answers:
        for chunk in answer.chunks:
            number = int(chunk.at_s / period_s)
            if number in tokens and chunk.at_s - number * period_s >= MARGIN_S:
                tokens[number] += chunk.num_tokens
        for before, after in pairwise(answer.chunks):
            number = int(after.at_s / period_s)
            if number in gaps and before.at_s - number * period_s >= MARGIN_S:
                gaps[number].append(after.at_s - before.at_s)
    return [Period(number, tokens[number], tuple(gaps[number])) for number in sorted(tokens)]


def ratios(active: Sequence[Sequence[int]], inert: Sequence[Sequence[int]]) -> list[float]:
    """Tokens of each period with drafts, relative to the mean of its two neighbours; periods are [number, tokens]."""
    found, without = [], dict(map(tuple, inert))
    for number, num_tokens in active:
        near = [without[each] for each in (number - 1, number + 1) if each in without]
        if len(near) == 2 and all(near):  # cancels a drift of the machine
            found.append(num_tokens / (sum(near) / 2))
    return found


def summarise(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One cell per kind of edges and load."""
    cells: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        cells.setdefault((run.temperature, run.requests, run.edge, run.rtt_ms), []).append(run)
    return [line for own in cells.values() if (line := _line(own))]


def _line(own: Sequence[Run]) -> dict[str, Any]:
    active, inert = ([run for run in own if run.arm == arm] for arm in (ACTIVE, INERT))
    pairs = [(one, other) for one in active for other in inert if one.repeat == other.repeat]
    values = [value for one, other in pairs for value in ratios(one.answers, other.answers)]
    if not values:
        return {}
    rate, counts = interval(values), counted(active)
    p99_ms, inert_p99_ms = (quantile_ms(pooled(run.gaps for run in each), 0.99) for each in (active, inert))
    return {
        **{name: getattr(active[0], name) for name in ("temperature", "requests", "edge", "rtt_ms")},
        RATE: rate,
        "periods": len(values),
        "p99_ms": p99_ms,
        P99_GAP: p99_ms / inert_p99_ms,
        "tokens_per_step": share(counts, "committed_tokens", "steps"),
        "acceptance": share(counts, "accepted_tokens", "verified_tokens"),
        "verdict": LEAST_RATE.verdict(rate),
        "gap_verdict": MET if p99_ms / inert_p99_ms <= MAX_P99_GAP else MISSED,
    }


def as_table(cells: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    columns: tuple[Column, ...] = (
        Column("edges", "edge"),
        Column("RTT ms", "rtt_ms", "g"),
        Column("requests", "requests"),
        Column("sampling", _sampling),
        Column("periods", "periods"),
        Column("tokens/s x", RATE),
        Column("p99 gap ms", "p99_ms", ".0f"),
        Column("p99 gap x", P99_GAP, ".2f"),
        Column("tokens per step", "tokens_per_step", ".2f"),
        Column("accepted", "acceptance", ".0%"),
        Column(f"{LEAST_RATE.bound:g} of inert", "verdict"),
        Column(f"p99 gap {MAX_P99_GAP:g}", "gap_verdict"),
    )
    return table(columns, cells)


def _sampling(cell: dict[str, Any]) -> str:
    return "own" if cell["temperature"] is None else f"T {cell['temperature']:g}"
