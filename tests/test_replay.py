"""The drafter that replays recorded answers: benchmarks/harness/replay.py."""

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import fmean

import pytest

from benchmarks.harness.replay import (
    Accuracy,
    Recording,
    ReplayDrafter,
    ReplaySequence,
    Stalls,
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
    with pytest.raises(ValueError, match="kept"):
        sequence.keep(3, [4, 3])
    with pytest.raises(ValueError, match="kept"):
        sequence.keep(6)
    with pytest.raises(ValueError, match="kept"):
        opened(drafter_of()).keep(1, [2])


def test_every_pass_takes_its_time_however_many_rows_it_has() -> None:
    pass_s = 0.02
    sequence = opened(drafter_of(pass_s=pass_s))
    for num_rows in (8, 1):
        started_s = time.monotonic()
        sequence.branch(range(num_rows), [2] * num_rows, 8)
        assert time.monotonic() - started_s >= pass_s


def test_a_chain_is_the_same_however_its_entries_came_to_be_where_they_are() -> None:
    """Against the plain definition: each entry's tokens by way of its parents."""
    chance = Random(3)
    sequence = opened(drafter_of())
    chains = [PROMPT[: end + 1] for end in range(3)]
    for _ in range(200):
        is_chain = all(one == other[:-1] for one, other in pairwise(chains))
        if chance.random() < 0.4 and is_chain:
            tokens = [chance.randrange(1000) for _ in range(chance.randrange(1, 4))]
            sequence.append(tokens, 1)
            for token in tokens:
                chains.append((*chains[-1], token))
        elif chance.random() < 0.6:
            parents = [chance.randrange(len(chains)) for _ in range(chance.randrange(1, 9))]
            tokens = [chance.randrange(1000) for _ in parents]
            sequence.branch(tokens, parents, 1)
            chains += [(*chains[parent], token) for parent, token in zip(parents, tokens, strict=True)]
        else:
            entry = chance.randrange(len(chains))
            path = [chains.index(chains[entry][: end + 1]) for end in range(len(chains[entry]))]
            length = next((at for at, number in enumerate(path) if number != at), len(path))
            sequence.keep(length, path[length:])
            chains = [chains[number] for number in path]
        assert [sequence.chain(entry) for entry in range(len(sequence))] == chains
    assert sequence.chain(-1) == ()


def test_stalls_last_as_long_and_come_as_often_as_they_are_told_to() -> None:
    stalls = Stalls(2.0, 5.0, seed=1, now_s=100.0)
    times = [100 + 0.01 * step for step in range(200_000)]
    ends = [stalls.over_s(at_s) for at_s in times]
    held = {end for at_s, end in zip(times, ends, strict=True) if end > at_s}
    assert all(at_s <= end <= at_s + 2.0 + 1e-9 for at_s, end in zip(times, ends, strict=True))
    assert len(held) == pytest.approx(2000 / 5, rel=0.1)
    assert fmean(end > at_s for at_s, end in zip(times, ends, strict=True)) == pytest.approx(0.4, rel=0.1)


def test_stalls_hang_on_the_seed_and_not_on_when_they_are_asked_for() -> None:
    often, seldom, other = (Stalls(2.0, 5.0, seed, now_s=0.0) for seed in (1, 1, 2))
    ends = {step: often.over_s(step / 10) for step in range(3000)}
    assert all(seldom.over_s(step / 10) == ends[step] for step in range(0, 3000, 70))
    assert [other.over_s(step / 10) for step in range(3000)] != list(ends.values())


def test_stalls_longer_than_their_distance_are_an_error() -> None:
    with pytest.raises(ValueError, match="every"):
        Stalls(5.0, 5.0, seed=0, now_s=0.0)


def test_a_pass_in_a_stall_lasts_until_its_end() -> None:
    stalls = Stalls(0.2, 0.4, seed=0, now_s=time.monotonic() - 100)
    sequence = ReplayDrafter([Recording(PROMPT, ANSWER)], ACCURACY, 0.001, vocab_size=1000, stalls=stalls).open()
    took_s = []
    for token in PROMPT + ANSWER[:100]:
        started_s = time.monotonic()
        sequence.append([token], 1)
        took_s.append(time.monotonic() - started_s)
    assert max(took_s) >= 0.05
    assert min(took_s) < 0.05


def test_recordings_go_through_a_file(tmp_path: Path) -> None:
    guesses = ((Candidate(3, 0.5), Candidate(9, 0.25)), (Candidate(4, 1.0),), ())
    recordings = [Recording((1, 2), (3, 4, 5), guesses), Recording((6,), ())]
    write_recordings(tmp_path / "new" / "recordings.json", recordings)
    assert read_recordings(tmp_path / "new" / "recordings.json") == recordings


def test_it_is_a_drafter() -> None:
    drafter: Drafter = drafter_of()
    assert drafter.max_width == 8


def test_passes_are_written_down_and_nothing_else_changes() -> None:
    trace: list[dict[str, float]] = []
    traced = ReplayDrafter([Recording(PROMPT, ANSWER)], ACCURACY, vocab_size=1000, trace=trace.append)
    sequence, plain = traced.open(), drafter_of().open()
    assert sequence.append(PROMPT, 3) == plain.append(PROMPT, 3)
    assert sequence.branch([1, 2], [2, 2], 3) == plain.branch([1, 2], [2, 2], 3)
    sequence.keep(2)
    plain.keep(2)
    assert sequence.append(PROMPT[2:], 3) == plain.append(PROMPT[2:], 3)
    assert [line["rows"] for line in trace] == [3, 2, 1]
    assert all(line["start_s"] <= line["end_s"] for line in trace)


GUESSES = ((Candidate(1, 0.6), Candidate(2, 0.3)), (Candidate(4, 0.9), Candidate(3, 0.1)))


def test_a_recorded_draft_is_repeated_where_the_past_is_true_and_wrong_elsewhere() -> None:
    """Its right tokens, its wrong ones, and its probabilities."""
    drafter = ReplayDrafter([Recording(PROMPT, (2, 4), GUESSES)], Accuracy(first=1.0), vocab_size=1000)
    assert drafter.candidates(PROMPT, 2) == list(GUESSES[0])
    assert drafter.candidates((*PROMPT, 2), 1) == list(GUESSES[1][:1])
    assert drafter.candidates((*PROMPT, 2, 4), 2) == []
    wrong = drafter.candidates((*PROMPT, 1), 2)
    assert [each.probability for each in wrong] == [each.probability for each in GUESSES[1]]
    assert tokens_of(wrong) == tokens_of(drafter.candidates((*PROMPT, 1), 2))
    assert 4 not in tokens_of(wrong)


def test_a_wide_pass_takes_longer_if_rows_do() -> None:
    traced: list[dict[str, float]] = []
    drafter = ReplayDrafter([], ACCURACY, 0.005, trace=traced.append, row_s=0.02)
    for num_rows in (1, 4):
        with drafter.forward_pass(num_rows):
            pass
    took_s = [line["end_s"] - line["start_s"] for line in traced]
    assert took_s[0] >= 0.005
    assert took_s[1] >= 0.065
