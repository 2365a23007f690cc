"""`make test-faults`: a real server under load, and faults around it. Prints a table; status 1 if a promise is broken.

    PYTHONPATH=examples python -m tests.faults.matrix [--only edge-killed] [--short]

A real `vllm serve`, its gateway with TLS and tokens, two real edges (one behind a relay, one in its own network
namespace if possible) and the OpenAI client, which sends four requests at a time and compares every answer with the
server's answer without edges. A fault is noticed when the gateway or the engine reports it, and over when all edges are
connected again and drafts are accepted; a harmless fault has to be over before it ends. No request may fail, unless the
engine itself is killed.

A namespace and a full file system need root; clock jumps need libfaketime. Faults that cannot be made here are reported
and left out.
"""

import json
import os
import random
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import httpx2 as httpx
import psutil
import trustme
import typer
from certificates import write_certificate
from openai import OpenAI, OpenAIError
from stack import BIN, EDGE_CORE, MODEL_NAME, Process, Server, start, start_server, wait_for

from benchmarks.harness.relay import Relay
from vllm_specedge.gateway.credentials import TokenFile

CACHE = Path(__file__).parents[2] / ".cache"
NUM_ASKING, NUM_TOKENS = 4, 48
LASTS_S = 10.0
"""Duration of a fault that ends by itself."""
LIMIT_S = 90.0
POLL_S = 0.1
NAMESPACE, HOST_IP, EDGE_IP = "specedge-faults", "10.213.7.1", "10.213.7.2"
LOG_BYTES = 16 << 20
KEPT = CACHE / "faults"
"""Directory of the logs at the end."""
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
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
    """Sends requests continuously, from several threads."""

    url: str
    expected: dict[str, str] = field(default_factory=dict)
    num_asking: int = NUM_ASKING
    num_requests: int = 0
    num_wrong: int = 0
    num_failed: int = 0
    longest_pause_s: float = 0.0
    """Longest time between two chunks of one answer."""
    _stopped: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, client: OpenAI, prompt: str) -> str:
        body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "stream": True}
        text, heard_s = "", None
        for chunk in client.completions.create(**body, extra_body={"ignore_eos": True}):
            now_s = time.monotonic()
            if heard_s is not None:
                with self._lock:
                    self.longest_pause_s = max(self.longest_pause_s, now_s - heard_s)
            text, heard_s = text + chunk.choices[0].text, now_s
        return text

    def learn(self) -> None:
        """Record the server's answers without edges."""
        with self._client() as client:
            self.expected = {prompt: self.ask(client, prompt) for prompt in PROMPTS}

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._run, args=(number,)) for number in range(self.num_asking)]
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


@dataclass(frozen=True)
class Credentials:
    """Certificate and tokens of the gateway and its edges."""

    directory: Path
    authority: trustme.CA = field(default_factory=trustme.CA)

    def __post_init__(self) -> None:
        self.certify()
        self.token.write_text(TokenFile(self.tokens).issue("edges", "pool"))

    @property
    def tokens(self) -> Path:
        return self.directory / "tokens.json"

    @property
    def token(self) -> Path:
        return self.directory / "token"

    @property
    def trusted(self) -> Path:
        return self.directory / "ca.pem"

    def certify(self, *, is_expired: bool = False) -> None:
        """Replace the certificate."""
        not_after = datetime.now(UTC) - timedelta(days=1) if is_expired else None
        write_certificate(self.directory, self.authority, "localhost", HOST_IP, not_after=not_after)

    @property
    def gateway_options(self) -> dict[str, str]:
        files = {"tls_cert": "cert.pem", "tls_key": "key.pem", "tokens_file": "tokens.json"}
        return {option: str(self.directory / name) for option, name in files.items()}

    @property
    def edge_options(self) -> list[str]:
        return ["--token-file", str(self.token), "--ca-file", str(self.trusted)]


