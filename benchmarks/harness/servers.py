"""Servers under load, and the resources that they and their edges use."""

import asyncio
import json
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import httpx2 as httpx
import psutil
from stack import EDGE_CORE, LARGE_PAGES, MODEL_NAME, Server, StackError, start_server, wait_for

from harness.edges import Edges
from harness.load import Answer, ask_all, ask_for
from harness.relay import Traffic
from harness.replay import Recording, write_recordings
from harness.results import CACHE, console

T = TypeVar("T")
WAIT_LIMIT_MS = 1000
"""Limit of a server that always waits: longer than any answer; other servers have the default."""
SETTLE_S = 0.1
IDLE = ("idle", "iowait")


@dataclass
class Target:
    """A server under load."""

    server: Server
    has_gateway: bool
    num_asked: int = 0
    """Tokens requested so far."""

    def ask(self, prompts: Sequence[str | Sequence[int]], num_tokens: int, is_streamed: bool = True) -> list[Answer]:
        """Greedy answers to all prompts, sent concurrently."""
        body = {"max_tokens": num_tokens, "temperature": 0, "stream": is_streamed, "ignore_eos": True}
        return self._ask("completions", [{**body, "prompt": prompt} for prompt in prompts])

    def chat(self, question: str, num_tokens: int, **body: object) -> Answer:
        """The streamed answer to a question, of at most `num_tokens`."""
        return self.converse([{**body, "messages": [{"role": "user", "content": question}]}], num_tokens)[0]

    def converse(self, bodies: Sequence[Mapping[str, Any]], num_tokens: int) -> list[Answer]:
        """The streamed answers to conversations that are sent concurrently."""
        return self._ask("chat/completions", [{**body, "max_tokens": num_tokens, "stream": True} for body in bodies])

    def _ask(self, endpoint: str, bodies: Sequence[Mapping[str, Any]]) -> list[Answer]:
        named = [{**body, "model": self.server.model} for body in bodies]
        try:
            answers = asyncio.run(ask_all(f"{self.server.url}/v1/{endpoint}", named))
        except (httpx.HTTPError, RuntimeError) as error:
            raise self.server.process.fail(f"request failed: {error!r}") from error
        self.num_asked += sum(len(answer.tokens) for answer in answers)
        return answers

    def record(self, prompts: Sequence[str], num_tokens: int, path: Path) -> list[Recording]:
        """Record the answers to these prompts, for edges that replay them."""
        recordings = [answer.recording for answer in self.ask(prompts, num_tokens)]
        write_recordings(path, recordings)
        return recordings

    def converse_for(
        self, bodies: Sequence[Mapping[str, Any]], num_tokens: int, at_once: int, seconds: float
    ) -> list[Answer]:
        """Cycle through conversations at a constant concurrency until the time is over.

        A body may have its own number of tokens.
        """
        named = [{"max_tokens": num_tokens, **body, "stream": True, "model": self.server.model} for body in bodies]
        try:
            answers = asyncio.run(ask_for(f"{self.server.url}/v1/chat/completions", named, at_once, seconds))
        except (httpx.HTTPError, RuntimeError) as error:
            raise self.server.process.fail(f"request failed: {error!r}") from error
        self.num_asked += sum(len(answer.tokens) for answer in answers)
        return answers

    def counters(self) -> Counter[str]:
        """The engine's counters, once they include all requests so far; they are reported once per second."""
        if not self.has_gateway:
            return Counter()
        values = self.server.engine_counters({"committed_tokens": self.num_asked})
        return Counter({name: int(value) for name, value in values.items()})

    def cpu_s(self) -> Counter[str]:
        """CPU seconds so far, by process."""
        front_end = psutil.Process(self.server.process.popen.pid)
        used: Counter[str] = Counter()
        for process in (front_end, *front_end.children(recursive=True)):
            try:
                text, times = " ".join(process.cmdline()), process.cpu_times()
            except psutil.Error:
                continue
            role = next((role for mark, role in ROLES.items() if mark in text), "front_end")
            used[role] += times.user + times.system
        return used


ROLES = {"VLLM::Worker": "worker", "VLLM::EngineCore": "engine_core", "vllm_specedge.cli gateway": "gateway"}
"""Roles of a server's processes by text in their command lines; the first process is the front end."""


# -- starting them ---------------------------------------------------------------------------------------------------


@contextmanager
def story(name: str) -> Iterator[ExitStack]:
    """Context of a benchmark: stops at its end, or on SIGTERM, what was started in it; a failed start ends it."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with ExitStack() as stack:
            yield stack
    except StackError as error:
        sys.exit(f"{name}: {error}")


def edge(k: int | None, **options: object) -> dict[str, object]:
    """The --speculative-config of a server with edges; k is the most draft tokens that a step verifies."""
    return {"method": "edge", **({} if k is None else {"num_speculative_tokens": k}), **options}


def waiting(k: int | None, **options: object) -> dict[str, object]:
    """The same for the paper's method: the server always waits for the draft."""
    return edge(k, mode="wait", hold_limit_ms=WAIT_LIMIT_MS, ngram=False, **options)


