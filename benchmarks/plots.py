"""What bench.py draws: throughput and latency, against the round trip and against the load."""

from collections.abc import Sequence
from pathlib import Path

from figures import ARMS, REMOTE, TITLES, Case, Run, cases, middle, of, rtts_ms
from harness.prompts import MIXED
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = dict(zip(ARMS, ("#555555", "#b07aa1", "#e15759", "#f1a340", "#1f77b4"), strict=True))


def draw(runs: Sequence[Run], path: Path) -> list[Path]:
    """Write NAME-rtt.svg and NAME-load.svg beside NAME.json; returns what was written."""
    mixed = [case for case in cases(runs) if case.kind == MIXED and not case.temperature]
    made = []
    if mixed and len(rtts_ms(runs)) > 1:
        made.append(_figure(path, "rtt", runs, mixed, over_rtt=True))
    if len(mixed) > 1:
        made.append(_figure(path, "load", runs, mixed, over_rtt=False))
    return made


def _figure(path: Path, name: str, runs: Sequence[Run], mixed: Sequence[Case], over_rtt: bool) -> Path:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    speed, latency = figure.subplots(1, 2)
    for arm in ARMS:
        for axes, value in ((speed, "tokens_per_s"), (latency, "p99")):
            if over_rtt:
                _over_rtt(axes, runs, arm, mixed[0], value)
            else:
                _over_load(axes, runs, arm, mixed, value)
    speed.set_ylabel("output tokens/s")
    latency.set_ylabel("p99 inter-token latency, ms")
    for axes in (speed, latency):
        axes.set_xlabel("round trip, ms" if over_rtt else "requests at once")
        axes.set_ylim(bottom=0)
    speed.set_title(f"{mixed[0].requests} request(s)" if over_rtt else f"edges {rtts_ms(runs)[0]:g} ms away", size=10)
    speed.legend(frameon=False, fontsize=8)
    target = path.with_name(f"{path.stem}-{name}.svg")
    figure.savefig(target)
    return target


def _value(runs: Sequence[Run], value: str) -> float:
    if value in ("p50", "p95", "p99"):
        ordered = sorted(run.itl_ms[value] for run in runs)
        return ordered[len(ordered) // 2]
    return middle(runs, value)


def _over_rtt(axes: Axes, runs: Sequence[Run], arm: str, case: Case, value: str) -> None:
    if arm in REMOTE:
        points = [(rtt_ms, own) for rtt_ms in rtts_ms(runs) if (own := of(runs, arm, case, rtt_ms))]
        axes.plot(
            [rtt_ms for rtt_ms, _ in points],
            [_value(own, value) for _, own in points],
            marker="o",
            color=COLOURS[arm],
            label=TITLES[arm],
        )
    elif own := of(runs, arm, case):
        axes.axhline(_value(own, value), linestyle="--", color=COLOURS[arm], label=TITLES[arm])


def _over_load(axes: Axes, runs: Sequence[Run], arm: str, mixed: Sequence[Case], value: str) -> None:
    rtt_ms = rtts_ms(runs)[0]
    points = [(case.requests, own) for case in mixed if (own := of(runs, arm, case, rtt_ms))]
    axes.plot(
        [requests for requests, _ in points],
        [_value(own, value) for _, own in points],
        marker="o",
        linestyle="-" if arm in REMOTE else "--",
        color=COLOURS[arm],
        label=TITLES[arm],
    )
