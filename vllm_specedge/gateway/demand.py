"""What all engines say of demand, by class of request, and of their own capacity. Pure: times are arguments."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from vllm_specedge.estimators import Rate
from vllm_specedge.policy.foresight import DEFAULT_HORIZON_S, Foresight, engines_needed
from vllm_specedge.wire.engine_frames import Capacity, Demand
from vllm_specedge.wire.telemetry import DEMAND_COUNTERS, WRAP

MAX_CLASSES = 64
"""Of one engine, and of all together; what these have beyond counts as OTHER. They are labels of metrics."""
OTHER = "other"
MEMORY_S = 15.0
"""Of the rate of what is offered: short, for a surge is to be seen."""
_OFFERED = [name for name, _ in DEMAND_COUNTERS].index("offered_tokens")


@dataclass(slots=True)
class _Engine:
    number: int
    counters: dict[str, list[int]] = field(default_factory=dict)
    """By class, as it said last: 0 when it comes."""
    capacity: Capacity | None = None


@dataclass(slots=True)
class ClassTotals:
    """One class, of all engines that were ever here: sums never fall."""

    counters: list[int] = field(default_factory=lambda: [0] * len(DEMAND_COUNTERS))
    offered: Rate = field(default_factory=lambda: Rate(MEMORY_S))
    """Tokens a second that are asked for."""
    num_rated: int = 0
    """Tokens that the rate knows of."""


class DemandBook:
    """The demand and the capacity of one gateway's engines."""

    def __init__(self) -> None:
        self.classes: dict[str, ClassTotals] = {}
        self._engines: dict[bytes, _Engine] = {}
        self._foresight = Foresight()

    def take(self, engine: bytes, number: int, frame: Demand | Capacity) -> None:
        """What an engine of this number says."""
        known = self._engines.get(engine)
        if known is None or known.number != number:  # it came anew, and counts from there on
            known = self._engines[engine] = _Engine(number)
        if isinstance(frame, Capacity):
            known.capacity = frame
            return
        if frame.name not in known.counters and len(known.counters) >= MAX_CLASSES:
            return
        before = known.counters.setdefault(frame.name, [0] * len(DEMAND_COUNTERS))
        name = frame.name if frame.name in self.classes or len(self.classes) < MAX_CLASSES else OTHER
        totals = self.classes.setdefault(name, ClassTotals())
        for index, (value, last) in enumerate(zip(frame.values, before, strict=False)):
            totals.counters[index] += (value - last) % WRAP
            before[index] = value

    def keep(self, engines: Collection[bytes]) -> None:
        """Forget the engines that are not among these."""
        for engine in self._engines.keys() - engines:
            del self._engines[engine]

    def sample(self, now_s: float) -> None:
        """To be called about every second."""
        for totals in self.classes.values():
            offered = totals.counters[_OFFERED]
            totals.offered.observe(offered - totals.num_rated, now_s)
            totals.num_rated = offered
        self._foresight.observe(self.offered_tokens_per_s, now_s, self.horizon_s)

    @property
    def offered_tokens_per_s(self) -> float:
        """Of all classes."""
        return sum(totals.offered.per_s for totals in self.classes.values())

    @property
    def horizon_s(self) -> float:
        """What an engine takes to start, the slowest that is here."""
        starts_s = [capacity.start_ms / 1e3 for _, capacity in self.capacities() if capacity.start_ms]
        return max(starts_s, default=DEFAULT_HORIZON_S)

    @property
    def foreseen_tokens_per_s(self) -> float:
        """What will be asked for when an engine that is started now is there."""
        return self._foresight.foreseen(self.horizon_s)

    @property
    def engines_needed(self) -> int:
        """For that, engines like those that are here; 0 while none has said its capacity."""
        capacities = [capacity.with_edges / 1e3 for _, capacity in self.capacities() if capacity.with_edges]
        mean = sum(capacities) / len(capacities) if capacities else 0.0
        return engines_needed(self.foreseen_tokens_per_s, mean)

    def view(self) -> dict[str, object]:
        """What the status page shows of it, in tokens of answers a second."""
        return {
            "demand": round(self.offered_tokens_per_s, 1),
            "foreseen": round(self.foreseen_tokens_per_s, 1),
            "engines_needed": self.engines_needed,
            "engines": [
                {"number": number, "with_edges": said.with_edges / 1e3, "without_edges": said.without_edges / 1e3}
                for number, said in self.capacities()
            ],
        }

    def capacities(self) -> Iterator[tuple[int, Capacity]]:
        """Of each engine that has said its own, by its number."""
        for engine in self._engines.values():
            if engine.capacity is not None:
                yield engine.number, engine.capacity
