"""Order and results of the measurements of `make bench-never-slower`: benchmarks/verdicts.py, harness/load.py,
harness/runs.py, harness/results.py."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from harness.load import Answer, Chunk, Gap, decoding, duration_s
from harness.replay import Recording
from harness.results import Kept
from harness.runs import Run, Slot, bin_of, differences, num_different, quantile_ms, run_of, timed
from typer import BadParameter

from benchmarks.verdicts import (
    COLUMNS,
    DEAD,
    EDGES,
    GOOD,
    HALF,
    NGRAM,
    OURS,
    POOR,
    VANILLA,
    Cell,
    Fleet,
    Limits,
    all_cells,
    cell_of,
    fleet,
    interleave,
    is_kept,
    nearest,
    noise,
    quiet_line,
    report,
    result_of,
    results,
    schedule,
    server_model,
)
from vllm_specedge.policy.step_cost import KNOTS

CELL = Cell(4, 20.0, GOOD)
LIMITS = Limits()


def run(
    arm: str = OURS,
    number: int = 0,
    tokens_per_s: float = 100.0,
    cell: Cell = CELL,
    gap_s: float = 0.05,
    session: int = 0,
    counters: dict[str, int] | None = None,
    differences: list[list[int]] | None = None,
    learned: dict[str, object] | None = None,
) -> Run:
    gaps = {bin_of(gap_s): 100}
    return Run(
        arm=arm,
        requests=cell.requests,
        rtt_ms=cell.rtt_ms if arm == OURS else None,
        edge=cell.edge if arm == OURS else None,
        repeat=0,
        session=session,
        number=number,
        num_tokens=1000,
        seconds=1000 / tokens_per_s,
        decode_tokens=900,
        decode_seconds=900 / tokens_per_s,
        cpu_s={"worker": 900 / tokens_per_s, "engine_core": 100 / tokens_per_s, "edges": 50 / tokens_per_s},
        core_busy=[0.9, 0.5],
        core_steal=[0.0, 0.0],
        first_token_s={"p50": 0.1, "max": 0.2},
        gap_ms={},
        token_gap_ms={},
        tokens_per_chunk=1.0,
        counters=counters or {},
        edge_totals={},
        up_bytes=0,
        down_bytes=0,
        differences=differences or [],
        learned=learned,
        gaps=gaps,
        token_gaps=gaps,
    )


def verdict(*runs: Run, limits: Limits = LIMITS) -> str:
    result = result_of(CELL, runs, limits)
    assert result is not None
    return str(result["verdict"])


# -- the order -------------------------------------------------------------------------------------------------------


def test_the_grid_has_every_cell_but_half_of_one_request() -> None:
    cells = all_cells([1, 4], [0.0, 80.0], EDGES)
    assert len(cells) == len(set(cells)) == 2 * 5 * 2 - 2
    assert Cell(4, 80.0, HALF) in cells
    assert not [cell for cell in cells if cell.requests == 1 and cell.edge == HALF]


def distances(slots: Sequence[Slot], at: int, arm: str) -> list[int]:
    return [abs(at - other) for other, slot in enumerate(slots) if slot.arm == arm]


@pytest.mark.parametrize("num_own", range(1, 12))
def test_each_of_ours_is_at_most_two_runs_away_from_both_others_and_between_two_of_vanilla(num_own: int) -> None:
    own = [Slot(arm=OURS, **Cell(4, float(number), GOOD)._asdict()) for number in range(num_own)]
    slots = list(interleave(own, 4))
    assert [slot for slot in slots if slot.arm == OURS] == own
    for at, slot in enumerate(slots):
        assert slot.requests == 4
        if slot.arm == OURS:
            assert min(distances(slots, at, VANILLA)) <= 2
            assert min(distances(slots, at, NGRAM)) <= 2
    assert slots[0].arm == slots[-1].arm == VANILLA
    assert len(slots) - num_own <= num_own / 2 + 2.5


def test_all_runs_are_made_once_for_one_number_of_requests_after_the_other() -> None:
    cells = all_cells([1, 8], [0.0, 20.0], [GOOD, POOR, HALF])
    slots = schedule(cells, 3)
    own = [(cell_of(slot), slot.repeat) for slot in slots if slot.arm == OURS]
    assert Counter(own) == Counter((cell, repeat) for cell in cells for repeat in range(3))
    assert [slot.requests for slot in slots] == sorted(slot.requests for slot in slots)
    first, second = ([cell for cell, at in own if at == repeat and cell and cell.requests == 8] for repeat in (0, 1))
    assert first == second[::-1] == [cell for cell in cells if cell.requests == 8]


def test_what_is_done_is_not_done_again() -> None:
    cells = all_cells([1, 8], [20.0], [GOOD, POOR])
    done = {Slot(arm=OURS, **cell._asdict(), repeat=at) for cell in cells for at in range(2) if at == 0 or cell[0] == 1}
    slots = schedule(cells, 2, done)
    assert {slot.requests for slot in slots} == {8}
    assert [(cell_of(slot), slot.repeat) for slot in slots if cell_of(slot)] == [(cells[3], 1), (cells[2], 1)]
    assert schedule(cells, 1, done) == []


@pytest.mark.parametrize("requests", range(1, 65))
def test_edges_have_room_for_all_requests_or_for_exactly_half(requests: int) -> None:
    everyone = fleet(requests, DEAD)
    assert everyone.connections <= 8
    assert everyone.connections * everyone.capacity >= requests
    if requests > 1:
        half = fleet(requests, HALF)
        assert half.connections <= 8
        assert half.connections * half.capacity == requests // 2


def test_the_fleets_of_the_grid() -> None:
    assert [fleet(n, GOOD) for n in (1, 4, 8, 16, 32)] == [
        Fleet(1, 1),
        Fleet(4, 1),
        Fleet(8, 1),
        Fleet(8, 2),
        Fleet(8, 4),
    ]
    assert [fleet(n, HALF) for n in (4, 8, 16, 32)] == [Fleet(2, 1), Fleet(4, 1), Fleet(8, 1), Fleet(8, 2)]


# -- streams ---------------------------------------------------------------------------------------------------------


def event(tokens: Sequence[int], prompt: Sequence[int] | None = None) -> str:
    return "data: " + json.dumps({"choices": [{"text": "", "token_ids": tokens, "prompt_token_ids": prompt}]})


def test_a_stream_becomes_chunks_with_their_times() -> None:
    answer = Answer(sent_s=10.0)
    for now_s, text in (
        (10.5, event([1], [7, 8])),
        (10.5, ""),
        (10.6, event([2, 3])),
        (10.7, event([])),
        (10.9, event([4])),
    ):
        answer.take(text, now_s)
    answer.take("data: [DONE]", 11.0)
    assert (answer.prompt, answer.tokens) == ((7, 8), (1, 2, 3, 4))
    assert answer.chunks == [Chunk(10.5, 1), Chunk(10.6, 2), Chunk(10.9, 1)]
    assert answer.first_token_s == pytest.approx(0.5)
    assert list(answer.gaps()) == [Gap(pytest.approx(0.1), 2), Gap(pytest.approx(0.3), 1)]


def test_what_the_server_calls_an_error_is_one() -> None:
    with pytest.raises(RuntimeError, match="too long"):
        Answer(0.0).take('data: {"error": {"message": "too long"}}', 1.0)


def test_a_run_goes_from_the_first_request_to_the_last_token() -> None:
    one = Answer(1.0, chunks=[Chunk(2.0, 1), Chunk(4.0, 2)])
    other = Answer(1.5, chunks=[Chunk(2.5, 1), Chunk(3.5, 1)])
    assert duration_s([one, other]) == pytest.approx(3.0)
    assert decoding([one, other]) == (1, pytest.approx(1.0))


# -- ratios and verdicts ---------------------------------------------------------------------------------------------


def test_quantiles_are_exact_to_half_a_percent() -> None:
    chance = Random(0)
    gaps = sorted(chance.lognormvariate(-3, 0.5) for _ in range(5000))
    histogram = Counter(bin_of(gap) for gap in gaps)
    for part in (0.5, 0.95, 0.99, 1.0):
        assert quantile_ms(histogram, part) == pytest.approx(1000 * gaps[round(part * 5000) - 1], rel=0.006)
    assert bin_of(0.0) == 0


def test_a_run_is_compared_with_the_nearest_before_and_after_it_of_its_session_and_size() -> None:
    ours = run(number=5)
    others = [run(VANILLA, number, number) for number in (1, 3, 8, 9)]
    others += [run(VANILLA, 4, session=1), run(VANILLA, 6, cell=Cell(8, 0.0, GOOD))]
    assert [other.number for other in nearest(ours, others)] == [3, 8]
    assert [other.number for other in nearest(run(number=0), others)] == [1]
    assert nearest(run(number=0, session=7), others) == []


def test_ratios_are_to_the_mean_of_the_neighbours_and_the_verdict_is_by_the_median() -> None:
    runs = [
        run(VANILLA, 0, 90),
        run(OURS, 1, 100),
        run(NGRAM, 2, 80),
        run(VANILLA, 3, 110),
        run(OURS, 4, 88),
        run(VANILLA, 5, 110),
        run(OURS, 6, 120),
    ]
    result = result_of(CELL, runs, LIMITS)
    assert result is not None
    said = {name: result[name] for name in ("ratio", "ratio_min", "ratio_max")}
    assert said == pytest.approx({"ratio": 1.0, "ratio_min": 0.8, "ratio_max": 120 / 110})
    said = [result[name] for name in ("ngram_ratio", "ngram_ratio_min", "ngram_ratio_max")]
    assert said == pytest.approx([1.25, 1.1, 1.5])
    said = [result[name] for name in ("tokens_per_s", "vanilla_tokens_per_s", "ngram_tokens_per_s")]
    assert said == pytest.approx([100, 110, 80])
    assert result["cpu_s_per_token_ratio"] == pytest.approx(cpu_by_hand(runs))
    assert (result["repeats"], result["verdict"]) == (3, "ok")


def cpu_by_hand(runs: Sequence[Run]) -> float:
    """Computed by hand: the first of ours uses as much as 100 / s, its neighbours on average (1 / 90 + 1 / 110) / 2."""
    return sorted([(1 / 100) / ((1 / 90 + 1 / 110) / 2), 110 / 88, 110 / 120])[1]


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([run(VANILLA, 0), run(OURS, 1, 97.5)], "ok"),
        ([run(VANILLA, 0), run(OURS, 1, 96)], "FAIL (vs vanilla)"),
        ([run(VANILLA, 0), run(OURS, 1, 100), run(NGRAM, 2, 104)], "FAIL (vs ngram)"),
        ([run(VANILLA, 0), run(OURS, 1, gap_s=0.057)], "ok"),
        ([run(VANILLA, 0), run(OURS, 1, gap_s=0.06)], "FAIL (p99)"),
        ([run(VANILLA, 0), run(OURS, 1, 200, differences=[[0, 3]])], "FAIL (tokens)"),
        (
            [run(VANILLA, 0), run(OURS, 1, 50, gap_s=1.0, differences=[[0, 3]]), run(NGRAM, 2)],
            "FAIL (tokens, vs vanilla, vs ngram, p99)",
        ),
    ],
)
def test_verdicts(runs: list[Run], said: str) -> None:
    assert verdict(*runs) == said


def test_the_limits_can_be_others() -> None:
    runs = [run(VANILLA, 0), run(OURS, 1, 90, gap_s=0.06)]
    assert verdict(*runs, limits=Limits(min_ratio=0.89, max_p99_ratio=1.3)) == "ok"


def test_gaps_are_pooled_over_repeats_before_the_percentile() -> None:
    """One slow gap of three hundred is above the 99th percentile of all, not of its own hundred."""
    slow = replace(run(OURS, 1), gaps={bin_of(0.05): 98, bin_of(1.0): 2})
    assert verdict(run(VANILLA, 0), slow, run(OURS, 2), run(OURS, 3)) == "ok"
    assert verdict(run(VANILLA, 0), slow) == "FAIL (p99)"


def test_a_cell_with_nothing_to_compare_has_no_result() -> None:
    assert results([run(OURS, 1), run(VANILLA, 0, session=3)], LIMITS) == []
    assert len(results([run(VANILLA, 0), run(OURS, 1), run(OURS, 2, cell=Cell(4, 0.0, POOR))], LIMITS)) == 2


def test_vanilla_against_itself() -> None:
    runs = [run(VANILLA, number, speed) for number, speed in enumerate((100, 110, 99))]
    (one,) = noise([*runs, run(OURS, 9), run(VANILLA, 0, 1, session=1)])
    assert (one.requests, one.num_runs) == (4, 4)
    assert (one.ratio_min, one.ratio_max) == pytest.approx((0.9, 1.1))


def test_what_others_used_is_seen() -> None:
    """The cores were busy for 1.4 s per second, of which 1.05 are known: the worker's, and so on."""
    assert run().foreign_busy == pytest.approx(0.35)
    assert "more than 0.15 in 1 of 2 runs" in quiet_line([run(), replace(run(), core_busy=[0.9, 0.2])])


