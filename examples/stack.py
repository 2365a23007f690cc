"""Start a vLLM server and edges as local processes on one core each, for the demo, the tests and the benchmarks."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2 as httpx
import psutil

BIN = Path(sys.executable).parent
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
"""Cores that this process may use: a container or `taskset` may have restricted them."""
SERVER_CORE, EDGE_CORE = CORES[0], CORES[-1]
START_LIMIT_S = 300.0
STOP_LIMIT_S = 20.0
POLL_S = 0.2
MODEL_NAME = "smollm2"
KV_BYTES = 2 << 30
"""Memory for the KV cache, unless arguments say otherwise."""
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Set for all servers that are compared. With 4 kB pages it is chance which of them collide in the processor's caches:
one of two equal servers was up to 7 % slower than the other for as long as both ran (benchmarks/LOG.md)."""


class StackError(Exception):
    """A process did not start; the message includes the end of its log."""


@dataclass(frozen=True)
class Process:
    popen: "subprocess.Popen[bytes]"
    log: Path

    def fail(self, what: str) -> StackError:
        return StackError(f"{what}; the end of {self.log}:\n" + "\n".join(self.log.read_text().splitlines()[-25:]))

    def stop(self) -> None:
        """Terminate the process and wait for it and its children; kill those left after STOP_LIMIT_S."""
        children = psutil.Process(self.popen.pid).children(recursive=True) if self.popen.poll() is None else []
        self.popen.terminate()
        try:
            self.popen.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        _, left = psutil.wait_procs(children, STOP_LIMIT_S)
        for child in left:
            child.kill()


def start(
    command: list[str], log: Path, env: dict[str, str] | None = None, core: int | None = None, cwd: Path | None = None
) -> Process:
    log.parent.mkdir(parents=True, exist_ok=True)
    both = {**os.environ, **(env or {})}
    with log.open("wb") as file:
        popen = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=both, cwd=cwd)
    if core is not None:
        psutil.Process(popen.pid).cpu_affinity([core])
    return Process(popen, log)


def wait_for(process: Process, url: str, key: str = "", at_least: int = 0) -> None:
    """Wait until `url` answers 200 and, if `key` is given, the value in its JSON is at least `at_least`."""
    with httpx.Client(trust_env=False, timeout=5) as client:
        for _ in range(int(START_LIMIT_S / POLL_S)):
            try:
                response = client.get(url)
                if response.status_code == 200 and (not key or response.json()[key] >= at_least):
                    return
            except httpx.HTTPError:
                pass
            try:
                process.popen.wait(POLL_S)
            except subprocess.TimeoutExpired:
                continue
            raise process.fail(f"{process.popen.args[0]} ended with status {process.popen.returncode}")  # type: ignore[index]
    raise process.fail(f"{url} was not ready within {START_LIMIT_S:.0f} s")


@dataclass(frozen=True)
class Server:
    """A running `vllm serve`, with its served model name."""

    process: Process
    port: int
    gateway_port: int
    model: str = MODEL_NAME

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def gateway_url(self) -> str:
        return f"http://127.0.0.1:{self.gateway_port}"

    def metrics(self) -> dict[str, float]:
        text = httpx.get(f"{self.gateway_url}/metrics", trust_env=False, timeout=STOP_LIMIT_S).text
        lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name.removesuffix("_total"): float(value) for name, _, value in lines}

    def engine_counters(self, at_least: dict[str, float] | None = None) -> dict[str, float]:
        """The engine's counters. It reports them once a second; wait until they have reached `at_least`."""
        for _ in range(int(STOP_LIMIT_S / POLL_S)):
            prefix = "specedge_engine_"
            values = ((k, v) for k, v in self.metrics().items() if k.startswith(prefix) and "{" not in k)
            counters = {k.removeprefix(prefix): v for k, v in values}
            if all(counters[name] >= value for name, value in (at_least or {}).items()):
                return counters
            with suppress(subprocess.TimeoutExpired):
                self.process.popen.wait(POLL_S)
        raise self.process.fail(f"the engine did not report {at_least} within {STOP_LIMIT_S:.0f} s")


def start_server(
    model: Path,
    log: Path,
    port: int,
    *arguments: str,
    gateway_port: int = 8100,
    env: dict[str, str] | None = None,
    dtype: str = "float32",
) -> Server:
    """Start `vllm serve` on one core; in float32 greedy tokens do not depend on the batch."""
    command = [str(BIN / "vllm"), "serve", str(model), "--served-model-name", model.name]
    command += ["--dtype", dtype, "--enforce-eager", "--port", str(port), *arguments]
    env = {
        "VLLM_CPU_OMP_THREADS_BIND": str(SERVER_CORE),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **(env or {}),
    }
    if "--kv-cache-memory-bytes" not in arguments:
        command += ["--kv-cache-memory-bytes", str(KV_BYTES)]
    return Server(start(command, log, env), port, gateway_port, model.name)


@contextmanager
def answering(server: Server) -> Iterator[Server]:
    """The server, once it answers; stops it at the end."""
    try:
        wait_for(server.process, f"{server.url}/health")
        yield server
    finally:
        server.process.stop()


@contextmanager
def edge_client(gateway_url: str, draft: str, log: Path, *arguments: str) -> Iterator[Process]:
    """An `edge-client connect` that the gateway has admitted."""
    command = [str(BIN / "edge-client"), "connect", gateway_url, "--draft", draft, "--threads", "1"]
    # On a slow machine a server may answer before its gateway listens.
    command += ["--wait", f"{START_LIMIT_S:.0f}", *arguments]
    process = start(command, log, {"HF_HUB_OFFLINE": "1"}, core=EDGE_CORE)
    try:
        wait_for(process, f"{gateway_url}/healthz", "edges", 1)
        yield process
    finally:
        process.stop()
