"""Assignment of requests to edges. Pure: frames in, effects out; the gateway carries them out.

Rule 1: an edge sees only the tokens of requests that it drafts for. A request that names a private session goes only to
that session's edge; a request that names none goes only to pool edges.
Rule 2: an edge's fault costs that edge its connection, never a request: the request goes to another edge or to none.
Rule 3: everything is bounded: requests per edge, tokens per request, tokens ahead, and what is stored.
Rule 4: the memory of earlier requests only chooses among edges that may and can draft for this one.
"""

from array import array
from collections import Counter, deque
from collections.abc import Iterator, Mapping

from vllm_specedge.errors import ByeCode
from vllm_specedge.gateway.effects import Effect, RequestReport, ToEdge, ToEngine
from vllm_specedge.gateway.known import (
    POOL,
    EdgeInfo,
    Key,
    KnownEngine,
    RoutedRequest,
    RouterLimits,
    may_draft,
    refusal,
    suits,
)
from vllm_specedge.gateway.prefix_memory import PrefixMemory
from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.engine_frames import (
    Assign,
    Capacity,
    Demand,
    Edges,
    EngineHello,
    EngineOpen,
    EngineWelcome,
    Groups,
    Report,
    Stats,
    StepTimes,
    VocabularyPart,
)
from vllm_specedge.wire.frames import (
    PROTOCOL_VERSION,
    Bye,
    Close,
    CloseReason,
    Commit,
    Hello,
    Open,
    Ping,
    Pong,
    Propose,
    Welcome,
    bye,
    commits,
)
from vllm_specedge.wire.telemetry import ACCEPTED, ENGINE_COUNTERS, VERIFIED, WRAP

MAX_GAPS = 2
"""An edge that misses commits of a request more often does not get it again: sending a whole context is expensive."""
MAX_REPORTS = 256
MAX_REPORT_VALUES = 64


