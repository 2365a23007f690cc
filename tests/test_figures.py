"""Results of `make bench` from its runs: benchmarks/figures.py, and its prompts."""

from dataclasses import replace

import pytest
from harness.load import KINDS, MIXED, prompts
from harness.runs import Run, Slot, digest, ratio

from benchmarks.figures import (
    COLUMNS,
    NGRAM,
    OURS,
    RATE,
    VANILLA,
    WAIT,
    Prices,
    as_table,
    break_even_ms,
    break_evens,
    cell_of,
    of,
    verdict,
)

CASE = Slot(arm="", requests=4, kind=MIXED)
PRICES = Prices(server=1.2, edge=0.1)


def run(arm: str, tokens_per_s: float, rtt_ms: float | None = None, repeat: int = 0, case: Slot = CASE) -> Run:
    drafts = {"verified_tokens": 600, "accepted_tokens": 300} if arm != VANILLA else {}
    return Run(
        arm=arm,
        requests=case.requests,
        kind=case.kind,
        rtt_ms=rtt_ms,
        repeat=repeat,
        num_tokens=1000,
        seconds=1000 / tokens_per_s,
        first_token_s={"p50": 0.1, "p99": 0.2, "max": 0.2},
        gap_ms={"p50": 50.0, "p95": 60.0, "p99": 70.0},
        counters={"committed_tokens": 1000, "steps": 700, **drafts},
        up_bytes=20_000,
        down_bytes=10_000,
        cpu_s={"worker": 15.0, "engine_core": 5.0, "edges": 250 / tokens_per_s},
        answers=["a", "b"],
    )


def test_a_run_is_compared_with_those_of_its_own_repeat() -> None:
    plain = [run(VANILLA, 10.0), run(VANILLA, 20.0, repeat=1)]
    own = [run(OURS, 12.0, 5.0), run(OURS, 30.0, 5.0, repeat=1), run(OURS, 99.0, 5.0, repeat=2)]
    assert ratio(own, plain, RATE) == (pytest.approx(1.35), pytest.approx(1.2), pytest.approx(1.5))
    assert ratio(own[2:], plain, RATE) is None


def test_the_round_trip_counts_only_for_those_with_an_edge() -> None:
    of_one = run(OURS, 9.0, 5.0, case=replace(CASE, requests=1))
    runs = [run(NGRAM, 10.0), run(OURS, 10.0, 5.0), run(OURS, 11.0, 20.0), of_one]
    assert of(runs, NGRAM, CASE, 20.0) == runs[:1]
    assert of(runs, OURS, CASE, 20.0) == runs[2:3]


@pytest.mark.parametrize(
    ("points", "until_ms"),
    [
        ([(0.0, 1.5), (20.0, 1.2), (80.0, 0.9)], 60.0),
        ([(0.0, 1.5), (80.0, 1.1)], 80.0),
        ([(0.0, 0.9), (80.0, 0.8)], None),
        ([(5.0, 1.0), (20.0, 0.5)], 5.0),
        ([], None),
    ],
)
def test_break_even_lies_where_the_line_crosses_one(points: list[tuple[float, float]], until_ms: float | None) -> None:
    assert break_even_ms(points) == (until_ms if until_ms is None else pytest.approx(until_ms))


def test_tokens_for_a_dollar_pay_for_the_edges_too() -> None:
    assert PRICES.tokens_per_dollar(13.0, 1) == pytest.approx(13.0 * 3600 / 1.3)
    assert PRICES.tokens_per_dollar(12.0, 0) == pytest.approx(12.0 * 3600 / 1.2)


def test_the_table_has_a_row_for_each_arm_and_round_trip() -> None:
    runs = [run(VANILLA, 10.0), *(run(arm, 12.0, rtt_ms) for arm in (WAIT, OURS) for rtt_ms in (5.0, 80.0))]
    rows = as_table(runs, PRICES).splitlines()
    assert len(rows) == 2 + 5
    assert {row.count("|") for row in rows} == {len(COLUMNS) + 1}
    shown = "| 12.0 | 1.20 (1.20..1.20) | 100 | 50 / 60 / 70 | 1.43 | 0.50 | 2.00 | 20.0 / 10.0 | 20 | 1.00 | 25% |"
    assert shown in rows[-1]
    assert rows[2].startswith("| 4 | mixed | 0 | vLLM | - | 10.0 | 1.00 (1.00..1.00) |")


def test_where_edges_do_not_help_is_said() -> None:
    runs = [run(VANILLA, 10.0), run(NGRAM, 20.0), run(OURS, 12.0, 5.0), run(OURS, 9.0, 80.0)]
    to_vanilla, to_ngram = break_evens(runs)
    assert "helps (1.20) at 5 ms, loses (0.90) at 80 ms; better up to 55 ms" in to_vanilla
    assert "loses (0.60) at 5 ms, loses (0.45) at 80 ms; nowhere better" in to_ngram
    assert [verdict(gain) for gain in (1.5, 1.0, 0.5)] == ["helps", "no difference", "loses"]


@pytest.mark.parametrize("kind", [*KINDS, MIXED])
def test_no_prompt_comes_twice_and_later_ones_go_on_from_earlier(kind: str) -> None:
    made = prompts(kind, 40)
    assert len(set(made)) == 40
    assert prompts(kind, 20, first=20) == made[20:]


def test_digests_tell_answers_apart() -> None:
    assert digest("a") == digest("a") != digest("b")


def test_capacity_is_what_a_second_of_the_server_makes() -> None:
    vanilla = [run(VANILLA, 10.0)]
    own = [replace(run(OURS, 10.0, 20.0), cpu_s={"worker": 7.5, "engine_core": 2.5})]
    assert cell_of(own, vanilla, PRICES)["capacity"] == pytest.approx(2.0)
    assert cell_of(own, [], PRICES)["capacity"] is None
