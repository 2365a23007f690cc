"""`make bench-overhead`: what one attached edge costs. Prints a table, then one JSON line; asserts nothing.

    python benchmarks/overhead.py [--without-vllm]

Memory of the gateway and of an edge client without a model, the time from a proposal leaving the edge to the
scheduler's inbox, vLLM's start-up with and without edges, and what an engine costs whose only request waits.
"""

import asyncio
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from openai import OpenAI
from stack import BIN, MODEL_NAME, Process, Server, edge_client, start, start_server, wait_for

from edge_client.client import EdgeClient
from edge_client.drafters import Candidate
from edge_client.gateway_link import Gateway, Link
from vllm_specedge.engine.gateway_link import EngineLink
from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.engine_frames import EngineHello, EngineOpen
from vllm_specedge.wire.frames import PROTOCOL_VERSION, Hello, Open, Propose, Welcome, commits

CACHE = Path(__file__).parent.parent / ".cache"
PORT, GATEWAY_PORT = 8020, 8121
NUM_PROPOSALS, PROPOSALS_PER_S = 300, 25
PARKED_S = 8.0
ANSWER_S = 1.0


def megabytes(pid: int) -> float:
    return psutil.Process(pid).memory_info().rss / 1e6


@dataclass
class Latency:
    """Proposals numbered by their only token: when each left the edge, and when the engine's inbox had it."""

    left_s: dict[int, float] = field(default_factory=dict)
    took_s: list[float] = field(default_factory=list)

    async def run(self, gateway_url: str, link: EngineLink, arrived: threading.Event) -> None:
        opened, welcome = asyncio.Event(), asyncio.Event()

        def on_frame(frame: Frame) -> None:
            if isinstance(frame, Welcome):
                welcome.set()
            elif isinstance(frame, Open):
                opened.set()

        edge = Link(Gateway(gateway_url), Hello(PROTOCOL_VERSION, "bench", "bench", "pool", "", 8), on_frame)
        running = asyncio.create_task(edge.run())
        await welcome.wait()
        link.send([EngineOpen(1, 4, 5, ""), *commits(1, 0, (1, 2, 3, 4))])
        await opened.wait()
        for number in range(NUM_PROPOSALS):
            self.left_s[number] = time.monotonic()
            edge.send(Propose(0, 4, (number,)))
            await asyncio.sleep(1 / PROPOSALS_PER_S)
            self._take(link)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    def _take(self, link: EngineLink) -> None:
        while link.inbox:
            arrived_s, frame = link.inbox.popleft()
            if isinstance(frame, Propose):
                self.took_s.append(arrived_s - self.left_s[frame.tokens[0]])


def start_gateway(directory: Path, *arguments: str) -> tuple[Process, str]:
    endpoint, listen = f"ipc://{directory}/engines", f"127.0.0.1:{GATEWAY_PORT}"
    command = [str(BIN / "vllm-specedge"), "gateway", "--engines", endpoint, "--listen", listen, *arguments]
    return start(command, directory / "gateway.log"), endpoint


def without_vllm() -> dict[str, float]:
    """A real gateway and a real edge; the engine's end of the link without its engine."""
    url = f"http://127.0.0.1:{GATEWAY_PORT}"
    with tempfile.TemporaryDirectory() as name:
        gateway, endpoint = start_gateway(Path(name))
        arrived = threading.Event()
        link = EngineLink(endpoint, EngineHello(PROTOCOL_VERSION, "bench", "", 49152), arrived.set, lambda: ())
        link.start()
        try:
            wait_for(gateway, f"{url}/healthz", "engines", 1)
            with edge_client(url, "ngram", Path(name) / "edge.log") as edge:
                memory = {"gateway_mb": megabytes(gateway.popen.pid), "edge_client_mb": megabytes(edge.popen.pid)}
            latency = Latency()
            asyncio.run(latency.run(url, link, arrived))
        finally:
            link.stop()
            gateway.stop()
    ordered = sorted(latency.took_s)
    return {
        **memory,
        "proposal_latency_ms_median": 1000 * statistics.median(ordered),
        "proposal_latency_ms_p99": 1000 * ordered[int(len(ordered) * 0.99)],
    }


