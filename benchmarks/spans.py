"""Spans of time from traces, for timeline.py. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

SERVER = "server"
PLAIN, VERIFYING, DRAFTING = "plain step", "verifies (tokens made)", "drafts"


@dataclass(frozen=True)
class Span:
    """A span of time: a step of the server, or a forward pass of an edge."""

    start_s: float
    end_s: float
    lane: str
    """SERVER, or an edge's name."""
    kind: str
    label: str = ""
    """For a step: the number of tokens that it generated."""


def steps(lines: Iterable[dict[str, Any]]) -> list[Span]:
    return [
        Span(line["start_s"], line["end_s"], SERVER, VERIFYING if line["verified"] else PLAIN, str(line["made"]))
        for line in lines
    ]


def passes(lines: Iterable[dict[str, Any]]) -> list[Span]:
    return [Span(line["start_s"], line["end_s"], f"edge {line['edge'] + 1}", DRAFTING) for line in lines]


def window(spans: Sequence[Span], start_s: float, length_s: float) -> list[Span]:
    """The spans that overlap the window, cut to it, with times from its start."""
    end_s = start_s + length_s
    return [
        replace(span, start_s=max(0.0, span.start_s - start_s), end_s=min(span.end_s, end_s) - start_s)
        for span in spans
        if span.end_s > start_s and span.start_s < end_s
    ]


def covered_s(spans: Iterable[Span]) -> float:
    """Time covered by at least one of the spans."""
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
    """Time covered by a span of each."""
    return covered_s(some) + covered_s(others) - covered_s([*some, *others])
