"""The frames about requests between an engine and its gateway. Pure: frames in, frames out.

Rule 1: a frame of the gateway may be late, wrong or hostile: it is checked, dropped and counted, and never raises.
Rule 2: nothing is published while no edge could use it, and seldom while drafts are not verified.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence

from vllm_specedge.engine.learning import learn_answer, learn_from_late
from vllm_specedge.engine.proposal_tree import Fate, Insertion, ProposalTree
from vllm_specedge.engine.requests import Acceptances, Assignment, DraftedRequest
from vllm_specedge.policy.acceptance import Acceptance
from vllm_specedge.policy.edge_record import EdgeRecord
from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.engine_frames import Assign, Edges, EngineOpen, EngineWelcome, Report
from vllm_specedge.wire.frames import MAX_UINT32, Bye, Close, CloseReason, Propose, commits
from vllm_specedge.wire.telemetry import request_values

_DISCARDED = {
    Fate.LATE: "discarded_late",
    Fate.MISMATCH: "discarded_mismatch",
    Fate.GAP: "discarded_gap",
    Fate.FULL: "discarded_over_budget",
}
MAX_OPENED_TOKENS = 16_384
"""Approximate limit of tokens of requests opened in one step: the engine's thread encodes them."""
MAX_RECORDS = 4096
"""Maximum edge records kept, those assigned last."""


