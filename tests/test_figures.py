"""What `make bench` computes from its runs: benchmarks/figures.py, and its prompts."""

from dataclasses import replace

import pytest

from benchmarks.figures import (
    HEADER,
    NGRAM,
    OURS,
    VANILLA,
    WAIT,
    Case,
    Prices,
    Run,
    break_even_ms,
    break_evens,
    capacity,
    digest,
    num_different,
    of,
    ratio,
    table,
    verdict,
)
from benchmarks.harness.prompts import KINDS, MIXED, prompts

CASE = Case(4, MIXED, 0.0)
PRICES = Prices(server=1.2, edge=0.1)


def run(arm: str, tokens_per_s: float, rtt_ms: float | None = None, repeat: int = 0, case: Case = CASE) -> Run:
    return Run(
        arm=arm,
        requests=case.requests,
        kind=case.kind,
        temperature=case.temperature,
        rtt_ms=rtt_ms,
        repeat=repeat,
        num_tokens=1000,
        seconds=1000 / tokens_per_s,
        tokens_per_s=tokens_per_s,
        ttft_ms={"p50": 100.0, "p99": 200.0},
        itl_ms={"p50": 50.0, "p95": 60.0, "p99": 70.0},
        tokens_per_step=1.5,
        acceptance=0.5 if arm != VANILLA else None,
        verified_per_accepted=2.0 if arm != VANILLA else None,
        up_bytes_per_token=20.0,
        down_bytes_per_token=10.0,
        server_cpu_s_per_token=0.02,
        edge_busy=0.25,
        answers=["a", "b"],
    )


def test_a_run_is_compared_with_those_of_its_own_repeat() -> None:
    plain = [run(VANILLA, 10.0), run(VANILLA, 20.0, repeat=1)]
    own = [run(OURS, 12.0, 5.0), run(OURS, 30.0, 5.0, repeat=1), run(OURS, 99.0, 5.0, repeat=2)]
    assert ratio(own, plain) == (pytest.approx(1.35), pytest.approx(1.2), pytest.approx(1.5))
    assert ratio(own[2:], plain) is None


def test_the_round_trip_counts_only_for_those_with_an_edge() -> None:
    of_one = run(OURS, 9.0, 5.0, case=Case(1, MIXED, 0.0))
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
    rows = table(runs, PRICES).splitlines()
    assert len(rows) == 2 + 5
    assert {row.count("|") for row in rows} == {len(HEADER) + 1}
    assert "1.20 (1.20..1.20)" in rows[-1]


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


def test_answers_are_compared_with_the_first_of_their_case_and_repeat() -> None:
    first, other = run(VANILLA, 10.0), run(NGRAM, 10.0)
    again = run(OURS, 10.0, 20.0, repeat=1)
    assert num_different([first, other, again]) == 0
    assert num_different([first, replace(other, answers=["a", "c"]), replace(again, answers=["x", "y"])]) == 1
    assert num_different([replace(first, answers=[]), replace(other, answers=[])]) == 0
    assert digest("a") != digest("b")


def test_capacity_is_what_a_second_of_the_server_makes() -> None:
    vanilla = [run(VANILLA, 10.0)]
    own = [replace(run(OURS, 10.0, 20.0), server_cpu_s_per_token=vanilla[0].server_cpu_s_per_token / 2)]
    assert capacity(own, vanilla) == "2.00"
    assert capacity(own, []) == ""