class Clock:
    """The wall clock of a process; its monotonic clock is unaffected. (Not vLLM's: libfaketime breaks its sleeps.)"""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.set("+0")

    def set(self, offset: str) -> None:
        """Set an offset in libfaketime's syntax: "+1d", "-2d"."""
        self._file.write_text(offset)

    @property
    def env(self) -> dict[str, str]:
        if FAKETIME is None:
            return {}
        only_wall = dict.fromkeys(("DONT_FAKE_MONOTONIC", "FAKETIME_DONT_FAKE_MONOTONIC"), "1")
        where = {"FAKETIME_TIMESTAMP_FILE": str(self._file), "FAKETIME_CACHE_DURATION": "1"}
        return {"LD_PRELOAD": str(FAKETIME), **only_wall, **where}


@dataclass
class Site:
    """All processes of the test, with their metrics."""

    logs: Path
    credentials: Credentials
    clock: Clock
    port: int
    gateway_port: int
    has_namespace: bool
    stack: ExitStack
    max_seqs: int = 8
    relay: Relay | None = None
    server: Server | None = None
    edges: list[Process] = field(default_factory=list)

    def start_server(self) -> None:
        config = {"method": "edge", "num_speculative_tokens": 5, "listen": f"0.0.0.0:{self.gateway_port}"}
        config |= {"ngram": False, **self.credentials.gateway_options}
        arguments = [
            "--max-model-len",
            "1024",
            "--max-num-seqs",
            str(self.max_seqs),
            "--speculative-config",
            json.dumps(config),
        ]
        log = self.logs / f"server-{time.monotonic_ns()}.log"
        self.server = start_server(CACHE / MODEL_NAME, log, self.port, *arguments)
        self.stack.callback(self.server.process.stop)
        wait_for(self.server.process, f"{self.server.url}/health")

    def start_edge(self, number: int, env: dict[str, str] | None = None) -> None:
        """Start an edge: the first behind the relay, the second in its namespace."""
        assert self.relay is not None
        is_apart = number == 1 and self.has_namespace
        url = f"https://{HOST_IP}:{self.gateway_port}" if is_apart else f"https://localhost:{self.relay.port}"
        command = [str(BIN / "edge-client"), "connect", url, "--draft", "ngram", "--name", f"edge-{number}"]
        command += self.credentials.edge_options
        prefix = ["ip", "netns", "exec", NAMESPACE] if is_apart else []
        log = self.logs / f"edge-{number}-{time.monotonic_ns()}.log"
        process = start([*prefix, *command, "--wait", "30"], log, env, core=EDGE_CORE)
        self.stack.callback(process.stop)
        self.edges[number : number + 1] = [process]

    @property
    def num_edges(self) -> int | None:
        """Number of edges of the gateway; None if it does not answer."""
        with suppress(httpx.HTTPError, ValueError, KeyError):
            answer = self._get("healthz").json()
            return int(answer["edges"]) if answer["engines"] else None
        return None

    @property
    def num_accepted(self) -> float:
        return self.metric("specedge_engine_accepted_tokens_total")

    def metric(self, name: str) -> float:
        """A metric of the gateway; 0 if it does not answer."""
        with suppress(httpx.HTTPError, StopIteration):
            lines = self._get("metrics").text.splitlines()
            return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])
        return 0.0

    def _get(self, path: str) -> httpx.Response:
        """A response of the gateway."""
        context = ssl.create_default_context(cafile=self.credentials.trusted)
        return httpx.get(f"https://localhost:{self.gateway_port}/{path}", trust_env=False, timeout=1.0, verify=context)

    def child(self, name: str) -> psutil.Process:
        assert self.server is not None
        children = psutil.Process(self.server.process.popen.pid).children(recursive=True)
        return next(child for child in children if name in " ".join(child.cmdline()))

    @property
    def gateway(self) -> psutil.Process:
        return self.child("vllm_specedge.cli gateway")

    def is_well(self, accepted_before: float) -> bool:
        """Whether all edges are connected and a draft was accepted since (a new engine counts from 0)."""
        return self.num_edges == len(self.edges) and self.num_accepted not in (0.0, accepted_before)


