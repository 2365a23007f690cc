"""What a step may do for each request, what it is to do, and what it did. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from vllm_specedge.engine.requests import DraftedRequest, Source
from vllm_specedge.policy.holding import awaited
from vllm_specedge.policy.situation import HOLDING_MODES, Awaited, Candidate, HoldLimits


@dataclass(frozen=True, slots=True)
class Row:
    """A running request that could decode in the next step, with room for `limit` draft tokens: in the request, in the
    model's context and, where the cache is nearly full, in the blocks that the request has already."""

    request_id: str
    limit: int
    priority: int = 0
    """As vLLM's: smaller is more important."""
    num_in_flight: int = 0
    """Tokens that a step under way decides, at least: what follows them is all that a draft is of use for."""


class Choice(NamedTuple):
    """What could be done for a request in the next step."""

    request: DraftedRequest
    candidate: Candidate
    draft: Sequence[int]
    source: Source
    """Whose draft it is."""
    has_edge_draft: bool
    """Its edge has a draft for it, which may be another one."""


@dataclass(slots=True)
class StepPlan:
    """For the next step: drafts to verify, and until when to hold others. A request in neither decodes plainly."""

    drafts: dict[str, list[int]] = field(default_factory=dict)
    holds: dict[str, float] = field(default_factory=dict)
    wait_until_s: float | None = None
    """All wait, this long at most: nobody is to run before something arrives."""
    made_s: float = field(default=0.0, compare=False)
    num_rows: int = field(default=0, compare=False)
    """Requests that could decode."""
    context: int = field(default=0, compare=False)
    """Tokens that these have in the cache."""
    choices: dict[str, Choice] = field(default_factory=dict, compare=False)
    """By request id; for `start` and `end`."""
    has_gap: bool = field(default=False, compare=False)
    """The engine waits for the outcome before it begins another step, and need not."""

    @property
    def is_plain(self) -> bool:
        """Nothing is verified, and nobody waits."""
        return not self.drafts and not self.holds

    def undrafted(self) -> "StepPlan":
        """The same step, in which nothing is verified and nobody waits."""
        return replace(self, drafts={}, holds={}, wait_until_s=None)

    def verdict(self, request_id: str) -> tuple[Source, bool]:
        """Whose draft a request verifies, if it verifies one, and whether its edge has one that is left unverified."""
        choice = self.choices.get(request_id)
        if choice is None:
            return Source.EDGE, False
        is_left_out = choice.source is not Source.EDGE or request_id not in self.drafts
        return choice.source, is_left_out and choice.has_edge_draft


class RequestOutcome(NamedTuple):
    """What a step did for one request; its view of tokens has grown by what was decided."""

    request_id: str
    num_tokens: int = 1
    """Computed for it: of its prompt or, where it decodes, one and its draft."""
    num_verified: int = 0
    """Draft tokens among them."""
    is_over: bool = False
    """It finished, or was aborted, in this step."""


class Step(NamedTuple):
    """When a step began and ended; if that is the same, it was not timed, and nothing is learned of what it cost."""

    started_s: float
    ended_s: float


def choose(row: Row, request: DraftedRequest, max_draft: int, limits: HoldLimits, now_s: float) -> Choice:
    """What could be verified for a request, or else what is expected for it."""
    limit = min(row.limit, max_draft)
    passed = row.num_in_flight
    draft: Sequence[int] = ()
    survivals: Sequence[float] = ()
    source, expected = Source.EDGE, None
    if limit > 0:
        draft, survivals, source = _best_draft(request, limit + passed)
        draft, survivals = draft[passed:], survivals[passed:]
        if source is not Source.EDGE or not draft:
            expected = _awaited(request, limit, limits)
    candidate = Candidate(
        key=row.request_id,
        order=request.number,
        since_s=request.committed_s,
        priority=row.priority,
        survivals=survivals,
        awaited=expected,
        speedup=request.speedup,
        waited_s=now_s - request.held_since_s if request.held_since_s is not None else 0.0,
    )
    return Choice(request, candidate, draft, source, request.tree.num_ahead > 0)


def _awaited(request: DraftedRequest, limit: int, limits: HoldLimits) -> Awaited | None:
    edge, length = request.edge, request.tree.length
    if edge is None or not edge.has_answered or edge.passed_at == length or limits.mode not in HOLDING_MODES:
        return None
    emptied_s = edge.emptied_s.get(length)
    if emptied_s is None:
        return None  # nothing was published for an edge to answer
    return awaited(edge.record, request.acceptances.edge, emptied_s, limit, limits)


def _best_draft(request: DraftedRequest, limit: int) -> tuple[Sequence[int], Sequence[float], Source]:
    """The draft of which most is expected to be accepted, its survivals, and whose it is."""
    draft: Sequence[int] = request.tree.chain(limit)
    survivals, source = request.acceptances.edge.survivals(len(draft)), Source.EDGE
    if request.suggestion:
        suggested = request.acceptances.ngram.survivals(min(limit, len(request.suggestion)))
        if sum(suggested) > sum(survivals):
            draft, survivals, source = request.suggestion, suggested, Source.NGRAM
    if request.prediction is not None:
        prediction = request.prediction.draft(limit)
        predicted = request.acceptances.prediction.survivals(len(prediction))
        if sum(predicted) > sum(survivals):
            draft, survivals, source = prediction, predicted, Source.PREDICTION
    return draft, survivals, source
