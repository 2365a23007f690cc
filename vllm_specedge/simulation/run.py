"""A server, its edges and the network between them in virtual time, to predict the gain from drafting.

Rule 1: the shipping code makes all decisions: StepDriver and its policy, Router, Speculation and Pace. This module only
has what surrounds them: a scheduler like vLLM's, forward passes, a network, and clients.
Rule 2: no clock, and all random numbers follow from the seed: the same scenario always has the same outcome.
Rule 3: of ended requests, only measurements are kept.

Frames are passed as objects, not as bytes, and the hop from the engine to its gateway takes no separate time: both are
part of `processing_s`.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

from vllm_specedge.engine.driver import StepDriver
from vllm_specedge.engine.plan import Row, Step, StepOutcome, StepPlan
from vllm_specedge.gateway.effects import Effect, ToEdge, ToEngine
from vllm_specedge.gateway.known import POOL, ROLES, RouterLimits
from vllm_specedge.gateway.router import Router
from vllm_specedge.policy.situation import Load
from vllm_specedge.policy.step_cost import PROFILED, StepCost
from vllm_specedge.policy.stepping import Stepping
from vllm_specedge.simulation.clock import VirtualTime, Way
from vllm_specedge.simulation.edge import DRAFTING, SimulatedDraft, VirtualEdge, speculation
from vllm_specedge.simulation.measuring import Client, Measuring
from vllm_specedge.simulation.models import Faults, SimulatedTarget, chance, key_of
from vllm_specedge.simulation.oracle import ExactAcceptance, ExactCost
from vllm_specedge.simulation.scenario import Outcome, Scenario
from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.engine_frames import EngineHello
from vllm_specedge.wire.frames import PROTOCOL_VERSION, Hello

_ENGINE = b"engine"
_MAX_IN_FLIGHT = 2
"""Running steps of vLLM's asynchronous engine: one that is computed, and one that is scheduled."""
_JITTER, _LENGTHS, _FAULTS = range(DRAFTING + 1, DRAFTING + 4)
"""Further purposes of random numbers."""


def simulate(scenario: Scenario) -> Outcome:
    return Simulation(scenario).run()


@dataclass(slots=True, eq=False)
class Served:
    """A request in the engine."""

    id_: str
    number: int
    key: int
    client: Client
    tokens: list[int]
    end: int
    """Number of tokens at which it ends."""
    chunk_s: float
    """Time of its last token, or before the first, of its arrival."""
    num_computed: int = 0
    """Tokens whose computation is scheduled."""
    num_in_flight: int = 0
    """Maximum tokens that running steps decide."""
    has_begun: bool = False
    """Whether it has a token of its answer."""

    @property
    def num_left(self) -> int:
        """Tokens to compute before the next one is known; 1: it decodes."""
        return len(self.tokens) + self.num_in_flight - self.num_computed

    @property
    def is_done(self) -> bool:
        """Whether it has all its tokens once the running steps are done."""
        return len(self.tokens) + self.num_in_flight >= self.end


class _Part(NamedTuple):
    """The part of a step for one request."""

    request: Served
    num_tokens: int
    draft: list[int]
    """The last of these tokens."""
    is_decided: bool
    """Whether the step decides at least one token of it."""


class _Step(NamedTuple):
    """A scheduled step whose outcome is not known yet."""

    plan: StepPlan
    parts: list[_Part]
    scheduled_s: float


