"""A server under overload in virtual time: requests arrive whether or not others have ended, and some are admitted.

The engine is that of `run`, with the shipping driver, router and edges. An arm of `overload_arms` decides admission.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import inf

from vllm_specedge.engine.plan import Row
from vllm_specedge.estimators import Rate
from vllm_specedge.policy.capacity import EngineLimits, Mix, capacity_tokens_per_s
from vllm_specedge.policy.demand import Demand
from vllm_specedge.policy.situation import Load
from vllm_specedge.policy.slo import Queue, Target
from vllm_specedge.simulation.arrivals import Arrival, Kind, RequestClass, arrivals
from vllm_specedge.simulation.measuring import Client
from vllm_specedge.simulation.models import Server
from vllm_specedge.simulation.oracle import ExactCost
from vllm_specedge.simulation.overload_arms import ARMS, Arm, Report, targets_of
from vllm_specedge.simulation.run import Served, Simulation
from vllm_specedge.simulation.scenario import Scenario

REPORT_EVERY_S = 0.1
ENOUGH_TOKENS = 8
"""Tokens of an answer from which on the mean time between them is meaningful."""
CLASSES = (
    RequestClass("gold", -1, 0.3, Target(ttft_s=1.0, itl_s=0.08)),
    RequestClass("default", 0, 0.7, Target(ttft_s=4.0, itl_s=0.16)),
)


@dataclass(frozen=True, slots=True)
class Overload:
    """The parameters of a simulation."""

    scenario: Scenario
    kind: Kind = "poisson"
    times: float = 1.0
    """Load as a multiple of the capacity."""
    arm: str = "none"
    classes: tuple[RequestClass, ...] = CLASSES
    duration_s: float = 60.0
    warm_up_s: float = 15.0
    """Requests that arrive before this time are not counted."""
    rated: Server | None = None
    """The server whose capacity `times` and `limit` refer to; None: the simulated one."""

    @property
    def mix(self) -> Mix:
        return Mix(self.scenario.prompt_tokens, self.scenario.output_tokens)

    @property
    def capacity_per_s(self) -> float:
        """Requests per second, without edges, at which all meet the shortest target."""
        return self._tokens_per_s / self.scenario.output_tokens

    @property
    def _tokens_per_s(self) -> float:
        step_s = min(each.target.itl_s for each in self.classes)
        limits = EngineLimits(self.scenario.max_running, self.scenario.max_step_tokens, step_s=step_s)
        return capacity_tokens_per_s(ExactCost(self.rated or self.scenario.server), self.mix, limits)

    @property
    def limit(self) -> int:
        """Concurrent requests at that rate: the limit that an operator with full knowledge would set by hand."""
        step_s = min(each.target.itl_s for each in self.classes)
        return max(1, round(self._tokens_per_s * step_s))


@dataclass(slots=True)
class ClassOutcome:
    """The outcome of the requests of one class."""

    offered: int = 0
    admitted: int = 0
    good: int = 0
    """Admitted requests that got all their tokens, and in time."""


@dataclass(frozen=True, slots=True)
class OverloadOutcome:
    """The outcome of the requests that arrived after the warm-up."""

    seconds: float
    classes: Mapping[str, ClassOutcome]
    verified_per_step: float
    """Mean draft tokens verified per step."""

    @property
    def goodput_per_s(self) -> float:
        """Requests per second that met their targets."""
        return sum(each.good for each in self.classes.values()) / self.seconds


@dataclass(eq=False)
class _Caller(Client):
    """The client of one request."""

    arrival: Arrival | None = None
    first_s: float = 0.0
    last_s: float = 0.0
    num_tokens: int = 0
    has_begun: bool = False


class OverloadSimulation(Simulation):
    """A simulation with arriving requests in place of clients that wait for their answers."""

    def __init__(self, overload: Overload) -> None:
        super().__init__(overload.scenario)
        self._overload = overload
        self._arm: Arm = ARMS[overload.arm](overload.classes, overload.limit)
        self._targets = targets_of(overload.classes)
        self._outcomes = {each.name: ClassOutcome() for each in overload.classes}
        self._arrivals = self._come()
        self._demand = Demand(each.name for each in overload.classes)
        self._finished = Rate()
        self._num_finished = 0
        self._reported_s = -inf
        self._is_idle = True

    def simulate(self) -> OverloadOutcome:
        self._connect()
        self._next()
        # Until all requests have their tokens; what takes longer than this is late in any case.
        self.time.run(2 * self._overload.duration_s, lambda: False)
        counters = self.driver.counters
        verified = counters["verified_tokens"] / max(1, counters["engine_steps"])
        return OverloadOutcome(self._overload.duration_s - self._overload.warm_up_s, self._outcomes, verified)

    # -- requests --------------------------------------------------------------------------------------------------

    def _come(self) -> Iterator[Arrival]:
        overload, scenario = self._overload, self.scenario
        per_s = overload.times * overload.capacity_per_s
        classes, answer = overload.classes, scenario.output_tokens
        return arrivals(overload.kind, per_s, overload.duration_s, classes, answer, scenario.seed)

    def _next(self) -> None:
        arrival = next(self._arrivals, None)
        if arrival is not None:
            self.time.at(arrival.at_s, self._arrive, arrival)

    def _arrive(self, arrival: Arrival) -> None:
        self._next()
        is_counted = arrival.at_s >= self._overload.warm_up_s
        outcome = self._outcomes[arrival.class_.name]
        outcome.offered += is_counted
        if not self._arm.ask(arrival.class_, self.time.now_s):
            self._demand.refused(arrival.class_.name, 1)
            return
        self._demand.admitted(arrival.class_.name, self.scenario.prompt_tokens)
        outcome.admitted += is_counted
        number = self._num_requests
        self._num_requests += 1
        tokens = self.target.prompt(number, self.scenario.prompt_tokens)
        end = len(tokens) + arrival.answer_tokens
        client = _Caller(arrival=arrival)
        request = Served(f"r{number}", number, self.target.key(number), client, tokens, end, self.time.now_s)
        self._waiting.append(request)
        self._publish(self.driver.open(request.id_, request.tokens, ""))
        if self._is_idle or self._is_parked:
            self._begin()

    def ended(self, request: Served) -> None:
        self._num_finished += 1
        caller = _caller(request)
        assert caller.arrival is not None
        now_s, target = self.time.now_s, caller.arrival.class_.target
        self._arm.ended(now_s - caller.arrival.at_s)
        self._demand.ended(caller.arrival.class_.name, caller.num_tokens)
        if caller.arrival.at_s < self._overload.warm_up_s:
            return
        itl_s = (caller.last_s - caller.first_s) / max(1, caller.num_tokens - 1)
        is_good = caller.first_s - caller.arrival.at_s <= target.ttft_s and itl_s <= target.itl_s
        self._outcomes[caller.arrival.class_.name].good += is_good

    # -- the engine ------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._is_idle = not self._running and not self._waiting and not self._in_flight
        if self._is_idle:
            self._is_parked = False
            return
        before = len(self._running)
        super()._begin()
        for request in self._running[before:]:
            self._arm.began(self.time.now_s - request.chunk_s, self.time.now_s)

    def _look(self) -> tuple[list[Row], Load]:
        """Like adapter/look.py: no step may be longer than the shortest target of the requests that decode in it."""
        rows, load = super()._look()
        priorities = {_priority(request) for request in self._running if request.num_left == 1}
        step_limit_s = min((self._targets.of(priority).itl_s for priority in priorities), default=inf)
        return rows, replace(load, step_limit_s=step_limit_s)

    def report(self, known_s: float) -> None:
        now_s = self.time.now_s
        if now_s - self._reported_s >= REPORT_EVERY_S:
            self._reported_s = now_s
            self._finished.observe(self._num_finished, now_s)
            self._num_finished = 0
            self._demand.sample(now_s)
            sizes = self.scenario.prompt_tokens, self.driver.cost
            report = Report(self._queue(known_s), *sizes, self._demand.offered_per_s, known_s)
            self._arm.reported(report, now_s)

    def _queue(self, known_s: float) -> Queue:
        """The queue, as in adapter/load_report.py, which does not see requests that arrived after `known_s`."""
        priorities = {each.name: each.priority for each in self._overload.classes}
        return Queue(
            running=[_priority(request) for request in self._running],
            waiting=[(_priority(each), each.num_left) for each in self._waiting if each.chunk_s <= known_s],
            context=sum(request.num_computed for request in self._running),
            slots=self.scenario.max_running,
            room=self.scenario.max_step_tokens,
            finished_per_s=self._finished.per_s,
            is_by_priority=False,
            prompt_per_token=self._demand.mix.prompt_per_token,
            lately=frozenset(priorities[name] for name in self._demand.lately(self.time.now_s)),
        )

    def _decide(self, request: Served, draft: list[int]) -> None:
        before, since_s, is_first = len(request.tokens), request.chunk_s, not request.has_begun
        super()._decide(request, draft)
        caller, now_s = _caller(request), self.time.now_s
        assert caller.arrival is not None
        made = len(request.tokens) - before
        caller.num_tokens += made
        caller.last_s = now_s
        if is_first:
            caller.first_s = now_s
        if is_first:
            self._arm.got(caller.arrival.class_, now_s - since_s, True)
        elif caller.num_tokens >= ENOUGH_TOKENS:
            self._arm.got(caller.arrival.class_, (now_s - caller.first_s) / (caller.num_tokens - 1), False)


def _caller(request: Served) -> _Caller:
    assert isinstance(request.client, _Caller)
    return request.client


def _priority(request: Served) -> int:
    arrival = _caller(request).arrival
    assert arrival is not None
    return arrival.class_.priority


def simulate_overload(overload: Overload) -> OverloadOutcome:
    return OverloadSimulation(overload).simulate()
