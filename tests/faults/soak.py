"""`make soak`: two hours of load while edges come and go. What grows, what is left behind, is any token wrong?

    PYTHONPATH=examples python -m tests.faults.soak [--minutes 120] [--edges 64] [--requests 16] [--output FILE]

A real `vllm serve` with the real model, its gateway with TLS and tokens, and the OpenAI client, which keeps a number of
requests running and compares every answer with the server's answer without edges. Edges live in processes of eight,
each process for a minute on average; then it is terminated or killed, with equal probability, and another starts.
Memory is sampled every 20 seconds; its slope (Theil-Sen, with 95 % bounds) is taken after the warm-up. At the end the
gateway may have no more connections, tasks and files than at first, and the engine no proposal tree.
"""

import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer
from scipy.stats import theilslopes
from stack import EDGE_CORE, Process, start

from tests.faults.matrix import Clock, Credentials, Load, Site, until

EDGES_PER_PROCESS = 8
LIFE_S = 60.0
SAMPLE_S = 20.0
SETTLE_S = 5.0
MAX_MB_PER_HOUR = 1.0
ROLES = {"gateway": "vllm_specedge.cli gateway", "engine core": "EngineCore", "worker": "VLLM::Worker"}
GROWING = ("gateway", "engine core")
"""Processes whose memory must not grow."""
LEFT_BEHIND = ("specedge_gateway_connections", "specedge_gateway_tasks", "process_open_fds", "specedge_requests")


@dataclass(frozen=True)
class Sample:
    """One sample of all figures."""

    minutes: float
    memory_mb: dict[str, float]
    open_files: dict[str, int]
    gateway: dict[str, float]


@dataclass(frozen=True)
class Slope:
    """Megabytes an hour, and the bounds of 95 %."""

    mb_per_hour: float
    low: float
    high: float

    @property
    def is_flat(self) -> bool:
        return self.mb_per_hour < MAX_MB_PER_HOUR


def slope(samples: list[Sample], role: str) -> Slope:
    hours = [sample.minutes / 60 for sample in samples]
    result = theilslopes([sample.memory_mb[role] for sample in samples], hours)
    return Slope(float(result.slope), float(result.low_slope), float(result.high_slope))


def look(site: Site, started_s: float) -> Sample:
    processes = {role: site.child(mark) for role, mark in ROLES.items()}
    return Sample(
        minutes=(time.monotonic() - started_s) / 60,
        memory_mb={role: process.memory_info().rss / 1e6 for role, process in processes.items()},
        open_files={role: process.num_fds() for role, process in processes.items()},
        gateway={name: site.metric(name) for name in LEFT_BEHIND},
    )


@dataclass
class Crowd:
    """Processes of edges that come and go."""

    url: str
    credentials: Credentials
    logs: Path
    num_processes: int
    num_started: int = 0
    num_killed: int = 0

    def _start(self) -> Process:
        command = [sys.executable, "benchmarks/harness/replay.py", self.url, "--draft", "ngram"]
        command += ["--edges", str(EDGES_PER_PROCESS), *self.credentials.edge_options]
        self.num_started += 1
        return start(command, self.logs / f"edges-{self.num_started % 64}.log", core=EDGE_CORE)

    def live(self, stopped: threading.Event) -> None:
        """Run until it is stopped; then terminate all."""
        chance = random.Random(0)
        alive = [(self._start(), self._end_s(chance)) for _ in range(self.num_processes)]
        while not stopped.wait(0.5):
            for index, (process, end_s) in enumerate(alive):
                if time.monotonic() > end_s:
                    self._end(process, chance)
                    alive[index] = (self._start(), self._end_s(chance))
        for process, _ in alive:
            process.stop()

    def _end(self, process: Process, chance: random.Random) -> None:
        if chance.random() < 0.5:
            process.popen.send_signal(signal.SIGKILL)
            self.num_killed += 1
        process.stop()

    def _end_s(self, chance: random.Random) -> float:
        return time.monotonic() + chance.expovariate(1 / LIFE_S)

    @contextmanager
    def coming_and_going(self) -> Iterator[None]:
        stopped = threading.Event()
        thread = threading.Thread(target=self.live, args=(stopped,))
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()


