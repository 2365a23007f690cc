"""The drafting state of a request in the engine, and the edge that it is assigned to. Pure."""

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
    """The source of a draft; the value is the prefix of its counters' names."""

    EDGE = ""
    NGRAM = "ngram_"
    PREDICTION = "prediction_"


@dataclass(slots=True)
class Acceptances:
    """Acceptance of drafts by source."""

    edge: Acceptance = field(default_factory=Acceptance)
    ngram: Acceptance = field(default_factory=Acceptance)
    prediction: Acceptance = field(default_factory=Acceptance)

    def of_request(self) -> "Acceptances":
        """The acceptances of a new request, which have these as priors and update them."""
        return Acceptances(Acceptance(self.edge), Acceptance(self.ngram), Acceptance(self.prediction))


@dataclass(slots=True)
class Assignment:
    """The assignment of a request to its edge."""

    record: EdgeRecord
    """The edge's record over all its requests."""
    coalescing: Coalescing = field(default_factory=Coalescing)
    has_answered: bool = False
    """Whether it has proposed something for this request."""
    passed_at: int | None = None
    """Length of the request for which the edge last reported that it has no draft."""
    awaited_at: int | None = None
    """Length at which the request was last held for the edge's draft; no proposal by the end of the hold is a miss."""
    emptied_s: dict[int, float] = field(default_factory=dict)
    """For the last few lengths without a draft that wait for an answer, the time at which they were published."""

    def told_without_draft(self, length: int, now_s: float) -> None:
        """Record that a length without a draft was published: the edge has to answer it."""
        self.emptied_s[length] = now_s
        if len(self.emptied_s) > _MAX_EMPTIED:
            del self.emptied_s[next(iter(self.emptied_s))]


@dataclass(slots=True)
class DraftedRequest:
    """A request that may get drafts."""

    number: int
    """Its number on the wire."""
    tokens: Sequence[int]
    """All its tokens, prompt first: a live view that grows with the request."""
    session: str
    num_prompt: int
    tree: ProposalTree
    totals: Counter[str]
    acceptances: Acceptances
    sampling: tuple[int, ...] = field(default=(), repr=False)
    """Its sampling parameters as sent to edges."""
    edge: Assignment | None = None
    num_published: int | None = None
    """Number of tokens sent to the gateway; None: it does not know the request."""
    committed_s: float = 0.0
    """Time at which its last token was decided."""
    held_since_s: float | None = None
    """Time at which it was first left out of a step at its present length."""
    suggestion: tuple[int, ...] = ()
    """The draft of vLLM's own n-gram lookup for its present length."""
    prediction: Prediction | None = None
    """Its predicted output."""
    gained_s: float = 0.0
    """Seconds that its last tokens would have taken without drafts; old ones count less."""
    spent_s: float = 0.0
    """Seconds that these tokens took."""
    counters: Counter[str] = field(default_factory=Counter)
    """Its own counters, with the names of telemetry.REQUEST_COUNTERS."""

    def count(self, name: str, number: int) -> None:
        """Count for the request and in total."""
        if number:
            self.counters[name] += number
            self.totals[name] += number

    @property
    def is_without_drafts(self) -> bool:
        """Whether there is no draft from an edge, a lookup or a prediction."""
        return not self.tree.num_nodes and not self.suggestion and self.prediction is None

    @property
    def speedup(self) -> float:
        """Recent speed of its tokens, relative to their speed without drafts."""
        return self.gained_s / self.spent_s if self.spent_s > 0.0 else 1.0
