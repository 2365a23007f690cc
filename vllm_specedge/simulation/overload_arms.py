"""Admission policies of a server under overload: those of other systems, and ours, which includes the shipping one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from typing import Protocol

from vllm_specedge.policy.slo import ON_THE_WAY_S, STALE_S, Queue, Target, Targets, rooms
from vllm_specedge.policy.step_cost import StepCost
from vllm_specedge.simulation.admitted_rate import AdmittedRates
from vllm_specedge.simulation.arrivals import RequestClass


@dataclass(frozen=True, slots=True)
class Report:
    """An engine's report, as adapter/load_report.py makes it."""

    queue: Queue
    num_tokens: int
    """Prompt tokens of a request."""
    cost: StepCost
    offered_per_s: Mapping[str, float]
    """Arriving requests by class."""
    known_s: float
    """Time at which the engine last took requests in; later ones are not included."""


class Arm(Protocol):
    """An admission policy, which is told the outcome of admitted requests."""

    def ask(self, class_: RequestClass, now_s: float) -> bool: ...

    def reported(self, report: Report, now_s: float) -> None:
        """The engine reports, every tenth of a second."""

    def began(self, waited_s: float, now_s: float) -> None:
        """The engine begins with a request that has waited for `waited_s`."""

    def got(self, class_: RequestClass, took_s: float, is_first: bool) -> None:
        """A request got its first token, `took_s` after its arrival; or later ones, `took_s` each on average so far."""

    def ended(self, took_s: float) -> None:
        """A request has ended."""


class _Told:
    """An arm that ignores all reports."""

    def reported(self, report: Report, now_s: float) -> None:
        pass

    def began(self, waited_s: float, now_s: float) -> None:
        pass

    def got(self, class_: RequestClass, took_s: float, is_first: bool) -> None:
        pass

    def ended(self, took_s: float) -> None:
        pass


class Everybody(_Told):
    """No admission control: everything is admitted."""

    def ask(self, class_: RequestClass, now_s: float) -> bool:
        return True


class FixedLimit(_Told):
    """A fixed limit of concurrent requests, as an operator sets it by hand."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._num_in = 0

    def ask(self, class_: RequestClass, now_s: float) -> bool:
        if self._num_in >= self._limit:
            return False
        self._num_in += 1
        return True

    def ended(self, took_s: float) -> None:
        self._num_in -= 1


class QueueTime(_Told):
    """CoDel (RFC 8289) for admission: refuses requests while even the shortest wait in an interval is over a target,
    more of them the longer that lasts. DAGOR and Breakwater also use queueing delay."""

    def __init__(self, target_s: float = 0.1, interval_s: float = 1.0) -> None:
        """The target must be longer than a step, for which every request waits, and the interval long enough for some
        requests to begin."""
        self._target_s, self._interval_s = target_s, interval_s
        self._since_s = 0.0
        self._shortest_s = inf
        self._is_dropping = False
        self._num_dropped = 0
        self._next_s = 0.0

    def began(self, waited_s: float, now_s: float) -> None:
        self._shortest_s = min(self._shortest_s, waited_s)

    def _look(self, now_s: float) -> None:
        if now_s - self._since_s < self._interval_s:
            return
        was_dropping, self._is_dropping = self._is_dropping, self._target_s < self._shortest_s < inf
        if self._is_dropping and not was_dropping:
            self._num_dropped, self._next_s = 1, now_s
        self._since_s, self._shortest_s = now_s, inf

    def ask(self, class_: RequestClass, now_s: float) -> bool:
        self._look(now_s)
        if not self._is_dropping or now_s < self._next_s:
            return True
        self._num_dropped += 1
        self._next_s += self._interval_s / sqrt(self._num_dropped)
        return False


class CostModel(_Told):
    """Ours: as many as would meet their targets without breaking others', by the cost model of steps.

    As in frontend/admission.py, which does not know whether a report includes the requests just before it.
    """

    def __init__(self, classes: Sequence[RequestClass]) -> None:
        self._targets = targets_of(classes)
        self._priorities = {each.name: each.priority for each in classes}
        self._room: dict[str, int] = {}
        self._said_s = -inf
        self._admitted_s: list[float] = []
        """Times of the admissions that the last report may not include."""

    def reported(self, report: Report, now_s: float) -> None:
        sizes = report.num_tokens, self._targets, report.cost
        self._room = rooms(report.queue, self._priorities, *sizes, report.offered_per_s)
        self._said_s = now_s
        self._admitted_s = [at_s for at_s in self._admitted_s if at_s > report.known_s - ON_THE_WAY_S]

    def ask(self, class_: RequestClass, now_s: float) -> bool:
        if now_s - self._said_s <= STALE_S and self._room[class_.name] <= len(self._admitted_s):
            return False
        self._admitted_s.append(now_s)
        return True


class Adaptive(_Told):
    """Ours: a rate for each class, raised and lowered by the resulting latencies."""

    def __init__(self, classes: Sequence[RequestClass]) -> None:
        by_importance = sorted(classes, key=lambda each: each.priority)
        self.rates = AdmittedRates([each.name for each in by_importance])

    def reported(self, report: Report, now_s: float) -> None:
        self.rates.decide(now_s)

    def ask(self, class_: RequestClass, now_s: float) -> bool:
        return self.rates.ask(class_.name, now_s)

    def got(self, class_: RequestClass, took_s: float, is_first: bool) -> None:
        self.rates.observe(class_.name, took_s / (class_.target.ttft_s if is_first else class_.target.itl_s))

    def ended(self, took_s: float) -> None:
        self.rates.ended(took_s)


def targets_of(classes: Sequence[RequestClass]) -> Targets:
    return Targets({each.priority: each.target for each in classes}, Target())


ARMS: dict[str, Callable[[Sequence[RequestClass], int], Arm]] = {
    "none": lambda classes, limit: Everybody(),
    "fixed": lambda classes, limit: FixedLimit(limit),
    "queue time": lambda classes, limit: QueueTime(),
    "cost model": lambda classes, limit: CostModel(classes),
    "adaptive": lambda classes, limit: Adaptive(classes),
}
"""Constructors by name, from the classes and the limit for `fixed`."""
