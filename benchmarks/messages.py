"""`make bench-messages`: a gateway with many edges over TLS: what it adds to a frame's way, what one costs, and memory.

    PYTHONPATH=examples python benchmarks/messages.py [--edges 200] [--idle 1000] [--rate 20] [--together 16] [--plain]

A real gateway process on one core; edges (light_edge.py) and the engine's end of the line share the other. So many
edges have a request each, are told a commit and propose, each at its own time, so many times a second; others are only
there. Latency is from `send` at one end to the frame in the other's hands, by one clock. Last, the rate is raised until
the gateway's core is full or frames are late.
"""

import asyncio
import resource
import ssl
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import trustme
import typer
import uvloop
from certificates import write_certificate
from harness.light_edge import AUTHORITY, LightEdge
from overhead import GATEWAY_PORT, start_gateway
from stack import EDGE_CORE, SERVER_CORE

from vllm_specedge.engine.gateway_link import EngineLink
from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.engine_frames import EngineHello, EngineOpen
from vllm_specedge.wire.frames import PROTOCOL_VERSION, Commit, Open, Propose

VOCAB_SIZE = 1 << 22
PROMPT = (1, 2, 3, 4)
DRAFT = (5, 6, 7, 8)
DEADLINE_S = 60.0
HEARTBEAT_S = 2.0
AT_ONCE = 50
"""Handshakes."""
SATURATING = (40, 60, 80, 100)
"""Rates of an edge at which the gateway's bound is looked for."""
FULL = 0.95
HEADER = (
    "active + idle edges",
    "frames/s each way",
    "down p50 / p99 ms",
    "up p50 / p99 ms",
    "lost",
    "gateway us a frame",
    "its core",
)


@dataclass(frozen=True)
class Result:
    edges: str
    rate: float
    """Frames a second, each way, of all edges."""
    down_ms: tuple[float, float]
    up_ms: tuple[float, float]
    lost: int
    gateway_us: float
    """CPU time a frame."""
    busy: float
    """Of the gateway's core."""

    @property
    def is_full(self) -> bool:
        return self.busy > FULL or self.lost > 0

    def row(self) -> str:
        down, up = (f"{p50:.2f} / {p99:.2f}" for p50, p99 in (self.down_ms, self.up_ms))
        cells = (
            self.edges,
            f"{self.rate:,.0f}",
            down,
            up,
            str(self.lost),
            f"{self.gateway_us:.0f}",
            f"{self.busy:.0%}",
        )
        return f"| {' | '.join(cells)} |"


@dataclass
class Bench:
    """Edges that stay connected while one rate after the other is tried."""

    engine: EngineLink
    gateway: psutil.Process
    scheme: str
    context: ssl.SSLContext | None
    active: list[LightEdge] = field(default_factory=list)
    idle: list[LightEdge] = field(default_factory=list)
    _numbers: "count[int]" = field(default_factory=lambda: count(len(DRAFT)))
    _left_s: dict[int, float] = field(default_factory=dict)
    """When the frame that carries this token left."""
    _down_s: list[float] = field(default_factory=list)
    _up_s: list[float] = field(default_factory=list)
    _known: list[int] = field(default_factory=list)
    """Tokens of each active edge's request, as the engine knows it; its number is the edge's index."""

    async def connect(self, number: int, name: str) -> list[LightEdge]:
        """So many edges more, a few at a time."""
        loop, edges = asyncio.get_running_loop(), []
        for first in range(0, number, AT_ONCE):
            starting = [
                loop.create_connection(
                    lambda index=index: LightEdge(f"{name}-{index}", self.scheme, self._take),
                    "127.0.0.1",
                    GATEWAY_PORT,
                    ssl=self.context,
                    server_hostname=AUTHORITY if self.context else None,
                )
                for index in range(first, min(number, first + AT_ONCE))
            ]
            some = [edge for _, edge in await asyncio.gather(*starting)]
            async with asyncio.timeout(DEADLINE_S):
                await asyncio.gather(*(edge.is_live.wait() for edge in some))
            edges += some
        return edges

    async def open(self) -> None:
        """A request for each active edge."""
        for index in range(len(self.active)):
            self.engine.send([EngineOpen(index, len(PROMPT), 5, ""), Commit(index, 0, PROMPT)])
        self._known = [len(PROMPT)] * len(self.active)
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*(edge.is_told.wait() for edge in self.active))

    def _take(self, edge: LightEdge, frame: Frame) -> None:
        if isinstance(frame, Open):
            edge.request = frame.request
        elif isinstance(frame, Commit):
            edge.known = frame.base + len(frame.tokens)
            edge.is_told.set()
            left_s = self._left_s.pop(frame.tokens[0], None)
            if left_s is not None:
                self._down_s.append(time.monotonic() - left_s)

    async def beat(self) -> None:
        """Everybody's heartbeats, spread evenly, for ever."""
        while True:
            edges = [*self.active, *self.idle]
            for edge in edges:
                edge.ping()
                await asyncio.sleep(HEARTBEAT_S / len(edges))

    async def run(self, rate: float, seconds: float, together: int) -> Result:
        """`rate`: of one edge. `together`: so many commits leave the engine at once, as those of a step do."""
        self.engine.inbox.clear()
        self._left_s.clear()
        self._down_s.clear()
        self._up_s.clear()
        before, started_s = self.gateway.cpu_times(), time.monotonic()
        num_sent = await self._send(rate, seconds, together, started_s)
        took_s, after = time.monotonic() - started_s, self.gateway.cpu_times()
        await asyncio.sleep(0.5)  # what is on its way
        self._hear()
        used_s = after.user + after.system - before.user - before.system
        return Result(
            edges=f"{len(self.active)} + {len(self.idle)}",
            rate=num_sent / took_s,
            down_ms=percentiles_ms(self._down_s),
            up_ms=percentiles_ms(self._up_s),
            lost=2 * num_sent - len(self._up_s) - len(self._down_s),
            gateway_us=1e6 * used_s / (2 * num_sent),
            busy=used_s / took_s,
        )

    def _hear(self) -> None:
        """What has come to the engine's end, whose inbox is bounded."""
        while self.engine.inbox:
            at_s, frame = self.engine.inbox.popleft()
            if isinstance(frame, Propose):
                self._up_s.append(at_s - self._left_s[frame.tokens[0]])

    async def _send(self, rate: float, seconds: float, together: int, started_s: float) -> int:
        """A commit and a proposal of each edge in its turn; how many of each."""
        total = round(rate * seconds) * len(self.active)
        pause_s = 1 / (rate * len(self.active))
        num_sent = 0
        while num_sent < total:
            await asyncio.sleep(max(0.0, started_s + num_sent * pause_s - time.monotonic()))
            num_due = max(together, int((time.monotonic() - started_s) / pause_s) - num_sent)
            indices = [number % len(self.active) for number in range(num_sent, num_sent + num_due)]
            self.engine.send([self._commit(index) for index in indices])
            for index in indices:
                self._propose(self.active[index])
            self._hear()
            num_sent += num_due
        return num_sent

    def _stamp(self) -> int:
        number = next(self._numbers) % VOCAB_SIZE
        self._left_s[number] = time.monotonic()
        return number

    def _commit(self, index: int) -> Commit:
        self._known[index] += 1
        return Commit(index, self._known[index] - 1, (self._stamp(),))

    def _propose(self, edge: LightEdge) -> None:
        assert edge.request is not None
        edge.send(Propose(edge.request, edge.known, (self._stamp(), *DRAFT)))


