"""Of which commits an edge hears at once: vllm_specedge/policy/coalescing.py."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_specedge.policy.coalescing import REST_AFTER, REST_TOKENS, UNUSED_AFTER, Rest

unused = st.sampled_from([0, UNUSED_AFTER, UNUSED_AFTER + 1])
commits = st.lists(st.tuples(st.integers(1, 9), st.booleans(), st.booleans(), unused), max_size=200)


def test_who_has_no_drafts_hears_of_every_token() -> None:
    rest = Rest()
    assert all(rest.committed(1, is_refused=False, is_verified=False) for _ in range(10 * REST_AFTER))


def test_drafts_that_are_verified_now_and_then_keep_an_edge_awake() -> None:
    rest = Rest()
    assert all(rest.committed(1, number % REST_AFTER != 0, number % REST_AFTER == 0) for number in range(100))


@given(commits)
def test_no_more_is_collected_than_it_says_and_nothing_of_what_was_verified(
    commits: list[tuple[int, bool, bool, int]],
) -> None:
    rest, collected = Rest(), 0
    for num_tokens, is_refused, is_verified, num_unused in commits:
        collected += num_tokens
        if rest.committed(num_tokens, is_refused and not is_verified, is_verified, 0 if is_verified else num_unused):
            collected = 0
        assert collected < REST_TOKENS
        assert not (is_verified and collected)
