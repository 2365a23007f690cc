"""A request as the engine's drafting sees it, and the edge that it is assigned to. Pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from vllm_specedge.engine.predicted_output import Prediction
from vllm_specedge.engine.proposal_tree import ProposalTree
from vllm_specedge.policy.acceptance import Acceptance
from vllm_specedge.policy.coalescing import Coalescing
from vllm_specedge.policy.edge_record import EdgeRecord

_MAX_EMPTIED = 32


class Source(Enum):
    """Whose draft a step verifies; the value is what its counters' names begin with."""

    EDGE = ""
    NGRAM = "ngram_"
    PREDICTION = "prediction_"


@dataclass(slots=True)
class Acceptances:
    """How often drafts are right, by whose they are."""

    edge: Acceptance = field(default_factory=Acceptance)
    ngram: Acceptance = field(default_factory=Acceptance)
    prediction: Acceptance = field(default_factory=Acceptance)

    def of_request(self) -> "Acceptances":
        """Those of a new request, which begin with these and teach them."""
        return Acceptances(Acceptance(self.edge), Acceptance(self.ngram), Acceptance(self.prediction))


@dataclass(slots=True)
class Assignment:
    """The edge that drafts for a request, since the request was given to it."""

    record: EdgeRecord
    """How the edge does, over all its requests."""
    coalescing: Coalescing = field(default_factory=Coalescing)
    has_answered: bool = False
    """It has proposed something for this request."""
    passed_at: int | None = None
    """The length of the request for which the edge last said that it has nothing."""
    awaited_at: int | None = None
    """The length at which the request was last held for a draft of it; no proposal by the end of that is a miss."""
    emptied_s: dict[int, float] = field(default_factory=dict)
    """When the edge was told a length for which there was no draft: the last few lengths that wait for an answer."""

    def told_without_draft(self, length: int, now_s: float) -> None:
        """The edge has to answer from now on."""
        self.emptied_s[length] = now_s
        if len(self.emptied_s) > _MAX_EMPTIED:
            del self.emptied_s[next(iter(self.emptied_s))]


@dataclass(slots=True)
class DraftedRequest:
    """A request that may get drafts."""

    number: int
    """Its name on the wire."""
    tokens: Sequence[int]
    """All its tokens, prompt first: a live view that grows with the request."""
    session: str
    num_prompt: int
    tree: ProposalTree
    totals: Counter[str]
    acceptances: Acceptances
    sampling: tuple[int, ...] = field(default=(), repr=False)
    """How it is sampled, as edges are told."""
    edge: Assignment | None = None
    num_published: int | None = None
    """Tokens that the gateway knows; None: it does not know the request."""
    committed_s: float = 0.0
    """When its last token was decided."""
    held_since_s: float | None = None
    """When it was first left out of a step at its present length."""
    suggestion: tuple[int, ...] = ()
    """What vLLM's own n-gram lookup found for its present length."""
    prediction: Prediction | None = None
    """What its user predicted of the answer."""
    gained_s: float = 0.0
    """Seconds that its last tokens would have taken without drafts; old ones count less."""
    spent_s: float = 0.0
    """Seconds that these tokens took."""
    counters: Counter[str] = field(default_factory=Counter)
    """Its own, in the names of telemetry.REQUEST_COUNTERS."""

    def count(self, name: str, number: int) -> None:
        """Count for the request and in total."""
        if number:
            self.counters[name] += number
            self.totals[name] += number

    @property
    def is_without_drafts(self) -> bool:
        """Nothing was proposed, found or predicted for what comes next."""
        return not self.tree.num_nodes and not self.suggestion and self.prediction is None

    @property
    def speedup(self) -> float:
        """How fast its tokens come of late, over how fast they would come without drafts."""
        return self.gained_s / self.spent_s if self.spent_s > 0.0 else 1.0