def test_runs_go_through_a_file_that_is_gone_on_with_only_by_the_same_settings(tmp_path: Path) -> None:
    path, settings = tmp_path / "runs.json", {"k": 5, "rtts_ms": (0.0, 20.0)}
    known = [run(counters={"steps": 3}, differences=[[1, 2]]), run(VANILLA, 1)]
    Kept(path, settings, [{"date": "today"}], known).save({"cells": []})
    again = Kept.load(path, settings, is_resumed=True)
    assert (again.runs, again.sessions) == (known, [{"date": "today"}])
    assert again.done == {known[0].slot, known[1].slot}
    assert Kept.load(path, settings, is_resumed=False).runs == []
    with pytest.raises(BadParameter, match="another --output"):
        Kept.load(path, {**settings, "k": 4}, is_resumed=True)


def test_a_file_of_runs_with_other_fields_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"settings": {"k": 5}, "sessions": [], "runs": [{"arm": VANILLA, "ttft_ms": 5}]}))
    with pytest.raises(BadParameter, match="before runs had these fields"):
        Kept.load(path, {"k": 5}, is_resumed=True)


def test_each_run_is_in_the_file_as_soon_as_it_is_made(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "runs.json", {}, [{}], [])
    slots = [run(VANILLA).slot, run().slot]

    def measure(slot: Slot) -> Iterator[Run]:
        assert len(kept.runs) == slots.index(slot)
        yield run(slot.arm)

    kept.measure_all(slots, measure, lambda runs: {"count": len(runs)})
    values = json.loads(kept.path.read_text())
    assert (values["count"], len(values["sessions"])) == (2, 2)
    assert [(each["arm"], each["session"], each["number"]) for each in values["runs"]] == [
        (VANILLA, 1, 0),
        (OURS, 1, 1),
    ]