@dataclass(frozen=True)
class Fault:
    name: str
    begin: Callable[[Site], None]
    end: Callable[[Site], None] = lambda site: None
    lasts_s: float = 0.0
    kills_engine: bool = False
    is_harmless: bool = False
    """Must go unnoticed: edges draft before it ends."""
    is_noticed: Callable[[Site], bool] = lambda site: site.num_edges != len(site.edges)
    can_be_made: Callable[[Site], bool] = lambda site: True


def send(number: signal.Signals, edge: int) -> Callable[[Site], None]:
    return lambda site: site.edges[edge].popen.send_signal(number)


def delay(rtt_s: float) -> Callable[[Site], None]:
    def begin(site: Site) -> None:
        assert site.relay is not None
        site.relay.rtt_s = rtt_s

    return begin


def jitter(site: Site) -> None:
    """A delay of up to 500 ms, changed every 50 ms."""
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


def crawl(site: Site) -> None:
    """An edge that reads and writes only a twentieth of the time."""
    for _ in range(int(LASTS_S)):
        site.edges[0].popen.send_signal(signal.SIGSTOP)
        time.sleep(0.95)
        site.edges[0].popen.send_signal(signal.SIGCONT)
        time.sleep(0.05)


def fill(site: Site) -> None:
    """No log can be written; an edge starts meanwhile."""
    with suppress(OSError), (site.logs / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    site.edges[0].popen.kill()
    site.start_edge(0)


def jump(site: Site) -> None:
    """An edge's clock jumps, as on a laptop that was asleep. (The gateway's: tests/processes/test_gateway.py.)"""
    site.edges[0].popen.kill()
    site.start_edge(0, site.clock.env)
    for offset in ("+1d", "-2d", "+0"):
        site.clock.set(offset)
        time.sleep(LASTS_S / 3)


def expire(site: Site) -> None:
    site.credentials.certify(is_expired=True)


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
    Fault("network-cut", link("down"), link("up"), LASTS_S, can_be_made=lambda site: site.has_namespace),
    Fault("nothing-passes", delay(3600.0), delay(0.0), LASTS_S),
    Fault("jitter-500-ms", jitter, delay(0.0), is_noticed=lambda site: True),
    Fault("reset-each-second", resets, is_noticed=lambda site: True),
    Fault("edge-crawls", crawl, is_noticed=lambda site: True),
    Fault(
        "disk-full",
        fill,
        lambda site: (site.logs / "filler").unlink(),
        LASTS_S,
        is_harmless=True,
        can_be_made=lambda site: site.logs.is_mount(),
        is_noticed=lambda site: True,
    ),
    Fault(
        "clock-jumps",
        jump,
        is_harmless=True,
        can_be_made=lambda site: FAKETIME is not None,
        is_noticed=lambda site: True,
    ),
    Fault("certificate-expired", expire, lambda site: site.credentials.certify(), LASTS_S),
    Fault("engine-killed", kill_engine, lambda site: site.start_server(), kills_engine=True),
)
SHORT = ("edge-killed", "gateway-killed")


@dataclass(frozen=True)
class Result:
    fault: Fault
    num_requests: int
    num_wrong: int
    num_failed: int
    longest_pause_s: float
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
        return [self.fault.name, *counts, f"{self.longest_pause_s:.2f}", *times, "ok" if self.is_kept else "BROKEN"]


def until(condition: Callable[[], bool]) -> float | None:
    """Seconds until the condition holds; None: not within the limit."""
    started_s = time.monotonic()
    while time.monotonic() - started_s < LIMIT_S:
        if condition():
            return time.monotonic() - started_s
        time.sleep(POLL_S)
    return None