def percentiles_ms(seconds: Sequence[float]) -> tuple[float, float]:
    p50, p99 = np.percentile(seconds, (50, 99))
    return 1e3 * float(p50), 1e3 * float(p99)


async def measure(bench: Bench, edges: int, idle: int, rate: float, seconds: float, together: int) -> None:
    at_first = bench.gateway.memory_info().rss
    bench.active = await bench.connect(edges, "active")
    await bench.open()
    bench.idle = await bench.connect(idle, "idle")
    beating = asyncio.create_task(bench.beat())
    with_all = bench.gateway.memory_info().rss
    print(f"| {' | '.join(HEADER)} |\n|{' ---: |' * len(HEADER)}")
    for some in sorted({1, together}):
        print((await bench.run(rate, seconds, some)).row(), flush=True)
    after = bench.gateway.memory_info().rss
    for more in SATURATING:
        result = await bench.run(more, seconds / 2, 1)
        print(result.row(), flush=True)
        if result.is_full:
            break
    beating.cancel()
    num_closed = sum(edge.is_closed.is_set() for edge in (*bench.active, *bench.idle))
    per_connection = (with_all - at_first) / (edges + idle) / 1e3
    print(f"\n{per_connection:.0f} kB a connection; {(after - with_all) / 1e6:+.1f} MB while frames went through it")
    print(f"at first {at_first / 1e6:.0f} MB; connections lost: {num_closed}")


def main(
    edges: Annotated[int, typer.Option(help="Edges with a request.", min=1)] = 200,
    idle: Annotated[int, typer.Option(help="Edges without.", min=0)] = 1000,
    rate: Annotated[float, typer.Option(help="Frames of an edge a second, each way.")] = 20.0,
    seconds: Annotated[float, typer.Option(help="Each run.", min=1)] = 20.0,
    together: Annotated[int, typer.Option(help="Commits in one message of the engine's, in a second run.")] = 16,
    plain: Annotated[bool, typer.Option("--plain", help="Without TLS.")] = False,
) -> None:
    """Frames through a real gateway."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, edges + idle + 256), hard), hard))
    # The engine's thread and the edges' loop share this process; Python would let one wait 5 ms for the other.
    sys.setswitchinterval(0.0001)
    with tempfile.TemporaryDirectory() as name:
        options, context = ([], None) if plain else tls(Path(name))
        gateway, endpoint = start_gateway(Path(name), "--max-edges", str(edges + idle), *options)
        psutil.Process(gateway.popen.pid).cpu_affinity([SERVER_CORE])
        psutil.Process().cpu_affinity([EDGE_CORE])
        is_welcome = asyncio.Event()
        hello = EngineHello(PROTOCOL_VERSION, "bench", "", VOCAB_SIZE)

        async def run() -> None:
            loop = asyncio.get_running_loop()

            def wake() -> None:
                if not is_welcome.is_set():
                    loop.call_soon_threadsafe(is_welcome.set)

            engine = EngineLink(endpoint, hello, wake, lambda: ())
            engine.start()
            try:
                async with asyncio.timeout(DEADLINE_S):
                    await is_welcome.wait()
                bench = Bench(engine, psutil.Process(gateway.popen.pid), "http" if plain else "https", context)
                await measure(bench, edges, idle, rate, seconds, together)
            finally:
                engine.stop()

        try:
            uvloop.run(run())
        finally:
            gateway.stop()


def tls(directory: Path) -> tuple[list[str], ssl.SSLContext]:
    """A gateway's options for TLS, and what a client needs that trusts it."""
    authority = trustme.CA()
    context = ssl.create_default_context()
    authority.configure_trust(context)
    context.set_alpn_protocols(["h2"])
    return write_certificate(directory, authority, AUTHORITY), context


if __name__ == "__main__":
    typer.run(main)
