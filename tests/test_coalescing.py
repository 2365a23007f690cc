"""Which commits are sent to an edge immediately: vllm_specedge/policy/coalescing.py."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_specedge.policy.coalescing import COALESCE_AFTER, COALESCED_TOKENS, UNUSED_AFTER, Coalescing

unused = st.sampled_from([0, UNUSED_AFTER, UNUSED_AFTER + 1])
commits = st.lists(st.tuples(st.integers(1, 9), st.booleans(), st.booleans(), unused), max_size=200)


def is_published(coalescing: Coalescing, num_tokens: int, is_refused: bool, is_verified: bool, unused: int = 0) -> bool:
    """Whether a commit is published, with all that was collected before it."""
    coalescing.committed(num_tokens, is_refused, is_verified, unused)
    is_due = coalescing.is_due
    if is_due:
        coalescing.published()
    return is_due


def test_every_commit_without_a_draft_is_published() -> None:
    coalescing = Coalescing()
    assert all(is_published(coalescing, 1, is_refused=False, is_verified=False) for _ in range(10 * COALESCE_AFTER))


def test_asking_whether_it_is_due_changes_nothing() -> None:
    coalescing = Coalescing()
    for _ in range(COALESCE_AFTER + COALESCED_TOKENS + 1):
        coalescing.committed(1, is_refused=True, is_verified=False)
        assert (
            coalescing.is_due
            == coalescing.is_due
            == (coalescing.num_collected >= COALESCED_TOKENS or coalescing.num_refused <= COALESCE_AFTER)
        )


def test_drafts_that_are_verified_now_and_then_keep_an_edge_awake() -> None:
    coalescing = Coalescing()
    for number in range(100):
        assert is_published(coalescing, 1, number % COALESCE_AFTER != 0, number % COALESCE_AFTER == 0)


@given(commits)
def test_no_more_is_collected_than_it_says_and_nothing_of_what_was_verified(
    commits: list[tuple[int, bool, bool, int]],
) -> None:
    coalescing, collected = Coalescing(), 0
    for num_tokens, is_refused, is_verified, num_unused in commits:
        collected += num_tokens
        unused = 0 if is_verified else num_unused
        if is_published(coalescing, num_tokens, is_refused and not is_verified, is_verified, unused):
            collected = 0
        assert collected < COALESCED_TOKENS
        assert not (is_verified and collected)