def suffer(site: Site, fault: Fault, load: Load) -> Result:
    """Apply one fault under load, from a healthy state until it is healthy again."""
    with load.running():
        accepted = site.num_accepted
        if until(lambda: site.is_well(accepted)) is None:
            raise RuntimeError(f"before {fault.name}: the edges do not draft")
        began_s = time.monotonic()
        fault.begin(site)
        noticed_s = until(lambda: fault.is_noticed(site))
        if fault.is_harmless:
            accepted = site.num_accepted
            recovered_s = until(lambda: site.is_well(accepted))
        time.sleep(max(0.0, fault.lasts_s - (time.monotonic() - began_s)))
        fault.end(site)
        if not fault.is_harmless:
            accepted = site.num_accepted
            recovered_s = until(lambda: site.is_well(accepted))
    counts = (load.num_requests, load.num_wrong, load.num_failed)
    return Result(fault, *counts, load.longest_pause_s, noticed_s, recovered_s)


# -- the network -----------------------------------------------------------------------------------------------------


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def namespace() -> Iterator[bool]:
    """A separate network namespace for an edge, linked to this one; False if it cannot be made (it needs root)."""
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


@contextmanager
def small_disk() -> Iterator[Path]:
    """A directory on a separate file system; an ordinary one if that cannot be made (it needs root)."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        try:
            run("mount", "-t", "tmpfs", "-o", f"size={LOG_BYTES}", "tmpfs", name)
            stack.callback(run, "umount", "--lazy", name)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"No file system for logs ({error}): none is filled.", file=sys.stderr)
        try:
            yield Path(name)
        finally:
            for log in Path(name).glob("*.log"):
                KEPT.mkdir(parents=True, exist_ok=True)
                shutil.copy(log, KEPT)


def chosen(only: Sequence[str], is_short: bool, site: Site) -> list[Fault]:
    """The requested faults. Those that cannot be made here are reported and left out."""
    unknown = set(only) - {fault.name for fault in FAULTS}
    if unknown:
        raise typer.BadParameter(f"there is no fault {', '.join(sorted(unknown))}")
    names = only or (SHORT if is_short else [fault.name for fault in FAULTS])
    wanted = [fault for fault in FAULTS if fault.name in names]
    for fault in wanted:
        if not fault.can_be_made(site):
            print(f"{fault.name} cannot be made here.", file=sys.stderr)
    return [fault for fault in wanted if fault.can_be_made(site)]


def main(
    only: Annotated[list[str] | None, typer.Option(help=", ".join(fault.name for fault in FAULTS))] = None,
    short: Annotated[bool, typer.Option("--short", help=f"Only {', '.join(SHORT)}.")] = False,
    port: Annotated[int, typer.Option(help="Port of the server; the gateway has the next.")] = 8040,
) -> None:
    """Test faults around a server under load."""
    header = ("fault", "requests", "wrong", "failed", "longest pause s", "noticed after s", "over after s", "")
    is_kept = True
    with (
        tempfile.TemporaryDirectory() as name,
        small_disk() as logs,
        namespace() as has_namespace,
        ExitStack() as stack,
    ):
        credentials, clock = Credentials(Path(name)), Clock(Path(name) / "clock")
        site = Site(logs, credentials, clock, port, port + 1, has_namespace, stack)
        faults = chosen(only or (), short, site)
        site.start_server()
        assert site.server is not None
        first = Load(site.server.url)
        first.learn()
        site.relay = stack.enter_context(Relay(site.gateway_port))
        for number in range(2):
            site.start_edge(number)
        psutil.Process().cpu_affinity([EDGE_CORE])
        print(f"| {' | '.join(header)} |\n| --- |{' ---: |' * 6} --- |")
        for fault in faults:
            result = suffer(site, fault, Load(site.server.url, first.expected))
            print(f"| {' | '.join(result.row())} |", flush=True)
            is_kept = is_kept and result.is_kept
    sys.exit(0 if is_kept else 1)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    typer.run(main)
