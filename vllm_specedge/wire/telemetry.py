"""What an engine counts, of each request and in all: names and meanings, in the order in which they travel. Pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from vllm_specedge.wire.engine_frames import Capacity, Groups, StepTimes
from vllm_specedge.wire.frames import MAX_UINT32

REQUEST_COUNTERS = (
    ("steps", "Decode steps of requests, with a draft or without."),
    ("committed_tokens", "Tokens chosen by the target."),
    ("proposed_tokens", "Draft tokens that reached the engine."),
    ("repeated_tokens", "Draft tokens that said again what stood in the tree already."),
    ("discarded_late", "Draft tokens dropped because their position was decided already."),
    ("discarded_mismatch", "Draft tokens dropped because they contradicted what the target chose."),
    ("discarded_gap", "Draft tokens dropped because they continue something the engine does not have."),
    ("discarded_over_budget", "Draft tokens dropped because the request's tree was full."),
    ("discarded_unused", "Draft tokens left in the tree when their request ended."),
    ("verified_tokens", "Draft tokens of edges that the target verified."),
    ("accepted_tokens", "Draft tokens of edges that the target accepted."),
    ("ngram_verified_tokens", "Tokens of vLLM's own n-gram lookup that the target verified."),
    ("ngram_accepted_tokens", "Tokens of vLLM's own n-gram lookup that the target accepted."),
    ("prediction_verified_tokens", "Tokens of users' predicted outputs that the target verified."),
    ("prediction_accepted_tokens", "Tokens of users' predicted outputs that the target accepted."),
    ("tree_hits", "Rejections after which a branch of the tree held the next draft."),
    ("round_trips_saved", "Steps whose next draft was in the tree already when they ended."),
    ("ahead_tokens", "Draft tokens in the trunk when a step began, summed over steps."),
)
"""What an engine reports of one request, in this order."""
VERIFIED, ACCEPTED = map([name for name, _ in REQUEST_COUNTERS].index, ("verified_tokens", "accepted_tokens"))
"""Where these are among them."""

ENGINE_COUNTERS = (
    *REQUEST_COUNTERS,
    ("verified_drafts", "Drafts of edges that the target verified."),
    ("ngram_verified_drafts", "Drafts of vLLM's own n-gram lookup that the target verified."),
    ("prediction_verified_drafts", "Drafts out of users' predicted outputs that the target verified."),
    ("proposals_kept", "Proposals kept in a proposal tree."),
    ("proposals_late", "Proposals for positions that were decided already."),
    ("proposals_mismatch", "Proposals that contradicted what was decided meanwhile."),
    ("proposals_gap", "Proposals that continue something the engine does not have."),
    ("proposals_full", "Proposals cut because the request's tree was full."),
    ("engine_steps", "Steps of the engine."),
    ("engine_step_us", "Microseconds that these took, in total."),
    ("decode_us", "Microseconds from the end of one step to that of the next, where no prompt was computed."),
    ("plain_decode_us", "Microseconds that the tokens of these steps are thought to take without drafts."),
    ("holds", "Times a request was held for its draft."),
    ("missed_holds", "Holds that ended without a draft."),
    ("wakes", "Times a draft woke a parked engine."),
    ("wake_us", "Microseconds from a draft's arrival to the parked engine's looking at it, in total."),
    ("dropped_closed", "Proposals for requests that were over."),
    ("dropped_token_id", "Proposals with a token id outside of the vocabulary."),
    ("unexpected_frames", "Frames a gateway should not send."),
    ("opened_requests", "Requests that the engine began to keep a proposal tree for."),
    ("closed_requests", "Requests whose proposal tree was given up: as many, once all are over."),
    ("refused_predictions", "Predicted outputs that were left out: no text, no token ids, or too many at a time."),
    ("collected_commits", "Commits that edges heard of with later ones, since their drafts were not verified."),
    ("waited_steps", "Steps whose outcome an engine waited for that schedules asynchronously otherwise."),
)
"""What an engine reports in Stats, in this order: the same over all requests, and what is counted only in total."""


DEMAND_COUNTERS = (
    ("offered_requests", "Requests that came, admitted or refused."),
    ("admitted_requests", "Requests that engines took in."),
    ("refused_requests", "Requests that were refused because of latency targets."),
    ("deferred_requests", "Requests that waited for a tenth of a second or more before an engine began with them."),
    ("offered_tokens", "Tokens of answers that these ask for, by what answers of their class have of late."),
    ("admitted_tokens", "Tokens of answers that admitted requests ask for, likewise."),
    ("refused_tokens", "Tokens of answers that refused requests asked for, likewise."),
    ("deferred_tokens", "Tokens of answers that deferred requests ask for, likewise."),
)
"""What an engine reports in Demand, for each class of requests, in this order."""

WRAP = 2**32
"""Where counters in Stats and Demand begin again at 0."""


def engine_values(counters: Counter[str], table: Sequence[tuple[str, str]] = ENGINE_COUNTERS) -> tuple[int, ...]:
    return tuple(counters[name] % WRAP for name, _ in table)


class CountedSince:
    """What a gateway is told of an engine's counters: what no report said before it welcomed the engine.

    So a gateway adds what it hears to its sums, whoever comes back to whom, and nothing is lost when an engine joins
    the same one anew. The first is told everything, since an engine may serve before it finds a gateway.
    """

    def __init__(self, table: Sequence[tuple[str, str]] = ENGINE_COUNTERS) -> None:
        self._table = table
        self._before: Counter[str] = Counter()
        self._reported: Counter[str] = Counter()
        self._num_welcomes = 1

    def values(self, counters: Counter[str], num_welcomes: int) -> tuple[int, ...]:
        """As Stats carries them. `num_welcomes`: so many times the engine was welcomed by now, by whichever gateway."""
        if num_welcomes > self._num_welcomes:
            self._before, self._num_welcomes = self._reported, num_welcomes
        self._reported = Counter(counters)
        since = Counter({name: counters[name] - self._before[name] for name, _ in self._table})
        return engine_values(since, self._table)


@dataclass(frozen=True, slots=True)
class Group:
    """One step of the engine, as people look at it."""

    ended_s: float
    took_s: float
    requests: int
    verified: int
    accepted: int


def groups_frame(groups: Sequence[Group], now_s: float) -> Groups:
    values = (
        (_whole(1e6 * (now_s - each.ended_s)), _whole(1e6 * each.took_s), each.requests, each.verified, each.accepted)
        for each in groups
    )
    return Groups(tuple(chain.from_iterable(values)))


def groups_of(frame: Groups, now_s: float) -> list[Group]:
    """The steps of a frame that has just come; what is no whole step is left out."""
    values = frame.values
    rows = (values[at : at + 5] for at in range(0, len(values) - 4, 5))
    return [Group(now_s - ago / 1e6, took / 1e6, *counts) for ago, took, *counts in rows]


def step_times(curve_s: Sequence[float], *others_s: float) -> StepTimes:
    """What the engine has learnt its steps to take (`StepCost.parts_s`), as StepTimes carries it."""
    return StepTimes(tuple(_whole(seconds * 1e6) for seconds in curve_s), *(_whole(each * 1e9) for each in others_s))


def capacity_frame(with_edges: float, without_edges: float, start_s: float) -> Capacity:
    """Tokens a second, and seconds, as Capacity carries them."""
    return Capacity(_whole(1e3 * with_edges), _whole(1e3 * without_edges), _whole(1e3 * start_s))


def _whole(number: float) -> int:
    return min(max(0, round(number)), MAX_UINT32)


def request_values(counters: Counter[str]) -> tuple[int, ...]:
    """A request's counters as Report carries them; they stop at 2**32 - 1, since no rate is taken of them."""
    return tuple(min(counters[name], MAX_UINT32) for name, _ in REQUEST_COUNTERS)
