"""A draft that has read answers beforehand (harness/recorded_draft.py) drafts what the model itself drafts."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch

from benchmarks.harness.recorded_draft import DraftReader
from benchmarks.harness.replay import Accuracy, Recording, ReplayDrafter

from .test_hf_trees import PLAIN, trees_of

PROMPT, ANSWER = (5, 6, 7, 8), (9, 4, 4, 2, 7)
WIDTH = 4


@pytest.fixture(scope="module")
def reader() -> DraftReader:
    torch.set_num_threads(1)
    return DraftReader(trees_of(deepcopy(PLAIN)))


def test_it_has_the_model_s_candidates_after_each_true_past(reader: DraftReader) -> None:
    model = trees_of(deepcopy(PLAIN))
    replayed = ReplayDrafter([reader.read(Recording(PROMPT, ANSWER), WIDTH)], Accuracy())
    for length in range(len(ANSWER)):
        past = (*PROMPT, *ANSWER[:length])
        expected = model.open().append(past, WIDTH)
        found = replayed.candidates(past, WIDTH)
        assert [each.token for each in found] == [each.token for each in expected]
        assert [each.probability for each in found] == pytest.approx([each.probability for each in expected], abs=1e-5)


def test_it_knows_how_long_passes_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 ms, and 2 ms for each row after the first."""
    now_s = 0.0

    @contextmanager
    def forward_pass(self: ReplayDrafter, num_rows: int) -> Iterator[None]:
        nonlocal now_s
        now_s += 0.005 + 0.002 * (num_rows - 1)
        yield

    monkeypatch.setattr(ReplayDrafter, "forward_pass", forward_pass)
    reader = DraftReader(ReplayDrafter([], Accuracy()), lambda: now_s)
    assert reader.pass_s == pytest.approx(0.005)
    assert reader.row_s == pytest.approx(0.002)
