"""Latency targets, and whether one more request would break them. Pure.

Rule: speculation is shed first (a step never becomes longer than the shortest target of its requests), then requests
are refused in the API server, before they cost anything. So admitted requests meet their targets under any load.
"""

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, inf, log
from types import MappingProxyType

from vllm_specedge.policy.step_cost import StepCost

DEFAULT_CLASS = "default"
"""The class of requests without a class of their own."""
MAX_CLASSES = 16
"""Maximum classes, the default included: they are metric labels."""

STALE_S = 2.0
"""An engine's report that is older does not count: an idle engine reports nothing."""
ON_THE_WAY_S = 0.05
"""Requests admitted this shortly before an engine took requests in may not have reached it by then, and are counted
beside its report."""

MAX_BLOCKED = 0.5
"""Maximum share of the more important requests that may find no place because of less important ones."""
MAX_RESERVED = 64


@dataclass(frozen=True, slots=True)
class Target:
    """The targets of a class of requests; inf: no target."""

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
        """The same without the targets of these priorities, and without the default if one of them uses it."""
        kept = {each: Target() if each in priorities else target for each, target in self.by_priority.items()}
        return Targets(kept, self.default if set(priorities) <= kept.keys() else Target())

    @property
    def priorities(self) -> list[int]:
        """The priorities with their own target."""
        return sorted(self.by_priority)


@dataclass(frozen=True, slots=True)
class Queue:
    """The work of an engine."""

    running: Sequence[int]
    """Priorities of the running requests."""
    waiting: Sequence[tuple[int, int]]
    """Priority and prompt tokens of each waiting request."""
    context: int
    """Cached tokens of the running requests."""
    slots: int
    """Maximum running requests."""
    room: int
    """Maximum tokens of a step."""
    finished_per_s: float
    """Recent rate of requests that ended, per second."""
    is_by_priority: bool
    """Whether waiting requests start by priority, else in order of arrival."""
    prompt_per_token: float = 0.0
    """Recent number of prompt tokens to prefill per answer token; steps include them."""
    lately: frozenset[int] = frozenset()
    """Priorities of recent requests, admitted or not: more of them are expected."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Expected latencies of one more request that arrives now."""

    ttft_s: float
    itl_s: float


def forecast(queue: Queue, priority: int, num_tokens: int, cost: StepCost) -> Forecast:
    """The latencies that a request with `num_tokens` prompt tokens would get, without speculation."""
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
    """Whether one more request would meet its class's target without breaking the others' targets."""
    expected = forecast(queue, priority, num_tokens, cost)
    target = targets.of(priority)
    others = {*queue.running, *(other for other, _ in queue.waiting), *queue.lately}
    itl_s = min([target.itl_s, *(targets.of(other).itl_s for other in others)])
    return expected.ttft_s <= target.ttft_s and expected.itl_s <= itl_s


def num_admissible(
    queue: Queue, priority: int, num_tokens: int, targets: Targets, cost: StepCost, limit: int = 64
) -> int:
    """How many requests of this class, with `num_tokens` prompt tokens each, could be admitted now, up to a limit."""

    def is_full(num_more: int) -> bool:
        more = replace(queue, waiting=[*queue.waiting, *[(priority, num_tokens)] * num_more])
        return not is_admitted(more, priority, num_tokens, targets, cost)

    return bisect_left(range(limit), True, key=is_full)


def num_reserved(offered_per_s: float, freed_per_s: float) -> int:
    """How many places a less important class leaves free for more important requests (trunk reservation).

    These arrive at `offered_per_s`, and places become free at `freed_per_s`: with r reserved places, about ratio ** r
    of them find none.
    """
    if offered_per_s <= 0.0 or freed_per_s <= 0.0:
        return 0
    ratio = min(offered_per_s / freed_per_s, 1.0)
    return MAX_RESERVED if ratio >= 1.0 else min(MAX_RESERVED, ceil(log(MAX_BLOCKED) / log(ratio)))


def unserved(
    queue: Queue, classes: Mapping[str, int], num_tokens: int, targets: Targets, cost: StepCost
) -> frozenset[str]:
    """The classes (names with priorities) whose targets this engine could not meet even when idle. They do not limit
    the other classes."""
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
    """By class (names with priorities), how many requests with `num_tokens` prompt tokens could be admitted now.
    `offered_per_s`: arriving requests by class, admitted or not."""
    never = unserved(queue, classes, num_tokens, targets, cost)
    found, ahead_per_s = dict.fromkeys(never, 0), 0.0
    targets = targets.without({classes[name] for name in never})
    for name in sorted(classes.keys() - never, key=classes.__getitem__):
        room = num_admissible(queue, classes[name], num_tokens, targets, cost)
        found[name] = max(0, room - num_reserved(ahead_per_s, queue.finished_per_s))
        ahead_per_s += offered_per_s.get(name, 0.0)
    return found


def retry_after_s(queue: Queue) -> int:
    """Seconds until a retry may be worthwhile: when about a tenth of the running requests have ended, 1 to 30."""
    if queue.finished_per_s <= 0.0:
        return 1
    return ceil(min(30.0, max(1.0, len(queue.running) / 10 / queue.finished_per_s)))
