"""A server, its edges and the network between them in virtual time: what drafting would bring, before it is tried.

Rule 1: what is decided, the shipping code decides: StepDriver and its policy, Router, Speculation and Pace. Here are
only the things around them: a scheduler as vLLM's, forward passes, a network, and clients.
Rule 2: no clock, and all chance follows from the seed: the same scenario always has the same outcome.
Rule 3: nothing is kept of what is over, but what is measured.

Frames travel as objects, not as bytes, and the engine's hop to its gateway takes no time of its own: what both take is
part of `processing_s`.
"""

import heapq
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import ceil, inf

from edge_client.drafters import Candidate, DraftSequence
from edge_client.drafting.pacing import UPLINK_BYTES_PER_TOKEN, Pace
from edge_client.drafting.speculation import Job, Speculation, run_pass
from vllm_specedge.engine.driver import RequestOutcome, Row, Step, StepDriver, StepPlan
from vllm_specedge.gateway.router import POOL, ROLES, Effect, Router, RouterLimits, ToEdge
from vllm_specedge.policy.acceptance import MAX_DEPTH, Acceptance
from vllm_specedge.policy.decision import HoldLimits, Load
from vllm_specedge.policy.step_cost import PROFILED, StepCost
from vllm_specedge.simulation.models import SERVERS, Faults, Server, SimulatedTarget, chance, key_of
from vllm_specedge.wire.frames import PROTOCOL_VERSION, Bye, EngineHello, Frame, Hello, Ping, Pong, Welcome

MAX_KEPT = 4
"""As edge_client/client.py."""
MAX_CONTEXT_TOKENS = 1 << 20
_ENGINE = b"engine"
_DRAFTING, _JITTER, _LENGTHS, _FAULTS = range(4)
"""What chance is for."""


@dataclass(frozen=True, slots=True)
class EdgeModel:
    """What one edge is like."""

    pass_s: float = 0.006
    """A forward pass of its draft model."""
    row_s: float = 0.0
    """For each further row of it, and each further token of a prompt."""
    acceptance: float = 0.75
    """How often the target says what the draft thinks most probable, at each position anew."""
    branch: float = 0.6
    """How often, where it does not, it says the second candidate."""
    max_width: int = 8
    """Rows a pass; 1: no branches."""
    uplink_bytes_per_token: float = UPLINK_BYTES_PER_TOKEN
    fault: str = ""
    """One of simulation_models.FAULTS."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A server under a load, and its edges."""

    server: Server = SERVERS["a100-14b"]
    requests: int = 1
    """At any time: each client asks again when it has its answer."""
    rtt_s: float = 0.020
    """Between edges and gateway."""
    jitter_s: float = 0.0
    """At most so much more, each way. Frames do not overtake each other."""
    processing_s: float = 0.0005
    """What soft- and hardware on both ends add to each way."""
    edge: EdgeModel = field(default_factory=EdgeModel)
    share: float = 1.0
    """For so many of the requests there is an edge."""
    requests_per_edge: int = 1
    """More, where `max_edges` do not suffice."""
    max_edges: int = 1 << 20
    limits: HoldLimits = field(default_factory=HoldLimits)
    spec_tokens: int = 5
    credit_tokens: int = 32
    prompt_tokens: int = 64
    output_tokens: int = 256
    tokens: int = 400
    """It goes on until each client has so many."""
    warm_up: float = 0.25
    """The part of `tokens` that is not measured."""
    is_in_step: bool = False
    """Clients ask again together, when the last one has its answer."""
    max_running: int = 1024
    max_step_tokens: int = 8192
    vocab_size: int = 128_256
    seed: int = 0
    is_oracle: bool = False
    """The policy is told how long steps take and how often drafts are right, and need not learn it."""

    @property
    def num_edges(self) -> int:
        return min(self.max_edges, ceil(self.share * self.requests / self.requests_per_edge - 1e-9))

    @property
    def edge_capacity(self) -> int:
        """Requests that one edge drafts for at once."""
        return max(self.requests_per_edge, ceil(self.share * self.requests / max(1, self.num_edges) - 1e-9))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was measured after the warm-up."""

    seconds: float
    tokens: int
    itl_p50_s: float
    """Between one chunk of an answer and the next, as a client that streams sees it; a chunk is what a step made."""
    itl_p99_s: float
    ttft_p50_s: float
    """From the arrival of a request to its first token."""
    ttft_p99_s: float
    counters: Mapping[str, int]
    """Those of the engine's that grew, by their names in counters.py."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def verified_per_accepted(self) -> float:
        """Draft tokens verified for each accepted one; 0 where none was."""
        accepted = self.counters.get("accepted_tokens", 0)
        return self.counters.get("verified_tokens", 0) / accepted if accepted else 0.0


def simulate(scenario: Scenario) -> Outcome:
    """Run a scenario to its end."""
    return Simulation(scenario).run()


