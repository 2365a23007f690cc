"""The promise: with any edge, the server says exactly what it would say without one."""

import signal
import threading
from pathlib import Path

from stack import edge_client

from edge_client.drafters.ngram import NgramDrafter

from .conftest import (
    NUM_PROMPTS,
    NUM_TOKENS,
    Completion,
    ReplayDrafter,
    Target,
    assert_same,
    counting,
    running_edge,
)

NUM_COMMITTED = NUM_PROMPTS * (NUM_TOKENS - 1)


def test_without_an_edge(edge_target: Target, prompts: list[str], expected: list[Completion]) -> None:
    with counting(edge_target) as counted:
        assert_same(expected, edge_target.greedy_all(prompts))
        counted.settle(NUM_COMMITTED)
        assert counted["verified_tokens"] == 0


def test_honest_edge(edge_target: Target, prompts: list[str], expected: list[Completion]) -> None:
    with running_edge(edge_target, ReplayDrafter(expected, accuracy=0.8)), counting(edge_target) as counted:
        assert_same(expected, edge_target.greedy_all(prompts))
        counted.settle(NUM_COMMITTED)
        assert counted["accepted_tokens"] > 0.2 * NUM_COMMITTED
        assert counted["verified_tokens"] > counted["accepted_tokens"]


def test_prompt_lookup_edge(edge_target: Target, prompts: list[str], expected: list[Completion]) -> None:
    with running_edge(edge_target, NgramDrafter()), counting(edge_target) as counted:
        assert_same(expected, edge_target.greedy_all(prompts))
        assert counted["accepted_tokens"] > 0


def test_garbage_edge(edge_target: Target, prompts: list[str], expected: list[Completion]) -> None:
    with running_edge(edge_target, ReplayDrafter((), accuracy=0.0)), counting(edge_target) as counted:
        assert_same(expected, edge_target.greedy_all(prompts))
        counted.settle(NUM_COMMITTED)
        assert counted["verified_tokens"] > 100
        assert counted["accepted_tokens"] < 0.02 * counted["verified_tokens"]


def test_edge_killed_in_the_middle(
    edge_target: Target, prompts: list[str], expected: list[Completion], tmp_path: Path
) -> None:
    with edge_client(edge_target.server.gateway_url, "ngram", tmp_path / "edge.log") as process:
        got: list[Completion] = []
        asking = threading.Thread(target=lambda: got.extend(edge_target.greedy_all(prompts)))
        with counting(edge_target) as counted:
            asking.start()
            counted.settle(NUM_COMMITTED // 4)
            assert asking.is_alive()
            process.popen.send_signal(signal.SIGKILL)
            asking.join(120)
    assert_same(expected, got)
