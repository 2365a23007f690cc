"""What a step is decided from: who could decode, what else is to do, what it costs and what an operator allows."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from vllm_specedge.policy.probing import Probe
from vllm_specedge.policy.step_cost import StepCost

MODES = ("auto", "wait", "never-wait", "budget")
"""All that pays; hold every request until its draft is there and verify all of it (the paper's way); never hold, and
verify all; never hold, and verify what pays."""
HOLDING_MODES, BUDGET_MODES = ("auto", "wait"), ("auto", "budget")
CAUTION = 1.15
"""What verifying takes counts as so many times as long: much of the work around it is done in no step (the gateway's,
the edges' on a shared machine), and of many estimates the best ones are the luckiest. Where drafts just about pay, they
then are left out, and what is lost by that is small; without it that is where a server gets slower."""
FAST = 2.0
"""So many times the tokens per second of a plain step make up for chunks that come after longer pauses."""


@dataclass(frozen=True, slots=True)
class HoldLimits:
    """What an operator sets. `hold_limit_s` 0 never holds; `mode` is one of MODES."""

    hold_limit_s: float = 0.1
    mode: str = "auto"
    max_misses: int = 2
    """After so many late answers in a row an edge is not waited for until it is in time again."""
    max_slowdown: float = 1.15
    """Nobody's tokens may come slower by more than this because of drafts, its own or others'."""
    max_stretch: float = 1.5
    """No step may take more than so many times what it takes without drafts, the wait before it included, unless it
    gives tokens FAST times as fast."""


@dataclass(frozen=True, slots=True)
class Awaited:
    """A draft that is expected for a request that has none."""

    arrives_s: float
    late_s: float
    """Then it is not waited for any more."""
    survivals: Sequence[float]
    """Of its tokens, as Candidate has them."""
    kept: float
    """The chance that it is of use although the request goes on by a token before it comes."""
    punctual: float
    """The chance that it comes before `late_s`."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A running request that could decode in the next step."""

    key: str
    order: int
    """Older ones have smaller numbers."""
    since_s: float
    """When its last token was decided."""
    priority: int = 0
    """As vLLM's: smaller is more important."""
    survivals: Sequence[float] = ()
    """Of the draft that is there: for each token the chance that the target says it and all before it."""
    awaited: Awaited | None = None
    speedup: float = 1.0
    """How fast its tokens come of late, over how fast they would come without drafts."""
    waited_s: float = 0.0
    """So long it was held since then."""


@dataclass(frozen=True, slots=True)
class Load:
    """What else there is to do for the engine."""

    context: int = 0
    """Tokens in the caches of the requests that could decode."""
    num_others: int = 0
    """Requests that decode plainly in any case, beside the candidates."""
    prefill: int = 0
    """Tokens of prompts that this step computes."""
    is_pressed: bool = False
    """Requests wait to be admitted: nobody is held."""
    room: int = 1 << 30
    """Tokens that fit into a step."""
    probe: Probe = Probe.NONE
    is_synchronous: bool = False
    """The step's outcome is waited for whatever it verifies, on an engine that could do without: the gap is in it."""
    step_limit_s: float = inf
    """The shortest target for inter-token latency among the requests that could decode."""


@dataclass(frozen=True, slots=True)
class Situation:
    """All that the next step is decided from."""

    rows: Sequence[Candidate]
    """By importance, then age: their order decides nothing else."""
    load: Load
    cost: StepCost
    speedup: float
    """Tokens per second of late, over those of plain steps of the same size."""
    limits: HoldLimits
    now_s: float

    @property
    def num_rows(self) -> int:
        """Requests that could decode."""
        return len(self.rows) + self.load.num_others

    def plain_s(self, requests: int, tokens: int, prefilled: int = 0) -> float:
        """Seconds of a step that verifies nothing; 0 before anything is known."""
        plain_s = self.cost(requests, tokens, self.load.context, prefilled)
        return plain_s + self.cost.gap_s if plain_s and self.load.is_synchronous else plain_s

    @property
    def verifying_s(self) -> float:
        """How much longer the step takes because something is verified, however little."""
        verifying_s = self.cost.verifying_s(self.num_rows)
        return verifying_s if self.load.is_synchronous else verifying_s + self.cost.gap_s

    def longest_s(self, rows: Sequence[Candidate], step_s: float) -> float:
        """How long a step may take, which takes `step_s` without drafts, for these rows, which have none in it.

        A step that is longer by others' drafts slows a request that has none. One whose drafts were right of late has
        its tokens sooner all the same; the others are to have theirs no later than `max_slowdown` allows.
        """
        slowest = 1.0 if self.load.num_others else max(1.0, min((row.speedup for row in rows), default=inf))
        return min(step_s * self.limits.max_slowdown * slowest, self.load.step_limit_s)


def cautious(growth_s: float) -> float:
    """What drafts are thought to make a step longer by; what is gained by one that becomes shorter is left as it is."""
    return growth_s * CAUTION if growth_s > 0.0 else growth_s