# -- virtual time --------------------------------------------------------------------------------------------------


class VirtualTime:
    """A clock that jumps from one thing to do to the next."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._order = count()

    def at(self, at_s: float, action: Callable[..., None], *arguments: object) -> None:
        """What is due at the same time is done in the order in which it was asked for."""
        heapq.heappush(self._due, (max(at_s, self.now_s), next(self._order), action, arguments))

    def after(self, delay_s: float, action: Callable[..., None], *arguments: object) -> None:
        self.at(self.now_s + delay_s, action, *arguments)

    def run(self, limit_s: float, is_over: Callable[[], bool]) -> None:
        """Do what is due until `is_over`, or there is nothing left to do, or it is `limit_s`."""
        while self._due and not is_over():
            at_s, _, action, arguments = heapq.heappop(self._due)
            if at_s > limit_s:
                return
            self.now_s = at_s
            action(*arguments)


class _Way:
    """One direction of a connection: frames arrive later, in order."""

    def __init__(
        self, time: VirtualTime, delay_s: float, jitter_s: float, key: int, deliver: Callable[[Frame], None]
    ) -> None:
        self._time = time
        self._delay_s = delay_s
        self._jitter_s = jitter_s
        self._key = key
        self._deliver = deliver
        self._number = 0
        self._last_s = 0.0

    def send(self, frame: Frame) -> None:
        self._number += 1
        jitter_s = self._jitter_s * chance(self._key, self._number) if self._jitter_s else 0.0
        self._last_s = max(self._last_s, self._time.now_s + self._delay_s + jitter_s)
        self._time.at(self._last_s, self._deliver, frame)


# -- edges ---------------------------------------------------------------------------------------------------------


class SimulatedDraft:
    """A draft model that is right so often, and knows how often it is."""

    def __init__(self, target: SimulatedTarget, model: EdgeModel) -> None:
        self.target = target
        self._acceptance, self._branch = model.acceptance, model.branch
        missed = 1.0 - model.acceptance
        self._claims = (model.acceptance, missed * model.branch, missed * (1.0 - model.branch) * 0.3)
        """Of its candidates; it has others beside."""

    def open(self) -> DraftSequence:
        return _SimulatedSequence(self)

    def candidates(self, key: int, drafting: int, position: int, width: int) -> list[Candidate]:
        """Behind a context that the target would have written; the keys are the request's."""
        vocab_size, right = self.target.vocab_size, self.target.token(key, position)
        other = right + 1
        if chance(drafting, 2 * position) < self._acceptance:
            tokens = (right, other, right + 2)
        elif chance(drafting, 2 * position + 1) < self._branch:
            tokens = (other, right, right + 2)
        else:
            tokens = (other, right + 2, right + 3)
        return [Candidate(tokens[i] % vocab_size, self._claims[i]) for i in range(width)]

    def astray(self, width: int) -> list[Candidate]:
        """Behind any other context: what is said there is of no use."""
        return [Candidate(i, self._claims[i]) for i in range(width)]


class _SimulatedSequence(DraftSequence):
    """Of each entry it is enough to know its position, and whether it is on the target's way; -1 if not."""

    def __init__(self, draft: SimulatedDraft) -> None:
        self._draft = draft
        self._entries: list[int] = []
        self._key = self._drafting = -1

    def keep(self, length: int, moved: Sequence[int] = ()) -> None:
        entries = self._entries
        if moved:
            entries[length:] = [entries[entry] for entry in moved]
        else:
            del entries[length:]

    def append(self, tokens: Sequence[int], width: int) -> list[Candidate]:
        target, entries = self._draft.target, self._entries
        if not entries:
            request = target.named(tokens)
            self._key, self._drafting = target.key(request), key_of(target.seed, request, _DRAFTING)
            entries += range(SimulatedTarget.NUM_NAMING)
            tokens = tokens[SimulatedTarget.NUM_NAMING :]
        for token in tokens:
            entries.append(self._follow(entries[-1], token))
        return self._said(entries[-1], width)

    def branch(self, tokens: Sequence[int], parents: Sequence[int], width: int) -> list[list[Candidate]]:
        entries = self._entries
        entries += [self._follow(entries[parent], token) for token, parent in zip(tokens, parents, strict=True)]
        return [self._said(entry, width) for entry in entries[-len(tokens) :]]

    def _follow(self, entry: int, token: int) -> int:
        return entry + 1 if entry >= 0 and self._draft.target.token(self._key, entry + 1) == token else -1

    def _said(self, entry: int, width: int) -> list[Candidate]:
        if entry < 0:
            return self._draft.astray(width)
        return self._draft.candidates(self._key, self._drafting, entry + 1, width)


