"""Predicted outputs: a prediction never changes the answer; an edited text is followed."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_specedge.engine.predicted_output import MAX_OFF_TRACK, Prediction

texts = st.lists(st.integers(0, 5), max_size=40) | st.lists(st.integers(0, 500), max_size=80)


def answered(prediction: Prediction, answer: Sequence[int], limit: int = 5) -> int:
    """Number of steps of an answer if each verifies the current prediction."""
    at = num_steps = 0
    while at < len(answer):
        draft = prediction.draft(limit)
        assert len(draft) <= limit
        num_right = next(
            (i for i, pair in enumerate(zip(draft, answer[at:], strict=False)) if pair[0] != pair[1]), None
        )
        num_right = min(len(draft), len(answer) - at) if num_right is None else num_right
        decided = answer[at : at + num_right + 1]
        prediction.advance(decided)
        at += len(decided)
        num_steps += 1
    return num_steps


@given(texts, texts, st.integers(1, 8))
def test_whatever_is_predicted_any_answer_can_be_given(predicted: list[int], answer: list[int], limit: int) -> None:
    prediction = Prediction(predicted)
    assert answered(prediction, answer, limit) <= len(answer)
    assert 0 <= prediction.num_accepted <= len(answer)


@given(texts, st.integers(1, 8))
def test_what_comes_as_predicted_is_all_accepted(answer: list[int], limit: int) -> None:
    prediction = Prediction(answer)
    assert answered(prediction, answer, limit) == -(-len(answer) // (limit + 1))
    assert prediction.num_accepted == len(answer)


@given(texts, texts, st.data())
def test_how_the_answer_is_cut_into_steps_does_not_matter(
    predicted: list[int], answer: list[int], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=5)))
    whole, pieces = Prediction(predicted), Prediction(predicted)
    whole.advance(answer)
    for start, end in zip([0, *cuts], [*cuts, len(answer)], strict=True):
        pieces.advance(answer[start:end])
    assert whole.draft(9) == pieces.draft(9)
    assert whole.num_accepted == pieces.num_accepted


TEXT = [(7 * i * i + 3 * i) % 997 for i in range(600)]
"""A text in which pairs of tokens are rare."""


@pytest.mark.parametrize(
    ("answer", "most_steps"),
    [
        (TEXT, 100),
        ([1000 + i if i % 40 == 10 else token for i, token in enumerate(TEXT)], 130),
        ([*TEXT[:100], *range(1000, 1007), *TEXT[100:]], 112),
        ([*TEXT[:300], *TEXT[330:]], 102),
        ([*TEXT[300:], *TEXT[:300]], 108),
        (list(range(1000, 1100)), 100),
    ],
    ids=["as predicted", "tokens replaced", "tokens added", "tokens left out", "halves exchanged", "another answer"],
)
def test_an_edited_text_is_followed(answer: list[int], most_steps: int) -> None:
    assert answered(Prediction(TEXT), answer) <= most_steps


def test_an_answer_that_goes_off_track_is_left_alone_until_it_comes_back() -> None:
    prediction = Prediction(TEXT)
    prediction.advance(range(1000, 1000 + MAX_OFF_TRACK))
    assert prediction.draft(5) == ()
    prediction.advance(TEXT[50:51])
    assert prediction.draft(5) == ()
    prediction.advance(TEXT[51:52])
    assert prediction.draft(5) == TEXT[52:57]


def test_a_text_that_repeats_itself_is_no_more_work_than_another() -> None:
    """Of the many occurrences of its last tokens, only a few are examined."""
    prediction = Prediction([1, 2] * 20_000)
    prediction.advance([3, *[1, 2] * 10, 3])
    prediction.advance([1, 2])
    assert prediction.draft(4) == [1, 2, 1, 2]
