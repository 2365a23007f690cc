"""How many tokens of answers a second an engine can make at most and meet its targets, by its own cost model. Pure.

In a steady state each step gives a token, or with drafts some, to each of n requests; n / answer of them end in it, and
as many prompts are computed. The more requests, the more tokens a second, and the longer a step: until it takes as long
as the shortest target allows, or the cache, the slots or a step's tokens are used up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from vllm_specedge.policy.step_cost import StepCost


@dataclass(frozen=True, slots=True)
class Mix:
    """What requests are like on average."""

    prompt_tokens: float
    answer_tokens: float

    @property
    def prompt_per_token(self) -> float:
        """Tokens of prompts that are computed for each token of an answer."""
        return self.prompt_tokens / self.answer_tokens


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What an engine takes at a time."""

    slots: int
    """Requests that can run at once."""
    step_tokens: int
    cache_tokens: float = inf
    step_s: float = inf
    """The shortest target for the time from one token to the next."""


@dataclass(frozen=True, slots=True)
class EdgeDrafts:
    """What edges bring."""

    share: float
    """Of the requests that run, those that an edge drafts for."""
    survivals: Sequence[float]
    """Of the first tokens of a draft, the chance that the target says it and all before it (`Acceptance.survivals`)."""


NO_DRAFTS = EdgeDrafts(0.0, ())


def capacity_tokens_per_s(cost: StepCost, mix: Mix, limits: EngineLimits, drafts: EdgeDrafts = NO_DRAFTS) -> float:
    """0 before anything is known of steps."""
    most = min(
        limits.slots,
        limits.cache_tokens / (mix.prompt_tokens + mix.answer_tokens),
        limits.step_tokens / (1.0 + mix.prompt_per_token),
    )
    return max(_rate(cost, mix, limits, drafts, requests) for requests in _sizes(max(1, int(most))))


def _sizes(most: int) -> Sequence[int]:
    """Numbers of requests that are tried: each an eighth more, about. Around the best one the rate is flat."""
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(min(most, max(sizes[-1] + 1, round(1.125 * sizes[-1]))))
    return sizes


def _rate(cost: StepCost, mix: Mix, limits: EngineLimits, drafts: EdgeDrafts, requests: int) -> float:
    """Tokens a second of so many requests at a time; 0 if that breaks the target. One request is never too many: where
    even it does, the engine does what it can."""
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