@dataclass(frozen=True)
class Arm:
    """One arm: the name of a server, which arms may share, and options of its edge."""

    name: str
    title: str
    server: str
    config: dict[str, object] | None = None
    """None: no speculation."""
    edge: tuple[str, ...] = ()


def launch(
    configs: Mapping[str, Mapping[str, object] | None],
    logs: Path,
    stack: ExitStack,
    *arguments: str,
    max_seqs: int,
    kv_bytes: int,
    env: Mapping[str, str] | None = None,
    model: Path = CACHE / MODEL_NAME,
    dtype: str = "float32",
    own_arguments: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> dict[str, Target]:
    """Start a server for each --speculative-config (None: plain vLLM), all at once; returns when all are healthy.
    `own_arguments`: further arguments of single servers, by name."""
    targets, ports = {}, free_ports(2 * len(configs))
    with console.status(f"Starting {len(configs)} servers (minutes) ..."):
        for name, config in configs.items():
            port, gateway_port = ports.pop(), ports.pop()
            own = [*arguments, *own_arguments.get(name, ()), "--max-model-len", "2048", "--max-num-seqs", str(max_seqs)]
            own += ["--kv-cache-memory-bytes", str(kv_bytes)]
            has_gateway = config is not None and config["method"] == "edge"
            if config is not None:
                listen = {"listen": f"127.0.0.1:{gateway_port}"} if has_gateway else {}
                own += ["--speculative-config", json.dumps({**config, **listen})]
            log = logs / f"{name.replace(', ', '-').replace(' ', '-')}.log"
            shared = {**LARGE_PAGES, **(env or {})}
            server = start_server(model, log, port, *own, gateway_port=gateway_port, env=shared, dtype=dtype)
            stack.callback(server.process.stop)
            targets[name] = Target(server, has_gateway)
        for target in targets.values():
            wait_for_start(target.server, len(targets))
    return targets


def free_ports(count: int) -> list[int]:
    """Free ports. With a fixed port, another process that already has it could answer in the server's place."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [item.getsockname()[1] for item in sockets]


def wait_for_start(server: Server, num_servers: int) -> None:
    """Wait for a server; as all start at once, the time limit grows with their number."""
    for left in reversed(range(num_servers)):
        try:
            wait_for(server.process, f"{server.url}/health")
            return
        except StackError:
            if not left or server.process.popen.poll() is not None:
                raise


def stand_aside() -> None:
    """Keep the relay and the load generator off the model's core. Servers that are started later inherit this."""
    psutil.Process().cpu_affinity([EDGE_CORE])


# -- resources of a run ----------------------------------------------------------------------------------------------


def metered(target: Target, edges: Edges | None, act: Callable[[], T]) -> tuple[T, dict[str, Any]]:
    """Call `act` with a server and its edges running; returns its result, and the resources used as a Run's fields."""
    counted, sent = target.counters(), _traffic(edges)
    cpu_before, cores_before = _cpu_s(target, edges), psutil.cpu_times(percpu=True)
    done = act()
    cpu_after, cores_after = _cpu_s(target, edges), psutil.cpu_times(percpu=True)
    time.sleep(SETTLE_S + (edges.relay.rtt_s if edges else 0.0))  # includes what is in flight
    counters, came = target.counters(), _traffic(edges)
    counters.subtract(counted)
    return done, {
        "cpu_s": {name: round(after - cpu_before.get(name, 0.0), 2) for name, after in cpu_after.items()},
        "core_busy": _core_shares(cores_before, cores_after, lambda name: name not in IDLE),
        "core_steal": _core_shares(cores_before, cores_after, lambda name: name == "steal"),
        "counters": dict(counters),
        "up_bytes": came.up_bytes - sent.up_bytes,
        "down_bytes": came.down_bytes - sent.down_bytes,
    }


def _traffic(edges: Edges | None) -> Traffic:
    return edges.relay.traffic if edges else Traffic(0, 0)


def _cpu_s(target: Target, edges: Edges | None) -> dict[str, float]:
    own = psutil.Process().cpu_times()
    return {**target.cpu_s(), "load": own.user + own.system, "edges": edges.cpu_s() if edges else 0.0}


def _core_shares(before: Sequence[Any], after: Sequence[Any], is_counted: Callable[[str], bool]) -> list[float]:
    """By core: share of the time between two samples that was spent in the counted states."""
    shares = []
    for one, other in zip(before, after, strict=True):
        names = [name for name in one._fields if not name.startswith("guest")]  # included in user
        spent = {name: getattr(other, name) - getattr(one, name) for name in names}
        counted = sum(seconds for name, seconds in spent.items() if is_counted(name))
        shares.append(round(counted / max(sum(spent.values()), 1e-9), 3))
    return shares
