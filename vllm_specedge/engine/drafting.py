"""What an engine knows about the drafts of its requests. Pure: events in, frames for the gateway and plans out.

Rule 1: nothing here can change a token. A draft is offered for exactly the tokens the request has, or not at all.
Rule 2: whatever the gateway says may be late, wrong or hostile: it is checked, dropped and counted, never raised on.
Rule 3: nothing is published while no edge could use it, and seldom where drafts are not verified.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from vllm_specedge.engine.predicted_output import Prediction
from vllm_specedge.engine.proposal_tree import Advance, Fate, Insertion, ProposalTree
from vllm_specedge.errors import RemoteProtocolError
from vllm_specedge.policy.acceptance import Acceptance
from vllm_specedge.policy.coalescing import Rest
from vllm_specedge.policy.decision import (
    HOLDING_MODES,
    Awaited,
    Candidate,
    EdgeRecord,
    HoldLimits,
    Load,
    Probe,
    awaited,
    decide,
)
from vllm_specedge.policy.ngram_budget import Lookups
from vllm_specedge.policy.step_cost import StepCost
from vllm_specedge.wire.frames import (
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
from vllm_specedge.wire.telemetry import Group, request_values

_MAX_EMPTIED = 32
_DISCARDED = {
    Fate.LATE: "discarded_late",
    Fate.MISMATCH: "discarded_mismatch",
    Fate.GAP: "discarded_gap",
    Fate.FULL: "discarded_over_budget",
}
MAX_OPENED_TOKENS = 16_384
MAX_RECORDS = 4096
"""Edges whose records are kept, those assigned last."""
NOTHING_ELSE = Load()
FIRST_PROBE_AFTER, PROBE_AFTER = 4, 64
"""So many steps with drafts that did not seem worth it; then a little is verified, to see what it costs now. Soon at
first, when what it costs is hardly known, and after twice as many steps each time."""
FORCED_AFTER = 2
"""A probe that would slow somebody by more than allowed waits for so many times as many steps, and is made then."""
PLAIN_PROBE_AFTER = 256
"""Steps in a row that verified something; then one does not, to see what that costs now."""
SPEEDUP_MEMORY = 0.98
MAX_GROUPS = 128
"""Steps that are kept until they are reported, the last ones."""


class Source(Enum):
    """Whose draft a step verifies; the value is what its counters' names begin with."""

    EDGE = ""
    NGRAM = "ngram_"
    PREDICTION = "prediction_"


@dataclass(frozen=True, slots=True)
class Row:
    """A running request that could decode in the next step, with room for `limit` draft tokens: in the request, in the
    model's context and, where the cache is nearly full, in the blocks that the request has already."""

    request_id: str
    limit: int
    priority: int = 0
    """As vLLM's: smaller is more important."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step that the engine has done."""

    requests: int
    """That were in it."""
    tokens: int
    """Of decoding, draft tokens included, and of prompts."""
    prefilled: int
    """Of prompts."""
    context: int
    """Tokens that these requests had in the cache before."""
    started_s: float
    ended_s: float
    is_verifying: bool
    """Draft tokens were in it."""


@dataclass(slots=True)
class Plan:
    """For the next step: drafts to verify, and until when to hold others. A request in neither decodes plainly."""

    drafts: dict[str, list[int]] = field(default_factory=dict)
    holds: dict[str, float] = field(default_factory=dict)
    wait_until_s: float | None = None
    """All wait, this long at most: nobody is to run before something arrives."""


