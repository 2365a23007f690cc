"""What an edge really said, said again over a bad network: the answer is the target's."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from edge_client.link import Gateway, Link
from vllm_specedge.frames import PROTOCOL_VERSION, Commit, Frame, Hello, Open, Propose, Welcome

from .conftest import Target, counting

TRACE = json.loads(Path(__file__).with_name("trace.json").read_text())
"""One request's prompt and answer, and its edge's proposals: seconds after its Open, base, tokens, branches. Recorded
from `benchmarks/replay.py` behind a relay of 20 ms."""
NUM_TOKENS = len(TRACE["answer"])


@dataclass
class BadNetwork:
    """Sends the trace's proposals for every request that is opened: late by up to `jitter_s`, so that they overtake
    each other, some twice, some never."""

    target: Target
    seed: int
    loss: float = 0.1
    doubling: float = 0.1
    jitter_s: float = 0.2
    welcomed: threading.Event = field(default_factory=threading.Event)
    num_sent: int = 0
    _link: Link = field(init=False)

    def __post_init__(self) -> None:
        hello = Hello(PROTOCOL_VERSION, "test", "trace", "pool", "", 8)
        self._link = Link(Gateway(self.target.server.gateway_url), hello, self._take)
        self._random = Random(self.seed)

    def _take(self, frame: Frame) -> None:
        match frame:
            case Welcome():
                self.welcomed.set()
            case Open():
                self._replay(frame.request)
            case Commit() | _:
                pass

    def _replay(self, request: int) -> None:
        loop = asyncio.get_running_loop()
        for after_s, base, tokens, branches in TRACE["proposals"]:
            for _ in range(self._num_copies()):
                frame = Propose(request, base, tuple(tokens), tuple(branches))
                loop.call_later(after_s + self._random.random() * self.jitter_s, self._send, frame)

    def _num_copies(self) -> int:
        return (self._random.random() >= self.loss) + (self._random.random() < self.doubling)

    def _send(self, frame: Frame) -> None:
        self.num_sent += 1
        self._link.send(frame)

    async def run(self) -> None:
        with suppress(asyncio.CancelledError):
            await self._link.run()


@contextmanager
def replaying(target: Target, seed: int) -> Iterator[BadNetwork]:
    """Connected, in a thread."""
    loop = asyncio.new_event_loop()
    network = BadNetwork(target, seed)
    task = loop.create_task(network.run())
    thread = threading.Thread(target=loop.run_until_complete, args=(task,))
    thread.start()
    try:
        assert network.welcomed.wait(10), "the edge was not admitted"
        yield network
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(10)
        loop.close()


@pytest.mark.parametrize("seed", [1, 2])
def test_a_recorded_trace_over_a_bad_network(plain: Target, edge_target: Target, seed: int) -> None:
    prompt = TRACE["prompt"]
    want = plain.greedy(prompt, NUM_TOKENS)
    with replaying(edge_target, seed) as network, counting(edge_target) as counted:
        have = edge_target.greedy(prompt, NUM_TOKENS)
        counted.settle(NUM_TOKENS - 1)
        assert network.num_sent > len(TRACE["proposals"]) / 2
        assert counted["proposed_tokens"] > 0
        assert counted["accepted_tokens"] > 0
        assert counted["discarded_late"] + counted["discarded_mismatch"] + counted["discarded_gap"] > 0
    assert have.token_ids == want.token_ids