def soak(site: Site, crowd: Crowd, load: Load, minutes: float) -> tuple[list[Sample], list[Sample]]:
    """Samples of the time under load, and those before and after it, without edges and requests."""
    started_s = time.monotonic()
    time.sleep(SETTLE_S)
    at_rest, samples = [look(site, started_s)], []
    with crowd.coming_and_going(), load.running():
        while time.monotonic() - started_s < 60 * minutes:
            time.sleep(SAMPLE_S)
            samples.append(look(site, started_s))
            print(said(samples[-1], load), flush=True)
    if until(lambda: site.num_edges == 0) is None:
        print("Edges are left.")
    time.sleep(SETTLE_S)
    at_rest.append(look(site, started_s))
    return samples, at_rest


def said(sample: Sample, load: Load) -> str:
    memory = ", ".join(f"{role} {sample.memory_mb[role]:.1f}" for role in sample.memory_mb)
    return f"{sample.minutes:6.1f} min: MB: {memory}; {answers(load)}"


def answers(load: Load) -> str:
    return f"{load.num_requests} answers, {load.num_wrong} wrong, {load.num_failed} failed"


def left_behind(at_rest: list[Sample], opened: float, closed: float) -> dict[str, float]:
    """Whatever there is more of at the end than at first."""
    first, last = at_rest
    more = {name: last.gateway[name] - first.gateway[name] for name in LEFT_BEHIND}
    more["engine's open files"] = last.open_files["engine core"] - first.open_files["engine core"]
    more["proposal trees"] = opened - closed
    return {name: number for name, number in more.items() if number > 0}


def main(
    minutes: Annotated[float, typer.Option(help="So long.")] = 120.0,
    warm_up: Annotated[float, typer.Option(help="Minutes until slopes are taken.")] = 20.0,
    edges: Annotated[int, typer.Option(help="Sessions at a time.", min=EDGES_PER_PROCESS)] = 64,
    requests: Annotated[int, typer.Option(help="At a time.", min=1)] = 16,
    port: Annotated[int, typer.Option(help="Port of the server; the gateway has the next.")] = 8060,
    output: Annotated[Path | None, typer.Option(help="All samples, as JSON.")] = None,
) -> None:
    """Check whether anything grows, is left behind, or any token is wrong."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        directory = Path(name)
        site = Site(directory, Credentials(directory), Clock(directory / "clock"), port, port + 1, False, stack)
        site.max_seqs = requests
        site.start_server()
        assert site.server is not None
        first = Load(site.server.url)
        first.learn()
        psutil.Process().cpu_affinity([EDGE_CORE])
        load = Load(site.server.url, first.expected, requests)
        crowd = Crowd(f"https://localhost:{site.gateway_port}", site.credentials, directory, edges // EDGES_PER_PROCESS)
        samples, at_rest = soak(site, crowd, load, minutes)
        counters = {
            name: site.metric(f"specedge_engine_{name}_total") for name in ("opened_requests", "closed_requests")
        }
        accepted = site.num_accepted
    warm = [sample for sample in samples if sample.minutes >= warm_up]
    slopes = {role: slope(warm, role) for role in ROLES}
    left = left_behind(at_rest, counters["opened_requests"], counters["closed_requests"])
    print(f"\n{answers(load)}; {accepted:.0f} draft tokens accepted")
    print(f"{crowd.num_started} processes of {EDGES_PER_PROCESS} edges came, {crowd.num_killed} were killed")
    for role, found in slopes.items():
        verdict = "" if role not in GROWING else " ok" if found.is_flat else " GROWS"
        print(f"{role}: {found.mb_per_hour:+.2f} MB an hour ({found.low:+.2f}..{found.high:+.2f}){verdict}")
    print("Left behind: " + (json.dumps(left) if left else "nothing"))
    if output is not None:
        parts = {"samples": samples, "at_rest": at_rest}
        listed = {name: [asdict(sample) for sample in some] for name, some in parts.items()}
        output.write_text(
            json.dumps({**listed, "slopes": {role: asdict(each) for role, each in slopes.items()}}, indent=1)
        )
    is_flat = all(slopes[role].is_flat for role in GROWING)
    sys.exit(0 if is_flat and not left and not load.num_wrong and not load.num_failed and accepted else 1)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    typer.run(main)
