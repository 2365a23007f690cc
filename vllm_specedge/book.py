"""What an engine knows about the drafts of its requests. Pure: events in, frames for the gateway and plans out.

Rule 1: nothing here can change a token. A draft is offered for exactly the tokens the request has, or not at all.
Rule 2: whatever the gateway says may be late, wrong or hostile: it is checked, dropped and counted, never raised on.
Rule 3: nothing is published while no edge could use it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vllm_specedge.counters import request_values
from vllm_specedge.errors import RemoteProtocolError
from vllm_specedge.estimates import Line, Smoothed
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
    Report,
    commits,
)
from vllm_specedge.policy import PRIOR_ACCEPTED, EdgeRecord, HoldLimits, hold_until, is_worth_verifying
from vllm_specedge.proposals import Fate, Insertion, ProposalTree

_MAX_EMPTIED = 32
_DISCARDED = {
    Fate.LATE: "discarded_late",
    Fate.MISMATCH: "discarded_mismatch",
    Fate.GAP: "discarded_gap",
    Fate.FULL: "discarded_over_budget",
}
MAX_OPENED_TOKENS = 16_384
MAX_SKIPPED = 8


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
    emptied_s: dict[int, float] = field(default_factory=dict)
    """When the request came to have so many tokens and no draft: its last few lengths that wait for an answer."""
    suggestion: tuple[int, ...] = ()
    """What vLLM's own n-gram lookup found for this position."""
    is_suggestion: bool = False
    """The step under way verifies the suggestion, not a draft of an edge's."""
    num_skipped: int = 0
    """Suggestions in a row that were not verified because they seemed not to pay."""
    record: EdgeRecord = field(default_factory=EdgeRecord)
    ngram_accepted: Smoothed = field(default_factory=lambda: Smoothed(mean=PRIOR_ACCEPTED))
    counters: Counter[str] = field(default_factory=Counter)
    """Its own, in the names of counters.REQUEST_COUNTERS."""


