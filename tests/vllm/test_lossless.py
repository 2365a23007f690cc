"""The promise: with any edge, the server says exactly what it would say without one."""

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from stack import edge_client

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
    until,
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
        assert counted["verified_tokens"] > counted["accepted_tokens"]
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
        # A token or two of a text read backwards are right; the edge soon learns to be silent, so few are verified.
        assert counted["accepted_tokens"] < 0.2 * counted["verified_tokens"]


def test_edge_killed_in_the_middle(
    edge_target: Target, prompts: list[str], expected: list[Completion], tmp_path: Path
) -> None:
    """All are asked again and again until it is dead, so some are being answered when that happens."""
    is_killed = threading.Event()
    rounds: list[list[Completion]] = []

    def ask() -> None:
        while not is_killed.is_set():
            rounds.append(edge_target.greedy_all(prompts))

    with (
        edge_client(edge_target.server.gateway_url, "ngram", tmp_path / "edge.log") as process,
        ThreadPoolExecutor(1) as executor,
        counting(edge_target) as counted,
    ):
        asking = executor.submit(ask)
        try:
            until(lambda: counted["accepted_tokens"] > 0, "the edge was of no use")
            process.popen.send_signal(signal.SIGKILL)
            until(lambda: edge_target.server.metrics()["specedge_edges"] == 0, "its death was not noticed")
        finally:
            is_killed.set()
        asking.result()
    for got in rounds:
        assert_same(expected, got)
