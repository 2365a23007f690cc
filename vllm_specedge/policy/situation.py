"""The inputs of a decision about a step: requests that could decode, other work, costs, and the operator's limits."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from vllm_specedge.policy.probing import Probe
from vllm_specedge.policy.step_cost import StepCost

MODES = ("auto", "wait", "never-wait", "budget")
"""In order: hold and verify what pays; hold every request until its draft is there and verify all of it (as in the
paper); never hold, and verify all; never hold, and verify what pays."""
HOLDING_MODES, BUDGET_MODES = ("auto", "wait"), ("auto", "budget")
CAUTION = 1.15
"""Factor on the time of verification. Much of its work is outside of steps (in the gateway, in edges on a shared
machine), and of many estimates the best ones are the luckiest. With it, drafts that just about pay are left out, which
loses little; without it, these make a server slower."""
FAST = 2.0
"""Speedup over a plain step that justifies longer pauses between chunks."""


@dataclass(frozen=True, slots=True)
class HoldLimits:
    """The operator's limits. `hold_limit_s` 0 never holds; `mode` is one of MODES."""

    hold_limit_s: float = 0.1
    mode: str = "auto"
    max_misses: int = 2
    """Consecutive late answers after which the server does not wait for an edge until it is in time again."""
    max_slowdown: float = 1.15
    """Limit on how many times slower a request's tokens may come because of drafts, its own or others'."""
    max_stretch: float = 1.5
    """Limit on a step, the wait before it included, as a multiple of the step without drafts, unless it makes tokens
    come FAST times as fast."""


class Awaited(NamedTuple):
    """The draft expected for a request that has none."""

    arrives_s: float
    late_s: float
    """From this time on the server does not wait for it any more."""
    survivals: Sequence[float]
    """Survivals of its tokens, as in Candidate."""
    kept: float
    """Probability that it is still useful if the request decodes a token before it arrives."""
    punctual: float
    """Probability that it arrives before `late_s`."""


class Candidate(NamedTuple):
    """A running request that could decode in the next step."""

    key: str
    order: int
    """Age order: older requests have smaller numbers."""
    since_s: float
    """Time at which its last token was decided."""
    priority: int = 0
    """vLLM's priority: smaller is more important."""
    survivals: Sequence[float] = ()
    """For each token of its present draft, the probability that the target chooses it and all before it."""
    awaited: Awaited | None = None
    speedup: float = 1.0
    """Recent speed of its tokens, relative to their speed without drafts."""
    waited_s: float = 0.0
    """Seconds for which it was held since `since_s`."""


@dataclass(frozen=True, slots=True)
class Load:
    """The rest of the engine's work."""

    context: int = 0
    """Cached tokens of the requests that could decode."""
    num_others: int = 0
    """Further requests, which decode plainly in any case."""
    prefill: int = 0
    """Prompt tokens that this step prefills."""
    is_pressed: bool = False
    """Whether requests wait to be admitted; then none is held."""
    room: int = 1 << 30
    """Tokens that fit into a step."""
    probe: Probe = Probe.NONE
    is_synchronous: bool = False
    """Whether an asynchronous engine runs this step synchronously in any case, so that it includes the gap."""
    step_limit_s: float = inf
    """The shortest target for inter-token latency among the requests that could decode."""


@dataclass(frozen=True, slots=True)
class Situation:
    """All inputs of the decision about the next step."""

    rows: Sequence[Candidate]
    """Candidates by importance, then age; their order decides nothing else."""
    load: Load
    cost: StepCost
    speedup: float
    """Recent tokens per second, relative to plain steps of the same size."""
    limits: HoldLimits
    now_s: float

    @property
    def num_rows(self) -> int:
        """Requests that could decode."""
        return len(self.rows) + self.load.num_others

    def plain_s(self, requests: int, tokens: int, prefilled: int = 0) -> float:
        """Seconds of a step that verifies nothing; 0 before any step was measured."""
        plain_s = self.cost(requests, tokens, self.load.context, prefilled)
        return plain_s + self.cost.gap_s if plain_s and self.load.is_synchronous else plain_s

    @property
    def verifying_s(self) -> float:
        """Seconds that the step is longer because something is verified, however little."""
        verifying_s = self.cost.verifying_s(self.num_rows)
        return verifying_s if self.load.is_synchronous else verifying_s + self.cost.gap_s

    def longest_s(self, rows: Sequence[Candidate], step_s: float) -> float:
        """Limit of a step that takes `step_s` without drafts, for the sake of these rows, which have no draft in it.

        Others' drafts in a step slow a request that has none. A request whose recent drafts were right still gets its
        tokens sooner; the others must get theirs no later than `max_slowdown` allows.
        """
        slowest = 1.0 if self.load.num_others else max(1.0, min((row.speedup for row in rows), default=inf))
        return min(step_s * self.limits.max_slowdown * slowest, self.load.step_limit_s)


def cautious(growth_s: float) -> float:
    """A step's growth by drafts, multiplied by CAUTION; negative growth stays as it is."""
    return growth_s * CAUTION if growth_s > 0.0 else growth_s
