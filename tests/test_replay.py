"""The drafter that knows the answers: benchmarks/replay.py."""

import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from benchmarks.replay import (
    Accuracy,
    Recording,
    ReplayDrafter,
    ReplaySequence,
    read_recordings,
    write_recordings,
)
from edge_client.drafters import Candidate, Drafter

PROMPT = (5, 6, 7)
NUM_TOKENS = 4000
ANSWER = tuple(Random(1).randrange(1000) for _ in range(NUM_TOKENS))
ACCURACY = Accuracy(first=0.75, second=0.6)


def drafter_of(accuracy: Accuracy = ACCURACY, answer: tuple[int, ...] = ANSWER, pass_s: float = 0.0) -> ReplayDrafter:
    return ReplayDrafter([Recording(PROMPT, answer)], accuracy, pass_s, vocab_size=1000)


def opened(drafter: ReplayDrafter, tokens: Sequence[int] = PROMPT) -> ReplaySequence:
    sequence = drafter.open()
    sequence.append(tokens, 1)
    return sequence


def tokens_of(candidates: Sequence[Candidate]) -> list[int]:
    return [candidate.token for candidate in candidates]


def test_it_is_right_as_often_as_it_is_told_to_be() -> None:
    drafter = drafter_of()
    num_first = num_second = num_later = 0
    for position in range(0, NUM_TOKENS, 4):
        tokens = tokens_of(drafter.candidates(PROMPT + ANSWER[:position], 4))
        assert len(set(tokens)) == 4
        num_first += tokens[0] == ANSWER[position]
        num_second += tokens[1] == ANSWER[position]
        num_later += ANSWER[position] in tokens[2:]
    assert num_first / (NUM_TOKENS / 4) == pytest.approx(0.75, abs=0.04)
    assert num_second / (NUM_TOKENS / 4 - num_first) == pytest.approx(0.6, abs=0.08)
    assert num_later == 0


def test_what_it_drafts_hangs_on_the_seed_and_the_position_and_nothing_else() -> None:
    chains = [PROMPT + ANSWER[:position] for position in range(40)]
    wide = [tokens_of(drafter_of().candidates(chain, 8)) for chain in chains]
    narrow = [tokens_of(drafter_of().candidates(chain, 1)) for chain in reversed(chains)]
    assert narrow[::-1] == [tokens[:1] for tokens in wide]
    other = [tokens_of(drafter_of(Accuracy(0.75, 0.6, seed=1)).candidates(chain, 8)) for chain in chains]
    assert all(mine != theirs for mine, theirs in zip(wide, other, strict=True))


def test_the_claims_are_the_true_rates() -> None:
    claims = [candidate.probability for candidate in drafter_of().candidates(PROMPT, 8)]
    assert claims[:2] == pytest.approx([0.75, 0.25 * 0.6])
    assert claims == sorted(claims, reverse=True)
    assert sum(claims) <= 1


def test_nothing_is_right_after_a_wrong_token() -> None:
    drafter = drafter_of(Accuracy(first=1.0))
    wrong = (*PROMPT, *ANSWER[:5], (ANSWER[5] + 1) % 1000)
    assert tokens_of(drafter.candidates(PROMPT + ANSWER[:6], 1)) == [ANSWER[6]]
    assert tokens_of(drafter.candidates(wrong, 8)) == tokens_of(drafter.candidates(wrong, 8))
    assert tokens_of(drafter.candidates(wrong, 8)) != tokens_of(drafter.candidates((*wrong[:-1], 0), 8))
    chain, num_right = wrong, 0
    for position in range(6, 206):
        chain = (*chain, *tokens_of(drafter.candidates(chain, 1)))
        num_right += chain[-1] == ANSWER[position]
    assert num_right < 5


def test_it_says_nothing_in_or_to_an_unknown_prompt_or_past_the_answer() -> None:
    drafter = drafter_of(answer=(1, 2, 3))
    assert drafter.candidates(PROMPT[:-1], 2) == []
    assert drafter.candidates((9, 9, 9, 9), 2) == []
    assert len(drafter.candidates((*PROMPT, 1, 2), 2)) == 2
    assert drafter.candidates((*PROMPT, 1, 2, 3), 2) == []
    assert drafter.candidates((*PROMPT, 1, 2, 9, 9), 2) == []


def test_the_longest_prompt_that_fits_is_meant() -> None:
    drafter = ReplayDrafter([Recording((5,), (6, 1)), Recording((5, 6), (2, 3))], Accuracy(first=1.0))
    assert tokens_of(drafter.candidates((5, 6), 1)) == [2]
    assert tokens_of(drafter.candidates((5,), 1)) == [6]


def test_branches_follow_their_parents_and_survive_being_moved() -> None:
    drafter = drafter_of()
    sequence = opened(drafter)
    first, second = 11, 12
    sequence.branch([first, second], [2, 2], 2)
    said = sequence.branch([21, 22, 23], [4, 3, 4], 2)
    assert [sequence.chain(entry)[len(PROMPT) :] for entry in range(5, 8)] == [(second, 21), (first, 22), (second, 23)]
    assert said == [drafter.candidates((*PROMPT, *past), 2) for past in ((12, 21), (11, 22), (12, 23))]
    sequence.keep(3, [4, 7])
    assert sequence.chain(4) == (*PROMPT, second, 23)
    assert len(sequence) == 5
    assert sequence.append([31], 2) == drafter.candidates((*PROMPT, second, 23, 31), 2)
    sequence.keep(2)
    assert sequence.append(PROMPT[2:], 2) == drafter.candidates(PROMPT, 2)


def test_misuse_is_an_error() -> None:
    sequence = opened(drafter_of())
    sequence.branch([1, 2], [2, 2], 1)
    with pytest.raises(ValueError, match="chain"):
        sequence.append([3], 1)
    with pytest.raises(ValueError, match="rows"):
        sequence.branch([1] * 9, [2] * 9, 1)
    with pytest.raises(ValueError, match="behind"):
        sequence.branch([1], [5], 1)
    with pytest.raises(ValueError, match="keep"):
        sequence.keep(3, [4, 3])
    with pytest.raises(ValueError, match="keep"):
        sequence.keep(6)
    with pytest.raises(KeyError):
        opened(drafter_of()).keep(1, [2])


def test_every_pass_takes_its_time_however_many_rows_it_has() -> None:
    pass_s = 0.02
    sequence = opened(drafter_of(pass_s=pass_s))
    for num_rows in (8, 1):
        started_s = time.monotonic()
        sequence.branch(range(num_rows), [2] * num_rows, 8)
        assert time.monotonic() - started_s >= pass_s


def test_recordings_go_through_a_file(tmp_path: Path) -> None:
    recordings = [Recording((1, 2), (3, 4, 5)), Recording((6,), ())]
    write_recordings(tmp_path / "new" / "recordings.json", recordings)
    assert read_recordings(tmp_path / "new" / "recordings.json") == recordings


def test_it_is_a_drafter() -> None:
    drafter: Drafter = drafter_of()
    assert drafter.max_width == 8
