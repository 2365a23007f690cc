"""The capacity of an engine: the most answer tokens per second within its targets, by its own cost model. Pure.

In a steady state each step gives each of n requests one token, or several with drafts. n / answer of them end in a
step, and as many prompts are prefilled. More requests mean more tokens per second and longer steps, up to the shortest
target, or until the cache, the slots or the tokens of a step are used up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from vllm_specedge.policy.step_cost import StepCost


@dataclass(frozen=True, slots=True)
class Mix:
    """The mean sizes of requests."""

    prompt_tokens: float
    answer_tokens: float

    @property
    def prompt_per_token(self) -> float:
        """Prompt tokens to prefill for each answer token."""
        return self.prompt_tokens / self.answer_tokens


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """The limits of an engine."""

    slots: int
    """Maximum running requests."""
    step_tokens: int
    cache_tokens: float = inf
    step_s: float = inf
    """The shortest target for the time from one token to the next."""


@dataclass(frozen=True, slots=True)
class EdgeDrafts:
    """The drafts of edges."""

    share: float
    """Share of the running requests that have an edge."""
    survivals: Sequence[float]
    """For each token of a draft, the probability that it and all before it are right (`Acceptance.survivals`)."""


NO_DRAFTS = EdgeDrafts(0.0, ())


def capacity_tokens_per_s(cost: StepCost, mix: Mix, limits: EngineLimits, drafts: EdgeDrafts = NO_DRAFTS) -> float:
    """Answer tokens per second; 0 before any step was measured."""
    most = min(
        limits.slots,
        limits.cache_tokens / (mix.prompt_tokens + mix.answer_tokens),
        limits.step_tokens / (1.0 + mix.prompt_per_token),
    )
    return max(_rate(cost, mix, limits, drafts, requests) for requests in _sizes(max(1, int(most))))


def _sizes(most: int) -> Sequence[int]:
    """Numbers of requests to try, growing by about an eighth: around the best one the rate is flat."""
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(min(most, max(sizes[-1] + 1, round(1.125 * sizes[-1]))))
    return sizes


def _rate(cost: StepCost, mix: Mix, limits: EngineLimits, drafts: EdgeDrafts, requests: int) -> float:
    """Tokens per second with this many concurrent requests; 0 if that breaks the target. One request is always
    allowed: if even one breaks the target, the engine does what it can."""
    context = round(requests * (mix.prompt_tokens + mix.answer_tokens / 2))
    best, num_drafted = 0.0, drafts.share * requests
    for length in range(len(drafts.survivals) + 1):
        num_verified = round(length * num_drafted)
        tokens_made = requests + num_drafted * sum(drafts.survivals[:length])
        prefilled = round(tokens_made * mix.prompt_per_token)
        step_s = cost(requests, requests + num_verified + prefilled, context, prefilled)
        if num_verified:
            step_s += cost.verifying_s(requests)
        if step_s > 0.0 and (step_s <= limits.step_s or (requests == 1 and not length)):
            best = max(best, tokens_made / step_s)
    return best