class RequestLedger:
    """The live requests of one engine, and what its gateway knows of them."""

    def __init__(
        self, vocab_size: int, max_draft: int, counters: Counter[str], acceptance_of: Callable[[EdgeRecord], Acceptance]
    ) -> None:
        """`acceptance_of`: the prior for the acceptance of an edge's drafts for a newly assigned request."""
        self.num_edges = 0
        self.vocab_size = vocab_size
        self.acceptances = Acceptances()
        """The acceptance of all drafts here: the prior for an edge without a record."""
        self._max_draft = max_draft
        self._acceptance_of = acceptance_of
        self._counters = counters
        self._requests: dict[str, DraftedRequest] = {}
        self._ids: dict[int, str] = {}
        self._next_number = 0
        self._opened_tokens = 0
        self._records: OrderedDict[int, EdgeRecord] = OrderedDict()

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[DraftedRequest]:
        return iter(self._requests.values())

    @property
    def drafted_share(self) -> float:
        """Share of the live requests that have an edge; 0 if there are none."""
        num_drafted = sum(request.edge is not None for request in self._requests.values())
        return num_drafted / len(self._requests) if self._requests else 0.0

    def find(self, request_id: str) -> DraftedRequest | None:
        """The request with this id, if it may get drafts and has not ended."""
        return self._requests.get(request_id)

    # -- from the gateway ------------------------------------------------------------------------------------------

    def receive(self, frame: Frame, now_s: float) -> list[Frame]:
        match frame:
            case Propose():
                self._propose(frame, now_s)
            case Assign():
                request = self._numbered(frame.request)
                if request is not None and self.num_edges:
                    return self._assign(request, frame.edge, now_s)
            case Edges():
                return self._edges(frame.num_edges)
            case EngineWelcome() | Bye():
                self._lost_gateway()  # a new gateway knows nothing: its next Edges frame opens all again
            case _:
                self._counters["unexpected_frames"] += 1
        return []

    def _numbered(self, number: int) -> DraftedRequest | None:
        return self._requests.get(self._ids.get(number, ""))

    def _assign(self, request: DraftedRequest, edge: int, now_s: float) -> list[Frame]:
        if not edge:
            request.edge = None
            return []
        record = self._records.setdefault(edge, EdgeRecord(Acceptance(self.acceptances.edge)))
        self._records.move_to_end(edge)
        if len(self._records) > MAX_RECORDS:
            self._records.popitem(last=False)
        request.edge = Assignment(record)
        request.acceptances.edge = self._acceptance_of(record)
        return self.publish(request, now_s) if request.num_published is not None else []

    def _lost_gateway(self) -> None:
        """Forget all edges: none is waited for, and nothing is published."""
        self.num_edges = 0
        self._records.clear()  # a new gateway numbers its edges from the start
        for request in self._requests.values():
            request.edge = request.num_published = None
            _drop_drafts(request)

    def _edges(self, num_edges: int) -> list[Frame]:
        self.num_edges = num_edges
        if num_edges:
            return []  # each request is opened with its next commit
        # Without edges the gateway is not told when requests end, so all are closed there now.
        frames: list[Frame] = []
        for request in self._requests.values():
            frames += self._closing(request)
            _drop_drafts(request)
        return frames

    def _propose(self, frame: Propose, now_s: float) -> None:
        request = self._numbered(frame.request)
        if request is None or not self.num_edges:
            self._counters["dropped_closed"] += 1
            return
        if any(token >= self.vocab_size for token in frame.tokens):
            self._counters["dropped_token_id"] += 1
            return
        if not frame.tokens:
            if request.edge is not None and frame.base == request.tree.length:
                request.edge.passed_at = frame.base
            return
        self._insert(request, frame.base, frame.runs, now_s)

    def _insert(
        self, request: DraftedRequest, past: int, runs: Sequence[tuple[int, Sequence[int]]], now_s: float
    ) -> None:
        """Insert a proposal. Its first token, at `past`, is a known one and shows which context the draft follows."""
        base, trunk = past + 1, runs[0][1]
        if request.edge is not None and base in request.edge.emptied_s and request.tokens[past] == trunk[0]:
            learn_from_late(request, base, trunk[1:])
        insertions = request.tree.insert(runs, request.tokens)
        self._counters[f"proposals_{insertions[0].fate.value}"] += 1
        for (_, tokens), done in zip(runs, insertions, strict=True):
            _count_insertion(request, len(tokens), done, is_trunk=tokens is trunk)
        if insertions[0].fate not in (Fate.MISMATCH, Fate.GAP):
            learn_answer(request, base, len(trunk) - 1, now_s)

    # -- to the gateway --------------------------------------------------------------------------------------------

    def open(self, request_id: str, tokens: Sequence[int], session: str, sampling: tuple[int, ...] = ()) -> list[Frame]:
        number = self._next_number
        self._next_number = (number + 1) & MAX_UINT32
        tree, acceptances = ProposalTree(len(tokens)), self.acceptances.of_request()
        request = DraftedRequest(number, tokens, session, len(tokens), tree, self._counters, acceptances)
        request.sampling = sampling
        self._requests[request_id] = request
        self._ids[number] = request_id
        self._counters["opened_requests"] += 1
        return self._opening(request) if self.num_edges else []

    def begin_step(self) -> None:
        """Reset the limit on opened tokens for another step."""
        self._opened_tokens = 0

    def _opening(self, request: DraftedRequest) -> list[Frame]:
        """Open with all tokens so far; nothing if the step's limit of opened tokens is reached."""
        if self._opened_tokens >= MAX_OPENED_TOKENS:
            return []
        tokens = list(request.tokens)
        self._opened_tokens += len(tokens)
        request.num_published = len(tokens)
        opening = EngineOpen(request.number, len(tokens), self._max_draft, request.session, request.sampling)
        return [opening, *commits(request.number, 0, tokens)]

    def publish(self, request: DraftedRequest, now_s: float) -> list[Frame]:
        """The decided tokens that are not published yet, if the request has an edge for which they are due."""
        if not self.num_edges:
            return []
        if request.num_published is None:
            return self._opening(request)
        edge, base, length = request.edge, request.num_published, request.tree.length
        if edge is None or base == length:
            return []
        if not edge.coalescing.is_due:
            self._counters["collected_commits"] += 1
            return []
        edge.coalescing.published()
        request.num_published = length
        if not request.tree.num_ahead:
            edge.told_without_draft(length, now_s)
        return list(commits(request.number, base, request.tokens[base:length]))

    def close(self, request_id: str) -> list[Frame]:
        request = self._requests.pop(request_id, None)
        if request is None:
            return []
        del self._ids[request.number]
        self._counters["closed_requests"] += 1
        _drop_drafts(request)
        report = Report(request.number, request_values(request.counters))
        return [report, *closing] if (closing := self._closing(request)) else []

    def _closing(self, request: DraftedRequest) -> list[Frame]:
        was_open, request.num_published, request.edge = request.num_published is not None, None, None
        return [Close(request.number, CloseReason.FINISHED)] if was_open else []


def _drop_drafts(request: DraftedRequest) -> None:
    request.count("discarded_unused", request.tree.num_nodes)
    request.tree.clear()


def _count_insertion(request: DraftedRequest, num_tokens: int, done: Insertion, is_trunk: bool) -> None:
    """Count the tokens of a run by outcome. The known token in front of a trunk is no draft token, and not counted."""
    late, repeated, discarded = done.late, done.repeated, done.discarded
    if is_trunk and late:
        late -= 1
    elif is_trunk and repeated:
        repeated -= 1
    elif is_trunk:
        discarded -= 1
    request.count("proposed_tokens", num_tokens - is_trunk)
    request.count("repeated_tokens", repeated)
    request.count("discarded_late", late)
    if discarded:
        request.count(_DISCARDED[done.fate], discarded)
