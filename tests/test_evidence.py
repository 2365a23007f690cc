"""Questions of `make evidence`, and results from its runs: harness/workload.py, evidence_figures.py,
switched_figures.py."""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from harness.load import Answer, Chunk
from harness.replay import Recording
from harness.runs import Run
from harness.workload import MIXED, REFERENCE, chosen, questions, varied
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.evidence_figures import (
    MET,
    MISSED,
    PLAIN,
    RATE,
    UNDECIDED,
    Goal,
    Interval,
    as_table,
    goals_of,
    interval,
    ratios,
    served_in_time,
    summarise,
)
from benchmarks.switched_figures import ACTIVE, INERT, Period, periods
from benchmarks.switched_figures import ratios as ratios_of_periods
from benchmarks.switched_figures import summarise as switched_lines
from examples.questions import QUESTIONS

KINDS = ("chat", "turns", "code", "maths", "summary", "translation", "grounded", "structured", "editing")


def run(arm: str, start: int = 0, seconds: float = 10.0, **fields: Any) -> Run:
    given = {
        "decode_tokens": 100,
        "decode_seconds": seconds,
        "num_tokens": 100,
        "gaps": {100: 99},
        "first_token_s": {"p50": 0.1},
        "each": [[0.1, 5.1, 51]],
        **fields,
    }
    return Run(arm=arm, repeat=start, seconds=seconds, **given)


# -- the workload --------------------------------------------------------------------------------------------------


def test_answers_of_several_requests_have_many_lengths_around_a_mean_and_each_has_the_same_everywhere() -> None:
    lengths = [varied(64, number) for number in range(1000)]
    assert lengths == [varied(64, number) for number in range(1000)]
    assert min(lengths) in range(16, 20)
    assert max(lengths) in range(108, 113)
    assert abs(sum(lengths) / len(lengths) - 64) < 3
    assert len(set(lengths[:8])) > 5, "eight requests at a time do not end together"


def test_there_are_ten_questions_of_each_kind_and_none_is_asked_twice() -> None:
    by_kind = questions()
    assert tuple(by_kind) == KINDS
    assert {len(each) for each in by_kind.values()} == {10}
    asked = [question.messages[-1]["content"] for each in by_kind.values() for question in each]
    assert len(set(asked)) == len(asked)
    assert not any(REFERENCE.search(text) for text in asked)
    assert not set(asked) & {question for each in QUESTIONS.values() for question in each}


def test_a_conversation_ends_with_its_user() -> None:
    for each in questions().values():
        for question in each:
            roles = [message["role"] for message in question.messages]
            assert roles[0] == roles[-1] == "user"
            assert all(one != other for one, other in pairwise(roles))


@given(st.integers(1, 200), st.integers(0, 10_000))
def test_mixed_questions_are_of_all_kinds_alike(number: int, first: int) -> None:
    by_kind = questions()
    asked = chosen(by_kind, MIXED, number, first)
    assert len(asked) == number
    counts = [sum(question.kind == kind for question in asked) for kind in by_kind]
    assert max(counts) - min(counts) <= 1


# -- intervals and verdicts ----------------------------------------------------------------------------------------

values = st.lists(st.floats(0.1, 10.0), min_size=1, max_size=8)


@given(values)
def test_an_interval_lies_within_the_range_around_the_median(given: list[float]) -> None:
    found = interval(given)
    assert min(given) <= found.low <= found.median <= found.high <= max(given)
    assert found == interval(given), "the same each time"


def test_more_starts_that_agree_say_more() -> None:
    seen = [0.9, 0.95, 0.98, 1.0, 1.02, 1.05, 1.1]
    few, many = interval(seen), interval(seen * 8)
    assert many.high - many.low < few.high - few.low


