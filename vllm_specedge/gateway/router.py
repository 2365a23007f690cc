"""Which edge drafts for which request. Pure: frames in, effects out; the gateway carries them out.

Rule 1: an edge sees the tokens of the requests it drafts for and of no other. A request that names a private session
goes to that session's edge only; a request that names none goes to pool edges only.
Rule 2: an edge's fault costs that edge its connection, never a request: the request goes to another edge or to none.
Rule 3: everything is bounded: requests an edge, tokens a request, tokens ahead, and what is kept for whom.
Rule 4: what is remembered of earlier requests only chooses among edges that may and can draft for this one.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from vllm_specedge.errors import ByeCode, RemoteProtocolError
from vllm_specedge.wire.frames import (
    PROTOCOL_VERSION,
    Assign,
    Bye,
    Close,
    CloseReason,
    Commit,
    Edges,
    EngineHello,
    EngineWelcome,
    Frame,
    Groups,
    Hello,
    Open,
    Ping,
    Pong,
    Propose,
    Report,
    Stats,
    StepTimes,
    VocabularyPart,
    Welcome,
    bye,
    commits,
)
from vllm_specedge.wire.telemetry import ACCEPTED, ENGINE_COUNTERS, VERIFIED, WRAP

POOL, PRIVATE = "pool", "private"
ROLES = (POOL, PRIVATE)

MAX_UNREAD_TOKENS = 1 << 16
MAX_GAPS = 2
"""An edge that misses commits of a request more often does not get it again: a context is a lot to send for a frame."""
MAX_EXTRA_LOAD = 1
"""How many requests more than the least loaded edge an edge may have that knows most of a context. With 0, two edges
that take turns at being one ahead would swap their conversations; with more, conversations would pile up on an edge,
and sharing it for a whole answer costs more than reading a context once."""
MAX_REPORTS = 256
MAX_REPORT_VALUES = 64


@dataclass(frozen=True, slots=True)
class RouterLimits:
    """What one gateway keeps, at most."""

    max_edges: int = 256
    max_requests_per_edge: int = 32
    max_requests: int = 4096
    max_context_tokens: int = 1 << 19
    max_total_tokens: int = 1 << 25
    """Of all contexts together, at 4 bytes a token."""
    credit_tokens: int = 32
    """How far past the last commit an edge may propose."""
    heartbeat_ms: int = 2000


@dataclass(frozen=True, slots=True)
class ToEdge:
    edge: int
    frame: Frame


@dataclass(frozen=True, slots=True)
class ToEngine:
    engine: bytes
    frame: Frame


Effect: TypeAlias = ToEdge | ToEngine
"""A Bye among the frames ends that edge's connection after it is sent."""

_Key: TypeAlias = tuple[bytes, int]


@dataclass(frozen=True, slots=True)
class RequestReport:
    """What one request came to, when it closed."""

    engine: int
    """Engines are numbered as they come; one that comes back has a new number."""
    values: tuple[int, ...]
    """In the order of counters.REQUEST_COUNTERS; of an engine of another release, fewer or more."""


@dataclass(slots=True)
class _Engine:
    hello: EngineHello
    number: int
    counters: list[int] = field(default_factory=lambda: [0] * len(ENGINE_COUNTERS))
    """As it said last: 0 when it comes."""
    step_times: StepTimes | None = None


@dataclass(slots=True)
class EdgeInfo:
    """One connected edge, as the gateway knows it."""

    hello: Hello
    session: str
    max_requests: int
    requests: dict[int, _Key] = field(default_factory=dict)
    """By the number that this edge knows them by."""
    unread_tokens: int = 0
    """Of contexts sent since the last Ping that it answered: a slow edge is not buried under prompts."""
    num_pings: int = 0
    next_number: int = 0
    num_proposed_tokens: int = 0
    num_committed_tokens: int = 0
    """Of its requests, decided while it drafted for them."""
    num_verified_tokens: int = 0
    num_accepted_tokens: int = 0
    """Of its drafts, as far as engines have reported: when a request ends, to whoever has it then."""

    @property
    def has_room(self) -> bool:
        return len(self.requests) < self.max_requests and self.unread_tokens < MAX_UNREAD_TOKENS


@dataclass(slots=True)
class _Request:
    opening: Open
    tokens: "array[int]"
    edge: int | None = None
    number: int = 0
    """What its edge calls it."""
    declined: set[int] = field(default_factory=set)
    num_gaps: int = 0
    has_report: bool = False

    @property
    def is_known(self) -> bool:
        """Its prompt has arrived in full."""
        return len(self.tokens) >= self.opening.num_tokens


