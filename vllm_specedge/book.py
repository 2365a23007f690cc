"""What an engine knows about the drafts of its requests. Pure: events in, frames for the gateway and plans out.

Rule 1: nothing here can change a token. A draft is offered for exactly the tokens the request has, or not at all.
Rule 2: whatever the gateway says may be late, wrong or hostile: it is checked, dropped and counted, never raised on.
Rule 3: nothing is published while no edge could use it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vllm_specedge.frames import (
    MAX_UINT32,
    Assign,
    Close,
    CloseReason,
    Edges,
    EngineWelcome,
    Frame,
    Open,
    Propose,
    commits,
)
from vllm_specedge.policy import EdgeRecord, HoldLimits, Smoothed, hold_until
from vllm_specedge.proposals import Fate, ProposalTree

_MAX_COMMIT_TIMES = 32
MAX_OPENED_TOKENS = 16_384


@dataclass(frozen=True, slots=True)
class Row:
    """A running request that could decode in the next step, with room for `limit` draft tokens."""

    request_id: str
    limit: int


@dataclass(slots=True)
class Plan:
    """For the next step: drafts to verify, and until when to hold others. A request in neither decodes plainly."""

    drafts: dict[str, list[int]] = field(default_factory=dict)
    holds: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class _Request:
    number: int
    tokens: Sequence[int]
    """All its tokens, prompt first: a live view that grows with the request."""
    session: str
    tree: ProposalTree
    is_open: bool = False
    """The gateway knows it."""
    is_assigned: bool = False
    has_answered: bool = False
    """Its edge has proposed something since it was assigned."""
    has_passed: bool = False
    """The edge has said that it has nothing for this position."""
    is_awaited: bool = False
    """It was held at this position; if no proposal comes, that is a miss."""
    commit_times_s: dict[int, float] = field(default_factory=dict)
    """When the request came to have so many tokens, for its last few lengths: the base of a proposal is one of them."""
    record: EdgeRecord = field(default_factory=EdgeRecord)


class DraftBook:
    """The live requests of one engine, their proposal trees and how their edges do."""

    def __init__(self, vocab_size: int, max_draft: int, limits: HoldLimits) -> None:
        self.counters: Counter[str] = Counter()
        self.step_s = Smoothed()
        self.num_edges = 0
        self._vocab_size = vocab_size
        self._max_draft = max_draft
        self._limits = limits
        self._requests: dict[str, _Request] = {}
        self._ids: dict[int, str] = {}
        self._next_number = 0
        self._opened_tokens = 0

    def __len__(self) -> int:
        return len(self._requests)

    # -- from the gateway ------------------------------------------------------------------------------------------

    def receive(self, frame: Frame, now_s: float) -> list[Frame]:
        """Take in one frame of the gateway's; returns what to send back."""
        match frame:
            case Propose():
                self._propose(frame, now_s)
            case Assign():
                request = self._find(frame.request)
                if request is not None:
                    request.is_assigned, request.has_answered = frame.active, False
                    request.record = EdgeRecord()
            case Edges():
                return self._edges(frame.num_edges)
            case EngineWelcome():
                self.lost_gateway()  # a new gateway knows nothing: its Edges frame, next, opens all again
            case _:
                self.counters["unexpected_frames"] += 1
        return []

    def lost_gateway(self) -> None:
        """No edge can be reached: nobody is waited for, nothing is published."""
        self.num_edges = 0
        for request in self._requests.values():
            request.is_assigned = request.is_open = False

    def _edges(self, num_edges: int) -> list[Frame]:
        self.num_edges = num_edges
        if num_edges:
            return []  # each request is opened with its next commit
        # Without edges the gateway will not hear of requests that end, so it is to forget them all.
        return [frame for request in self._requests.values() for frame in self._closing(request)]

    def _find(self, number: int) -> _Request | None:
        return self._requests.get(self._ids.get(number, ""))

    def _propose(self, frame: Propose, now_s: float) -> None:
        request = self._find(frame.request)
        if request is None:
            self.counters["dropped_closed"] += 1
            return
        if any(token >= self._vocab_size for token in frame.tokens):
            self.counters["dropped_token_id"] += 1
            return
        self.counters["proposed_tokens"] += len(frame.tokens)
        if not frame.tokens:
            request.has_passed = request.has_passed or frame.base == request.tree.length
            return
        self._learn_from_late(request, frame)
        fate = request.tree.insert(frame.base, frame.tokens, request.tokens, frame.branch)
        self.counters[f"proposals_{fate.value}"] += 1
        committed_s = request.commit_times_s.pop(frame.base, None)
        if committed_s is not None and not request.has_answered:
            request.has_answered = True  # the first answer has the edge's prefill in it
        elif committed_s is not None:
            request.record.answered(now_s - committed_s, in_time=frame.base == request.tree.length)
        if fate in (Fate.KEPT, Fate.FULL):
            request.is_awaited = False

    def _learn_from_late(self, request: _Request, frame: Propose) -> None:
        """How right a proposal was can be seen without verifying it, once its positions are decided.

        Without this an edge that was wrong a few times, and so is not waited for and comes late, would stay so.
        """
        decided = request.tokens[frame.base : request.tree.length]
        num_right = next(
            (i for i, pair in enumerate(zip(frame.tokens, decided, strict=False)) if pair[0] != pair[1]), None
        )
        if num_right is not None or 0 < len(frame.tokens) <= len(decided):
            request.record.accepted.observe(len(frame.tokens) if num_right is None else num_right)

    # -- from the engine -------------------------------------------------------------------------------------------

    def open(self, request_id: str, tokens: Sequence[int], session: str) -> list[Frame]:
        """A request was added; `tokens` is a live view of all its token ids, prompt first."""
        number = self._next_number
        self._next_number = (number + 1) & MAX_UINT32
        request = _Request(number, tokens, session, ProposalTree(len(tokens)))
        self._requests[request_id] = request
        self._ids[number] = request_id
        return self._opening(request) if self.num_edges else []

    def _opening(self, request: _Request) -> list[Frame]:
        """Open and all tokens so far; a bounded number of tokens a step, for the engine's thread encodes them."""
        if self._opened_tokens >= MAX_OPENED_TOKENS:
            return []
        tokens = list(request.tokens)
        self._opened_tokens += len(tokens)
        request.is_open = True
        opening = Open(request.number, len(tokens), self._max_draft, self._max_draft, request.session)
        return [opening, *commits(request.number, 0, tokens)]

    def commit(self, request_id: str, num_verified: int, now_s: float) -> list[Frame]:
        """A step of a request is done: it verified `num_verified` draft tokens, and its token view may have grown."""
        request = self._requests.get(request_id)
        if request is None:
            return []
        base = request.tree.length
        num_tokens = len(request.tokens) - base
        if num_tokens <= 0:
            return []
        self._count(request, num_tokens, num_verified)
        if not self.num_edges:
            request.tree = ProposalTree(base + num_tokens) if request.tree.num_nodes else request.tree
            request.tree.length = base + num_tokens
            return []
        tokens = tuple(request.tokens[base:])
        request.tree.advance(tokens)
        request.has_passed = request.is_awaited = False
        request.commit_times_s[request.tree.length] = now_s
        if len(request.commit_times_s) > _MAX_COMMIT_TIMES:
            del request.commit_times_s[next(iter(request.commit_times_s))]
        return list(commits(request.number, base, tokens)) if request.is_open else self._opening(request)

    def _count(self, request: _Request, num_tokens: int, num_verified: int) -> None:
        self.counters["committed_tokens"] += num_tokens
        self.counters["steps"] += 1
        if num_verified:
            num_accepted = min(num_tokens - 1, num_verified)
            self.counters["verified_tokens"] += num_verified
            self.counters["accepted_tokens"] += num_accepted
            self.counters["verified_drafts"] += 1
            request.record.accepted.observe(num_accepted)

    def close(self, request_id: str) -> list[Frame]:
        """A request finished or was aborted."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return []
        del self._ids[request.number]
        return self._closing(request)

    def _closing(self, request: _Request) -> list[Frame]:
        was_open, request.is_open, request.is_assigned = request.is_open, False, False
        return [Close(request.number, CloseReason.FINISHED)] if was_open else []

    def plan(self, rows: Iterable[Row], now_s: float) -> Plan:
        """What each row does next: verify a draft, wait for one, or decode plainly."""
        plan = Plan()
        self._opened_tokens = 0
        for row in rows:
            request = self._requests.get(row.request_id)
            if request is None or row.limit <= 0:
                continue
            draft = request.tree.chain(min(row.limit, self._max_draft))
            if draft:
                plan.drafts[row.request_id] = draft
            elif request.is_assigned and not request.has_passed:
                self._plan_hold(row.request_id, request, now_s, plan)
        return plan

    def _plan_hold(self, request_id: str, request: _Request, now_s: float, plan: Plan) -> None:
        committed_s = request.commit_times_s.get(request.tree.length)
        if committed_s is None:
            return  # nothing was published for an edge to answer
        until_s = hold_until(request.record, committed_s, now_s, self.step_s.mean or 0.0, self._limits)
        if until_s is not None:
            self.counters["holds"] += not request.is_awaited
            request.is_awaited = True
            plan.holds[request_id] = until_s
        elif request.is_awaited:
            self.counters["missed_holds"] += 1
            request.is_awaited = False
            request.record.missed()
