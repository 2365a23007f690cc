"""`make bench-messages`: frames through a real gateway: what it adds to their way, and what a frame costs it.

    PYTHONPATH=examples python benchmarks/messages.py [--edges 16] [--rate 20 --rate 200]

A gateway process on one core; edges (real links over HTTP/2, one request each) and the engine's end of the line share
the other. Each edge is told a commit and proposes, so many times a second. Latency is from `send` at one end to the
frame in the other's hands, by one clock. What one core of the gateway can do at most follows from its CPU time a frame,
for the senders' core is full before.
"""

import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer
from overhead import GATEWAY_PORT, start_gateway
from stack import EDGE_CORE, SERVER_CORE, wait_for

from edge_client.link import Gateway, Link
from vllm_specedge.frames import PROTOCOL_VERSION, Commit, EngineHello, Frame, Hello, Open, Propose
from vllm_specedge.link import EngineLink

URL = f"http://127.0.0.1:{GATEWAY_PORT}"
VOCAB_SIZE = 1 << 22
PROMPT = (1, 2, 3, 4)
DRAFT = (5, 6, 7, 8)
DEADLINE_S = 30.0
HEADER = ("edges", "frames/s each way", "down p50 / p99 ms", "up p50 / p99 ms", "lost", "gateway us a frame", "a core")


@dataclass
class Edge:
    """One edge with one request, whose commits it has."""

    request: int
    sent_s: dict[int, float]
    """When the engine sent the commits of this position, to all edges."""
    took_s: list[float] = field(default_factory=list)
    """On the way down."""
    number: int | None = None
    """Of its request, on its connection."""
    is_ready: asyncio.Event = field(default_factory=asyncio.Event)
    link: Link = field(init=False)

    def __post_init__(self) -> None:
        hello = Hello(PROTOCOL_VERSION, "bench", f"bench-{self.request}", "pool", "", 1)
        self.link = Link(Gateway(URL), hello, self._on_frame)

    def _on_frame(self, frame: Frame) -> None:
        now_s = time.monotonic()
        if isinstance(frame, Open):
            self.number = frame.request
        elif isinstance(frame, Commit):
            self.is_ready.set()
            if frame.base in self.sent_s:
                self.took_s.append(now_s - self.sent_s[frame.base])


@dataclass(frozen=True)
class Result:
    edges: int
    rate: float
    """Frames a second, each way, of all edges."""
    down_ms: dict[str, float]
    up_ms: dict[str, float]
    lost: int
    gateway_us: float
    """CPU time a frame."""

    def row(self) -> list[str]:
        down, up = (f"{ms['p50']:.2f} / {ms['p99']:.2f}" for ms in (self.down_ms, self.up_ms))
        return [
            str(self.edges),
            f"{self.rate:,.0f}",
            down,
            up,
            str(self.lost),
            f"{self.gateway_us:.0f}",
            f"{1e6 / self.gateway_us:,.0f}",
        ]


class Bench:
    """Edges that stay connected while one rate after the other is tried."""

    def __init__(self, engine: EngineLink, gateway: psutil.Process, num_edges: int) -> None:
        self._engine = engine
        self._gateway = gateway
        self._sent_s: dict[int, float] = {}
        self._edges = [Edge(number, self._sent_s) for number in range(num_edges)]
        self._known = len(PROMPT)
        self._numbers = count(len(DRAFT))
        self._left_s: dict[int, float] = {}
        """When the proposal that carries this token left its edge."""

    async def connect(self) -> list["asyncio.Task[None]"]:
        running = [asyncio.create_task(edge.link.run()) for edge in self._edges]
        for edge in self._edges:
            self._engine.send([Open(edge.request, len(PROMPT), 5, 5, ""), Commit(edge.request, 0, PROMPT)])
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*(edge.is_ready.wait() for edge in self._edges))
        return running

    async def run(self, rate: float, seconds: float) -> Result:
        """`rate`: of one edge."""
        for edge in self._edges:
            edge.took_s.clear()
        self._engine.inbox.clear()
        self._left_s.clear()
        self._sent_s.clear()
        before, started_s = self._gateway.cpu_times(), time.monotonic()
        num_rounds = round(rate * seconds)
        for number in range(num_rounds):
            await asyncio.sleep(max(0.0, started_s + number / rate - time.monotonic()))
            self._round()
        took_s = time.monotonic() - started_s
        await asyncio.sleep(0.5)  # what is on its way
        after = self._gateway.cpu_times()
        up = [
            at_s - self._left_s[frame.tokens[0]]
            for at_s, frame in list(self._engine.inbox)
            if isinstance(frame, Propose)
        ]
        down = [each for edge in self._edges for each in edge.took_s]
        num_sent = 2 * num_rounds * len(self._edges)
        used_s = after.user + after.system - before.user - before.system
        return Result(
            edges=len(self._edges),
            rate=num_rounds * len(self._edges) / took_s,
            down_ms=percentiles_ms(down),
            up_ms=percentiles_ms(up),
            lost=num_sent - len(up) - len(down),
            gateway_us=1e6 * used_s / num_sent,
        )

    def _round(self) -> None:
        """A commit for each request, as an engine's step sends them, and a proposal of each edge."""
        self._sent_s[self._known] = time.monotonic()
        self._engine.send([Commit(edge.request, self._known, (1,)) for edge in self._edges])
        self._known += 1
        for edge in self._edges:
            assert edge.number is not None
            number = next(self._numbers) % VOCAB_SIZE
            self._left_s[number] = time.monotonic()
            edge.link.send(Propose(edge.number, self._known, (number, *DRAFT)))


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{part}": 1e3 * float(np.percentile(seconds, part)) for part in (50, 99)}


async def measure(
    engine: EngineLink, gateway: psutil.Process, edges: int, rates: Sequence[float], seconds: float
) -> None:
    bench = Bench(engine, gateway, edges)
    running = await bench.connect()
    print(f"| {' | '.join(HEADER)} |\n|{' ---: |' * len(HEADER)}")
    for rate in rates:
        result = await bench.run(rate, seconds)
        print(f"| {' | '.join(result.row())} |", flush=True)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


def main(
    edges: Annotated[int, typer.Option(help="Connections.", min=1)] = 16,
    rate: Annotated[list[float] | None, typer.Option(help="Frames of an edge a second, each way; again.")] = None,
    seconds: Annotated[float, typer.Option(help="Each.", min=1)] = 5.0,
) -> None:
    """Frames through a real gateway."""
    with tempfile.TemporaryDirectory() as name:
        gateway, endpoint = start_gateway(Path(name))
        psutil.Process(gateway.popen.pid).cpu_affinity([SERVER_CORE])
        psutil.Process().cpu_affinity([EDGE_CORE])
        hello = EngineHello(PROTOCOL_VERSION, "bench", "", VOCAB_SIZE)
        engine = EngineLink(endpoint, hello, lambda: None, lambda: ())
        engine.start()
        try:
            wait_for(gateway, f"{URL}/healthz", "engines", 1)
            asyncio.run(measure(engine, psutil.Process(gateway.popen.pid), edges, rate or (20, 100, 400), seconds))
        finally:
            engine.stop()
            gateway.stop()


if __name__ == "__main__":
    typer.run(main)
