"""The options, the plan and the outcome of a step for each request. Pure."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple

from vllm_specedge.engine.requests import DraftedRequest, Source
from vllm_specedge.policy.holding import awaited
from vllm_specedge.policy.situation import HOLDING_MODES, Awaited, Candidate, HoldLimits


class Row(NamedTuple):
    """A running request that could decode in the next step, with room for `limit` draft tokens: in the request, in the
    model's context and, if the cache is nearly full, in the blocks that the request already has."""

    request_id: str
    limit: int
    priority: int = 0
    """vLLM's priority: smaller is more important."""
    num_in_flight: int = 0
    """Minimum tokens that a running step decides: only draft tokens after these are useful."""


class Choice(NamedTuple):
    """The options for a request in the next step."""

    request: DraftedRequest
    candidate: Candidate
    draft: Sequence[int]
    source: Source
    """The source of the draft."""
    has_edge_draft: bool
    """Whether its edge has a draft for it, which may be a different one."""


@dataclass(slots=True)
class StepPlan:
    """The plan of the next step: drafts to verify, and until when to hold requests. Others decode plainly."""

    drafts: dict[str, list[int]] = field(default_factory=dict)
    holds: dict[str, float] = field(default_factory=dict)
    wait_until_s: float | None = None
    """If set, all wait until this time at most, unless something arrives."""
    made_s: float = field(default=0.0, compare=False)
    num_rows: int = field(default=0, compare=False)
    """Requests that could decode."""
    context: int = field(default=0, compare=False)
    """Cached tokens of these."""
    choices: dict[str, Choice] = field(default_factory=dict, compare=False)
    """Options by request id, for `start` and `end`."""
    is_measured: bool = field(default=True, compare=False)
    """Whether the step's time teaches its cost: `num_rows` and `context` are known."""
    has_gap: bool = field(default=False, compare=False)
    """Whether an asynchronous engine waits for the outcome before it begins another step."""

    @property
    def is_plain(self) -> bool:
        """Whether nothing is verified and no request waits."""
        return not self.drafts and not self.holds

    def undrafted(self) -> "StepPlan":
        """The same step with nothing verified and no request waiting."""
        return replace(self, drafts={}, holds={}, wait_until_s=None)

    def verdict(self, request_id: str) -> tuple[Source, bool]:
        """The source of a request's verified draft, if any, and whether its edge has a draft that is left out."""
        choice = self.choices.get(request_id)
        if choice is None:
            return Source.EDGE, False
        is_left_out = choice.source is not Source.EDGE or request_id not in self.drafts
        return choice.source, is_left_out and choice.has_edge_draft


class StepOutcome(NamedTuple):
    """The outcome of a step. The views of its requests' tokens have grown by the decided ones."""

    num_tokens: Mapping[str, int]
    """Tokens computed for each request: of its prompt, or when it decodes, one and its draft."""
    num_verified: Mapping[str, int] = MappingProxyType({})
    """Number of draft tokens among them, for requests that have any."""
    over: Collection[str] = ()
    """Requests that finished or were aborted in this step."""

    @property
    def num_prefilled(self) -> int:
        """Prompt tokens among those computed: a decoding request has one token and its draft."""
        if sum(self.num_tokens.values()) == len(self.num_tokens) + sum(self.num_verified.values()):
            return 0
        verified = self.num_verified.get
        return sum(num_tokens for id_, num_tokens in self.num_tokens.items() if num_tokens != 1 + verified(id_, 0))


UNMEASURED = StepPlan(is_measured=False)
"""The plan of a step without drafts from whose time nothing is to be learnt."""


class Step(NamedTuple):
    """Start and end of a step. If they are equal, it was not timed, and nothing is learned about its cost."""

    started_s: float
    ended_s: float


def choose(row: Row, request: DraftedRequest, max_draft: int, limits: HoldLimits, now_s: float) -> Choice:
    """The draft that could be verified for a request, or else the draft that is expected for it."""
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
        return None  # nothing was published that an edge could answer
    return awaited(edge.record, request.acceptances.edge, emptied_s, limit, limits)


def _best_draft(request: DraftedRequest, limit: int) -> tuple[Sequence[int], Sequence[float], Source]:
    """The draft with the most expected accepted tokens, its survivals, and its source."""
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