def test_old_results_files_are_read_and_come_to_what_they_say() -> None:
    values = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "never-slower.json").read_text())
    found = results([run_of(each) for each in values["runs"]], Limits(**values["limits"]))
    assert found == [pytest.approx(cell) for cell in without_lists(values["cells"], found)]


def without_lists(cells: list[dict[str, object]], found: list[dict[str, object]]) -> list[dict[str, object]]:
    """pytest.approx compares no lists within what it compares, so those are compared here."""
    for cell, other in zip(cells, found, strict=True):
        for name in ("core_busy", "failures"):
            assert other.pop(name) == cell.pop(name)
    return cells


def test_the_table_has_a_line_for_each_result() -> None:
    runs = [run(VANILLA, 0), run(OURS, 1, 96)]
    lines = report(runs, LIMITS).splitlines()[:3]
    assert {text.count("|") for text in lines} == {len(COLUMNS) + 1}
    assert "| 0.96 (0.96..0.96) | - |" in lines[2]
    assert lines[2].endswith("| FAIL (vs vanilla) |")
    assert not is_kept(runs, LIMITS)
    assert is_kept([run(VANILLA, 0), run(OURS, 1)], LIMITS)


# -- what a run comes to ---------------------------------------------------------------------------------------------


def answer(sent_s: float, *chunks: tuple[float, int]) -> Answer:
    tokens = tuple(range(sum(num_tokens for _, num_tokens in chunks)))
    return Answer(sent_s, (9,), tokens, [Chunk(*chunk) for chunk in chunks])


