"""Edges that draft while a server is under load: one process, behind a relay that adds delay."""

import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from stack import BIN, EDGE_CORE, POLL_S, STOP_LIMIT_S, Process, Server, start, wait_for

from harness.relay import Relay

CONNECT = (str(BIN / "edge-client"), "connect")
REPLAY = (sys.executable, str(Path(__file__).with_name("replay.py")))
NICE = 19


@dataclass(frozen=True)
class Edges:
    """The edges of one run, all in one process, behind their relay."""

    process: Process
    relay: Relay

    def cpu_s(self) -> float:
        times = psutil.Process(self.process.popen.pid).cpu_times()
        return float(times.user + times.system)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the edges while the block runs; their connections stay open."""
        self.process.popen.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.popen.send_signal(signal.SIGCONT)  # so that they can exit

    def totals(self, is_dead: bool = False) -> dict[str, int]:
        """Totals that the edges printed when they exited. Other output is shown as warnings; dead edges have many."""
        *warnings, last = self.process.log.read_text().splitlines() or [""]
        try:
            totals: dict[str, int] = json.loads(last)
        except ValueError:
            totals, warnings = {}, [*warnings, last]
        for text in warnings if not is_dead else ():
            print(f"{self.process.log.name}: {text}", file=sys.stderr)
        return totals


def flags(**values: object) -> list[str]:
    """Command-line options: `pass_ms=6` is --pass-ms 6."""
    return [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]


@contextmanager
def drafting(
    server: Server,
    rtt_ms: float | None,
    command: Sequence[str],
    options: Sequence[str],
    log: Path,
    num_edges: int = 1,
    is_pinned: bool = True,
) -> Iterator[Edges | None]:
    """Edges that the gateway has admitted through their own relay; None without a round trip to add.

    `command` is CONNECT or REPLAY. Edges that are not pinned run where the server leaves room. Raises StackError if
    they do not connect, do not disconnect, or exit by themselves.
    """
    if rtt_ms is None:
        yield None
        return
    with Relay(server.gateway_port, rtt_ms / 1000) as relay:
        core = EDGE_CORE if is_pinned else None
        process = start([*command, relay.url, *options], log, {"HF_HUB_OFFLINE": "1"}, core)
        if not is_pinned:
            psutil.Process(process.popen.pid).nice(NICE)
        try:
            wait_for(process, f"{server.gateway_url}/healthz", "edges", num_edges)
            yield Edges(process, relay)
            if process.popen.poll() is not None:
                raise process.fail("the edge exited by itself")
        finally:
            process.stop()
    wait_for_no_edge(server)


def wait_for_no_edge(server: Server) -> None:
    for _ in range(int(STOP_LIMIT_S / POLL_S)):
        if not server.metrics()["specedge_edges"]:
            return
        time.sleep(POLL_S)
    raise server.process.fail("the last edge is still connected")