class Simulation:
    """An engine that schedules like vLLM, with the driver of its steps, its gateway and edges."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.time = VirtualTime()
        self.target = SimulatedTarget(scenario.seed, scenario.vocab_size)
        self.router = Router(
            RouterLimits(
                max_edges=max(256, scenario.num_edges),
                max_requests_per_edge=max(32, scenario.edge_capacity),
                credit_tokens=scenario.credit_tokens,
            )
        )
        self.driver = _driver(scenario)
        self._running: list[Served] = []
        self._waiting: deque[Served] = deque()
        self._to_edges: dict[int, Way] = {}
        self._inbox: list[tuple[float, Frame]] = []
        self._is_parked = False
        self._num_parks = 0
        self._num_requests = 0
        self._idle: list[Client] = []
        self._measuring = Measuring(scenario, self.driver.counters)
        self._stepping = Stepping()
        self._in_flight: deque[_Step] = deque()
        self._free_s = 0.0
        """Time at which the device has done all scheduled steps."""
        self._ended_s = 0.0
        """End of the last step."""

    def run(self) -> Outcome:
        """Run until each client has its tokens."""
        self._connect()
        for _ in range(self.scenario.requests):
            self._ask(Client())
        self._begin()
        self.time.run(inf, lambda: self._measuring.is_done)
        return self._measuring.outcome(self.time.now_s)

    def ended(self, request: Served) -> None:
        self._idle.append(request.client)
        if not self.scenario.is_in_step or len(self._idle) == self.scenario.requests:
            idle, self._idle = self._idle, []
            for client in idle:
                self._ask(client)

    # -- gateway and edges -----------------------------------------------------------------------------------------

    def _connect(self) -> None:
        hello = EngineHello(PROTOCOL_VERSION, "simulated", "f", self.scenario.vocab_size)
        self._carry_out(self.router.from_engine(_ENGINE, hello))
        draft = SimulatedDraft(self.target, self.scenario.edge)
        for number in range(self.scenario.num_edges):
            self._join(number, draft)

    def _join(self, number: int, draft: SimulatedDraft) -> None:
        scenario, model = self.scenario, self.scenario.edge
        faults = Faults(key_of(scenario.seed, number, _FAULTS), model.fault)
        edge = VirtualEdge(
            self.time,
            speculation(scenario),
            draft.open,
            lambda num_tokens: model.pass_s + (num_tokens - 1) * model.row_s,
            faults.free_s,
        )
        delay_s = scenario.rtt_s / 2 + scenario.processing_s
        key = key_of(scenario.seed, number, _JITTER)
        down = Way(self.time, delay_s, scenario.jitter_s, key, edge.receive)
        up = Way(self.time, delay_s, scenario.jitter_s, key_of(key), lambda frame: self._from_edge(number, frame))
        self._to_edges[number], edge.send = down, up.send
        hello = Hello(PROTOCOL_VERSION, "simulated", "edge", POOL, "f", scenario.edge_capacity)
        self._carry_out(self.router.edge_hello(number, hello, "", frozenset(ROLES)))

    def _from_edge(self, number: int, frame: Frame) -> None:
        self._carry_out(self.router.from_edge(number, frame))
        if self._inbox and self._is_parked:
            self._begin()

    def _publish(self, frames: Iterable[Frame]) -> None:
        for frame in frames:
            self._carry_out(self.router.from_engine(_ENGINE, frame))

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, ToEdge):
                self._to_edges[effect.edge].send(effect.frame)
            elif isinstance(effect, ToEngine):
                self._inbox.append((self.time.now_s, effect.frame))

    def _take_in(self) -> None:
        while self._inbox:
            inbox, self._inbox = self._inbox, []
            for arrived_s, frame in inbox:
                self._publish(self.driver.receive(frame, arrived_s))

    # -- before a step ---------------------------------------------------------------------------------------------

    def _ask(self, client: Client) -> None:
        scenario, number = self.scenario, self._num_requests
        self._num_requests += 1
        tokens = self.target.prompt(number, scenario.prompt_tokens)
        end = len(tokens) + scenario.output_tokens
        if number < scenario.requests and not scenario.is_in_step:
            # The first answers have all lengths, so that later requests do not arrive all at once.
            end -= int(chance(key_of(scenario.seed, number, _LENGTHS), 0) * scenario.output_tokens)
        request = Served(f"r{number}", number, self.target.key(number), client, tokens, end, self.time.now_s)
        self._waiting.append(request)
        self._publish(self.driver.open(request.id_, request.tokens, ""))

    def _begin(self) -> None:
        """Schedule the steps that may begin now, or sleep while all requests wait for drafts."""
        self._is_parked = False
        while len(self._in_flight) < _MAX_IN_FLIGHT:
            is_synchronous = self.scenario.gap_s is None or self._stepping.is_synchronous
            if (self._in_flight and is_synchronous) or not self._schedule_step(is_synchronous):
                return

    def _schedule_step(self, is_synchronous: bool) -> bool:
        """Schedule a step. Returns whether there was something to schedule."""
        self._take_in()
        rows, load = self._look()
        load = replace(load, is_synchronous=is_synchronous)
        plan = self._as_stepped(self.driver.begin(rows, self.time.now_s, load), is_synchronous)
        self.driver.start(plan)
        if plan.wait_until_s is not None and not self._waiting:
            self._is_parked = True
            self._num_parks += 1
            self.time.at(plan.wait_until_s, self._wake, self._num_parks)
            return False
        parts = self._schedule(plan)
        if not parts and self._in_flight:
            return False
        self.driver.learn()
        num_tokens = sum(part.num_tokens for part in parts)
        step_s = self.scenario.server.step_s(len(parts), num_tokens, any(part.draft for part in parts))
        if is_synchronous:
            step_s += self.scenario.gap_s or 0.0
        self._free_s = max(self._free_s, self.time.now_s) + step_s
        self._in_flight.append(_Step(plan, parts, self.time.now_s))
        self.time.at(self._free_s, self._finish)
        return True

    def _as_stepped(self, plan: StepPlan, is_synchronous: bool) -> StepPlan:
        """Same as in adapter/drafting.py."""
        if self.scenario.gap_s is None:
            return plan
        self._stepping.planned(not plan.is_plain, self.driver.speedups.gain_of_waiting)
        return replace(plan, has_gap=True) if is_synchronous else plan.undrafted()

    def _wake(self, number: int) -> None:
        if self._is_parked and number == self._num_parks:
            self._begin()

    def _look(self) -> tuple[list[Row], Load]:
        """Same as adapter/look.py."""
        scenario, has_edges = self.scenario, bool(self.driver.num_edges)
        rows: list[Row] = []
        prefill = context = num_others = 0
        for request in self._running:
            num_left, num_in_flight = request.num_left, request.num_in_flight
            if num_left != 1:
                prefill += num_left
                continue
            context += len(request.tokens)
            if has_edges:
                left = request.end - len(request.tokens) - num_in_flight
                rows.append(Row(request.id_, left - 1, num_in_flight=num_in_flight))
            else:
                num_others += 1
        is_pressed = bool(self._waiting)
        if is_pressed and len(self._running) < scenario.max_running:
            prefill += len(self._waiting[0].tokens)
        room = scenario.max_step_tokens
        return rows, Load(context, num_others, min(prefill, room), is_pressed, room)

    def _schedule(self, plan: StepPlan) -> list[_Part]:
        """Same as vLLM's scheduler: running requests come first, and prompts take the remaining room."""
        room, parts = self.scenario.max_step_tokens, list[_Part]()
        for request in self._running:
            if request.id_ in plan.holds or not room or request.is_done:
                continue
            parts.append(_part(request, plan.drafts.get(request.id_, []), room))
            room -= parts[-1].num_tokens
        while self._waiting and room and len(self._running) < self.scenario.max_running:
            request = self._waiting.popleft()
            self._running.append(request)
            parts.append(_part(request, [], room))
            room -= parts[-1].num_tokens
        return parts

    # -- after a step ----------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """The oldest running step is done."""
        step = self._in_flight.popleft()
        for part in step.parts:
            if part.is_decided:
                self._decide(part.request, part.draft)
        num_tokens = {part.request.id_: part.num_tokens for part in step.parts}
        num_verified = {part.request.id_: len(part.draft) for part in step.parts if part.draft}
        over = [part.request for part in step.parts if len(part.request.tokens) >= part.request.end]
        outcome = StepOutcome(num_tokens, num_verified, [request.id_ for request in over])
        self._take_in()
        started_s, self._ended_s = max(step.scheduled_s, self._ended_s), self.time.now_s
        self._publish(self.driver.end(step.plan, outcome, Step(started_s, self._ended_s)))
        if over:
            self._running = [request for request in self._running if len(request.tokens) < request.end]
        for request in over:
            self.ended(request)
        self.report((self._in_flight[-1] if self._in_flight else step).scheduled_s)
        self._begin()

    def report(self, known_s: float) -> None:
        """Called at the end of each step. The engine has taken in the requests that arrived until `known_s`."""

    def _decide(self, request: Served, draft: list[int]) -> None:
        """A step has decided tokens of a request."""
        said = self._verify(request, draft)
        request.tokens += said
        request.num_in_flight -= 1 + len(draft)
        request.num_computed -= 1 + len(draft) - len(said)
        now_s = self.time.now_s
        self._measuring.count(request.client, len(said), request.chunk_s, not request.has_begun, now_s)
        request.chunk_s, request.has_begun = now_s, True

    def _verify(self, request: Served, draft: list[int]) -> list[int]:
        """The tokens of a greedy target: its own choices, up to the first that differs from the draft."""
        position, said = len(request.tokens), list[int]()
        for guess in [*draft, None]:
            said.append(self.target.token(request.key, position + len(said)))
            if guess != said[-1]:
                break
        return said


def _part(request: Served, draft: list[int], room: int) -> _Part:
    """Schedule as many tokens of a request as there is room for."""
    num_left = request.num_left
    num_tokens = min(num_left + len(draft), room)
    draft, is_decided = draft[: max(0, num_tokens - num_left)], num_tokens >= num_left
    request.num_computed += num_tokens
    request.num_in_flight += is_decided * (1 + len(draft))
    return _Part(request, num_tokens, draft, is_decided)


def _driver(scenario: Scenario) -> StepDriver:
    sizes = scenario.vocab_size, scenario.spec_tokens, scenario.limits
    if scenario.is_oracle:
        exact = ExactAcceptance(scenario.edge.acceptance)
        return StepDriver(*sizes, ExactCost(scenario.server, scenario.gap_s or 0.0), lambda record: exact)
    server = scenario.server
    profile = {size: server.step_s(1, size) for size in PROFILED if size <= scenario.max_step_tokens}
    return StepDriver(*sizes, StepCost(profile))
