from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.drafters.ngram import MAX_NGRAM, MIN_NGRAM, NgramDrafter, NgramSequence


def naive(tokens: list[int]) -> int | None:
    """What followed the latest earlier place where the longest run that ends `tokens` stood."""
    for length in range(min(MAX_NGRAM, len(tokens)), MIN_NGRAM - 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                return tokens[end]
    return None


acts = st.lists(
    st.tuples(st.integers(0, 8), st.lists(st.integers(0, 1), min_size=4, max_size=10)), min_size=1, max_size=12
)


@settings(max_examples=100)
@given(acts)
def test_it_finds_what_a_plain_search_finds_after_any_truncation(acts: list[tuple[int, list[int]]]) -> None:
    sequence, tokens = NgramSequence(), list[int]()
    for num_forgotten, more in acts:
        length = max(0, len(tokens) - num_forgotten)
        sequence.truncate(length)
        tokens = tokens[:length] + more
        assert sequence.extend(more) == naive(tokens)


@given(st.lists(st.integers(0, 2), max_size=30))
def test_forgetting_everything_leaves_nothing(tokens: list[int]) -> None:
    sequence = NgramSequence()
    sequence.extend(tokens)
    sequence.truncate(0)
    assert not sequence._tokens
    assert not sequence._ends


def test_truncating_past_the_end_forgets_nothing() -> None:
    sequence = NgramSequence()
    sequence.extend([1, 2, 3, 1, 2])
    sequence.truncate(9)
    assert sequence.extend([]) == 3


def test_a_longer_match_goes_before_a_later_one() -> None:
    assert NgramSequence().extend([1, 2, 3, 7, 2, 3, 8, 1, 2, 3]) == 7


def test_it_suits_any_tokenizer() -> None:
    assert NgramDrafter().fingerprint == ""
    assert NgramDrafter().open().extend([5, 6]) is None