@dataclass(slots=True)
class _Request:
    number: int
    tokens: Sequence[int]
    """All its tokens, prompt first: a live view that grows with the request."""
    session: str
    num_prompt: int
    tree: ProposalTree
    is_open: bool = False
    """The gateway knows it."""
    num_published: int = 0
    """Tokens that the gateway knows."""
    rest: Rest = field(default_factory=Rest)
    is_refused: bool = False
    """The step under way leaves the draft unverified that its edge had for it."""
    is_assigned: bool = False
    has_answered: bool = False
    """Its edge has proposed something since it was assigned."""
    has_passed: bool = False
    """The edge has said that it has nothing for this position."""
    held_since_s: float | None = None
    """When it was left out first at this position."""
    is_awaited: bool = False
    """It was held at this position; if no proposal comes, that is a miss."""
    emptied_s: dict[int, float] = field(default_factory=dict)
    """When the request came to have so many tokens and no draft: its last few lengths that wait for an answer."""
    committed_s: float = 0.0
    """When its last token was decided."""
    suggestion: tuple[int, ...] = ()
    """What vLLM's own n-gram lookup found for this position."""
    prediction: Prediction | None = None
    """What its user foretold of the answer."""
    source: Source = Source.EDGE
    """Whose draft the step under way verifies, if it verifies one."""
    record: EdgeRecord = field(default_factory=EdgeRecord)
    """Its edge's."""
    gained_s: float = 0.0
    spent_s: float = 0.0
    """What its last tokens would have taken without drafts, and what they took; old ones count less."""
    acceptance: Acceptance = field(default_factory=Acceptance)
    ngram_acceptance: Acceptance = field(default_factory=Acceptance)
    prediction_acceptance: Acceptance = field(default_factory=Acceptance)
    counters: Counter[str] = field(default_factory=Counter)
    """Its own, in the names of counters.REQUEST_COUNTERS."""


@dataclass(frozen=True, slots=True)
class _Lesson:
    """What a commit was, for `learn`."""

    request: _Request
    record: EdgeRecord
    acceptance: Acceptance
    """Those of the edge that it had."""
    draft: Sequence[int]
    """What the trunk held, as far as it can teach."""
    decided: Sequence[int]
    num_verified: int
    suggestion: Sequence[int]
    predicted: Sequence[int]
    source: Source
    """Whose draft the step verified."""
    num_ahead: int
    """Tokens of the trunk before."""
    done: Advance
    is_saved: bool
    """There is a draft for what follows."""

    @property
    def num_accepted(self) -> int:
        return min(len(self.decided) - 1, self.num_verified)


