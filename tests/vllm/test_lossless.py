"""The promise: with any edge, the server's output is exactly the same as without one."""

from dataclasses import replace
from pathlib import Path

import pytest

from edge_client.drafters.ngram import NgramDrafter

from .conftest import (
    NUM_PROMPTS,
    NUM_TOKENS,
    Completion,
    Target,
    assert_same,
    counting,
    replay,
    running_edge,
    said_while_an_edge_dies,
)

NUM_COMMITTED = NUM_PROMPTS * (NUM_TOKENS - 1)


def test_without_an_edge(edge_target: Target, prompts: list[str], expected: list[Completion]) -> None:
    with counting(edge_target) as counted:
        assert_same(expected, edge_target.greedy_all(prompts))
        counted.settle(NUM_COMMITTED)
        assert counted["verified_tokens"] == 0


@pytest.mark.parametrize("max_width", [1, 8])
def test_honest_edge(edge_target: Target, prompts: list[str], expected: list[Completion], max_width: int) -> None:
    """Without branches, and with."""
    with running_edge(edge_target, replay(expected, 0.8, max_width)), counting(edge_target) as counted:
        assert_same(expected, edge_target.greedy_all(prompts))
        counted.settle(NUM_COMMITTED)
        assert counted["accepted_tokens"] > 0.2 * NUM_COMMITTED
        accepted, verified = counted.together("accepted_tokens", "verified_tokens")
        assert verified > accepted
        assert (counted["tree_hits"] > 0) == (max_width > 1)


def test_prompt_lookup_edge(edge_target: Target, prompts: list[str], expected: list[Completion]) -> None:
    with running_edge(edge_target, NgramDrafter()), counting(edge_target) as counted:
        assert_same(expected, edge_target.greedy_all(prompts))
        counted.settle(NUM_COMMITTED)
        assert counted["accepted_tokens"] > 0


def test_garbage_edge(edge_target: Target, prompts: list[str], expected: list[Completion]) -> None:
    """It is sure of everything and right about nothing."""
    garbage = [replace(completion, token_ids=completion.token_ids[::-1]) for completion in expected]
    with running_edge(edge_target, replay(garbage)), counting(edge_target) as counted:
        assert_same(expected, edge_target.greedy_all(prompts))
        counted.settle(NUM_COMMITTED)
        assert counted["verified_tokens"] > 20
        # One or two tokens of a reversed text are right; the edge soon stops proposing, so few are verified.
        accepted, verified = counted.together("accepted_tokens", "verified_tokens")
        assert accepted < 0.2 * verified


def test_edge_killed_in_the_middle(
    edge_target: Target, prompts: list[str], expected: list[Completion], tmp_path: Path
) -> None:
    for got in said_while_an_edge_dies(edge_target, lambda: edge_target.greedy_all(prompts), "accepted", tmp_path):
        assert_same(expected, got)
