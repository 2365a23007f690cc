"""The number of cores that this process may use: a container, a service or `taskset` may limit it to a part."""

import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path("/")
GROUPS = "sys/fs/cgroup"


def usable_cores(root: Path = ROOT) -> int:
    """The least of the cores in its affinity mask, its CPU quota, and the physical cores."""
    process = psutil.Process()
    allowed = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count()
    physical = psutil.cpu_count(logical=False)
    share = min(_shares(root), default=math.inf)
    return max(1, int(min(allowed or 1, physical or math.inf, math.ceil(share) if share < math.inf else math.inf)))


def _shares(root: Path) -> Iterator[float]:
    """The CPU quota of each control group around this process, in cores. Linux only."""
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            is_second = number == "0" and not controllers
            if is_second or "cpu" in controllers.split(","):
                top = root / GROUPS / ("" if is_second else "cpu")
                yield from _shares_up(top / path.lstrip("/"), top, is_second)


def _shares_up(group: Path, top: Path, is_second: bool) -> Iterator[float]:
    for folder in (group, *group.parents):
        with suppress(OSError, ValueError, ZeroDivisionError):
            if is_second:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0:  # "max" (not a number) and -1 mean no limit
                yield int(quota) / int(period)
        if folder == top:
            return
