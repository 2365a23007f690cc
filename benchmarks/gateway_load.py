"""Cost and latency of a gateway: with frames of many edges, or with one attached edge and its engine.

    PYTHONPATH=examples python benchmarks/gateway_load.py messages [--edges 200] [--idle 1000] [--rate 20] [--plain]
    PYTHONPATH=examples python benchmarks/gateway_load.py overhead [--without-vllm]

`messages` (`make bench-messages`): a real gateway process on one core, over TLS; edges (light_edge.py) and the engine's
end of the link share the other. The active edges have a request each, receive a commit and send a proposal at a given
rate, each at its own time; the others are only connected. Latency is from `send` at one end until the other has the
frame, by one clock. At the end, the rate is raised until the gateway's core is full or frames are late.

`overhead` (`make bench-overhead`): memory of the gateway and of an edge client without a model, the time from a
proposal leaving the edge to the scheduler's inbox, vLLM's start-up with and without edges, and the cost of an engine
whose only request waits. Prints a table, then one JSON line; asserts nothing.
"""

import asyncio
import json
import resource
import ssl
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import SplitResult, urlsplit

import psutil
import typer
import uvloop
from harness import results
from harness.edges import REPLAY, drafting, flags
from harness.gateways import VOCAB_SIZE, gateway, percentiles_ms, tls
from harness.light_edge import AUTHORITY, LightEdge
from harness.results import Column, table
from harness.servers import edge, launch, stand_aside, story
from stack import SERVER_CORE, edge_client

from edge_client.gateway_link import Gateway, Link
from vllm_specedge.engine.gateway_link import EngineLink
from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.engine_frames import EngineOpen
from vllm_specedge.wire.frames import PROTOCOL_VERSION, Commit, Hello, Open, Propose, Welcome

LOGS = results.LOGS / "gateway"
PROMPT = (1, 2, 3, 4)
DRAFT = (5, 6, 7, 8)
DEADLINE_S = 60.0
HEARTBEAT_S = 2.0
AT_ONCE = 50
"""Most concurrent handshakes."""
SATURATING = (40, 60, 80, 100)
"""Rates per edge to try in the search for the gateway's limit."""
FULL = 0.95
NUM_PROPOSALS, PROPOSALS_PER_S = 300, 25
PARKED_S, ANSWER_S, ANSWER_TOKENS = 8.0, 1.0, 24

app = typer.Typer(add_completion=False)


# -- many edges' frames ----------------------------------------------------------------------------------------------

COLUMNS = (
    Column("active + idle edges", "edges"),
    Column("frames/s each way", "rate", ",.0f"),
    Column("down p50 / p99 ms", lambda row: "{:.2f} / {:.2f}".format(*row["down_ms"])),
    Column("up p50 / p99 ms", lambda row: "{:.2f} / {:.2f}".format(*row["up_ms"])),
    Column("lost", "lost"),
    Column("gateway us per frame", "gateway_us", ".0f"),
    Column("its core", "busy", ".0%"),
)