def test_batches_are_timed_one_by_one_and_add_up() -> None:
    together = answer(1.0, (2.0, 1), (4.0, 2)), answer(1.5, (2.5, 1), (3.5, 1))
    alone = answer(10.0, (11.0, 1), (11.5, 3))
    figures = timed(together, [alone])
    assert (figures["num_tokens"], figures["seconds"]) == (9, pytest.approx(3.0 + 1.5))
    assert (figures["decode_tokens"], figures["decode_seconds"]) == (1 + 3, pytest.approx(1.0 + 0.5))
    assert figures["first_token_s"] == pytest.approx({"p50": 1.0, "p99": 1.0, "max": 1.0})
    assert sum(figures["gaps"].values()) == 3
    assert figures["gap_ms"]["p99"] == pytest.approx(2000, rel=0.006)
    assert figures["token_gap_ms"]["p99"] == pytest.approx(1000, rel=0.006)
    assert figures["tokens_per_chunk"] == pytest.approx(9 / 6)


def test_a_whole_answer_is_one_chunk() -> None:
    whole = Answer(sent_s=1.0)
    whole.take(json.dumps({"choices": [{"token_ids": [1, 2, 3], "prompt_token_ids": [7]}]}), 2.0)
    assert whole.recording == Recording((7,), (1, 2, 3))
    assert whole.chunks == [Chunk(2.0, 3)]
    assert timed([whole])["decode_seconds"] == 0.0


