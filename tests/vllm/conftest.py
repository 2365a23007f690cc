"""Real vLLM servers with the real model, and edges that know the target's answers."""

import asyncio
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx2 as httpx
import pytest
from stack import MODEL_NAME, Server, edge_client, start_server, wait_for

from benchmarks.harness.replay import Accuracy, Recording, ReplayDrafter
from edge_client.client import EdgeClient
from edge_client.drafting.pacing import Pace
from edge_client.gateway_link import Gateway
from tests.ports import free_port

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache"
MODEL = CACHE / MODEL_NAME
NUM_PROMPTS, NUM_TOKENS = 32, 64
VOCAB_SIZE = 49152
NEAR_TIE = 1e-3
"""The target's two best logits may come out in either order if they are closer than this (docs/design.md, Numerics)."""
CONCURRENCY = 16
IMPATIENT = -7
"""Priority of requests whose targets no server could meet; such a class must not affect other requests."""
MIDDLEWARES = (
    "--middleware",
    "vllm_specedge.admission.AdmissionMiddleware",
    "--middleware",
    "vllm_specedge.prediction_front.PredictionMiddleware",
)
STRUCTURED = ("--structured-outputs-config", json.dumps({"backend": "xgrammar", "disable_any_whitespace": True}))
"""A model that may write white space between two values might write it until it has no tokens left."""
THINKING = ("--reasoning-config", json.dumps({"reasoning_start_str": "<|im_start|>", "reasoning_end_str": "</think>"}))
DEADLINE_S = 120.0
"""Time limit for events that must happen: it detects failures, not slowness."""
KV_BYTES = 200 * 2**20
"""Room for 34 blocks of 128 tokens: one context of 2,048 tokens fits, eight of 650 do not."""
ROOM = ("--kv-cache-memory-bytes", str(512 * 2**20))
"""Room for five contexts of 2,048 tokens. Several servers run at a time, and each touches all of its memory."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in ours:
        item.add_marker(pytest.mark.vllm)
    # Files that start only servers of their own come first: the two of `servers`, once started, run until the end.
    with_both = {item.path for item in ours if "servers" in item.fixturenames}
    items.sort(key=lambda item: item.path in with_both)


@dataclass(frozen=True)
class Completion:
    """One greedy answer, by token, with the gap between the two best logits at each position."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    gaps: tuple[float, ...]
    finish_reason: str


@dataclass
class Target:
    """A server under test."""

    server: Server
    http: httpx.Client = field(
        # Connections that the server may close at any moment, after 5 s, are not used again.
        default_factory=lambda: httpx.Client(trust_env=False, timeout=300, limits=httpx.Limits(keepalive_expiry=2.0))
    )

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = self.http.post(f"{self.server.url}{path}", json={"model": self.server.model, **body})
        assert response.status_code == 200, response.text
        return response.json()

    def greedy(self, prompt: str | list[int], num_tokens: int = NUM_TOKENS, **extra: Any) -> Completion:
        body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "logprobs": 2, "return_token_ids": True}
        choice = self.post("/v1/completions", {**body, "ignore_eos": True, **extra})["choices"][0]
        gaps = []
        for top in choice["logprobs"]["top_logprobs"]:
            best = sorted(top.values(), reverse=True)
            gaps.append(best[0] - best[1] if len(best) > 1 else 0.0)
        ids = (tuple(choice["prompt_token_ids"]), tuple(choice["token_ids"]))
        return Completion(*ids, tuple(gaps), choice["finish_reason"])

    def greedy_all(self, prompts: Sequence[str | list[int]], num_tokens: int = NUM_TOKENS) -> list[Completion]:
        with ThreadPoolExecutor(CONCURRENCY) as executor:
            return list(executor.map(lambda prompt: self.greedy(prompt, num_tokens), prompts))


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Texts of different lengths, some of them repetitive."""
    topics = ["rivers", "the moon", "bread", "a lost dog", "chess", "winter", "bees", "the sea"]
    shapes = [
        "Write a short story about {0}.",
        "List ten facts about {0}:\n1.",
        "Repeat this line: I like {0}. I like {0}. I like",
        "Question: what is special about {0}? Answer:",
    ]
    return [shape.format(topic) for shape in shapes for topic in topics]


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Target, Target]]:
    """A server without speculation, and one that takes edges, has little KV memory and prefills in chunks."""
    assert (MODEL / "config.json").exists(), "make the model first: make model"
    logs = tmp_path_factory.mktemp("servers")
    shared = ("--max-model-len", "2048", "--max-num-seqs", "16", *STRUCTURED, *THINKING)
    development = {"VLLM_SERVER_DEV_MODE": "1"}  # for what is said to a server between requests
    gateway_port = free_port()
    config: dict[str, Any] = {"method": "edge", "num_speculative_tokens": 5, "listen": f"127.0.0.1:{gateway_port}"}
    # Hold every request and verify everything: the default skips most of both on a busy CPU. Without a time limit: an
    # edge without a draft says so, and a dead one is not waited for.
    config |= {"mode": "wait", "hold_limit_ms": 5000}
    config["slo"] = {str(IMPATIENT): {"itl_ms": 1}}
    edge = ("--speculative-config", json.dumps(config), "--max-num-batched-tokens", "512", *MIDDLEWARES)
    kv = ("--kv-cache-memory-bytes", str(KV_BYTES))
    with ExitStack() as stack:
        both = []
        for name, arguments in (("plain", ROOM), ("edge", (*edge, *kv))):
            log, options = logs / f"{name}.log", (*shared, *arguments)
            server = start_server(MODEL, log, free_port(), *options, gateway_port=gateway_port, env=development)
            stack.callback(server.process.stop)
            both.append(Target(server))
            stack.callback(both[-1].http.close)
        for target in both:
            wait_for(target.server.process, f"{target.server.url}/health")
        wait_for(both[1].server.process, f"{both[1].server.gateway_url}/healthz", "engines", 1)
        yield both[0], both[1]


@pytest.fixture(scope="session")
def plain(servers: tuple[Target, Target]) -> Target:
    return servers[0]


@pytest.fixture(scope="session")
def edge_target(servers: tuple[Target, Target]) -> Target:
    return servers[1]


@pytest.fixture(scope="session")
def expected(plain: Target, prompts: list[str]) -> list[Completion]:
    """The target's answers without speculation."""
    return plain.greedy_all(prompts)


