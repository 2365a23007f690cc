"""Plots of bench.py: throughput and latency, against the round trip and against the load."""

from collections.abc import Sequence
from pathlib import Path

from figures import ARMS, RATE, REMOTE, TITLES, cases, of, rtts_ms
from harness.load import MIXED
from harness.runs import Run, Slot, middle
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Point = tuple[float, Slot, float | None]
"""Position on the x axis, case and round trip."""
COLOURS = dict(zip(ARMS, ("#555555", "#b07aa1", "#e15759", "#f1a340", "#1f77b4"), strict=True))
VALUES = {RATE: "output tokens/s", "gap_p99_ms": "p99 inter-token latency, ms"}
"""Figures that are drawn side by side, with their labels."""


def draw(runs: Sequence[Run], path: Path) -> list[Path]:
    """Write NAME-rtt.svg and NAME-load.svg next to NAME.json; returns the written files."""
    mixed = [case for case in cases(runs) if case.kind == MIXED and not case.temperature]
    rtts = rtts_ms(runs)
    made = []
    if mixed and len(rtts) > 1:
        points: list[Point] = [(rtt_ms, mixed[0], rtt_ms) for rtt_ms in rtts]
        labels = "round trip, ms", f"{mixed[0].requests} request(s)"
        made.append(_figure(path.with_name(f"{path.stem}-rtt.svg"), runs, points, *labels))
    if len(mixed) > 1:
        points = [(case.requests, case, rtts[0] if rtts else None) for case in mixed]
        labels = "requests at once", f"edges {rtts[0]:g} ms away" if rtts else ""
        made.append(_figure(path.with_name(f"{path.stem}-load.svg"), runs, points, *labels))
    return made


def _figure(path: Path, runs: Sequence[Run], points: Sequence[Point], label: str, title: str) -> Path:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    both = figure.subplots(1, 2)
    for axes, (value, name) in zip(both, VALUES.items(), strict=True):
        for arm in ARMS:
            _line(
                axes,
                arm,
                [(x, middle(own, value)) for x, case, rtt_ms in points if (own := of(runs, arm, case, rtt_ms))],
            )
        axes.set(xlabel=label, ylabel=name)
        axes.set_ylim(bottom=0)
    both[0].set_title(title, size=10)
    both[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)
    return path


def _line(axes: Axes, arm: str, points: Sequence[tuple[float, float]]) -> None:
    """Draw a line; dashed for arms without an edge."""
    if points:
        style = "o-" if arm in REMOTE else "--"
        axes.plot(*zip(*points, strict=True), style, color=COLOURS[arm], label=TITLES[arm])