@dataclass
class Bench:
    """Edges that stay connected while one rate after another is tried."""

    engine: EngineLink
    gateway: psutil.Process
    url: SplitResult
    context: ssl.SSLContext | None
    active: list[LightEdge] = field(default_factory=list)
    idle: list[LightEdge] = field(default_factory=list)
    _numbers: "count[int]" = field(default_factory=lambda: count(len(DRAFT)))
    _left_s: dict[int, float] = field(default_factory=dict)
    """Send time of the frame with this token."""
    _down_s: list[float] = field(default_factory=list)
    _up_s: list[float] = field(default_factory=list)
    _known: list[int] = field(default_factory=list)
    """Number of tokens of each active edge's request in the engine; its number is the edge's index."""

    async def connect(self, number: int, name: str) -> list[LightEdge]:
        """Connect `number` more edges, a few at a time."""
        loop, edges = asyncio.get_running_loop(), []
        for first in range(0, number, AT_ONCE):
            starting = [
                loop.create_connection(
                    lambda index=index: LightEdge(f"{name}-{index}", self.url.scheme, self._take),
                    self.url.hostname,
                    self.url.port,
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
        """Open a request for each active edge."""
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
        """Send the heartbeats of all edges, spread evenly, until cancelled."""
        while True:
            edges = [*self.active, *self.idle]
            for each in edges:
                each.ping()
                await asyncio.sleep(HEARTBEAT_S / len(edges))

    async def run(self, rate: float, seconds: float, together: int) -> dict[str, Any]:
        """Measure one row. `rate`: per edge. `together`: commits in one message of the engine, as in a step."""
        self.engine.inbox.clear()
        self._left_s.clear()
        self._down_s.clear()
        self._up_s.clear()
        before, started_s = self.gateway.cpu_times(), time.monotonic()
        num_sent = await self._send(rate, seconds, together, started_s)
        took_s, after = time.monotonic() - started_s, self.gateway.cpu_times()
        await asyncio.sleep(0.5)  # for frames in flight
        self._hear()
        used_s = after.user + after.system - before.user - before.system
        return {
            "edges": f"{len(self.active)} + {len(self.idle)}",
            "rate": num_sent / took_s,
            "down_ms": percentiles_ms(self._down_s),
            "up_ms": percentiles_ms(self._up_s),
            "lost": 2 * num_sent - len(self._up_s) - len(self._down_s),
            "gateway_us": 1e6 * used_s / (2 * num_sent),
            "busy": used_s / took_s,
        }

    def _hear(self) -> None:
        """Read what has arrived at the engine's end, whose inbox is bounded."""
        while self.engine.inbox:
            at_s, frame = self.engine.inbox.popleft()
            if isinstance(frame, Propose):
                self._up_s.append(at_s - self._left_s[frame.tokens[0]])

    async def _send(self, rate: float, seconds: float, together: int, started_s: float) -> int:
        """Send a commit and a proposal of each edge in turn; returns the number of each."""
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


async def measure(bench: Bench, edges: int, idle: int, rate: float, seconds: float, together: int) -> None:
    at_first = bench.gateway.memory_info().rss
    bench.active = await bench.connect(edges, "active")
    await bench.open()
    bench.idle = await bench.connect(idle, "idle")
    beating = asyncio.create_task(bench.beat())
    with_all = bench.gateway.memory_info().rss
    rows = [await bench.run(rate, seconds, some) for some in sorted({1, together})]
    after = bench.gateway.memory_info().rss
    for more in SATURATING:
        rows.append(await bench.run(more, seconds / 2, 1))
        if rows[-1]["busy"] > FULL or rows[-1]["lost"]:
            break
    beating.cancel()
    print(table(COLUMNS, rows))
    num_closed = sum(edge.is_closed.is_set() for edge in (*bench.active, *bench.idle))
    per_connection = (with_all - at_first) / (edges + idle) / 1e3
    print(f"\n{per_connection:.0f} kB per connection; {(after - with_all) / 1e6:+.1f} MB while frames went through it")
    print(f"{at_first / 1e6:.0f} MB at the start; connections lost: {num_closed}")


@app.command()
def messages(
    edges: Annotated[int, typer.Option(help="Number of edges with a request.", min=1)] = 200,
    idle: Annotated[int, typer.Option(help="Number of edges without a request.", min=0)] = 1000,
    rate: Annotated[float, typer.Option(help="Frames per edge and second, each way.")] = 20.0,
    seconds: Annotated[float, typer.Option(help="Each run.", min=1)] = 20.0,
    together: Annotated[int, typer.Option(help="Commits in one message of the engine, in a second run.")] = 16,
    plain: Annotated[bool, typer.Option("--plain", help="Without TLS.")] = False,
) -> None:
    """Measure frames through a real gateway."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, edges + idle + 256), hard), hard))
    # The engine's thread and the edges' loop share this process; by default Python lets one wait 5 ms for the other.
    sys.setswitchinterval(0.0001)
    with story("messages"), tempfile.TemporaryDirectory() as name:
        options, context = ([], None) if plain else tls(Path(name))
        with gateway(Path(name), "--max-edges", str(edges + idle), *options) as (process, listen, engine):
            running = psutil.Process(process.popen.pid)
            running.cpu_affinity([SERVER_CORE])
            stand_aside()
            url = urlsplit(f"{'http' if plain else 'https'}://{listen}")
            uvloop.run(measure(Bench(engine, running, url, context), edges, idle, rate, seconds, together))


# -- one edge and its engine -----------------------------------------------------------------------------------------


def without_vllm() -> dict[str, float]:
    """Measure a real gateway and a real edge, with the engine's end of the link but no engine."""
    with tempfile.TemporaryDirectory() as name, gateway(Path(name)) as (process, listen, engine):
        with edge_client(f"http://{listen}", "ngram", Path(name) / "edge.log") as client:
            gateway_mb, edge_mb = (psutil.Process(each.popen.pid).memory_info().rss / 1e6 for each in (process, client))
        median_ms, p99_ms = percentiles_ms(asyncio.run(proposal_latencies_s(f"http://{listen}", engine)))
    return {
        "gateway_mb": gateway_mb,
        "edge_client_mb": edge_mb,
        "proposal_latency_ms_median": median_ms,
        "proposal_latency_ms_p99": p99_ms,
    }


async def proposal_latencies_s(url: str, engine: EngineLink) -> list[float]:
    """Times from the edge client's end of its link to the engine's inbox. A proposal's only token is its number."""
    opened, welcome = asyncio.Event(), asyncio.Event()
    left_s: dict[int, float] = {}

    def on_frame(frame: Frame) -> None:
        if isinstance(frame, Welcome):
            welcome.set()
        elif isinstance(frame, Open):
            opened.set()

    link = Link(Gateway(url), Hello(PROTOCOL_VERSION, "bench", "bench", "pool", "", 8), on_frame)
    running = asyncio.create_task(link.run())
    await welcome.wait()
    engine.send([EngineOpen(1, len(PROMPT), 5, ""), Commit(1, 0, PROMPT)])
    await opened.wait()
    for number in range(NUM_PROPOSALS):
        left_s[number] = time.monotonic()
        link.send(Propose(0, len(PROMPT), (number,)))
        await asyncio.sleep(1 / PROPOSALS_PER_S)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return [at_s - left_s[frame.tokens[0]] for at_s, frame in list(engine.inbox) if isinstance(frame, Propose)]


def start_up_s(name: str, config: Mapping[str, object] | None) -> float:
    started_s = time.monotonic()
    with ExitStack() as stack:
        launch({name: config}, LOGS, stack, max_seqs=128, kv_bytes=2 << 30)
        return time.monotonic() - started_s


def parked() -> dict[str, float]:
    """Measure one request that is always held for an edge that takes a second per draft token."""
    recordings = LOGS / "recordings.json"
    with ExitStack() as stack:
        config = edge(1, mode="wait", hold_limit_ms=5000)
        target = launch({"parked": config}, LOGS, stack, max_seqs=128, kv_bytes=2 << 30)["parked"]
        [known] = target.record(["Wait for it"], ANSWER_TOKENS, recordings)
        options = flags(recordings=recordings, first=1, pass_ms=1e3 * ANSWER_S, max_width=1)
        with drafting(target.server, 0.0, REPLAY, options, LOGS / "slow.log"):
            asking = threading.Thread(target=target.ask, args=([known.prompt], ANSWER_TOKENS))
            asking.start()
            time.sleep(3 * ANSWER_S)
            before_s, started_s = target.cpu_s()["engine_core"], time.monotonic()
            time.sleep(PARKED_S)
            used_s, took_s = target.cpu_s()["engine_core"] - before_s, time.monotonic() - started_s
            time.sleep(1.5)  # counters are reported once a second
            counters = target.server.metrics()
            asking.join()
    return {
        "parked_engine_cpu_percent": 100 * used_s / took_s,
        "wake_ms_mean": counters["specedge_engine_wake_us"] / max(1, counters["specedge_engine_wakes"]) / 1000,
        "wakes": counters["specedge_engine_wakes"],
    }


GOALS = {
    "gateway_mb": 100,
    "edge_client_mb": 80,
    "proposal_latency_ms_median": 1.5,
    "start_up_added_s": 2.0,
    "parked_engine_cpu_percent": 5.0,
    "wake_ms_mean": 2.0,
}


@app.command()
def overhead(
    is_without: Annotated[bool, typer.Option("--without-vllm", help="Only gateway and edge client.")] = False,
) -> None:
    """Measure the cost of one attached edge."""
    with story("overhead"):
        result = without_vllm()
        if not is_without:
            start_up_s("warm", None)  # warms the disk cache; then alternating
            pairs = [(start_up_s("plain", None), start_up_s("edge", edge(None))) for _ in range(3)]
            plain_s, edge_s = (statistics.median(each) for each in zip(*pairs, strict=True))
            result |= {"start_up_plain_s": plain_s, "start_up_added_s": edge_s - plain_s, **parked()}
    for name, value in result.items():
        goal = f"goal: under {GOALS[name]}" if name in GOALS else ""
        print(f"{name:32}{value:10.2f}  {goal}")
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


if __name__ == "__main__":
    app()
