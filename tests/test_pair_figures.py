"""Results of `make bench-ahead ARGS="--pair ..."` from its runs: benchmarks/pair_figures.py."""

from dataclasses import replace
from itertools import chain

import pytest
from harness.runs import Run
from questions import QUESTIONS

from benchmarks.pair_figures import ALL, PLAIN, as_split, as_table, summarise

KINDS = list(QUESTIONS)
COUNTERS = {
    kind: {"verified_tokens": 40 * n, "accepted_tokens": 10 * n, "steps": 20, "committed_tokens": 30 * n}
    for n, kind in enumerate(KINDS, 1)
}


def run(arm: str, *seconds: float, repeat: int = 0, temperature: float = 0.0, rtt_ms: float = 0.0) -> list[Run]:
    """An answer of 11 tokens to each kind of question, the first of which is not timed."""
    return [
        Run(
            arm=arm,
            kind=kind,
            rtt_ms=rtt_ms,
            temperature=temperature,
            repeat=repeat,
            num_tokens=11,
            seconds=each + 1,
            decode_tokens=10,
            decode_seconds=each,
            counters=COUNTERS[kind] if arm != PLAIN else {},
            up_bytes=110,
            down_bytes=33,
            answers=[list(range(11))],
        )
        for kind, each in zip(KINDS, seconds, strict=True)
    ]


def test_a_ratio_is_to_plain_vllm_of_the_same_repeat_and_temperature() -> None:
    runs = [
        *run(PLAIN, 10, 10, 10),
        *run("ahead", 5, 2.5, 2, rtt_ms=20),
        *run(PLAIN, 8, 8, 8, repeat=1),
        *run("ahead", 8, 2, 4, repeat=1, rtt_ms=20),
        *run(PLAIN, 6, 6, 6, temperature=0.7),
        *run("ahead", 6, 3, 2, temperature=0.7, rtt_ms=20),
    ]
    greedy, sampled = summarise(runs)
    assert [greedy["by_kind"][kind]["times"] for kind in KINDS] == [(1.5, 1.0, 2.0), (4.0, 4.0, 4.0), (3.5, 2.0, 5.0)]
    assert greedy["mean"] == pytest.approx((3.0, 7 / 3, 11 / 3))
    assert greedy["by_kind"][ALL]["times"] == pytest.approx(((30 / 9.5 + 24 / 14) / 2, 24 / 14, 30 / 9.5))
    assert [sampled["by_kind"][kind]["times"].median for kind in KINDS] == [1.0, 2.0, 3.0]


def test_round_trips_and_arms_are_apart() -> None:
    others = [run(arm, 2, 2, 2, rtt_ms=rtt) for rtt in (80, 0) for arm in ("waiting", "ahead")]
    runs = [*run(PLAIN, 4, 4, 4), *chain(*others)]
    assert [(cell["arm"], cell["rtt_ms"]) for cell in summarise(runs)] == [
        ("ahead", 0),
        ("ahead", 80),
        ("waiting", 0),
        ("waiting", 80),
    ]


def test_counters_and_bytes_are_summed_over_the_repeats() -> None:
    runs = [run(arm, 1, 1, 1, repeat=repeat) for repeat in range(2) for arm in (PLAIN, "ahead")]
    [cell] = summarise(list(chain(*runs)))
    names = ("acceptance", "verified_per_step", "tokens_per_step")
    assert [cell["by_kind"][KINDS[0]][name] for name in names] == [0.25, 2.0, 1.5]
    assert [cell["by_kind"][ALL][name] for name in names] == [0.25, 4.0, 3.0]
    assert cell["up_bytes_per_token"] == 10.0


def test_a_ratio_is_tokens_a_step_over_what_a_step_takes_more() -> None:
    [cell] = summarise([*run(PLAIN, 3, 3, 3), *run("ahead", 2.5, 1.5, 2)])
    for kind in (*KINDS, ALL):
        figures = cell["by_kind"][kind]
        assert figures["tokens_per_step"] / figures["step_times"] == pytest.approx(figures["times"].median)


def test_only_greedy_answers_are_held_against_plain_ones() -> None:
    first, *rest = run("ahead", 1, 1, 1)
    other = [replace(first, answers=[[7, *range(10)]]), *rest]
    for temperature, parted in ((0.0, 1), (0.7, 0)):
        runs = [replace(each, temperature=temperature) for each in (*run(PLAIN, 1, 1, 1), *other)]
        assert [cell["parted"] for cell in summarise(runs)] == [parted]


def test_the_table_has_a_column_for_each_kind() -> None:
    lines = as_table(summarise([*run(PLAIN, 4, 4, 4), *run("ahead", 2, 2, 2)])).splitlines()
    assert lines[0].startswith(f"| T | arm | RTT ms | {' | '.join(KINDS)} | mean |")
    assert lines[2].startswith("| 0 | ahead | 0 | 2.00 (2.00..2.00) |")
    split = as_split(summarise([*run(PLAIN, 4, 4, 4), *run("ahead", 2, 2, 2)])).splitlines()
    assert split[2:] == [
        f"| 0 | ahead | 0 | {KINDS[0]} | 2.00 | 25% | 1.50 | 0.75 |",
        f"| 0 | ahead | 0 | {KINDS[1]} | 4.00 | 25% | 3.00 | 1.50 |",
        f"| 0 | ahead | 0 | {KINDS[2]} | 6.00 | 25% | 4.50 | 2.25 |",
    ]
    assert all(len({line.count("|") for line in table}) == 1 for table in (lines, split))
