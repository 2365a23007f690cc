"""Servers to ask, what they are asked, and what they use meanwhile."""

import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx2 as httpx
import psutil
from stack import LARGE_PAGES, MODEL_NAME, POLL_S, STOP_LIMIT_S, Server, StackError, start_server, wait_for

from harness.edges import Edges
from harness.relay import Traffic
from harness.replay import Recording
from harness.results import CACHE

REQUEST_LIMIT_S = 600.0
QUESTIONS = (
    "Write a short story about an old lighthouse and a grey cat.",
    "Explain in detail to a ten-year-old why the sky is blue.",
    "How do I make a simple vegetable soup? Give me all the steps.",
    "Write an e-mail to my landlord: the heating has been broken since Monday.",
    "What is the difference between weather and climate? Give examples.",
    "Give me ten tips for a job interview and explain each of them.",
    "Describe the history of the bicycle, from its first days until now.",
    "Plan a weekend trip to the mountains for a family of four.",
)
"""Their answers are longer than what is asked of them, so that --tokens is all text."""


def prompt_of(question: str) -> str:
    """As the model's own chat template puts it, about 40 tokens."""
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    turns = (("system", system), ("user", question))
    return "".join(f"<|im_start|>{who}\n{text}<|im_end|>\n" for who, text in turns) + "<|im_start|>assistant\n"


@dataclass
class Target:
    """A server to ask, one request at a time."""

    server: Server
    has_gateway: bool
    http: httpx.Client = field(default_factory=lambda: httpx.Client(trust_env=False, timeout=REQUEST_LIMIT_S))
    num_asked: int = 0
    """Tokens that it was asked for so far."""

    def ask(self, prompt: str | Sequence[int], num_tokens: int) -> tuple[Recording, float]:
        """One greedy answer, and the seconds that the whole request took."""
        body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        started_s = time.monotonic()
        response = self.http.post(f"{self.server.url}/v1/completions", json=body)
        took_s = time.monotonic() - started_s
        response.raise_for_status()
        choice = response.json()["choices"][0]
        self.num_asked += num_tokens
        return Recording(tuple(choice["prompt_token_ids"]), tuple(choice["token_ids"])), took_s

    def counters(self) -> Counter[str]:
        """The engine's, with all that was asked so far in them; they come once a second."""
        if not self.has_gateway:
            return Counter()
        values = self.server.engine_counters({"committed_tokens": self.num_asked})
        return Counter({name: int(value) for name, value in values.items()})

    def wait_for_no_edge(self) -> None:
        for _ in range(int(STOP_LIMIT_S / POLL_S)):
            if not self.server.metrics()["specedge_edges"]:
                return
            time.sleep(POLL_S)
        raise self.server.process.fail("the last edge is still connected")


def free_ports(count: int) -> list[int]:
    """A server whose port is taken ends, while whoever has the port answers in its place: so none is fixed."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [item.getsockname()[1] for item in sockets]


def launch_all(
    names: Sequence[str],
    speculation: Callable[[str, int], dict[str, object] | None],
    arguments: Sequence[str],
    logs: Path,
    stack: ExitStack,
    env: dict[str, str] | None = None,
    model: Path = CACHE / MODEL_NAME,
    dtype: str = "float32",
) -> dict[str, Target]:
    """Start a server for each name, all at once; returns them when all are healthy.

    `speculation`: the --speculative-config of a server, with the port of its gateway.
    """
    targets, ports, shared = {}, free_ports(2 * len(names)), {**LARGE_PAGES, **(env or {})}
    for name in names:
        port, gateway_port = ports.pop(), ports.pop()
        config = speculation(name, gateway_port)
        own = ["--speculative-config", json.dumps(config)] if config is not None else []
        log = logs / f"{name.replace(', ', '-').replace(' ', '-')}.log"
        server = start_server(model, log, port, *arguments, *own, gateway_port=gateway_port, env=shared, dtype=dtype)
        stack.callback(server.process.stop)
        targets[name] = Target(server, has_gateway=config is not None and config["method"] == "edge")
        stack.callback(targets[name].http.close)
    for target in targets.values():
        wait_for_start(target.server, len(targets))
    return targets


def wait_for_start(server: Server, num_servers: int) -> None:
    """They all start at once, so each may take as many times as long."""
    for left in reversed(range(num_servers)):
        try:
            wait_for(server.process, f"{server.url}/health")
            return
        except StackError:
            if not left or server.process.popen.poll() is not None:
                raise


# -- what a run uses -------------------------------------------------------------------------------------------------

ROLES = {"VLLM::Worker": "worker", "VLLM::EngineCore": "engine_core", "vllm_specedge.cli gateway": "gateway"}
"""A server's processes by what is in their command lines; the first one is the front end."""


def server_cpu_s(target: Target) -> Counter[str]:
    """CPU seconds so far, by process."""
    front_end = psutil.Process(target.server.process.popen.pid)
    used: Counter[str] = Counter()
    for process in (front_end, *front_end.children(recursive=True)):
        try:
            text, times = " ".join(process.cmdline()), process.cpu_times()
        except psutil.Error:
            continue
        role = next((role for mark, role in ROLES.items() if mark in text), "front_end")
        used[role] += times.user + times.system
    return used


def own_cpu_s() -> float:
    times = psutil.Process().cpu_times()
    return float(times.user + times.system)


@dataclass(frozen=True)
class Usage:
    """What was used until a moment; what a run used is the difference of two."""

    cpu_s: dict[str, float]
    cores: list[dict[str, float]]
    """Seconds that each core spent in each of its states."""
    traffic: Traffic


def usage(target: Target, edges: Edges | None) -> Usage:
    cpu_s = {**server_cpu_s(target), "load": own_cpu_s(), "edges": edges.cpu_s() if edges else 0.0}
    cores = [core._asdict() for core in psutil.cpu_times(percpu=True)]
    return Usage(cpu_s, cores, edges.relay.traffic if edges else Traffic(0, 0))


def core_shares(before: Usage, after: Usage, is_counted: Callable[[str], bool]) -> list[float]:
    """By core: the part of the time between that was spent in states such as these."""
    shares = []
    for one, other in zip(before.cores, after.cores, strict=True):
        spent = {name: other[name] - one[name] for name in one if not name.startswith("guest")}  # in user as well
        counted = sum(seconds for name, seconds in spent.items() if is_counted(name))
        shares.append(round(counted / max(sum(spent.values()), 1e-9), 3))
    return shares