class DraftBook:
    """The live requests of one engine, their proposal trees and how their edges do."""

    def __init__(self, vocab_size: int, max_draft: int, limits: HoldLimits) -> None:
        self.counters: Counter[str] = Counter()
        self.step_s = Line()
        self.num_edges = 0
        self._vocab_size = vocab_size
        self._max_draft = max_draft
        self._limits = limits
        self._requests: dict[str, _Request] = {}
        self._ids: dict[int, str] = {}
        self._next_number = 0
        self._opened_tokens = 0
        self._typical = EdgeRecord()
        """How right drafts are here, whoever's: what is expected of an edge before it has shown its own."""

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
                    request.record = self._typical.fresh()
                    request.emptied_s.clear()
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
        if not frame.tokens:
            request.has_passed = request.has_passed or frame.base == request.tree.length
            return
        try:
            runs = frame.runs
        except RemoteProtocolError:
            self.counters["unexpected_frames"] += 1
            return
        base, draft = frame.base + 1, runs[0][1][1:]  # the first token is a known one
        if base in request.emptied_s and request.tokens[frame.base] == frame.tokens[0]:
            self._learn_from_late(request, base, draft)
        insertions = request.tree.insert(runs, request.tokens)
        self.counters[f"proposals_{insertions[0].fate.value}"] += 1
        for (_, tokens), done in zip(runs, insertions, strict=True):
            self._count_insertion(request, len(tokens), done)
        if insertions[0].fate not in (Fate.MISMATCH, Fate.GAP):
            self._learn_answer(request, base, len(draft), now_s)

    def _count_insertion(self, request: _Request, num_tokens: int, done: Insertion) -> None:
        self._add(request, "proposed_tokens", num_tokens)
        self._add(request, "repeated_tokens", done.repeated)
        self._add(request, "discarded_late", done.late)
        if done.discarded:
            self._add(request, _DISCARDED[done.fate], done.discarded)

    def _add(self, request: _Request, name: str, number: int) -> None:
        """Count for the request and in total."""
        if number:
            request.counters[name] += number
            self.counters[name] += number

    def _learn_answer(self, request: _Request, base: int, num_tokens: int, now_s: float) -> None:
        """How long the edge took to answer a commit that left the request without a draft.

        A proposal answers each of those lengths that it covers, for its past is that of the request.
        """
        for length in [length for length in request.emptied_s if base <= length < base + num_tokens]:
            emptied_s = request.emptied_s.pop(length)
            if request.has_answered:
                request.record.answered(now_s - emptied_s, in_time=length == request.tree.length)
            request.has_answered = True  # the first answer has the edge's prefill in it

    def _learn(self, request: _Request, num_right: int) -> None:
        request.record.verified(num_right)
        self._typical.verified(num_right)

    def _learn_from_late(self, request: _Request, base: int, tokens: Sequence[int]) -> None:
        """How right a proposal was can be seen without verifying it, once its positions are decided.

        Without this an edge that was wrong a few times, and so is not waited for and comes late, would stay so.
        """
        decided = request.tokens[base : request.tree.length]
        num_right = _num_equal(tokens, decided)
        if num_right < min(len(tokens), len(decided)) or 0 < len(tokens) <= len(decided):
            self._learn(request, num_right)

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
        is_rejected = num_tokens <= num_verified and not request.is_suggestion
        request.suggestion, request.is_suggestion = (), False
        request.has_passed = request.is_awaited = False
        tokens = tuple(request.tokens[base:])
        self._advance(request, tokens, is_rejected)
        if not self.num_edges:
            return []
        if not request.tree.num_ahead:
            request.emptied_s[request.tree.length] = now_s
            if len(request.emptied_s) > _MAX_EMPTIED:
                del request.emptied_s[next(iter(request.emptied_s))]
        return list(commits(request.number, base, tokens)) if request.is_open else self._opening(request)

    def _advance(self, request: _Request, tokens: tuple[int, ...], is_rejected: bool) -> None:
        done = request.tree.advance(tokens)
        self._add(request, "discarded_mismatch", done.pruned)
        self._add(request, "tree_hits", done.is_hit)
        if is_rejected:
            request.record.hit.observe(float(done.is_hit))
        self._add(request, "round_trips_saved", request.tree.num_ahead > 0)

    def _count(self, request: _Request, num_tokens: int, num_verified: int) -> None:
        self._add(request, "committed_tokens", num_tokens)
        self._add(request, "ahead_tokens", request.tree.num_ahead)
        self._add(request, "steps", 1)
        self._learn_from_suggestion(request)
        if not num_verified:
            return
        num_accepted = min(num_tokens - 1, num_verified)
        kind = "ngram_" if request.is_suggestion else ""
        self._add(request, f"{kind}verified_tokens", num_verified)
        self._add(request, f"{kind}accepted_tokens", num_accepted)
        if not request.is_suggestion:
            self.counters["verified_drafts"] += 1
            self._learn(request, num_accepted)

    def _learn_from_suggestion(self, request: _Request) -> None:
        """How many of its tokens were right, whether they were verified or not: so it can pay again."""
        if request.suggestion:
            request.num_skipped = 0 if request.is_suggestion else request.num_skipped + 1
            decided = request.tokens[request.tree.length :]
            request.ngram_accepted.observe(_num_equal(request.suggestion, decided))

    def _is_suggestion_worth_it(self, request: _Request, limit: int) -> bool:
        num_tokens = min(limit, len(request.suggestion))
        accepted = min(request.ngram_accepted.mean or 0.0, num_tokens)
        if num_tokens == 0:
            return False
        # Now and then one that is often right is tried anyway: else one slow step that verified would count for ever.
        is_tried = request.num_skipped >= MAX_SKIPPED and accepted >= 1.0
        return is_tried or is_worth_verifying(accepted, num_tokens, self.step_s)

    def suggest(self, request_id: str, tokens: Sequence[int]) -> None:
        """vLLM's own n-gram draft for what follows the request's tokens as they are now; forgotten with its commit."""
        request = self._requests.get(request_id)
        if request is not None:
            request.suggestion = tuple(tokens)

    def close(self, request_id: str) -> list[Frame]:
        """A request finished or was aborted."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return []
        del self._ids[request.number]
        self._add(request, "discarded_unused", request.tree.num_nodes)
        report = Report(request.number, request_values(request.counters))
        return [report, *self._closing(request)] if request.is_open else []

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
            limit = min(row.limit, self._max_draft)
            draft = request.tree.chain(limit)
            request.is_suggestion = not draft and self._is_suggestion_worth_it(request, limit)
            if draft:
                plan.drafts[row.request_id] = draft
            elif request.is_suggestion:
                plan.drafts[row.request_id] = list(request.suggestion[:limit])
            elif request.is_assigned and not request.has_passed:
                self._plan_hold(row.request_id, request, now_s, plan)
        return plan

    def _plan_hold(self, request_id: str, request: _Request, now_s: float, plan: Plan) -> None:
        emptied_s = request.emptied_s.get(request.tree.length)
        if emptied_s is None:
            return  # nothing was published for an edge to answer
        until_s = hold_until(request.record, emptied_s, now_s, self.step_s(1), self._limits)
        if until_s is not None:
            self.counters["holds"] += not request.is_awaited
            request.is_awaited = True
            plan.holds[request_id] = until_s
        elif request.is_awaited:
            self.counters["missed_holds"] += 1
            request.is_awaited = False
            request.record.missed()


def _num_equal(draft: Sequence[int], decided: Sequence[int]) -> int:
    """How many first tokens of a draft are right."""
    pairs = zip(draft, decided, strict=False)
    return next((i for i, pair in enumerate(pairs) if pair[0] != pair[1]), min(len(draft), len(decided)))
