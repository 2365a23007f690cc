"""A real gateway process, edges in threads, and an engine without vLLM, for tests of all three together."""

import asyncio
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2 as httpx
import pytest
from stack import BIN, Process, start

from edge_client.client import EdgeClient
from edge_client.gateway_link import Gateway, Link, LinkError
from tests.ports import free_port
from vllm_specedge.engine.driver import StepDriver
from vllm_specedge.engine.gateway_link import EngineLink
from vllm_specedge.engine.plan import Row, Step, StepOutcome, StepPlan
from vllm_specedge.errors import UserError
from vllm_specedge.policy.situation import HoldLimits
from vllm_specedge.policy.step_cost import StepCost
from vllm_specedge.wire.engine_frames import EngineHello, Stats
from vllm_specedge.wire.fingerprint import vocabulary_fingerprint
from vllm_specedge.wire.frames import (
    PROTOCOL_VERSION,
    Hello,
)
from vllm_specedge.wire.vocabulary import pack_vocabulary

DEADLINE_S = 20.0
VOCAB_SIZE = 100
FINGERPRINT = "f" * 64


@dataclass
class Engine:
    """The real link and the real driver, stepped by the test; its target repeats a cycle of ten tokens."""

    endpoint: str
    driver: StepDriver = field(default_factory=lambda: StepDriver(VOCAB_SIZE, 4, HoldLimits(), StepCost()))
    arrived: threading.Event = field(default_factory=threading.Event)
    vocabulary: dict[str, int] = field(default_factory=dict)
    """Vocabulary that the gateway may serve to edges."""

    def __post_init__(self) -> None:
        fingerprint = vocabulary_fingerprint(self.vocabulary) if self.vocabulary else FINGERPRINT
        hello = EngineHello(PROTOCOL_VERSION, "toy", fingerprint, VOCAB_SIZE)
        packed = pack_vocabulary(self.vocabulary) if self.vocabulary else b""
        self.link = EngineLink(self.endpoint, hello, self.arrived.set, lambda: (Stats((1, 2, 3)),), packed)
        self.link.start()

    def take_in(self) -> None:
        while self.link.inbox:
            arrived_s, frame = self.link.inbox.popleft()
            self.link.send(self.driver.receive(frame, arrived_s))

    def wait(self, condition: Callable[[], bool]) -> None:
        """Process incoming frames until `condition` holds."""
        deadline_s = time.monotonic() + DEADLINE_S
        self.take_in()
        while not condition():
            assert time.monotonic() < deadline_s, "waited too long"
            self.arrived.wait(0.05)
            self.arrived.clear()
            self.take_in()

    def generate(self, request_id: str, num_tokens: int) -> int:
        """Answer a request whose prompt is the cycle, with an edge; returns the number of accepted draft tokens."""
        self.wait(lambda: self.driver.num_edges > 0)
        tokens = [position % 10 for position in range(20)]
        self.link.send(self.driver.open(request_id, tokens, ""))
        num_accepted = 0
        while len(tokens) < 20 + num_tokens:
            self.wait(lambda: bool(self.driver.begin([Row(request_id, 4)], 0.0).drafts))
            plan = self.driver.begin([Row(request_id, 4)], 0.0)
            self.driver.start(plan)
            draft = plan.drafts[request_id]
            truth = [(len(tokens) + i) % 10 for i in range(len(draft) + 1)]
            num_same = next((i for i, token in enumerate(draft) if token != truth[i]), len(draft))
            tokens += truth[: num_same + 1]
            num_accepted += num_same
            over = [request_id] if len(tokens) >= 20 + num_tokens else []
            self.end_step(plan, StepOutcome({request_id: 1 + len(draft)}, {request_id: len(draft)}, over))
        return num_accepted

    def end_step(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """End a step that was not timed; its requests already have their new tokens."""
        now_s = time.monotonic()
        self.link.send(self.driver.end(plan, outcome, Step(now_s, now_s)))


@dataclass
class Running:
    """A gateway process and how to reach it."""

    process: Process
    url: str
    endpoint: str
    port: int


@contextmanager
def running_gateway(
    directory: Path, *arguments: str, verify: str = "", env: dict[str, str] | None = None
) -> Iterator[Running]:
    port, endpoint = free_port(), f"ipc://{directory}/engines"
    listen = f"127.0.0.1:{port}"
    command = [str(BIN / "vllm-specedge"), "gateway", "--engines", endpoint, "--listen", listen, *arguments]
    process = start(command, directory / "gateway.log", env)
    try:
        wait_for_port(process, port)
        yield Running(process, f"{'https' if verify else 'http'}://localhost:{port}", endpoint, port)
    finally:
        process.stop()


def wait_for_port(process: Process, port: int) -> None:
    waiting = threading.Event()
    for _ in range(int(DEADLINE_S / 0.05)):
        if process.popen.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        waiting.wait(0.05)
    raise process.fail("the gateway did not start")


@contextmanager
def edge_in_thread(client: EdgeClient) -> Iterator[None]:
    """Run an edge client until the block ends."""
    client.pause_s = lambda limit_s: min(limit_s, 0.1)  # a random pause may exceed the tests' time limits
    connected = threading.Event()
    client.on_change = lambda: connected.set() if client.state == "connected" else None
    loop = asyncio.new_event_loop()
    task = loop.create_task(client.run(DEADLINE_S))

    def run() -> None:
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert connected.wait(DEADLINE_S)
        yield
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(DEADLINE_S)


def hello(version: int = PROTOCOL_VERSION, fingerprint: str = "", role: str = "pool") -> Hello:
    return Hello(version, "test", "test", role, fingerprint, 8)


async def until_closed(link: Link) -> None:
    async with asyncio.timeout(DEADLINE_S):
        await link.run()


def refused(url: str, greeting: Hello, token: str = "", ca_file: str = "") -> Exception:
    with pytest.raises((UserError, LinkError)) as caught:
        asyncio.run(until_closed(Link(Gateway(url, token, ca_file), greeting, lambda _: None)))
    return caught.value


def failing(*command: str) -> str:
    """The one-sentence error message of a command that cannot work."""
    result = subprocess.run(
        [str(BIN / command[0]), *command[1:]], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 2, result
    lines = [line for line in result.stderr.splitlines() if line.startswith(f"{command[0]}: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def metric(gateway: Running, name: str) -> float:
    lines = httpx.get(f"{gateway.url}/metrics", trust_env=False, timeout=DEADLINE_S).text.splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])