class Router:
    """Engines, edges, live requests and their assignment. One class, as frames of each may change the assignment."""

    def __init__(self, limits: RouterLimits, prefixes: PrefixMemory | None = None) -> None:
        self.limits = limits
        self.counters: Counter[str] = Counter()
        self.edges: dict[int, EdgeInfo] = {}
        self.engines: dict[bytes, KnownEngine] = {}
        self.reports: deque[RequestReport] = deque(maxlen=MAX_REPORTS)
        """Reports of the requests that closed last, oldest first."""
        self.engine_totals = [0] * len(ENGINE_COUNTERS)
        """Sums of the engines' counters since they connected, those that have left included: they never fall."""
        self._prefixes = PrefixMemory() if prefixes is None else prefixes
        self._num_engines = 0
        self._requests: dict[Key, RoutedRequest] = {}
        self._num_tokens = 0

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def step_times(self) -> dict[int, StepTimes]:
        """The step times that engines report, by engine number."""
        return {engine.number: engine.step_times for engine in self.engines.values() if engine.step_times}

    # -- engines ---------------------------------------------------------------------------------------------------

    def from_engine(self, engine: bytes, frame: Frame) -> list[Effect]:
        if isinstance(frame, EngineHello):
            return self._engine_hello(engine, frame)
        known = self.engines.get(engine)
        if known is None:
            return [ToEngine(engine, Bye(ByeCode.GOING_AWAY, "send EngineHello first"))]
        match frame:
            case EngineOpen():
                return self._open(engine, frame)
            case Commit():
                return self._commit((engine, frame.request), frame)
            case Close():
                return self._close((engine, frame.request), frame.reason)
            case Ping():
                return [ToEngine(engine, Pong(frame.stamp))]
            case Stats():
                self._count(known, frame.values)
            case StepTimes():
                known.step_times = frame
            case Report():
                return self._report(engine, known, frame)
            case Groups():
                return [frame]
            case VocabularyPart() | Demand() | Capacity():
                pass  # processed by the gateway
            case _:
                self.counters["unexpected_engine_frames"] += 1
        return []

    def _engine_hello(self, engine: bytes, hello: EngineHello) -> list[Effect]:
        if hello.version != PROTOCOL_VERSION:
            text = f"this gateway speaks version {PROTOCOL_VERSION}, not {hello.version}"
            return [ToEngine(engine, Bye(ByeCode.VERSION, text))]
        effects = self.engine_left(engine)
        self.engines[engine] = KnownEngine(hello, self._num_engines)
        self._num_engines += 1
        return [
            *effects,
            ToEngine(engine, EngineWelcome(PROTOCOL_VERSION)),
            ToEngine(engine, Edges(sum(suits(edge.hello, hello) for edge in self.edges.values()))),
        ]

    def engine_left(self, engine: bytes) -> list[Effect]:
        """Remove an engine that has left, with its requests."""
        if self.engines.pop(engine, None) is None:
            return []
        keys = [key for key in self._requests if key[0] == engine]
        # Drop all of them before assigning their room, or one of them could get it.
        effects = [effect for key in keys for effect in self._drop(key, CloseReason.FINISHED)]
        return [*effects, *self._assign_waiting()]

    def _count(self, engine: KnownEngine, values: tuple[int, ...]) -> None:
        """Add an engine's counters to the totals. An engine of another release may have fewer or more."""
        for index, (value, before) in enumerate(zip(values, engine.counters, strict=False)):
            self.engine_totals[index] += (value - before) % WRAP
            engine.counters[index] = value

    def _open(self, engine: bytes, opening: EngineOpen) -> list[Effect]:
        key = (engine, opening.request)
        effects = self._close(key, CloseReason.MOVED) if key in self._requests else []
        if len(self._requests) >= self.limits.max_requests or opening.num_tokens > self.limits.max_context_tokens:
            self.counters["requests_over_limit"] += 1
            return effects
        self._requests[key] = RoutedRequest(opening, array("I"))
        return effects

    def _commit(self, key: Key, commit: Commit) -> list[Effect]:
        request = self._requests.get(key)
        if request is None:
            return []
        known, end = len(request.tokens), commit.base + len(commit.tokens)
        new = max(0, end - known)
        is_too_much = end > self.limits.max_context_tokens or self._num_tokens + new > self.limits.max_total_tokens
        if commit.base > known or is_too_much:
            self.counters["commit_gaps"] += 1
            return [*self._close(key, CloseReason.GAP), ToEngine(key[0], Assign(key[1], 0))]
        was_known = request.is_known
        request.tokens.extend(commit.tokens[known - commit.base :])
        self._num_tokens += new
        if request.edge is not None:
            self.edges[request.edge].num_committed_tokens += new
            return [ToEdge(request.edge, Commit(request.number, commit.base, commit.tokens))]
        return self._assign(key, request) if request.is_known and not was_known else []

    def _report(self, id_: bytes, engine: KnownEngine, report: Report) -> list[Effect]:
        request = self._requests.get((id_, report.request))
        if request is None or request.has_report:
            self.counters["dropped_reports"] += 1
            return []
        request.has_report = True
        self.counters["reports"] += 1
        self.reports.append(RequestReport(engine.number, report.values[:MAX_REPORT_VALUES]))
        if request.edge is not None and len(report.values) > max(VERIFIED, ACCEPTED):
            edge = self.edges[request.edge]
            edge.num_verified_tokens += report.values[VERIFIED]
            edge.num_accepted_tokens += report.values[ACCEPTED]
        return [self.reports[-1]]

    def _close(self, key: Key, reason: int) -> list[Effect]:
        effects = self._drop(key, reason)
        return [*effects, *self._assign_waiting()] if effects else []

    def _drop(self, key: Key, reason: int) -> list[Effect]:
        request = self._requests.pop(key, None)
        self._num_tokens -= len(request.tokens) if request is not None else 0
        if request is None or request.edge is None:
            return []
        self._remember(request, request.edge)
        del self.edges[request.edge].requests[request.number]
        return [ToEdge(request.edge, Close(request.number, reason))]

    # -- edges -----------------------------------------------------------------------------------------------------

    def edge_hello(self, edge: int, hello: Hello, session: str, roles: frozenset[str]) -> list[Effect]:
        """Admit or refuse an edge. `roles`: those that its credentials allow."""
        engines = [engine.hello for engine in self.engines.values()]
        refused = refusal(hello, roles, len(self.edges), self.limits.max_edges, engines)
        if refused is not None:
            return [ToEdge(edge, refused)]
        matching = {id_: engine for id_, engine in self.engines.items() if suits(hello, engine.hello)}
        model = next(iter(matching.values())).hello
        max_requests = min(hello.max_requests, self.limits.max_requests_per_edge)
        self.edges[edge] = EdgeInfo(hello, session, max_requests)
        welcome = Welcome(session, model.model, model.vocab_size, self.limits.heartbeat_ms)
        return [ToEdge(edge, welcome), *self._tell_edges(), *self._assign_waiting()]

    def edge_left(self, edge: int) -> list[Effect]:
        """Remove an edge that has left. Its requests go to others, or to none."""
        info = self.edges.pop(edge, None)
        if info is None:
            return []
        self._prefixes.forget(edge)
        effects: list[Effect] = []
        for key in info.requests.values():
            request = self._requests[key]
            request.edge = None
            effects += self._assign(key, request) or [ToEngine(key[0], Assign(key[1], 0))]
        return [*effects, *self._tell_edges()]

    def from_edge(self, edge: int, frame: Frame) -> list[Effect]:
        info = self.edges[edge]
        match frame:
            case Propose():
                return self._propose(edge, info, frame)
            case Close():
                return self._declined(edge, info, frame)
            case Ping():
                return [ToEdge(edge, Pong(frame.stamp))]
            case Pong():
                return self._pong(info, frame)
            case _:
                raise TypeError(frame)

    def _propose(self, edge: int, info: EdgeInfo, frame: Propose) -> list[Effect]:
        key = info.requests.get(frame.request)
        if key is None:
            self.counters["dropped_closed"] += 1
            return []
        request = self._requests[key]
        vocab_size = self.engines[key[0]].hello.vocab_size
        bad = next((token for token in frame.tokens if token >= vocab_size), None)
        if bad is not None:
            self.counters["dropped_token_id"] += 1
            text = f"Token id {bad} is outside of the model's vocabulary of {vocab_size}."
            return [ToEdge(edge, bye(ByeCode.TOKEN_ID, text))]
        end = max(base + len(tokens) for base, tokens in frame.runs)
        known = len(request.tokens)
        if end > known + self.limits.credit_tokens:
            self.counters["dropped_ahead"] += 1
            return []
        if end <= known if frame.tokens else end != known:
            self.counters["dropped_late"] += 1
            return []
        info.num_proposed_tokens += frame.num_drafted
        self.counters["proposed_tokens"] += frame.num_drafted
        return [ToEngine(key[0], Propose(key[1], frame.base, frame.tokens, frame.branches))]

    def _pong(self, info: EdgeInfo, frame: Pong) -> list[Effect]:
        if frame.stamp != info.num_pings or not info.unread_tokens:
            return []
        info.unread_tokens = 0
        return self._assign_waiting()

    def _declined(self, edge: int, info: EdgeInfo, frame: Close) -> list[Effect]:
        key = info.requests.pop(frame.request, None)
        if key is None:
            return []
        request = self._requests[key]
        request.edge = None
        request.num_gaps += frame.reason == CloseReason.GAP
        if frame.reason != CloseReason.GAP or request.num_gaps > MAX_GAPS:
            request.declined.add(edge)
        self.counters["declined"] += 1
        effects = self._assign(key, request) or [ToEngine(key[0], Assign(key[1], 0))]
        return [*effects, *self._assign_waiting()]

    # -- assignment ------------------------------------------------------------------------------------------------

    def _tell_edges(self) -> Iterator[Effect]:
        for id_, engine in self.engines.items():
            yield ToEngine(id_, Edges(sum(suits(edge.hello, engine.hello) for edge in self.edges.values())))

    def _assign_waiting(self) -> list[Effect]:
        # Edges with room are looked up once: most requests wait for a kind of edge that has none.
        with_room = [edge for edge in self.edges.values() if edge.has_room]
        has_pool = any(edge.hello.role == POOL for edge in with_room)
        sessions = {edge.session for edge in with_room}
        waiting = [
            (key, request)
            for key, request in self._requests.items()
            if request.edge is None and (request.opening.session in sessions if request.opening.session else has_pool)
        ]
        return [effect for key, request in waiting if request.is_known for effect in self._assign(key, request)]

    def _assign(self, key: Key, request: RoutedRequest) -> list[Effect]:
        """Assign a request to one of the edges that may and can draft for it; nothing if there is none."""
        hello = self.engines[key[0]].hello
        loads = {
            edge: len(info.requests)
            for edge, info in self.edges.items()
            if info.has_room and edge not in request.declined and may_draft(info, request) and suits(info.hello, hello)
        }
        return self._give(key, request, self._choose(request, loads)) if loads else []

    def _choose(self, request: RoutedRequest, loads: Mapping[int, int]) -> int:
        """The edge that has the most of this context, else the least loaded. `loads`: requests by edge."""
        knows = None if request.opening.session else self._prefixes.choose(request.tokens, loads)
        if knows is not None:
            self.counters["assigned_by_prefix"] += 1
            return knows
        return min(loads, key=lambda edge: (loads[edge], edge))

    def _remember(self, request: RoutedRequest, edge: int) -> None:
        # A request with a session has no choice of edges, and would hide which pool edge has a common prefix.
        if not request.opening.session:
            self._prefixes.remember(request.tokens, edge)

    def _give(self, key: Key, request: RoutedRequest, edge: int) -> list[Effect]:
        """Assign a request to an edge, and send the edge all tokens so far."""
        info = self.edges[edge]
        request.edge, request.number = edge, info.next_number
        info.next_number += 1
        info.requests[request.number] = key
        self._remember(request, edge)
        self.counters["assigned"] += 1
        opening = request.opening
        session = opening.session if opening.session == info.session else ""
        credit, num_tokens = self.limits.credit_tokens, len(request.tokens)
        opened = Open(request.number, num_tokens, opening.max_draft, credit, session, opening.sampling)
        context = commits(request.number, 0, request.tokens)
        info.unread_tokens += len(request.tokens)
        info.num_pings += 1
        return [
            ToEdge(edge, opened),
            *(ToEdge(edge, commit) for commit in context),
            ToEdge(edge, Ping(info.num_pings)),
            ToEngine(key[0], Assign(key[1], edge + 1)),
        ]
