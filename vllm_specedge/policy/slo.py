"""Targets for latency, and whether one more request would break them. Pure.

Rule: speculation is shed first (a step is never made longer than the shortest target of those in it), then requests
are refused at the front, before they cost anything: so that those admitted meet their targets under any load.
"""

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, inf, log
from types import MappingProxyType

from vllm_specedge.policy.step_cost import StepCost

DEFAULT_CLASS = "default"
"""Of the requests that have no class of their own."""
MAX_CLASSES = 16
"""This one included: they are labels of metrics."""

MAX_BLOCKED = 0.5
"""Of the more important requests so many may find no place because of less important ones."""
MAX_RESERVED = 64


@dataclass(frozen=True, slots=True)
class Target:
    """What a class of requests is to get; inf: no target."""

    ttft_s: float = inf
    itl_s: float = inf


@dataclass(frozen=True, slots=True)
class Targets:
    """Each class's target, by vLLM's priority."""

    by_priority: Mapping[int, Target] = field(default_factory=dict)
    default: Target = Target()

    def of(self, priority: int) -> Target:
        return self.by_priority.get(priority, self.default)

    def without(self, priorities: Collection[int]) -> "Targets":
        """The same without those of these priorities; without the default's where one of them has none of its own."""
        kept = {each: Target() if each in priorities else target for each, target in self.by_priority.items()}
        return Targets(kept, self.default if set(priorities) <= kept.keys() else Target())

    @property
    def priorities(self) -> list[int]:
        """The priorities that have a target of their own."""
        return sorted(self.by_priority)


@dataclass(frozen=True, slots=True)
class Queue:
    """What an engine has to do."""

    running: Sequence[int]
    """The priorities of the requests that run."""
    waiting: Sequence[tuple[int, int]]
    """Priority and prompt tokens of those that do not."""
    context: int
    """Tokens in the caches of those that run."""
    slots: int
    """Requests that can run at once."""
    room: int
    """Tokens that fit into a step."""
    finished_per_s: float
    """Requests that ended per second, of late."""
    is_by_priority: bool
    """The more important are admitted first, else who came first."""
    prompt_per_token: float = 0.0
    """Tokens of prompts that are computed for each token of an answer, of late: steps have them beside."""
    lately: frozenset[int] = frozenset()
    """The priorities of requests that came of late, admitted or not: more of them are expected."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """For one more request that came now."""

    ttft_s: float
    itl_s: float


def forecast(queue: Queue, priority: int, num_tokens: int, cost: StepCost) -> Forecast:
    """What a request with a prompt of so many tokens would get, without speculation."""
    ahead = [tokens for other, tokens in queue.waiting if other <= priority or not queue.is_by_priority]
    num_running, num_left = len(queue.running), sum(ahead) + num_tokens
    room = max(1, queue.room - num_running)
    full_s = cost(num_running + 1, num_running + room, queue.context, room)
    rest = num_left % room
    rest_s = cost(num_running + 1, num_running + rest, queue.context, rest) if rest else 0.0
    ttft_s = num_left // room * full_s + rest_s
    num_too_many = num_running + len(ahead) + 1 - queue.slots
    if num_too_many > 0:
        ttft_s += num_too_many / queue.finished_per_s if queue.finished_per_s > 0.0 else 0.0
    num_then = min(queue.slots, num_running + len(queue.waiting) + 1)
    context = queue.context + sum(tokens for _, tokens in queue.waiting) + num_tokens
    prefilled = min(room, round(num_then * queue.prompt_per_token))
    return Forecast(ttft_s, cost(num_then, num_then + prefilled, context, prefilled))


def is_admitted(queue: Queue, priority: int, num_tokens: int, targets: Targets, cost: StepCost) -> bool:
    """Whether one more request would get what its class is to get, and leave the others what theirs are to get."""
    expected = forecast(queue, priority, num_tokens, cost)
    target = targets.of(priority)
    others = {*queue.running, *(other for other, _ in queue.waiting), *queue.lately}
    itl_s = min([target.itl_s, *(targets.of(other).itl_s for other in others)])
    return expected.ttft_s <= target.ttft_s and expected.itl_s <= itl_s


def num_admissible(
    queue: Queue, priority: int, num_tokens: int, targets: Targets, cost: StepCost, limit: int = 64
) -> int:
    """How many requests of this class, each with a prompt of so many tokens, could come now, up to a limit."""

    def is_full(num_more: int) -> bool:
        more = replace(queue, waiting=[*queue.waiting, *[(priority, num_tokens)] * num_more])
        return not is_admitted(more, priority, num_tokens, targets, cost)

    return bisect_left(range(limit), True, key=is_full)


def num_reserved(offered_per_s: float, freed_per_s: float) -> int:
    """How many places a less important class leaves free for more important requests that come at this rate, where
    places become free at the other (trunk reservation): with r of them about ratio ** r of these find none."""
    if offered_per_s <= 0.0 or freed_per_s <= 0.0:
        return 0
    ratio = min(offered_per_s / freed_per_s, 1.0)
    return MAX_RESERVED if ratio >= 1.0 else min(MAX_RESERVED, ceil(log(MAX_BLOCKED) / log(ratio)))


def unserved(
    queue: Queue, classes: Mapping[str, int], num_tokens: int, targets: Targets, cost: StepCost
) -> frozenset[str]:
    """The classes, of these priorities, whose targets this engine could not meet with nothing else to do. Whatever they
    ask for, they are nothing to the others."""
    idle = replace(queue, running=[], waiting=[], context=0, lately=frozenset())
    return frozenset(
        name for name, priority in classes.items() if not is_admitted(idle, priority, num_tokens, targets, cost)
    )


def rooms(
    queue: Queue,
    classes: Mapping[str, int],
    num_tokens: int,
    targets: Targets,
    cost: StepCost,
    offered_per_s: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, int]:
    """By class, of these priorities: how many requests with a prompt of so many tokens could come now. `offered_per_s`:
    by class, requests that come, admitted or not."""
    never = unserved(queue, classes, num_tokens, targets, cost)
    found, ahead_per_s = dict.fromkeys(never, 0), 0.0
    targets = targets.without({classes[name] for name in never})
    for name in sorted(classes.keys() - never, key=classes.__getitem__):
        room = num_admissible(queue, classes[name], num_tokens, targets, cost)
        found[name] = max(0, room - num_reserved(ahead_per_s, queue.finished_per_s))
        ahead_per_s += offered_per_s.get(name, 0.0)
    return found


def retry_after_s(queue: Queue) -> int:
    """When it may be worth another try: when about a tenth of those that run have ended, 1 to 30 seconds."""
    if queue.finished_per_s <= 0.0:
        return 1
    return ceil(min(30.0, max(1.0, len(queue.running) / 10 / queue.finished_per_s)))
