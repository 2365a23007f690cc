"""Spans of a timeline: benchmarks/spans.py."""

import math

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.spans import DRAFTING, PLAIN, SERVER, VERIFYING, Span, covered_s, overlap_s, passes, steps, window

times = st.integers(0, 60).map(float)


def span(start_s: float, end_s: float) -> Span:
    return Span(start_s, end_s, SERVER, PLAIN)


spans = st.lists(st.tuples(times, times).map(lambda pair: span(min(pair), max(pair))), max_size=6)


def test_traces_become_spans() -> None:
    step = {"start_s": 1.0, "end_s": 2.0, "verified": 3, "made": 4, "requests": 2, "tokens": 5}
    assert list(steps([step, {**step, "verified": 0}])) == [
        Span(1.0, 2.0, SERVER, VERIFYING, "4"),
        Span(1.0, 2.0, SERVER, PLAIN, "4"),
    ]
    assert passes([{"edge": 1, "start_s": 1.0, "end_s": 2.0, "rows": 1}]) == [Span(1.0, 2.0, "edge 2", DRAFTING)]


def test_a_window_shows_what_is_partly_within() -> None:
    seen = window([span(0, 5), span(4, 11), span(12, 13), span(19, 30), span(20, 21)], 10, 10)
    assert [(each.start_s, each.end_s) for each in seen] == [(0, 1), (2, 3), (9, 10)]


def is_on(spans: list[Span], at_s: float) -> bool:
    return any(each.start_s <= at_s < each.end_s for each in spans)


@given(spans, spans)
def test_what_is_covered_and_what_overlaps(some: list[Span], others: list[Span]) -> None:
    instants = [i + 0.5 for i in range(60)]
    assert covered_s(some) == sum(is_on(some, at_s) for at_s in instants)
    both = sum(is_on(some, at_s) and is_on(others, at_s) for at_s in instants)
    assert math.isclose(overlap_s(some, others), both, abs_tol=1e-9)