class PrefixMemory:
    """Which edge last drafted for a context that begins so: it may still have that part in its cache.

    Keeps `max_kept` hashes of 8 bytes, those used last, and looks at the first `max_blocks` whole blocks of
    `block_tokens` tokens of a context: some 60 microseconds at most, for a context that costs more to send. No clock:
    an edge may have dropped its cache meanwhile. What is wrong here (that, a collision, or users who fill this with
    contexts of their own) costs the edge a cold prefill and nothing else, for only edges that may have the request
    anyway are chosen among.
    """

    def __init__(self, block_tokens: int = 64, max_blocks: int = 64, max_kept: int = 4096) -> None:
        self._block_tokens = block_tokens
        self._max_blocks = max_blocks
        self._max_kept = max_kept
        self._edges: OrderedDict[bytes, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._edges)

    def remember(self, tokens: "array[int]", edge: int) -> None:
        """This edge has all these tokens now."""
        for digest in self._digests(tokens):
            self._edges[digest] = edge
            self._edges.move_to_end(digest)
        while len(self._edges) > self._max_kept:
            self._edges.popitem(last=False)

    def holders(self, tokens: "array[int]") -> Iterator[tuple[float, int]]:
        """Edges that know a beginning of a context, longest first, with the part that it is of what is looked at."""
        num_looked_at = min(len(tokens), self._max_blocks * self._block_tokens)
        digests = self._digests(tokens)
        for num_blocks in range(len(digests), 0, -1):
            edge = self._edges.get(digests[num_blocks - 1])
            if edge is not None:
                yield num_blocks * self._block_tokens / num_looked_at, edge

    def forget(self, edge: int) -> None:
        """This edge is gone. Looks at all that is kept."""
        self._edges = OrderedDict((digest, other) for digest, other in self._edges.items() if other != edge)

    def _digests(self, tokens: "array[int]") -> list[bytes]:
        """Of the first block, of the first two, and so on: each stands for all tokens up to its block's end."""
        # Not Python's `hash`: users choose the tokens, and nobody finds a second context for one of these on purpose.
        state = hashlib.blake2b(digest_size=8)
        digests: list[bytes] = []
        for index in range(min(len(tokens) // self._block_tokens, self._max_blocks)):
            state.update(tokens[index * self._block_tokens : (index + 1) * self._block_tokens])
            digests.append(state.digest())
        return digests


class Router:
    """Engines, edges, live requests, and who drafts for whom."""

    def __init__(self, limits: RouterLimits, prefixes: PrefixMemory | None = None) -> None:
        self.limits = limits
        self.counters: Counter[str] = Counter()
        self.edges: dict[int, EdgeInfo] = {}
        self.engines: dict[bytes, _Engine] = {}
        self.reports: deque[RequestReport] = deque(maxlen=MAX_REPORTS)
        """Of the requests that closed last, oldest first. A frame of an engine's adds one at most."""
        self.engine_totals = [0] * len(ENGINE_COUNTERS)
        """What engines have counted while this gateway knew them, those that have left included: they never fall."""
        self._prefixes = PrefixMemory() if prefixes is None else prefixes
        self._num_engines = 0
        self._requests: dict[_Key, _Request] = {}
        self._num_tokens = 0

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def step_times(self) -> dict[int, StepTimes]:
        """What engines say their steps take, by engine number."""
        return {engine.number: engine.step_times for engine in self.engines.values() if engine.step_times}

    # -- engines ---------------------------------------------------------------------------------------------------

    def from_engine(self, engine: bytes, frame: Frame) -> list[Effect]:
        """Take in one frame of an engine's."""
        if isinstance(frame, EngineHello):
            return self._engine_hello(engine, frame)
        known = self.engines.get(engine)
        if known is None:
            return [ToEngine(engine, Bye(ByeCode.GOING_AWAY, "say EngineHello first"))]
        match frame:
            case Open():
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
                self._report(engine, known, frame)
            case Groups() | VocabularyPart():
                pass  # for people, and for edges that are to know what they draft for: the gateway's
            case _:
                self.counters["unexpected_engine_frames"] += 1
        return []

    def _engine_hello(self, engine: bytes, hello: EngineHello) -> list[Effect]:
        if hello.version != PROTOCOL_VERSION:
            text = f"this gateway speaks version {PROTOCOL_VERSION}, not {hello.version}"
            return [ToEngine(engine, Bye(ByeCode.VERSION, text))]
        effects = self.engine_left(engine)
        self.engines[engine] = _Engine(hello, self._num_engines)
        self._num_engines += 1
        return [
            *effects,
            ToEngine(engine, EngineWelcome(PROTOCOL_VERSION)),
            ToEngine(engine, Edges(sum(_suits(edge.hello, hello) for edge in self.edges.values()))),
        ]

    def engine_left(self, engine: bytes) -> list[Effect]:
        """An engine is gone: so are its requests."""
        if self.engines.pop(engine, None) is None:
            return []
        keys = [key for key in self._requests if key[0] == engine]
        # All of them go before the room they leave is given away, or one of them could get it.
        effects = [effect for key in keys for effect in self._drop(key, CloseReason.FINISHED)]
        return [*effects, *self._assign_waiting()]

    def _count(self, engine: _Engine, values: tuple[int, ...]) -> None:
        """An engine of another release may know fewer counters, or more."""
        for index, (value, before) in enumerate(zip(values, engine.counters, strict=False)):
            self.engine_totals[index] += (value - before) % WRAP
            engine.counters[index] = value

    def _open(self, engine: bytes, opening: Open) -> list[Effect]:
        key = (engine, opening.request)
        effects = self._close(key, CloseReason.MOVED) if key in self._requests else []
        if len(self._requests) >= self.limits.max_requests or opening.num_tokens > self.limits.max_context_tokens:
            self.counters["requests_over_limit"] += 1
            return effects
        self._requests[key] = _Request(opening, array("I"))
        return effects

    def _commit(self, key: _Key, commit: Commit) -> list[Effect]:
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

    def _report(self, id_: bytes, engine: _Engine, report: Report) -> None:
        request = self._requests.get((id_, report.request))
        if request is None or request.has_report:
            self.counters["dropped_reports"] += 1
            return
        request.has_report = True
        self.counters["reports"] += 1
        self.reports.append(RequestReport(engine.number, report.values[:MAX_REPORT_VALUES]))
        if request.edge is not None and len(report.values) > max(VERIFIED, ACCEPTED):
            edge = self.edges[request.edge]
            edge.num_verified_tokens += report.values[VERIFIED]
            edge.num_accepted_tokens += report.values[ACCEPTED]

    def _close(self, key: _Key, reason: int) -> list[Effect]:
        effects = self._drop(key, reason)
        return [*effects, *self._assign_waiting()] if effects else []

    def _drop(self, key: _Key, reason: int) -> list[Effect]:
        request = self._requests.pop(key, None)
        self._num_tokens -= len(request.tokens) if request is not None else 0
        if request is None or request.edge is None:
            return []
        self._remember(request, request.edge)
        del self.edges[request.edge].requests[request.number]
        return [ToEdge(request.edge, Close(request.number, reason))]

    # -- edges -----------------------------------------------------------------------------------------------------

    def edge_hello(self, edge: int, hello: Hello, session: str, roles: frozenset[str]) -> list[Effect]:
        """An edge presents itself; `roles` are those that its credentials allow."""
        refusal = self._refusal(hello, roles)
        if refusal is not None:
            return [ToEdge(edge, refusal)]
        matching = {id_: engine for id_, engine in self.engines.items() if _suits(hello, engine.hello)}
        model = next(iter(matching.values())).hello
        max_requests = min(hello.max_requests, self.limits.max_requests_per_edge)
        self.edges[edge] = EdgeInfo(hello, session, max_requests)
        welcome = Welcome(session, model.model, model.vocab_size, self.limits.heartbeat_ms)
        return [ToEdge(edge, welcome), *self._tell_edges(), *self._assign_waiting()]

    def _refusal(self, hello: Hello, roles: frozenset[str]) -> Bye | None:
        if hello.version != PROTOCOL_VERSION:
            versions = f"{PROTOCOL_VERSION}, this edge {hello.version}"
            text = f"This gateway speaks protocol version {versions}: update the older of the two."
            return bye(ByeCode.VERSION, text)
        if hello.role not in roles:
            text = f"This token does not allow the role {hello.role[:20]!r}: ask for one that does."
            return bye(ByeCode.ROLE, text)
        if len(self.edges) >= self.limits.max_edges:
            return bye(ByeCode.FULL, f"The gateway has its {self.limits.max_edges} edges: try again later.")
        if not self.engines:
            return bye(ByeCode.NO_ENGINE, "No vLLM engine is connected to this gateway yet.")
        if not any(_suits(hello, engine.hello) for engine in self.engines.values()):
            models = ", ".join(sorted({engine.hello.model for engine in self.engines.values()}))
            text = f"The draft model's tokenizer is not that of {models:.200}: choose a draft of the same family."
            return bye(ByeCode.TOKENIZER, text)
        return None

    def edge_left(self, edge: int) -> list[Effect]:
        """An edge is gone; its requests go to others, or to none."""
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
        """Take in one frame of a live edge's."""
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
        try:
            end = max(base + len(tokens) for base, tokens in frame.runs)
        except RemoteProtocolError as error:
            return [ToEdge(edge, bye(error.code, str(error)))]
        known = len(request.tokens)
        if end > known + self.limits.credit_tokens:
            self.counters["dropped_ahead"] += 1
            return []
        if end <= known if frame.tokens else end != known:
            self.counters["dropped_late"] += 1
            return []
        info.num_proposed_tokens += len(frame.tokens)
        self.counters["proposed_tokens"] += len(frame.tokens)
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

    # -- who drafts for whom ---------------------------------------------------------------------------------------

    def _tell_edges(self) -> Iterator[Effect]:
        for id_, engine in self.engines.items():
            yield ToEngine(id_, Edges(sum(_suits(edge.hello, engine.hello) for edge in self.edges.values())))

    def _assign_waiting(self) -> list[Effect]:
        # Who has room is looked up once: most requests wait for a kind of edge that has none.
        with_room = [edge for edge in self.edges.values() if edge.has_room]
        has_pool = any(edge.hello.role == POOL for edge in with_room)
        sessions = {edge.session for edge in with_room}
        waiting = [
            (key, request)
            for key, request in self._requests.items()
            if request.edge is None and (request.opening.session in sessions if request.opening.session else has_pool)
        ]
        return [effect for key, request in waiting if request.is_known for effect in self._assign(key, request)]

    def _assign(self, key: _Key, request: _Request) -> list[Effect]:
        """Give a request to one of the edges that may and can draft for it; nothing if there is none."""
        hello = self.engines[key[0]].hello
        loads = {
            edge: len(info.requests)
            for edge, info in self.edges.items()
            if info.has_room and edge not in request.declined and _may(info, request) and _suits(info.hello, hello)
        }
        return self._give(key, request, self._choose(request, loads)) if loads else []

    def _choose(self, request: _Request, loads: Mapping[int, int]) -> int:
        """Of edges with so many requests each: the one that knows most of this context, else the least loaded.

        Knowing less than half of it, such as a system prompt, is no reason to take a busier edge.
        """
        least = min(loads.values())
        holders = () if request.opening.session else self._prefixes.holders(request.tokens)
        for part, edge in holders:
            extra_load = MAX_EXTRA_LOAD if part >= 0.5 else 0
            if edge in loads and loads[edge] <= least + extra_load:
                self.counters["assigned_by_prefix"] += 1
                return edge
        return min(loads, key=lambda edge: (loads[edge], edge))

    def _remember(self, request: _Request, edge: int) -> None:
        # One that names a session has no choice, and would hide who among the others knows a common prefix.
        if not request.opening.session:
            self._prefixes.remember(request.tokens, edge)

    def _give(self, key: _Key, request: _Request, edge: int) -> list[Effect]:
        """The request is this edge's from now on: send it all tokens so far."""
        info = self.edges[edge]
        request.edge, request.number = edge, info.next_number
        info.next_number += 1
        info.requests[request.number] = key
        self._remember(request, edge)
        self.counters["assigned"] += 1
        opening = request.opening
        session = opening.session if opening.session == info.session else ""
        opened = Open(request.number, len(request.tokens), opening.max_draft, self.limits.credit_tokens, session)
        context = commits(request.number, 0, request.tokens)
        info.unread_tokens += len(request.tokens)
        info.num_pings += 1
        return [
            ToEdge(edge, opened),
            *(ToEdge(edge, commit) for commit in context),
            ToEdge(edge, Ping(info.num_pings)),
            ToEngine(key[0], Assign(key[1], edge + 1)),
        ]


def _suits(edge: Hello, engine: EngineHello) -> bool:
    return edge.fingerprint in ("", engine.fingerprint)


def _may(edge: EdgeInfo, request: _Request) -> bool:
    if request.opening.session:
        return request.opening.session == edge.session
    return edge.hello.role == POOL