@pytest.mark.parametrize(
    ("measured", "least", "most"),
    [
        (Interval(1.02, 0.99, 1.05, 5), MET, UNDECIDED),
        (Interval(0.96, 0.95, 0.97, 5), MISSED, MET),
        (Interval(0.99, 0.96, 1.03, 5), UNDECIDED, UNDECIDED),
        (Interval(1.02, 0.99, 1.05, 2), UNDECIDED, UNDECIDED),
        (Interval(1.02, 1.01, 1.05, 5), MET, MISSED),
    ],
)
def test_a_goal_is_judged_by_the_whole_interval(measured: Interval, least: str, most: str) -> None:
    assert Goal(RATE, 0.98, True, "no edges").verdict(measured) == least
    assert Goal(RATE, 1.0, False, "no edges").verdict(measured) == most


def test_requests_are_in_time_by_their_first_token_and_their_pace() -> None:
    plain = [run(PLAIN, each=[[0.5, 5.5, 51], [0.5, 6.5, 51], [3.0, 8.0, 51]])]
    assert served_in_time(plain, plain) == pytest.approx(2 / 3)
    own = [run("edge", each=[[0.1, 7.7, 51], [0.1, 7.5, 51]])]
    assert served_in_time(own, plain) == pytest.approx(1 / 2), "0.152 s a token is too slow, 0.148 is not"
    assert served_in_time([run("edge", each=[])], plain) is None


def test_requests_are_in_time_by_plain_vllm_s_pace_in_the_same_start() -> None:
    plain = [run(PLAIN, 0, each=[[0.1, 5.1, 51]]), run(PLAIN, 1, each=[[0.1, 10.1, 51]])]
    own = [run("edge", start, each=[[0.1, 8.1, 51]]) for start in (0, 1, 2)]
    assert served_in_time(own, plain) == 1 / 2, "0.16 s a token: too slow in the first start, and not in the second"


def test_what_a_token_costs_is_compared_within_the_same_starts() -> None:
    plain = [run(PLAIN, start, cpu_s={"worker": used_s}) for start, used_s in ((0, 10.0), (1, 90.0))]
    own = [run("no edges", start, cpu_s={"worker": 5.0, "front_end": 3.0 + start}) for start in (0, 2)]
    (cell,) = summarise([*plain, *own], "smollm2")
    assert (cell["server_ms_a_token"], cell["plain_server_ms_a_token"]) == (80.0, 100.0)


# -- one server that is switched -----------------------------------------------------------------------------------


def answer(*chunks: tuple[float, int]) -> Answer:
    return Answer(0.0, chunks=[Chunk(*each) for each in chunks])


@pytest.mark.parametrize("is_chat", [True, False])
def test_an_answer_knows_its_prompt_s_tokens(is_chat: bool) -> None:
    """Edges that replay it find it by them. In a chat they are in the event, otherwise in the choice."""
    prompt = {"prompt_token_ids": [1, 2]}
    choice = {"index": 0, "token_ids": [7]}
    event = {**prompt, "choices": [choice]} if is_chat else {"choices": [{**choice, **prompt}]}
    one = answer()
    one.take(f"data: {json.dumps(event)}", 1.0)
    one.take(f"data: {json.dumps({'choices': [choice]})}", 1.1)
    assert one.recording == Recording((1, 2), (7, 7))


def test_a_period_counts_what_came_in_it_but_for_its_beginning() -> None:
    came = [answer((2.5, 1), (3.1, 1), (3.5, 2), (4.5, 1), (6.4, 3)), answer((5.9, 1), (6.1, 1), (9.5, 1))]
    assert periods(came, 3.0, from_s=2.0, until_s=9.9) == [Period(1, 4, (1.0,)), Period(2, 3, ())]


def test_a_period_is_compared_with_both_beside_it() -> None:
    """So a machine that gets continuously slower does not affect the result."""
    tokens = [[number, round(1000 - 10 * number)] for number in range(11)]
    assert ratios_of_periods(tokens[0::2], tokens[1::2]) == pytest.approx([1.0] * 4)
    doubled = [[number, 2 * num_tokens] for number, num_tokens in tokens[0::2]]
    assert ratios_of_periods(doubled, tokens[1::2]) == pytest.approx([2.0] * 4)