class DraftBook:
    """The live requests of one engine, their proposal trees and how their edges do."""

    def __init__(
        self, vocab_size: int, max_draft: int, limits: HoldLimits, profile: Mapping[int, float] | None = None
    ) -> None:
        """`profile`: seconds that a step takes by its number of tokens, as tried at start-up."""
        self.counters: Counter[str] = Counter()
        self.cost = StepCost(profile)
        self.lookups = Lookups()
        self.num_edges = 0
        self._vocab_size = vocab_size
        self._max_draft = max_draft
        self._limits = limits
        self._requests: dict[str, _Request] = {}
        self._ids: dict[int, str] = {}
        self._next_number = 0
        self._opened_tokens = 0
        self._acceptance = Acceptance()
        """How right drafts are here, whoever's: what is expected of an edge before it has shown its own."""
        self._ngram_acceptance = Acceptance()
        self._prediction_acceptance = Acceptance()
        self.predicted: set[str] = set()
        """The requests with a predicted output."""
        self._records: OrderedDict[int, EdgeRecord] = OrderedDict()
        self._lessons: list[_Lesson] = []
        self._num_refused = self._num_verifying = 0
        self._probe_after = FIRST_PROBE_AFTER
        self._num_rows = self._row_context = 0
        """Of the last plan: requests that could decode, and their context."""
        self._last_end_s: float | None = None
        self._plain_step_s = 0.0
        """What the last step would have taken without drafts, and with all that could have been in it."""
        self._gained_s = self._spent_s = 0.0
        self._plain_s = 0.0
        """What all tokens so far would have taken without drafts."""
        self.groups: deque[Group] = deque(maxlen=MAX_GROUPS)
        """The last steps, for whoever looks at them; the one under way is not among them."""
        self._last_step: tuple[Step, int, int] | None = None
        """And what was verified and accepted before it."""

    @property
    def has_lookup_due(self) -> bool:
        """Asked once after each step: whether what was said before is to be looked up, for `suggest`."""
        step_s = self.cost(self._num_rows, self._num_rows, self._row_context)
        return self.lookups.is_due(step_s / max(1, self._num_rows), step_s)

    @property
    def speedup(self) -> float:
        """Tokens per second of late, over what plain steps are thought to give."""
        return self._gained_s / self._spent_s if self._spent_s > 0.0 else 1.0

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
                    return self._assign(request, frame.edge, now_s)
            case Edges():
                return self._edges(frame.num_edges)
            case EngineWelcome():
                self.lost_gateway()  # a new gateway knows nothing: its Edges frame, next, opens all again
            case _:
                self.counters["unexpected_frames"] += 1
        return []

    def _assign(self, request: _Request, edge: int, now_s: float) -> list[Frame]:
        request.is_assigned, request.has_answered = edge != 0, False
        request.emptied_s.clear()
        if not edge:
            return []
        request.record = self._records.setdefault(edge, EdgeRecord(Acceptance(self._acceptance)))
        self._records.move_to_end(edge)
        if len(self._records) > MAX_RECORDS:
            self._records.popitem(last=False)
        request.acceptance = Acceptance(request.record.acceptance)
        request.rest = Rest()
        return self._publish(request, now_s)

    def lost_gateway(self) -> None:
        """No edge can be reached: nobody is waited for, nothing is published."""
        self.num_edges = 0
        self._records.clear()  # a new gateway numbers its edges anew
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
            in_time = length == request.tree.length
            if request.has_answered:
                request.record.answered(now_s - emptied_s, in_time, base + num_tokens - length)
            request.has_answered = True  # the first answer has the edge's prefill in it

    def _learn_from_late(self, request: _Request, base: int, tokens: Sequence[int]) -> None:
        """How right a proposal was can be seen without verifying it, once its positions are decided.

        Without this an edge that was wrong a few times, and so is not waited for and comes late, would stay so.
        """
        decided = request.tokens[base : request.tree.length]
        num_right = _num_equal(tokens, decided)
        request.acceptance.observe(num_right, min(len(tokens), len(decided)))

    # -- from the engine -------------------------------------------------------------------------------------------

    def open(self, request_id: str, tokens: Sequence[int], session: str) -> list[Frame]:
        """A request was added; `tokens` is a live view of all its token ids, prompt first."""
        number = self._next_number
        self._next_number = (number + 1) & MAX_UINT32
        request = _Request(number, tokens, session, len(tokens), ProposalTree(len(tokens)))
        request.ngram_acceptance = Acceptance(self._ngram_acceptance)
        self._requests[request_id] = request
        self._ids[number] = request_id
        self.counters["opened_requests"] += 1
        return self._opening(request) if self.num_edges else []

    def _opening(self, request: _Request) -> list[Frame]:
        """Open and all tokens so far; a bounded number of tokens a step, for the engine's thread encodes them."""
        if self._opened_tokens >= MAX_OPENED_TOKENS:
            return []
        tokens = list(request.tokens)
        self._opened_tokens += len(tokens)
        request.is_open, request.num_published = True, len(tokens)
        opening = Open(request.number, len(tokens), self._max_draft, self._max_draft, request.session)
        return [opening, *commits(request.number, 0, tokens)]

    def commit(self, request_id: str, num_verified: int, now_s: float) -> list[Frame]:
        """A step of a request is done: it verified `num_verified` draft tokens, and its token view may have grown.

        Only what the next plan cannot do without is done at once; the rest is for `learn`.
        """
        request = self._requests.get(request_id)
        if request is None:
            return []
        base = request.tree.length
        num_tokens = len(request.tokens) - base
        if num_tokens <= 0:
            return []
        self._pace(request, num_tokens, now_s)
        num_ahead, decided = request.tree.num_ahead, tuple(request.tokens[base:])
        draft = request.tree.chain(max(num_tokens, num_verified + 1))
        predicted = self._walk(request, decided) if request.prediction is not None else ()
        done = request.tree.advance(decided)
        self._lessons.append(
            _Lesson(
                request,
                request.record,
                request.acceptance,
                draft,
                decided,
                num_verified,
                request.suggestion,
                predicted,
                request.source,
                num_ahead,
                done,
                request.tree.num_ahead > 0,
            )
        )
        is_verified = num_verified > 0 and request.source is Source.EDGE
        num_unused = 0
        if request.has_answered:
            request.record.stepped(is_verified, now_s)
            num_unused = request.record.num_unused
        is_due = request.rest.committed(num_tokens, request.is_refused, is_verified, num_unused)
        request.suggestion, request.source = (), Source.EDGE
        request.has_passed = request.is_awaited = request.is_refused = False
        request.held_since_s = None
        if not self.num_edges:
            return []
        if not request.is_open:
            return self._opening(request)
        if not is_due:
            self.counters["collected_commits"] += 1
        return self._publish(request, now_s) if is_due and request.is_assigned else []

    def _publish(self, request: _Request, now_s: float) -> list[Frame]:
        """All that is decided and not published; without a draft, its edge has to answer from now on."""
        base = request.num_published
        if not request.is_open or base == request.tree.length:
            return []
        request.num_published = request.tree.length
        if not request.tree.num_ahead:
            request.emptied_s[request.tree.length] = now_s
            if len(request.emptied_s) > _MAX_EMPTIED:
                del request.emptied_s[next(iter(request.emptied_s))]
        return list(commits(request.number, base, request.tokens[base : request.tree.length]))

    def _pace(self, request: _Request, num_tokens: int, now_s: float) -> None:
        if self._plain_step_s and request.committed_s:
            plain_s = num_tokens * self._plain_step_s / self._num_rows
            self._gained_s += plain_s
            self._plain_s += plain_s
            request.gained_s = SPEEDUP_MEMORY * request.gained_s + num_tokens * self._plain_step_s
            request.spent_s = SPEEDUP_MEMORY * request.spent_s + now_s - request.committed_s
        request.committed_s = now_s

    def learn(self) -> None:
        """Count what was committed, and learn from it: may be late, so the engine does it while the workers compute."""
        for lesson in self._lessons:
            self._count(lesson)
            if lesson.num_verified and lesson.source is Source.EDGE:
                self._learn_verified(lesson)
            self._learn_unverified(lesson)
        self._lessons.clear()

    def _count(self, lesson: _Lesson) -> None:
        request, done = lesson.request, lesson.done
        self._add(request, "committed_tokens", len(lesson.decided))
        self._add(request, "ahead_tokens", lesson.num_ahead)
        self._add(request, "steps", 1)
        self._add(request, "discarded_mismatch", done.pruned)
        self._add(request, "tree_hits", done.is_hit)
        self._add(request, "round_trips_saved", lesson.is_saved)
        if not lesson.num_verified:
            return
        kind = lesson.source.value
        self._add(request, f"{kind}verified_tokens", lesson.num_verified)
        self._add(request, f"{kind}accepted_tokens", lesson.num_accepted)
        self.counters[f"{kind}verified_drafts"] += 1
        if lesson.source is Source.NGRAM:
            self.lookups.accepted(lesson.num_accepted)

    def _learn_verified(self, lesson: _Lesson) -> None:
        """Where all was accepted, the token behind shows how right the next one was that was not verified.

        Else what lies deeper than what is verified would never be seen, and stay out for ever once it seemed poor.
        """
        num_verified, num_accepted = lesson.num_verified, lesson.num_accepted
        if num_accepted < num_verified:
            lesson.record.hit.observe(float(lesson.done.is_hit))
        draft, decided = lesson.draft[: num_verified + 1], lesson.decided
        is_all = num_accepted == num_verified < len(draft)
        if is_all and list(draft[:num_verified]) == list(decided[:num_verified]):
            lesson.acceptance.observe(_num_equal(draft, decided), num_verified + 1)
        else:
            lesson.acceptance.observe(num_accepted, num_verified)

    def _learn_unverified(self, lesson: _Lesson) -> None:
        """What was there and not verified shows how right it was too: so that it can pay again."""
        decided, request = lesson.decided, lesson.request
        others = (
            (lesson.suggestion, request.ngram_acceptance),
            (lesson.predicted, request.prediction_acceptance),
        )
        for said, acceptance in others:
            if said:
                acceptance.observe(_num_equal(said, decided), min(len(said), len(decided)))
        if not lesson.num_verified or lesson.source is not Source.EDGE:
            draft = lesson.draft[: len(decided)]
            lesson.acceptance.observe(_num_equal(draft, decided), len(draft))

    def suggest(self, request_id: str, tokens: Sequence[int]) -> None:
        """vLLM's own n-gram draft for what follows the request's tokens as they are now; forgotten with its commit."""
        request = self._requests.get(request_id)
        if request is not None:
            request.suggestion = tuple(tokens)

    def predict(self, request_id: str, tokens: Sequence[int]) -> None:
        """What a request's user foretold of its answer; may come while it is being answered. Nothing: it was no use."""
        request = self._requests.get(request_id)
        if request is None:
            return
        if not tokens or any(not 0 <= token < self._vocab_size for token in tokens):
            self.counters["refused_predictions"] += 1
            return
        request.prediction = Prediction(tokens)
        request.prediction.advance(request.tokens[request.num_prompt : request.tree.length])
        request.prediction_acceptance = Acceptance(self._prediction_acceptance)
        self.predicted.add(request_id)

    def _walk(self, request: _Request, decided: Sequence[int]) -> Sequence[int]:
        """A predicted answer has grown; what had been foretold instead."""
        assert request.prediction is not None
        foretold = request.prediction.draft(max(self._max_draft, len(decided)))
        request.prediction.advance(decided)
        return foretold

    def close(self, request_id: str) -> list[Frame]:
        """A request finished or was aborted."""
        self.learn()
        self.predicted.discard(request_id)
        request = self._requests.pop(request_id, None)
        if request is None:
            return []
        if not self._requests:
            self._last_end_s = None  # the time until the next request is nobody's
        del self._ids[request.number]
        self.counters["closed_requests"] += 1
        self._add(request, "discarded_unused", request.tree.num_nodes)
        report = Report(request.number, request_values(request.counters))
        return [report, *self._closing(request)] if request.is_open else []

    def _closing(self, request: _Request) -> list[Frame]:
        was_open, request.is_open, request.is_assigned = request.is_open, False, False
        return [Close(request.number, CloseReason.FINISHED)] if was_open else []

    def stepped(self, step: Step) -> None:
        """A step is done; what it decided is told by `commit`, next."""
        self.learn()
        self._note_step(step)
        self.counters["engine_steps"] += 1
        took_s = step.ended_s - step.started_s
        self.counters["engine_step_us"] += int(took_s * 1e6)
        self.cost.observe(step.requests, step.tokens, step.context, took_s, step.prefilled, step.is_verifying)
        self._gained_s *= SPEEDUP_MEMORY
        self._spent_s *= SPEEDUP_MEMORY
        since_s = self._last_end_s if self._last_end_s is not None else step.started_s
        self._last_end_s = step.ended_s
        self._plain_step_s = 0.0
        if not step.prefilled and self._num_rows:
            self._spent_s += step.ended_s - since_s
            self.counters["decode_us"] += int((step.ended_s - since_s) * 1e6)
            self.counters["plain_decode_us"] = int(self._plain_s * 1e6)
            self._plain_step_s = self.cost(self._num_rows, self._num_rows, self._row_context)

    def _note_step(self, step: Step) -> None:
        """What the step before came to is known now."""
        verified, accepted = (
            sum(self.counters[f"{source.value}{what}_tokens"] for source in Source) for what in ("verified", "accepted")
        )
        if self._last_step is not None:
            last, verified_before, accepted_before = self._last_step
            took_s = last.ended_s - last.started_s
            counts = (last.requests, verified - verified_before, accepted - accepted_before)
            self.groups.append(Group(last.ended_s, took_s, *counts))
        self._last_step = (step, verified, accepted)

    def plan(self, rows: Iterable[Row], now_s: float, load: Load = NOTHING_ELSE) -> Plan:
        """What each row does next: verify a draft, wait for one, or decode plainly."""
        self._opened_tokens = 0
        drafts: dict[str, Sequence[int]] = {}
        candidates = []
        for row in rows:
            request = self._requests.get(row.request_id)
            if request is None:
                continue
            candidates.append(self._candidate(row, request, drafts, now_s))
        load = replace(load, probe=self._probe())
        self._num_rows, self._row_context = len(candidates) + load.num_others, load.context
        decision = decide(candidates, load, self.cost, self.speedup, self._limits, now_s)
        plan = Plan(holds=decision.holds, wait_until_s=decision.wait_until_s)
        plan.drafts = {key: list(drafts[key][:length]) for key, length in decision.lengths.items()}
        if plan.wait_until_s is None:
            self._note_verified(bool(drafts), bool(plan.drafts))
        for candidate in candidates:
            request = self._requests[candidate.key]
            is_left_out = candidate.key not in plan.drafts or request.source is not Source.EDGE
            request.is_refused = is_left_out and request.tree.num_ahead > 0
            self._note(request, candidate, candidate.key in plan.holds, now_s)
        return plan

    def _note_verified(self, has_drafts: bool, is_verifying: bool) -> None:
        self._num_verifying = self._num_verifying + 1 if is_verifying else 0
        if is_verifying:
            if self._num_refused >= self._probe_after:  # this was a probe
                self._probe_after = min(PROBE_AFTER, 2 * self._probe_after)
            self._num_refused = 0
        elif has_drafts:
            self._num_refused += 1

    def _probe(self) -> Probe:
        if self._num_refused >= self._probe_after:
            return Probe.FORCED if self._num_refused >= FORCED_AFTER * self._probe_after else Probe.VERIFY
        return Probe.PLAIN if self._num_verifying >= PLAIN_PROBE_AFTER else Probe.NONE

    def _candidate(self, row: Row, request: _Request, drafts: dict[str, Sequence[int]], now_s: float) -> Candidate:
        """What could be verified for a request (its tokens go to `drafts`), or else what is expected for it."""
        limit = min(row.limit, self._max_draft)
        request.source = Source.EDGE
        survivals: Sequence[float] = ()
        if limit > 0:
            draft, survivals = self._best(request, limit)
            if draft:
                drafts[row.request_id] = draft
        expected = None
        if limit > 0 and (request.source is not Source.EDGE or not survivals):
            expected = self._awaited(request, limit)
        return Candidate(
            key=row.request_id,
            order=request.number,
            since_s=request.committed_s,
            priority=row.priority,
            survivals=survivals,
            awaited=expected,
            pace=request.gained_s / request.spent_s if request.spent_s > 0.0 else 1.0,
            waited_s=now_s - request.held_since_s if request.held_since_s is not None else 0.0,
        )

    def _best(self, request: _Request, limit: int) -> tuple[Sequence[int], Sequence[float]]:
        """The draft of which most is expected to be accepted, whose ever it is, and its survivals."""
        draft: Sequence[int] = request.tree.chain(limit)
        survivals = request.acceptance.survivals(len(draft))
        if request.suggestion:
            suggested = request.ngram_acceptance.survivals(min(limit, len(request.suggestion)))
            if sum(suggested) > sum(survivals):
                request.source, draft, survivals = Source.NGRAM, request.suggestion, suggested
        if request.prediction is not None:
            foretold = request.prediction.draft(limit)
            predicted = request.prediction_acceptance.survivals(len(foretold))
            if sum(predicted) > sum(survivals):
                request.source, draft, survivals = Source.PREDICTION, foretold, predicted
        return draft, survivals

    def _awaited(self, request: _Request, limit: int) -> Awaited | None:
        can_answer = request.is_assigned and request.has_answered and not request.has_passed
        if not can_answer or self._limits.mode not in HOLDING_MODES:
            return None
        emptied_s = request.emptied_s.get(request.tree.length)
        if emptied_s is None:
            return None  # nothing was published for an edge to answer
        return awaited(request.record, request.acceptance, emptied_s, limit, self._limits)

    def _note(self, request: _Request, candidate: Candidate, is_held: bool, now_s: float) -> None:
        """Whether a request begins to wait for its draft, or has waited in vain."""
        if is_held and request.held_since_s is None:
            request.held_since_s = now_s
        if candidate.survivals and request.source is Source.EDGE:
            return  # the draft is there
        if is_held and candidate.awaited is not None:
            self.counters["holds"] += not request.is_awaited
            request.is_awaited = True
        elif request.is_awaited and not is_held:
            request.is_awaited = False
            emptied_s = request.emptied_s.get(request.tree.length, now_s)
            late_s = self._limits.hold_limit_s
            if self._limits.mode != "wait":
                late_s = min(late_s, request.record.late_after_s)
            if now_s >= emptied_s + late_s:  # else something else ended the wait
                self.counters["missed_holds"] += 1
                request.record.missed()


def _num_equal(draft: Sequence[int], decided: Sequence[int]) -> int:
    """How many first tokens of a draft are right."""
    pairs = zip(draft, decided, strict=False)
    return next((i for i, pair in enumerate(pairs) if pair[0] != pair[1]), min(len(draft), len(decided)))