def test_differences_are_where_an_answer_parts_from_what_is_recorded() -> None:
    known = [Recording((1,), (5, 6, 7))] * 3
    answers = [Answer(0.0, (1,), tokens) for tokens in ((5, 6, 7), (5, 6), (5, 9, 7))]
    assert differences(known, answers) == [[2, 1]]


def test_answers_are_compared_with_the_first_of_their_case_and_repeat() -> None:
    first, other = (replace(run(arm), answers=["a", "b"]) for arm in (VANILLA, NGRAM))
    again = replace(run(), answers=["a", "b"], repeat=1)
    assert num_different([first, other, again]) == 0
    assert num_different([first, replace(other, answers=["a", "c"]), replace(again, answers=["x", "y"])]) == 1
    sampled = [replace(each, temperature=0.7) for each in (first, replace(other, answers=["a", "c"]))]
    assert num_different(sampled) == 0


# -- the server for the simulator ------------------------------------------------------------------------------------


def learned(token_s: float, verifying_s: float = 0.0) -> dict[str, object]:
    """Steps of 50 ms plus `token_s` per token, 1 ms per request and per 1,024 tokens of context."""
    curve_s = [0.05 + token_s * size for size in KNOTS]
    return {"curve_s": curve_s, "request_s": 0.001, "context_s": 0.001, "verifying_s": verifying_s}


def test_the_model_has_what_vanilla_s_clients_saw_and_what_our_engine_learned() -> None:
    cell = Cell(8, 0.0, GOOD)
    runs = [run(VANILLA, cell=cell, gap_s=0.07)]
    runs += [run(number=1, cell=cell, learned=learned(token_s, 0.002)) for token_s in (0.003, 0.004, 0.009)]
    rows = server_model(runs, k=3, prompt_tokens=40)["rows"]
    assert isinstance(rows, list)
    sizes = [(8, 8, 0), (8, 320, 0), (8, 8, 0), (8, 16, 1), (8, 24, 1), (8, 32, 1)]
    assert [(*row[:2], row[3]) for row in rows] == sizes
    assert rows[0][2] == pytest.approx(0.07, rel=0.006)
    assert rows[1][2] == runs[0].first_token_s["p50"]
    beside_s = 8 * 0.001 + 8 * (40 + 1000 // 8 // 2) / 1024 * 0.001
    assert rows[2][2] == pytest.approx(0.05 + 8 * 0.004 + beside_s)
    assert rows[5][2] == pytest.approx(0.05 + 32 * 0.004 + beside_s + 8 * 0.002)


def test_runs_of_others_teach_nothing_beyond_plain_steps() -> None:
    assert len(server_model([run(VANILLA), run(NGRAM, 1)], 5, 40)["rows"]) == 2  # type: ignore[arg-type]
