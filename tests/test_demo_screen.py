"""The demo's display of an answer, and the figures of its table and last line."""

from io import StringIO

import pytest
from demo import row
from demo_screen import Answer, Screen, first_difference, tokens_per_s
from rich.console import Console

WORDS = {1: "The", 2: " sky", 3: " is", 4: " blue", 5: "."}


def decode(token_ids: list[int]) -> str:
    return "".join(WORDS[token] for token in token_ids)


@pytest.fixture
def answer() -> Answer:
    answer = Answer("chat", "Why?\nSay.")
    answer.take("The", [1], 10.0, decode)
    answer.take(" sky is blue", [2, 3, 4], 10.5, decode)
    answer.take(".", [5], 12.0, decode)
    return answer


def test_accepted_drafts_are_all_of_a_chunk_but_its_last_token(answer: Answer) -> None:
    assert answer.text.plain == "The sky is blue."
    assert [answer.text.plain[span.start : span.end] for span in answer.text.spans if span.style == "green"] == [
        " sky is"
    ]


def test_what_a_prompt_takes_is_not_counted(answer: Answer) -> None:
    assert answer.num_timed == 4
    assert tokens_per_s([answer]) == 2.0
    assert tokens_per_s([]) == tokens_per_s([Answer("chat", "")]) == 0.0


@pytest.mark.parametrize(
    ("ours", "theirs", "at"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1], 1), ([], [4], 0)],
)
def test_where_answers_part(ours: list[int], theirs: list[int], at: int | None) -> None:
    assert first_difference(ours, theirs) == at


def test_a_log_shows_each_answer_once_beside_the_plain_pace(answer: Answer) -> None:
    out = StringIO()
    plain = Answer("chat", "Why?")
    for at, token in enumerate(WORDS):
        plain.take(WORDS[token], [token], float(at), decode)
    with Screen(Console(file=out, width=80)).stream(answer, [plain]):
        pass
    assert out.getvalue().count("The sky is blue.") == 1
    assert "plain 1.0 | with an edge 2.0 tokens/s (2.00 times)" in out.getvalue()


def test_a_row_of_the_table(answer: Answer) -> None:
    before = {"accepted_tokens": 1.0, "verified_tokens": 10.0, "committed_tokens": 100.0, "steps": 90.0}
    after = {"accepted_tokens": 4.0, "verified_tokens": 14.0, "committed_tokens": 106.0, "steps": 92.0}
    got = row("chat", [answer], [answer], before, after)
    assert (got.speedup, got.acceptance_rate, got.tokens_per_step) == (1.0, 0.75, 3.0)