def test_a_server_that_is_switched_has_a_verdict() -> None:
    gaps = {100: 99}
    runs = [
        Run(arm=arm, edge="poor", rtt_ms=20.0, num_tokens=1, seconds=1.0, gaps=gaps, answers=answers)
        for arm, answers in (
            (ACTIVE, [[number, 95] for number in range(0, 20, 2)]),
            (INERT, [[number, 100] for number in range(1, 20, 2)]),
        )
    ]
    [line] = switched_lines(runs)
    assert (line["verdict"], line["gap_verdict"], line["periods"]) == (MISSED, MET, 9)
    assert line[RATE].median == pytest.approx(0.95)


# -- cells ---------------------------------------------------------------------------------------------------------


def test_a_place_is_compared_with_plain_of_its_own_start_and_kind() -> None:
    plain = [run(PLAIN, 0, 10.0, kind="chat"), run(PLAIN, 0, 20.0, kind="code"), run(PLAIN, 1, 40.0, kind="chat")]
    own = [run("edge", 0, 5.0, kind="chat"), run("edge", 0, 5.0, kind="code"), run("edge", 1, 10.0, kind="chat")]
    found = ratios(own, plain, lambda each: each.whole_tokens_per_s)
    assert found == pytest.approx({0: 8**0.5, 1: 4.0})
    assert ratios(own, plain[:2], lambda each: each.whole_tokens_per_s).keys() == {0}, "a start without plain"


def many(arm: str, seconds: Sequence[float], **fields: Any) -> list[Run]:
    return [run(arm, start, took_s, **fields) for start, took_s in enumerate(seconds)]


def test_cells_have_verdicts_and_a_line() -> None:
    plain = many(PLAIN, [10.0] * 5, requests=4, answers=["a", "b"])
    edges = many("good edges, 20 ms", [5.0, 5.1, 4.9, 5.0, 5.2], requests=4, answers=["a", "c"])
    without = many("no edges", [10.0, 10.4, 9.8, 10.1, 10.0], requests=4, answers=["a", "b"])
    by_arm = {cell["arm"]: cell for cell in summarise(plain + edges + without, "smollm2")}
    assert by_arm["good edges, 20 ms"]["verdicts"] == {
        "tokens_per_s >= 0.97": MET,
        "whole_tokens_per_s >= 0.97": MET,
        "gap_p99 <= 1.15": MET,
        "tokens_per_s >= 1.45": MET,
    }
    assert by_arm["no edges"]["verdicts"] == {
        "tokens_per_s >= 0.98": UNDECIDED,
        "whole_tokens_per_s >= 0.98": UNDECIDED,
    }
    assert by_arm["good edges, 20 ms"]["answers_unlike_plain"] == 5
    assert by_arm["no edges"]["answers_unlike_plain"] == 0
    lines = as_table(list(by_arm.values())).splitlines()
    assert len(lines) == 2 + len(by_arm)
    assert "2.00 (1.92..2.04)" in lines[2]


def test_loads_are_not_mixed() -> None:
    plain = [*many(PLAIN, [10.0] * 3), *many(PLAIN, [1.0] * 3, rate=0.5), *many(PLAIN, [2.0] * 3, temperature=None)]
    own = [*many("edge", [10.0] * 3), *many("edge", [1.0] * 3, rate=0.5), *many("edge", [2.0] * 3, temperature=None)]
    found = summarise(plain + own, "qwen")
    assert [cell[RATE].median for cell in found] == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("pair", ["qwen", "smollm2"])
def test_goals_of_good_edges_are_the_pairs_own(pair: str) -> None:
    (one,) = [goal for goal in goals_of(pair) if goal.requests == (8,)]
    assert one.bound == {"qwen": 1.3, "smollm2": 1.15}[pair]