class VirtualEdge:
    """An edge in virtual time: drives a Speculation as edge_client/client.py does."""

    def __init__(
        self,
        time: VirtualTime,
        speculation: Speculation,
        open_sequence: Callable[[], DraftSequence],
        pass_s: Callable[[int], float],
        free_s: Callable[[float], float] = lambda now_s: now_s,
    ) -> None:
        """`pass_s`: seconds of a forward pass of so many tokens. `free_s`: from when on it is at work."""
        self.speculation = speculation
        self.send: Callable[[Frame], None] = lambda frame: None
        self._time = time
        self._open = open_sequence
        self._pass_s = pass_s
        self._free_s = free_s
        self._sequences: dict[int, DraftSequence] = {}
        self._is_busy = False
        self._wakes_s = inf

    def receive(self, frame: Frame) -> None:
        self._when_free(self._receive, frame)

    def _when_free(self, action: Callable[..., None], *arguments: object) -> None:
        now_s = self._time.now_s
        free_s = self._free_s(now_s)
        if free_s <= now_s:
            action(*arguments)
        elif free_s < inf:
            self._time.at(free_s, action, *arguments)

    def _receive(self, frame: Frame) -> None:
        match frame:
            case Welcome():
                self.speculation.vocab_size = frame.vocab_size
            case Ping():
                self.send(Pong(frame.stamp))
            case Bye():
                pass
            case _:
                self._say(self.speculation.receive(frame, self._time.now_s))
                self._draft()

    def _say(self, frames: Iterable[Frame]) -> None:
        for frame in frames:
            self.send(frame)

    def _draft(self) -> None:
        if self._is_busy:
            return
        now_s = self._time.now_s
        self._say(self.speculation.poll(now_s))
        job = self.speculation.next_job()
        if job is None:
            self._rest()
            return
        self._is_busy = True
        said = run_pass(self._sequence(job), job)
        self._time.after(self._pass_s(len(job.tokens)), self._when_free, self._drafted, job, said, now_s)

    def _sequence(self, job: Job) -> DraftSequence:
        if job.source is not None:
            self._sequences[job.request] = self._sequences.pop(job.source)
        for number in [number for number in self._sequences if not self.speculation.needs(number)]:
            del self._sequences[number]
        if job.request not in self._sequences:
            self._sequences[job.request] = self._open()
        return self._sequences[job.request]

    def _drafted(self, job: Job, said: list[list[Candidate]], started_s: float) -> None:
        self._is_busy = False
        now_s = self._time.now_s
        self._say(self.speculation.drafted(job, said, now_s - started_s, now_s))
        self._draft()

    def _rest(self) -> None:
        due_s = self.speculation.due_s
        if due_s is not None and due_s < self._wakes_s:
            self._wakes_s = due_s
            self._time.at(due_s, self._when_free, self._wake)

    def _wake(self) -> None:
        self._wakes_s = inf
        self._draft()


# -- what the policy may be told -----------------------------------------------------------------------------------


class ExactCost(StepCost):
    """Knows the server."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._server = server
        self._requests = 1
        """Of the step asked about last; the policy asks next how that grows."""

    def observe(
        self, requests: int, tokens: int, context: int, took_s: float, prefilled: int = 0, is_verifying: bool = False
    ) -> None:
        pass

    def __call__(self, requests: int, tokens: int, context: int, prefilled: int = 0) -> float:
        self._requests = requests
        return self._server.step_s(requests, tokens) if tokens > 0 else 0.0

    def verifying_s(self, requests: int) -> float:
        return self._server.step_s(requests, requests, True) - self._server.step_s(requests, requests)

    def growth(self, tokens: int, more: int) -> list[float]:
        base_s = self._server.step_s(self._requests, tokens)
        return [self._server.step_s(self._requests, tokens + i) - base_s for i in range(1, more + 1)]


class ExactAcceptance(Acceptance):
    """Knows the draft."""

    __slots__ = ()

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rates = [rate] * MAX_DEPTH

    def observe(self, num_right: int, num_known: int) -> None:
        pass


# -- the engine ----------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Client:
    """Asks, reads the answer, and asks again."""

    made: int = 0
    """Tokens that it got."""


@dataclass(slots=True, eq=False)
class Served:
    """A request in the engine."""

    id_: str
    number: int
    key: int
    """The target's, of this number."""
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
        self._to_edges: dict[int, _Way] = {}
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
        """A request has all its tokens."""
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
        down = _Way(self.time, delay_s, scenario.jitter_s, key, edge.receive)
        up = _Way(self.time, delay_s, scenario.jitter_s, key_of(key), lambda frame: self._from_edge(number, frame))
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
            else:
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
            itl_p50_s=_quantile(measured.gaps_s, 0.5),
            itl_p99_s=_quantile(measured.gaps_s, 0.99),
            ttft_p50_s=_quantile(measured.ttfts_s, 0.5),
            ttft_p99_s=_quantile(measured.ttfts_s, 0.99),
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


def _quantile(values: Sequence[float], part: float) -> float:
    """0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0
