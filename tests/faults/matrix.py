"""`make test-faults`: a real server under load, and what can go wrong around it. Prints a table; status 1 if a promise
is broken.

    PYTHONPATH=examples python -m tests.faults.matrix [--only edge-killed] [--short]

A real `vllm serve`, its gateway, two real edges (one behind a relay, one in a network namespace of its own where this
may be made) and the OpenAI client, which asks four things at a time and compares every answer with what the server said
before there were edges. A fault is noticed when the gateway's or the engine's view shows it, and over when all edges
are there again and drafts are accepted. No request may fail, except where the engine itself is killed.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import httpx2 as httpx
import psutil
import typer
from openai import OpenAI, OpenAIError
from stack import BIN, EDGE_CORE, MODEL_NAME, Process, Server, start, start_server, wait_for

from benchmarks.relay import Relay

CACHE = Path(__file__).parents[2] / ".cache"
NUM_ASKING, NUM_TOKENS = 4, 48
LASTS_S = 10.0
"""So long a fault goes on that ends by itself."""
LIMIT_S = 90.0
POLL_S = 0.1
NAMESPACE, HOST_IP, EDGE_IP = "specedge-faults", "10.213.7.1", "10.213.7.2"
PROMPTS = tuple(
    f"Repeat these lines, all of them.\n{line}\n{line}\n{line}\n"
    for line in (
        "The ferry leaves at seven, and the bakery opens at six.",
        "Red, green, blue, yellow, red, green, blue, yellow.",
        "One for the cat, two for the dog, three for the bird.",
        "Monday soup, Tuesday rice, Wednesday bread, Thursday fish.",
        "North to the hill, east to the mill, south to the sea.",
        "The key is under the stone, the stone is under the tree.",
    )
)


@dataclass
class Load:
    """Asks all the time, from several threads."""

    url: str
    expected: dict[str, str] = field(default_factory=dict)
    num_requests: int = 0
    num_wrong: int = 0
    num_failed: int = 0
    _stopped: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, client: OpenAI, prompt: str) -> str:
        body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0}
        return client.completions.create(**body, extra_body={"ignore_eos": True}).choices[0].text

    def learn(self) -> None:
        """What the server says without edges."""
        with self._client() as client:
            self.expected = {prompt: self.ask(client, prompt) for prompt in PROMPTS}

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._run, args=(number,)) for number in range(NUM_ASKING)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            for thread in threads:
                thread.join(LIMIT_S)

    def _client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=LIMIT_S)

    def _run(self, number: int) -> None:
        chance = random.Random(number)
        with self._client() as client:
            while not self._stopped.is_set():
                prompt = chance.choice(PROMPTS)
                try:
                    is_wrong, is_failed = self.ask(client, prompt) != self.expected[prompt], False
                except OpenAIError:
                    is_wrong, is_failed = False, True
                    self._stopped.wait(POLL_S)
                with self._lock:
                    self.num_requests += 1
                    self.num_wrong += is_wrong
                    self.num_failed += is_failed


@dataclass
class Site:
    """Everything that runs, and how to look at it."""

    logs: Path
    port: int
    gateway_port: int
    has_namespace: bool
    stack: ExitStack
    relay: Relay | None = None
    server: Server | None = None
    edges: list[Process] = field(default_factory=list)

    def start_server(self) -> None:
        config = {"method": "edge", "num_speculative_tokens": 5, "listen": f"0.0.0.0:{self.gateway_port}"}
        config |= {"insecure": True, "ngram": False}
        arguments = ["--max-model-len", "1024", "--max-num-seqs", "8", "--speculative-config", json.dumps(config)]
        log = self.logs / f"server-{time.monotonic_ns()}.log"
        self.server = start_server(CACHE / MODEL_NAME, log, self.port, *arguments, gateway_port=self.gateway_port)
        self.stack.callback(self.server.process.stop)
        wait_for(self.server.process, f"{self.server.url}/health")

    def start_edge(self, number: int) -> None:
        """The first behind the relay, the second in its namespace."""
        assert self.relay is not None
        is_apart = number == 1 and self.has_namespace
        url = f"http://{HOST_IP}:{self.gateway_port}" if is_apart else self.relay.url
        command = [str(BIN / "edge-client"), "connect", url, "--draft", "ngram", "--name", f"edge-{number}", "--quiet"]
        prefix = ["ip", "netns", "exec", NAMESPACE] if is_apart else []
        log = self.logs / f"edge-{number}-{time.monotonic_ns()}.log"
        process = start([*prefix, *command, "--wait", "30"], log, core=EDGE_CORE)
        self.stack.callback(process.stop)
        self.edges[number : number + 1] = [process]

    @property
    def num_edges(self) -> int | None:
        """That the gateway has; None if it does not answer."""
        with suppress(httpx.HTTPError, ValueError, KeyError):
            answer = httpx.get(f"http://127.0.0.1:{self.gateway_port}/healthz", trust_env=False, timeout=1.0).json()
            return int(answer["edges"]) if answer["engines"] else None
        return None

    @property
    def num_accepted(self) -> float:
        assert self.server is not None
        with suppress(httpx.HTTPError, KeyError):
            return self.server.metrics()["specedge_engine_accepted_tokens"]
        return 0.0

    def child(self, name: str) -> psutil.Process:
        assert self.server is not None
        children = psutil.Process(self.server.process.popen.pid).children(recursive=True)
        return next(child for child in children if name in " ".join(child.cmdline()))

    @property
    def gateway(self) -> psutil.Process:
        return self.child("vllm_specedge.cli gateway")

    def is_well(self, accepted_before: float) -> bool:
        """All edges are there, and a draft was accepted since (a new engine counts from 0)."""
        return self.num_edges == len(self.edges) and self.num_accepted not in (0.0, accepted_before)


@dataclass(frozen=True)
class Fault:
    name: str
    begin: Callable[[Site], None]
    end: Callable[[Site], None] = lambda site: None
    lasts_s: float = 0.0
    kills_engine: bool = False
    needs_namespace: bool = False
    is_noticed: Callable[[Site], bool] = lambda site: site.num_edges != len(site.edges)


def send(number: signal.Signals, edge: int) -> Callable[[Site], None]:
    return lambda site: site.edges[edge].popen.send_signal(number)


def delay(rtt_s: float) -> Callable[[Site], None]:
    def begin(site: Site) -> None:
        assert site.relay is not None
        site.relay.rtt_s = rtt_s

    return begin


def jitter(site: Site) -> None:
    """Up to 500 ms, another each 50 ms."""
    assert site.relay is not None
    chance = random.Random(0)
    for _ in range(int(LASTS_S / 0.05)):
        site.relay.rtt_s = chance.uniform(0.0, 1.0)
        time.sleep(0.05)


def resets(site: Site) -> None:
    assert site.relay is not None
    for _ in range(int(LASTS_S)):
        site.relay.reset()
        time.sleep(1.0)


def link(state: str) -> Callable[[Site], None]:
    return lambda site: run("ip", "link", "set", "specedge-f0", state)


def kill_engine(site: Site) -> None:
    site.child("EngineCore").kill()
    assert site.server is not None
    site.server.process.stop()


FAULTS = (
    Fault("edge-killed", send(signal.SIGKILL, 0), lambda site: site.start_edge(0)),
    Fault("gateway-killed", lambda site: site.gateway.kill()),
    Fault("edge-stopped", send(signal.SIGSTOP, 0), send(signal.SIGCONT, 0), LASTS_S),
    Fault("gateway-stopped", lambda site: site.gateway.suspend(), lambda site: site.gateway.resume(), LASTS_S),
    Fault("network-cut", link("down"), link("up"), LASTS_S, needs_namespace=True),
    Fault("nothing-passes", delay(3600.0), delay(0.0), LASTS_S),
    Fault("jitter-500-ms", jitter, delay(0.0), is_noticed=lambda site: True),
    Fault("reset-each-second", resets, is_noticed=lambda site: True),
    Fault("engine-killed", kill_engine, lambda site: site.start_server(), kills_engine=True),
)
SHORT = ("edge-killed", "gateway-killed")


@dataclass(frozen=True)
class Result:
    fault: Fault
    num_requests: int
    num_wrong: int
    num_failed: int
    noticed_s: float | None
    recovered_s: float | None

    @property
    def is_kept(self) -> bool:
        is_served = not self.num_failed or self.fault.kills_engine
        is_over = self.noticed_s is not None and self.recovered_s is not None
        return not self.num_wrong and is_served and is_over and self.num_requests > 0

    def row(self) -> list[str]:
        times = (f"{each:.1f}" if each is not None else "never" for each in (self.noticed_s, self.recovered_s))
        counts = map(str, (self.num_requests, self.num_wrong, self.num_failed))
        return [self.fault.name, *counts, *times, "ok" if self.is_kept else "BROKEN"]


def until(condition: Callable[[], bool]) -> float | None:
    """Seconds until it holds; None: not within the limit."""
    started_s = time.monotonic()
    while time.monotonic() - started_s < LIMIT_S:
        if condition():
            return time.monotonic() - started_s
        time.sleep(POLL_S)
    return None


def suffer(site: Site, fault: Fault, load: Load) -> Result:
    """One fault under load, from well to well."""
    with load.running():
        accepted = site.num_accepted
        if until(lambda: site.is_well(accepted)) is None:
            raise RuntimeError(f"before {fault.name}: the edges do not draft")
        began_s = time.monotonic()
        fault.begin(site)
        noticed_s = until(lambda: fault.is_noticed(site))
        time.sleep(max(0.0, fault.lasts_s - (time.monotonic() - began_s)))
        fault.end(site)
        accepted = site.num_accepted
        recovered_s = until(lambda: site.is_well(accepted))
    return Result(fault, load.num_requests, load.num_wrong, load.num_failed, noticed_s, recovered_s)


# -- the network -----------------------------------------------------------------------------------------------------


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def namespace() -> Iterator[bool]:
    """A network of its own for an edge, on a cable to this one; False where it cannot be made (it takes root)."""
    within = ("ip", "netns", "exec", NAMESPACE, "ip")
    with ExitStack() as stack:
        try:
            run("ip", "netns", "add", NAMESPACE)
            stack.callback(run, "ip", "netns", "del", NAMESPACE)
            run("ip", "link", "add", "specedge-f0", "type", "veth", "peer", "name", "specedge-f1", "netns", NAMESPACE)
            run("ip", "addr", "add", f"{HOST_IP}/30", "dev", "specedge-f0")
            run("ip", "link", "set", "specedge-f0", "up")
            run(*within, "addr", "add", f"{EDGE_IP}/30", "dev", "specedge-f1")
            run(*within, "link", "set", "specedge-f1", "up")
            has_namespace = True
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"No network namespace ({error}): both edges are behind the relay.", file=sys.stderr)
            has_namespace = False
        yield has_namespace


def chosen(only: Sequence[str], is_short: bool, has_namespace: bool) -> list[Fault]:
    names = only or (SHORT if is_short else [fault.name for fault in FAULTS])
    return [fault for fault in FAULTS if fault.name in names and (has_namespace or not fault.needs_namespace)]


def main(
    only: Annotated[list[str] | None, typer.Option(help=", ".join(fault.name for fault in FAULTS))] = None,
    short: Annotated[bool, typer.Option("--short", help=f"Only {', '.join(SHORT)}.")] = False,
    port: Annotated[int, typer.Option(help="Of the server; the gateway has the next.")] = 8040,
) -> None:
    """What can go wrong around a server, under load."""
    header = ("fault", "requests", "wrong", "failed", "noticed after s", "over after s", "")
    print(f"| {' | '.join(header)} |\n| --- |{' ---: |' * 5} --- |")
    is_kept = True
    with ExitStack() as stack, tempfile.TemporaryDirectory() as logs:
        has_namespace = stack.enter_context(namespace())
        site = Site(Path(logs), port, port + 1, has_namespace, stack)
        site.start_server()
        assert site.server is not None
        first = Load(site.server.url)
        first.learn()
        site.relay = stack.enter_context(Relay(site.gateway_port))
        for number in range(2):
            site.start_edge(number)
        psutil.Process().cpu_affinity([EDGE_CORE])
        for fault in chosen(only or (), short, has_namespace):
            result = suffer(site, fault, Load(site.server.url, first.expected))
            print(f"| {' | '.join(result.row())} |", flush=True)
            is_kept = is_kept and result.is_kept
    sys.exit(0 if is_kept else 1)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    typer.run(main)
