"""A real edge's recorded proposals, replayed over a bad network: the answer is the target's."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import accumulate
from pathlib import Path
from random import Random

import pytest

from edge_client.gateway_link import Gateway, Link
from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.frames import PROTOCOL_VERSION, Commit, Hello, Open, Propose, Welcome

from .conftest import DEADLINE_S, Target, counting

TRACE = json.loads(Path(__file__).with_name("trace.json").read_text())
"""One request's prompt and answer, and its edge's proposals: seconds after its Open, base, tokens, branches. Recorded
from `benchmarks/harness/replay.py` behind a relay of 20 ms."""
NUM_TOKENS = len(TRACE["answer"])
MAX_LATE = 6
"""Tokens of the answer that are committed before a late proposal arrives: about 0.2 s when the trace was recorded."""


def proposals() -> list[tuple[int, Propose]]:
    """Each proposal with the most tokens that its edge can have known: that never decreases, and each starts with a
    known token, or one of the trunk after it."""
    bases = [base for _, base, _, _ in TRACE["proposals"]]
    known = [1 + base for base in accumulate(reversed(bases), min)][::-1]
    frames = [Propose(0, base, tuple(tokens), tuple(branches)) for _, base, tokens, branches in TRACE["proposals"]]
    return list(zip(known, frames, strict=True))


@dataclass
class BadNetwork:
    """Sends the trace's proposals for every request that is opened: late by up to MAX_LATE tokens, so that they
    overtake each other, some twice, some never.

    Arrival is counted in tokens of the answer and not in seconds, so it is the same on a machine of any speed. After
    each commit it sends an empty proposal, otherwise the server would wait for the lost ones.
    """

    target: Target
    seed: int
    loss: float = 0.1
    doubling: float = 0.1
    welcomed: threading.Event = field(default_factory=threading.Event)
    num_sent: int = 0
    _link: Link = field(init=False)
    _on_the_way: list[tuple[int, int, Propose]] = field(default_factory=list)
    """Proposals in flight, by arrival."""

    def __post_init__(self) -> None:
        hello = Hello(PROTOCOL_VERSION, "test", "trace", "pool", "", 8)
        self._link = Link(Gateway(self.target.server.gateway_url), hello, self._take)
        self._random = Random(self.seed)

    def _take(self, frame: Frame) -> None:
        match frame:
            case Welcome():
                self.welcomed.set()
            case Open():
                self._send_off(frame.request)
            case Commit():
                self._arrive(frame.request, frame.base + len(frame.tokens))
            case _:
                pass

    def _send_off(self, request: int) -> None:
        self._on_the_way.clear()
        for known, said in proposals():
            for _ in range(self._num_copies()):
                frame = Propose(request, said.base, said.tokens, said.branches)
                arrives = known + self._random.randint(0, MAX_LATE)
                heappush(self._on_the_way, (arrives, len(self._on_the_way), frame))

    def _num_copies(self) -> int:
        return (self._random.random() >= self.loss) + (self._random.random() < self.doubling)

    def _arrive(self, request: int, num_known: int) -> None:
        while self._on_the_way and self._on_the_way[0][0] <= num_known:
            self.num_sent += 1
            self._link.send(heappop(self._on_the_way)[2])
        self._link.send(Propose(request, num_known, ()))

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
        assert network.welcomed.wait(DEADLINE_S), "the edge was not admitted"
        yield network
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(DEADLINE_S)
        loop.close()


@pytest.mark.parametrize("seed", [1, 2])
def test_a_recorded_trace_over_a_bad_network(plain: Target, edge_target: Target, seed: int) -> None:
    prompt = TRACE["prompt"]
    want = plain.greedy(prompt, NUM_TOKENS)
    with replaying(edge_target, seed) as network, counting(edge_target) as counted:
        have = edge_target.greedy(prompt, NUM_TOKENS)
        counted.settle(NUM_TOKENS - 1)
        assert network.num_sent > len(TRACE["proposals"]) / 2
        for name in ("accepted_tokens", "discarded_late", "discarded_mismatch", "discarded_gap"):
            assert counted[name] > 0, name
    assert have.token_ids == want.token_ids
