import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.drafters import Candidate
from edge_client.drafters.ngram import MAX_NGRAM, MAX_PLACES, MIN_NGRAM, NgramDrafter, NgramSequence


def naive(tokens: list[int]) -> list[Candidate]:
    """By a plain search: the token after each earlier copy of the context's end, longest and then latest first."""
    found = [
        tokens[end]
        for length in range(min(MAX_NGRAM, len(tokens)), MIN_NGRAM - 1, -1)
        for end in range(len(tokens) - 1, length - 1, -1)
        if tokens[end - length : end] == tokens[-length:]
    ]
    shares = dict.fromkeys(found[:MAX_PLACES], 0.0)
    for rank, token in enumerate(found[:MAX_PLACES], 1):
        shares[token] += 0.5**rank
    return [Candidate(token, share) for token, share in shares.items()]


acts = st.lists(
    st.tuples(st.integers(0, 8), st.lists(st.integers(0, 2), min_size=1, max_size=10), st.integers(1, 3)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=100)
@given(acts)
def test_it_finds_what_a_plain_search_finds_after_any_cut(acts: list[tuple[int, list[int], int]]) -> None:
    sequence, tokens = NgramSequence(), list[int]()
    for num_forgotten, more, width in acts:
        length = max(0, len(tokens) - num_forgotten)
        sequence.keep(length)
        tokens = tokens[:length] + more
        assert sequence.append(more, width) == naive(tokens)[:width]


@given(st.lists(st.integers(0, 1), min_size=1, max_size=40))
def test_probabilities_are_such(tokens: list[int]) -> None:
    """Candidates are sorted by them."""
    said = [candidate.probability for candidate in NgramSequence().append(tokens, 3)]
    assert said == sorted(said, reverse=True)
    assert all(0 < probability < 1 for probability in said)
    assert sum(said) < 1


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30))
def test_forgetting_everything_leaves_nothing(tokens: list[int]) -> None:
    sequence = NgramSequence()
    sequence.append(tokens, 1)
    sequence.keep(0)
    assert not sequence._tokens
    assert not sequence._ends


def test_entries_that_move_in_a_chain_are_there_already() -> None:
    sequence = NgramSequence()
    sequence.append([1, 2, 3, 1, 9], 1)
    sequence.keep(2, [2, 3])
    assert sequence._tokens == [1, 2, 3, 1]


def test_a_longer_match_goes_before_a_later_one() -> None:
    first, second = NgramSequence().append([1, 2, 3, 7, 2, 3, 8, 1, 2, 3], 2)
    assert (first.token, second.token) == (7, 8)
    assert NgramSequence().append([1, 2, 3, 7, 2, 3, 8, 1, 2, 3], 1) == [first]


def test_it_suits_any_tokenizer_and_drafts_chains() -> None:
    drafter = NgramDrafter()
    assert drafter.fingerprint == ""
    assert drafter.max_width == 1
    sequence = drafter.open()
    assert sequence.append([5, 6], 1) == []
    with pytest.raises(NotImplementedError):
        sequence.branch([7], [1], 1)