def start_up_s(log: Path, *arguments: str) -> float:
    started_s = time.monotonic()
    server = start_server(CACHE / MODEL_NAME, log, PORT, "--max-model-len", "2048", *arguments)
    try:
        wait_for(server.process, f"{server.url}/health")
        return time.monotonic() - started_s
    finally:
        server.process.stop()


@dataclass
class SlowSequence:
    """Answers every commit after a second: meanwhile the engine has nothing to do but wait."""

    waiting: threading.Event

    def keep(self, length: int, moved: Sequence[int] = ()) -> None:
        pass

    def append(self, tokens: Sequence[int], width: int) -> list[Candidate]:
        self.waiting.wait(ANSWER_S)
        return [Candidate(0, 1.0)]


@dataclass
class SlowDrafter:
    fingerprint: str = ""
    max_context_tokens: int = 1 << 20
    max_width: int = 1
    description: str = "slow"
    waiting: threading.Event = field(default_factory=threading.Event)

    def open(self) -> SlowSequence:
        return SlowSequence(self.waiting)


def engine_process(server: Server) -> psutil.Process:
    children = psutil.Process(server.process.popen.pid).children(recursive=True)
    return next(child for child in children if "EngineCore" in " ".join(child.cmdline()))


def parked(log: Path) -> dict[str, float]:
    """One request, always held for an edge that takes a second to answer."""
    config = {"method": "edge", "mode": "wait", "hold_limit_ms": 5000, "num_speculative_tokens": 1}
    arguments = ("--max-model-len", "2048", "--speculative-config", json.dumps(config))
    server = start_server(CACHE / MODEL_NAME, log, PORT, *arguments)
    try:
        wait_for(server.process, f"{server.url}/health")
        client = EdgeClient(Gateway(server.gateway_url), SlowDrafter(), "slow")
        return asyncio.run(_parked(server, client))
    finally:
        server.process.stop()


async def _parked(server: Server, client: EdgeClient) -> dict[str, float]:
    connected = asyncio.Event()
    client.on_change = connected.set
    edge = asyncio.create_task(client.run(10))
    await connected.wait()
    ask = OpenAI(base_url=f"{server.url}/v1", api_key="none").completions.create
    body = {"model": MODEL_NAME, "prompt": "Wait for it", "max_tokens": 30, "extra_body": {"ignore_eos": True}}
    asking = asyncio.create_task(asyncio.to_thread(ask, **body))
    await asyncio.sleep(3 * ANSWER_S)
    engine = engine_process(server)
    before, before_s = engine.cpu_times(), time.monotonic()
    await asyncio.sleep(PARKED_S)
    after, after_s = engine.cpu_times(), time.monotonic()
    await asyncio.sleep(1.5)
    counters = await asyncio.to_thread(server.metrics)
    edge.cancel()
    await asyncio.gather(edge, asking, return_exceptions=True)
    used_s = after.user + after.system - before.user - before.system
    return {
        "parked_engine_cpu_percent": 100 * used_s / (after_s - before_s),
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


def main() -> None:
    result = without_vllm()
    if "--without-vllm" not in sys.argv:
        logs = CACHE / "bench"
        # Once to warm the disk cache, then alternating.
        start_up_s(logs / "warm.log")
        plain, edge = [], []
        for _ in range(3):
            plain.append(start_up_s(logs / "plain.log"))
            edge.append(start_up_s(logs / "edge.log", "--speculative-config", "edge"))
        result["start_up_plain_s"] = statistics.median(plain)
        result["start_up_added_s"] = statistics.median(edge) - statistics.median(plain)
        result |= parked(logs / "parked.log")
    for name, value in result.items():
        goal = f"goal: under {GOALS[name]}" if name in GOALS else ""
        print(f"{name:32}{value:10.2f}  {goal}")
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


if __name__ == "__main__":
    main()
