"""A server, its edges and the network between them in virtual time: what drafting would bring, before it is tried.

Rule 1: what is decided, the shipping code decides: StepDriver and its policy, Router, Speculation and Pace. Here are
only the things around them: a scheduler as vLLM's, forward passes, a network, and clients.
Rule 2: no clock, and all chance follows from the seed: the same scenario always has the same outcome.
Rule 3: nothing is kept of what is over, but what is measured.

Frames travel as objects, not as bytes, and the engine's hop to its gateway takes no time of its own: what both take is
part of `processing_s`.
"""

from array import array
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf

from edge_client.drafting.pacing import Pace
from edge_client.drafting.speculation import MAX_KEPT, Speculation
from vllm_specedge.engine.driver import StepDriver
from vllm_specedge.engine.plan import RequestOutcome, Row, Step, StepPlan
from vllm_specedge.estimators import quantile
from vllm_specedge.gateway.effects import Effect, ToEdge, ToEngine
from vllm_specedge.gateway.known import POOL, ROLES, RouterLimits
from vllm_specedge.gateway.router import Router
from vllm_specedge.policy.situation import Load
from vllm_specedge.policy.step_cost import PROFILED, StepCost
from vllm_specedge.simulation.clock import VirtualTime, Way
from vllm_specedge.simulation.edge import DRAFTING, SimulatedDraft, VirtualEdge
from vllm_specedge.simulation.models import Faults, SimulatedTarget, chance, key_of
from vllm_specedge.simulation.oracle import ExactAcceptance, ExactCost
from vllm_specedge.simulation.scenario import Outcome, Scenario
from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.engine_frames import EngineHello
from vllm_specedge.wire.frames import PROTOCOL_VERSION, Hello

MAX_CONTEXT_TOKENS = 1 << 20
_ENGINE = b"engine"
_JITTER, _LENGTHS, _FAULTS = range(DRAFTING + 1, DRAFTING + 4)
"""What else chance is for."""


def simulate(scenario: Scenario) -> Outcome:
    return Simulation(scenario).run()


@dataclass(slots=True, eq=False)
class Client:
    """Asks, reads the answer, and asks again."""

    made: int = 0


@dataclass(slots=True, eq=False)
class Served:
    """A request in the engine."""

    id_: str
    number: int
    key: int
    client: Client
    tokens: list[int]
    end: int
    """It is over when it has so many tokens."""
    chunk_s: float
    """When it got a token last; before the first: when it was asked."""
    num_computed: int = 0
    has_begun: bool = False
    """It has a token of its answer."""

    @property
    def num_left(self) -> int:
        """Tokens to compute before the next one is known; 1: it decodes."""
        return len(self.tokens) - self.num_computed


@dataclass(slots=True)
class _Measured:
    """From the end of the warm-up on."""

    started_s: float
    before: Counter[str]
    """The engine's counters as they were then."""
    tokens: int = 0
    gaps_s: "array[float]" = field(default_factory=lambda: array("d"))
    ttfts_s: "array[float]" = field(default_factory=lambda: array("d"))


_Scheduled = list[tuple[Served, int, list[int]]]
"""What is in a step: the request, how many of its tokens, and the draft that is the last of these."""