def replay(completions: Sequence[Completion], accuracy: float = 1.0, max_width: int = 8) -> ReplayDrafter:
    """A drafter that knows these answers: each token is right with probability `accuracy`, else a second one may be."""
    recordings = [Recording(completion.prompt_ids, completion.token_ids) for completion in completions]
    return ReplayDrafter(recordings, Accuracy(first=accuracy), max_width=max_width, vocab_size=VOCAB_SIZE)


@contextmanager
def running_edge(target: Target, drafter: Any, pace: Pace | None = None) -> Iterator[EdgeClient]:
    """The real edge client in a thread, with a test's drafter, once the gateway has admitted it."""
    client = EdgeClient(Gateway(target.server.gateway_url), drafter, "test", max_requests=64, pace=pace or Pace())
    connected = threading.Event()
    client.on_change = lambda: connected.set() if client.state == "connected" else None
    loop = asyncio.new_event_loop()
    task = loop.create_task(client.run(0))

    def run() -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            pass
        finally:
            loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert connected.wait(DEADLINE_S), "the edge was not admitted"
        yield client
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


def until(is_so: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds; fail with the message `what` if it does not."""
    pause, end_s = threading.Event(), time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < end_s, what
        pause.wait(0.1)


@dataclass
class Counted:
    """Change of the engine's counters during a part of a test."""

    before: dict[str, float]
    target: Target

    def __getitem__(self, name: str) -> float:
        return self.together(name)[0]

    def together(self, *names: str) -> list[float]:
        """Several counters of the same moment; an engine may report between two reads of one each."""
        now = self.target.server.metrics()
        return [now[f"specedge_engine_{name}"] - self.before[f"specedge_engine_{name}"] for name in names]

    def settle(self, num_tokens: int) -> None:
        """Wait until the engine has reported at least `num_tokens` committed tokens; it reports once per second."""
        until(lambda: self["committed_tokens"] >= num_tokens, f"the engine has not reported {num_tokens} tokens")


@contextmanager
def counting(target: Target) -> Iterator[Counted]:
    """The change of the counters from here on: earlier requests are in the engine's report before this begins."""

    def has_reported() -> bool:
        now = target.server.metrics()
        # The gateway counts a request as it closes; the engine's totals come once per second.
        return now["specedge_requests"] == 0 and (
            now["specedge_engine_closed_requests"] >= now["specedge_gateway_reports"]
        )

    until(has_reported, "the engine has not reported earlier requests")
    yield Counted(target.server.metrics(), target)


def said_while_an_edge_dies(target: Target, ask: Callable[[], T], use: str, directory: Path) -> list[T]:
    """Answers to requests that are repeated until an edge is dead, some of them running when that happens.

    The edge is killed once some of its draft tokens were `use`: verified, or accepted.
    """
    is_killed, rounds = threading.Event(), list[T]()

    def ask_on() -> None:
        while not is_killed.is_set():
            rounds.append(ask())

    with (
        edge_client(target.server.gateway_url, "ngram", directory / "edge.log") as process,
        ThreadPoolExecutor(1) as executor,
        counting(target) as counted,
    ):
        asking = executor.submit(ask_on)
        try:
            until(lambda: counted[f"{use}_tokens"] > 0, "the edge was of no use")
            process.popen.send_signal(signal.SIGKILL)
            until(lambda: target.server.metrics()["specedge_edges"] == 0, "its death was not noticed")
        finally:
            is_killed.set()
        asking.result()
    return rounds


def assert_same(expected: Sequence[Completion], got: Sequence[Completion]) -> None:
    """Assert equal tokens, except after a near-tie of the target's two best logits; those are counted and printed."""
    num_forgiven = 0
    for want, have in zip(expected, got, strict=True):
        assert want.prompt_ids == have.prompt_ids
        assert len(want.token_ids) == len(have.token_ids)
        fork = next(
            (i for i, pair in enumerate(zip(want.token_ids, have.token_ids, strict=True)) if pair[0] != pair[1]), None
        )
        if fork is None:
            continue
        assert want.gaps[fork] < NEAR_TIE, f"differs at {fork}, where the gap is {want.gaps[fork]}: {want} {have}"
        num_forgiven += 1
    print(f"{len(expected)} answers compared, {num_forgiven} forgiven for a near-tie")
    assert num_forgiven <= len(expected) // 8
