"""Edges that draft while servers are asked."""

import json
import signal
from dataclasses import dataclass
from pathlib import Path

import psutil
from stack import Process

from harness.relay import Relay
from harness.results import console


@dataclass(frozen=True)
class Edges:
    """The edges of one run, all in one process, behind their relay."""

    process: Process
    relay: Relay

    def cpu_s(self) -> float:
        times = psutil.Process(self.process.popen.pid).cpu_times()
        return float(times.user + times.system)

    def signal(self, number: signal.Signals) -> None:
        self.process.popen.send_signal(number)


def check(process: Process) -> None:
    if process.popen.poll() is not None:
        raise process.fail("the edge ended by itself")


def edge_totals(log: Path, is_dead: bool = False) -> dict[str, int]:
    """What edges say of themselves when they end. Whatever else is a warning and is shown; the dead have many."""
    *warnings, last = log.read_text().splitlines() or [""]
    try:
        totals: dict[str, int] = json.loads(last)
    except ValueError:
        totals, warnings = {}, [*warnings, last]
    for text in warnings if not is_dead else ():
        console.print(f"{log.name}: {text}", markup=False)
    return totals
