"""Results of `make bench-ahead ARGS="--pair ..."` from its runs (benchmarks/real_pair.py). Pure."""

import statistics
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from harness.results import Column, table
from harness.runs import Ratio, Run, counted, middle, num_different, of_same_repeat, ratio, spread
from questions import QUESTIONS

PLAIN = "plain"
ALL = "all"
"""In place of a kind of question: all kinds together."""


def summarise(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One cell per arm, RTT and temperature, over all repeats, for the tables and the file."""
    places = {(run.temperature, run.arm, run.rtt_ms or 0.0): None for run in runs if run.arm != PLAIN}
    return [
        _cell(
            [run for run in runs if (run.temperature, run.arm, run.rtt_ms or 0.0) == place],
            [run for run in runs if (run.arm, run.temperature) == (PLAIN, place[0])],
        )
        for place in sorted(places)
    ]


def _cell(own: Sequence[Run], plain: Sequence[Run]) -> dict[str, Any]:
    total = counted(own)
    by_kind = {kind: (of_kind(kind, own), of_kind(kind, plain)) for kind in (*QUESTIONS, ALL)}
    # The mean over kinds, for each repeat separately.
    times = [[_times([run], by_kind[kind][1]).median for run in by_kind[kind][0]] for kind in QUESTIONS]
    return {
        "arm": own[0].arm,
        "rtt_ms": own[0].rtt_ms,
        "temperature": own[0].temperature,
        "by_kind": {kind: _figures(*both) for kind, both in by_kind.items()},
        "mean": spread(list(map(statistics.mean, zip(*times, strict=True)))),
        "up_bytes_per_token": total["up_bytes"] / total["tokens"],
        # Greedy answers that differ from plain vLLM's in any token.
        "parted": sum(num_different([*of_same_repeat(run, of_kind(run.kind, plain)), run]) for run in own),
    }


def of_kind(kind: str, runs: Iterable[Run]) -> list[Run]:
    """The runs of one kind of question; with ALL, one run per repeat that combines all kinds."""
    if kind != ALL:
        return [run for run in runs if run.kind == kind]
    repeats: dict[int, list[Run]] = {}
    for run in runs:
        repeats.setdefault(run.repeat, []).append(run)
    return [_joined(each) for each in repeats.values()]


def _joined(runs: Sequence[Run]) -> Run:
    return Run(
        arm=runs[0].arm,
        kind=ALL,
        temperature=runs[0].temperature,
        repeat=runs[0].repeat,
        num_tokens=sum(run.num_tokens for run in runs),
        seconds=sum(run.seconds for run in runs),
        decode_tokens=sum(run.decode_tokens for run in runs),
        decode_seconds=sum(run.decode_seconds for run in runs),
        counters=dict(counted(runs)),
    )


def _times(own: Sequence[Run], plain: Sequence[Run]) -> Ratio:
    """Tokens per second relative to plain vLLM's in the same repeat."""
    return ratio(own, plain) or Ratio(0.0, 0.0, 0.0)


def _figures(own: Sequence[Run], plain: Sequence[Run]) -> dict[str, Any]:
    """`step_times`: time of a step relative to plain vLLM's, including holds; `tokens_per_step` divided by it is
    `times`."""
    times, counts = _times(own, plain), counted(own)
    num_steps = max(counts["steps"], 1)
    tokens_per_step = counts["committed_tokens"] / num_steps
    return {
        "times": times,
        "tokens_per_s": middle(own, "tokens_per_s"),
        "acceptance": counts["accepted_tokens"] / max(counts["verified_tokens"], 1),
        "verified_per_step": counts["verified_tokens"] / num_steps,
        "tokens_per_step": tokens_per_step,
        "step_times": tokens_per_step / times.median if times.median else 0.0,
    }


PLACE = (Column("T", "temperature", "g"), Column("arm", "arm"), Column("RTT ms", "rtt_ms", "g"))


def as_table(cells: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    columns = (
        *PLACE,
        *(Column(kind, lambda cell, kind=kind: cell["by_kind"][kind]["times"]) for kind in QUESTIONS),
        Column("mean", "mean"),
        Column("accepted", lambda cell: cell["by_kind"][ALL]["acceptance"], ".0%"),
        Column("tokens per step", lambda cell: cell["by_kind"][ALL]["tokens_per_step"], ".2f"),
        Column("bytes up per token", "up_bytes_per_token", ".0f"),
        Column("parted", "parted"),
    )
    return table(columns, cells)


def as_split(cells: Sequence[dict[str, Any]]) -> str:
    """Factors of each ratio, as Markdown: tokens per step, and how much longer a step takes."""
    columns = (
        *PLACE,
        Column("kind", "kind"),
        Column("verified per step", "verified_per_step", ".2f"),
        Column("accepted", "acceptance", ".0%"),
        Column("tokens per step", "tokens_per_step", ".2f"),
        Column("step times", "step_times", ".2f"),
    )
    return table(columns, [{**cell, "kind": kind, **cell["by_kind"][kind]} for cell, kind in product(cells, QUESTIONS)])
