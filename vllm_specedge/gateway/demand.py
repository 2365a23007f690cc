"""The demand by class of request and the capacities that engines report. Pure: times are arguments."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from vllm_specedge.estimators import Rate
from vllm_specedge.policy.foresight import DEFAULT_HORIZON_S, Foresight, engines_needed
from vllm_specedge.wire.engine_frames import Capacity, Demand
from vllm_specedge.wire.telemetry import DEMAND_COUNTERS, WRAP

MAX_CLASSES = 64
"""Maximum classes of one engine, and of all engines. Further classes of all count as OTHER. Classes are metric labels.
"""
OTHER = "other"
MEMORY_S = 15.0
"""Memory of the demand's rate in seconds: short, so that surges show."""
_OFFERED = [name for name, _ in DEMAND_COUNTERS].index("offered_tokens")


@dataclass(slots=True)
class _Engine:
    number: int
    counters: dict[str, list[int]] = field(default_factory=dict)
    """Last reported values by class; 0 when the engine connects."""
    capacity: Capacity | None = None


@dataclass(slots=True)
class ClassTotals:
    """Totals of one class over all engines, those that have left included: sums never fall."""

    counters: list[int] = field(default_factory=lambda: [0] * len(DEMAND_COUNTERS))
    offered: Rate = field(default_factory=lambda: Rate(MEMORY_S))
    """Demand in tokens per second."""
    num_rated: int = 0
    """Offered tokens that the rate already counts."""


class DemandBook:
    """The demand and the capacity of one gateway's engines."""

    def __init__(self) -> None:
        self.classes: dict[str, ClassTotals] = {}
        self._engines: dict[bytes, _Engine] = {}
        self._foresight = Foresight()

    def take(self, engine: bytes, number: int, frame: Demand | Capacity) -> None:
        """Process a report of the engine with this number."""
        known = self._engines.get(engine)
        if known is None or known.number != number:  # it has reconnected, and counts from 0
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
        """Update rates and the forecast; to be called about every second."""
        for totals in self.classes.values():
            offered = totals.counters[_OFFERED]
            totals.offered.observe(offered - totals.num_rated, now_s)
            totals.num_rated = offered
        self._foresight.observe(self.offered_tokens_per_s, now_s, self.horizon_s)

    @property
    def offered_tokens_per_s(self) -> float:
        """Demand of all classes."""
        return sum(totals.offered.per_s for totals in self.classes.values())

    @property
    def horizon_s(self) -> float:
        """Seconds that the slowest of the connected engines took to start."""
        starts_s = [capacity.start_ms / 1e3 for _, capacity in self.capacities() if capacity.start_ms]
        return max(starts_s, default=DEFAULT_HORIZON_S)

    @property
    def foreseen_tokens_per_s(self) -> float:
        """Predicted demand at the time when an engine started now is ready."""
        return self._foresight.foreseen(self.horizon_s)

    @property
    def engines_needed(self) -> int:
        """Engines like the connected ones needed for that demand; 0 while none has reported its capacity."""
        capacities = [capacity.with_edges / 1e3 for _, capacity in self.capacities() if capacity.with_edges]
        mean = sum(capacities) / len(capacities) if capacities else 0.0
        return engines_needed(self.foreseen_tokens_per_s, mean)

    def view(self) -> dict[str, object]:
        """The data for the status page, in answer tokens per second."""
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
        """The number and capacity of each engine that has reported one."""
        for engine in self._engines.values():
            if engine.capacity is not None:
                yield engine.number, engine.capacity
