"""The output of `vllm-specedge simulate-overload`: goodput by arm and load, for both kinds of arrivals, by class."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.console import Console
from rich.table import Table

from vllm_specedge.simulation.arrivals import Kind
from vllm_specedge.simulation.overload import Overload, OverloadOutcome, simulate_overload
from vllm_specedge.simulation.overload_arms import ARMS

KINDS: tuple[Kind, ...] = ("poisson", "bursty")
WIDTH = 110


@dataclass(frozen=True, slots=True)
class Cell:
    """An arm under a load, over some seeds."""

    kind: Kind
    arm: str
    times: float
    outcomes: Sequence[OverloadOutcome]

    @property
    def goodput_per_s(self) -> float:
        return sum(each.goodput_per_s for each in self.outcomes) / len(self.outcomes)

    @property
    def verified_per_step(self) -> float:
        return sum(each.verified_per_step for each in self.outcomes) / len(self.outcomes)

    def met(self, class_: str) -> float:
        """Share of the requests of a class, refused ones included, that met their targets."""
        of_class = [each.classes[class_] for each in self.outcomes]
        return sum(each.good for each in of_class) / max(1, sum(each.offered for each in of_class))


def cells(base: Overload, times: Iterable[float], num_seeds: int) -> Iterator[Cell]:
    loads, first = list(times), base.scenario.seed
    seeds = [replace(base.scenario, seed=first + number) for number in range(num_seeds)]
    for kind in KINDS:
        for arm in ARMS:
            for each in loads:
                run = replace(base, kind=kind, arm=arm, times=each)
                yield Cell(kind, arm, each, [simulate_overload(replace(run, scenario=seed)) for seed in seeds])


def show(base: Overload, times: Sequence[float], num_seeds: int, is_json: bool) -> int:
    """Simulate and print. Returns the exit status."""
    found = list(cells(base, times, num_seeds))
    if is_json:
        print(json.dumps([_as_row(base, cell) for cell in found], indent=1))  # noqa: T201
        return 0
    console = Console(width=WIDTH)
    classes = ", ".join(
        f"{each.name} ({each.share:.0%}): first token in {each.target.ttft_s:g} s, then {1e3 * each.target.itl_s:g} ms"
        for each in base.classes
    )
    console.print(f"Capacity: {base.capacity_per_s:.2f} requests per second. {classes}.")
    console.print("Goodput: requests per second that met their targets; in brackets, the share of each class that did.")
    for kind in KINDS:
        console.print(_table(base, kind, times, [cell for cell in found if cell.kind == kind]))
    return 0


def _table(base: Overload, kind: Kind, times: Sequence[float], found: Sequence[Cell]) -> Table:
    table = Table("arm", *(f"{each:g} times" for each in times), title=f"{kind} arrivals", box=box.SIMPLE)
    for arm in ARMS:
        row = [cell for cell in found if cell.arm == arm]
        table.add_row(arm, *(_text(base, cell) for cell in row))
    return table


def _text(base: Overload, cell: Cell) -> str:
    parts = " ".join(f"{cell.met(each.name):.2f}" for each in base.classes)
    return f"{cell.goodput_per_s:.2f} ({parts})"


def _as_row(base: Overload, cell: Cell) -> dict[str, object]:
    return {
        "arrivals": cell.kind,
        "arm": cell.arm,
        "times": cell.times,
        "capacity_per_s": base.capacity_per_s,
        "goodput_per_s": cell.goodput_per_s,
        "met": {each.name: cell.met(each.name) for each in base.classes},
        "verified_per_step": cell.verified_per_step,
    }
