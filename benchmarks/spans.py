"""What went on when, from traces: for timeline.py. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

SERVER = "server"
PLAIN, VERIFYING, DRAFTING = "plain step", "verifies (tokens made)", "drafts"


@dataclass(frozen=True)
class Span:
    """Something that took time: a step of the server's, or a forward pass of an edge's."""

    start_s: float
    end_s: float
    lane: str
    """SERVER, or an edge's name."""
    kind: str
    label: str = ""
    """Of a step: how many tokens it made."""


def steps(lines: Iterable[dict[str, Any]]) -> list[Span]:
    return [
        Span(line["start_s"], line["end_s"], SERVER, VERIFYING if line["verified"] else PLAIN, str(line["made"]))
        for line in lines
    ]


def passes(lines: Iterable[dict[str, Any]]) -> list[Span]:
    return [Span(line["start_s"], line["end_s"], f"edge {line['edge'] + 1}", DRAFTING) for line in lines]


def window(spans: Sequence[Span], start_s: float, length_s: float) -> list[Span]:
    """What is at least partly within, cut there, from 0 on."""
    end_s = start_s + length_s
    return [
        replace(span, start_s=max(0.0, span.start_s - start_s), end_s=min(span.end_s, end_s) - start_s)
        for span in spans
        if span.end_s > start_s and span.start_s < end_s
    ]


def covered_s(spans: Iterable[Span]) -> float:
    """The time during which at least one of them goes on."""
    return sum(end_s - start_s for start_s, end_s in union(spans))


def union(spans: Iterable[Span]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start_s, end_s in sorted((span.start_s, span.end_s) for span in spans):
        if merged and start_s <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end_s))
        else:
            merged.append((start_s, end_s))
    return merged


def overlap_s(some: Sequence[Span], others: Sequence[Span]) -> float:
    """The time during which one of each goes on."""
    return covered_s(some) + covered_s(others) - covered_s([*some, *others])