class Simulation:
    """An engine that schedules as vLLM does, with the driver of its steps, its gateway and edges."""

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
        self._num_cold = self._num_busy = scenario.requests
        """Clients that have not made what the warm-up takes; what they all are to make."""
        self._measured = None if scenario.warm_up else _Measured(0.0, Counter())

    def run(self) -> Outcome:
        """Until each client has its tokens."""
        self._connect()
        for _ in range(self.scenario.requests):
            self._ask(Client())
        self._begin()
        self.time.run(inf, lambda: not self._num_busy)
        return self._outcome()

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
            _speculation(scenario),
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
            # The first answers have all lengths, so that afterwards requests do not come all at once.
            end -= int(chance(key_of(scenario.seed, number, _LENGTHS), 0) * scenario.output_tokens)
        request = Served(f"r{number}", number, self.target.key(number), client, tokens, end, self.time.now_s)
        self._waiting.append(request)
        self._publish(self.driver.open(request.id_, request.tokens, ""))

    def _begin(self) -> None:
        """Begin the next step, or sleep while all wait for drafts."""
        self._is_parked = False
        self._take_in()
        rows, load = self._look()
        plan = self.driver.begin(rows, self.time.now_s, load)
        self.driver.start(plan)
        if plan.wait_until_s is not None and not self._waiting:
            self._is_parked = True
            self._num_parks += 1
            self.time.at(plan.wait_until_s, self._wake, self._num_parks)
            return
        scheduled = self._schedule(plan)
        self.driver.learn()
        num_tokens = sum(num for _, num, _ in scheduled)
        is_verifying = any(draft for _, _, draft in scheduled)
        step_s = self.scenario.server.step_s(len(scheduled), num_tokens, is_verifying)
        self.time.after(step_s, self._finish, plan, scheduled, self.time.now_s)

    def _wake(self, number: int) -> None:
        if self._is_parked and number == self._num_parks:
            self._begin()

    def _look(self) -> tuple[list[Row], Load]:
        """As adapter/look.py does."""
        scenario, has_edges = self.scenario, bool(self.driver.num_edges)
        rows: list[Row] = []
        prefill = context = num_others = 0
        for request in self._running:
            num_left = request.num_left
            if num_left != 1:
                prefill += num_left
                continue
            context += len(request.tokens)
            if has_edges:
                rows.append(Row(request.id_, request.end - len(request.tokens) - 1))
            else:
                num_others += 1
        is_pressed = bool(self._waiting)
        if is_pressed and len(self._running) < scenario.max_running:
            prefill += len(self._waiting[0].tokens)
        room = scenario.max_step_tokens
        return rows, Load(context, num_others, min(prefill, room), is_pressed, room)

    def _schedule(self, plan: StepPlan) -> _Scheduled:
        """As vLLM's scheduler does: who runs already comes first, and prompts take what room is left."""
        room, scheduled = self.scenario.max_step_tokens, _Scheduled()
        for request in self._running:
            if request.id_ in plan.holds or not room:
                continue
            draft = plan.drafts.get(request.id_, [])
            num_left = request.num_left
            num_tokens = min(num_left + len(draft), room)
            scheduled.append((request, num_tokens, draft[: max(0, num_tokens - num_left)]))
            room -= num_tokens
        while self._waiting and room and len(self._running) < self.scenario.max_running:
            request = self._waiting.popleft()
            self._running.append(request)
            num_tokens = min(request.num_left, room)
            scheduled.append((request, num_tokens, []))
            room -= num_tokens
        return scheduled

    # -- after a step ----------------------------------------------------------------------------------------------

    def _finish(self, plan: StepPlan, scheduled: _Scheduled, started_s: float) -> None:
        outcomes, over = [], []
        for request, num_tokens, draft in scheduled:
            is_over = self._run(request, num_tokens, draft)
            outcomes.append(RequestOutcome(request.id_, num_tokens, len(draft), is_over))
            if is_over:
                over.append(request)
        self._take_in()
        self._publish(self.driver.end(plan, outcomes, Step(started_s, self.time.now_s)))
        if over:
            self._running = [request for request in self._running if len(request.tokens) < request.end]
        for request in over:
            self.ended(request)
        self._begin()

    def _run(self, request: Served, num_tokens: int, draft: list[int]) -> bool:
        """A step has computed so many of its tokens. Returns whether the request is over."""
        if num_tokens < request.num_left:
            request.num_computed += num_tokens
            return False
        said = self._verify(request, draft)
        request.tokens += said
        request.num_computed = len(request.tokens) - 1
        self._count(request, len(said))
        return len(request.tokens) >= request.end

    def _verify(self, request: Served, draft: list[int]) -> list[int]:
        """What a greedy target emits: its own choices, up to the first one that the draft did not foresee."""
        position, said = len(request.tokens), list[int]()
        for guess in [*draft, None]:
            said.append(self.target.token(request.key, position + len(said)))
            if guess != said[-1]:
                break
        return said

    # -- what is measured ------------------------------------------------------------------------------------------

    def _count(self, request: Served, num_tokens: int) -> None:
        now_s, scenario, client = self.time.now_s, self.scenario, request.client
        if self._measured is not None:
            gaps_s = self._measured.gaps_s if request.has_begun else self._measured.ttfts_s
            gaps_s.append(now_s - request.chunk_s)
            self._measured.tokens += num_tokens
        request.chunk_s, request.has_begun = now_s, True
        made, client.made = client.made, client.made + num_tokens
        warm = scenario.warm_up * scenario.tokens
        self._num_cold -= made < warm <= client.made
        self._num_busy -= made < scenario.tokens <= client.made
        if self._num_cold == 0 and self._measured is None:
            self._measured = _Measured(now_s, self.driver.counters.copy())

    def _outcome(self) -> Outcome:
        measured = self._measured or _Measured(self.time.now_s, Counter())
        return Outcome(
            seconds=self.time.now_s - measured.started_s,
            tokens=measured.tokens,
            itl_p50_s=quantile(measured.gaps_s, 0.5),
            itl_p99_s=quantile(measured.gaps_s, 0.99),
            ttft_p50_s=quantile(measured.ttfts_s, 0.5),
            ttft_p99_s=quantile(measured.ttfts_s, 0.99),
            counters=self.driver.counters - measured.before,
        )


def _driver(scenario: Scenario) -> StepDriver:
    sizes = scenario.vocab_size, scenario.spec_tokens, scenario.limits
    if scenario.is_oracle:
        exact = ExactAcceptance(scenario.edge.acceptance)
        return StepDriver(*sizes, ExactCost(scenario.server), lambda record: exact)
    server = scenario.server
    profile = {size: server.step_s(1, size) for size in PROFILED if size <= scenario.max_step_tokens}
    return StepDriver(*sizes, StepCost(profile))


def _speculation(scenario: Scenario) -> Speculation:
    model = scenario.edge
    return Speculation(
        MAX_CONTEXT_TOKENS,
        max_width=model.max_width,
        max_requests=scenario.edge_capacity,
        max_kept=MAX_KEPT,
        pace=Pace(rtt_s=scenario.rtt_s, uplink_bytes_per_token=model.uplink_bytes_per_token),
    )
