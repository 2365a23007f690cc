"""The counters of an engine, per request and in total: names and meanings, in the order on the wire. Pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from vllm_specedge.wire.engine_frames import Capacity, Groups, StepTimes
from vllm_specedge.wire.frames import MAX_UINT32

REQUEST_COUNTERS = (
    ("steps", "Decode steps of requests, with or without a draft."),
    ("committed_tokens", "Tokens chosen by the target."),
    ("proposed_tokens", "Draft tokens that reached the engine."),
    ("repeated_tokens", "Draft tokens that were already in the tree."),
    ("discarded_late", "Draft tokens dropped because their position was already decided."),
    ("discarded_mismatch", "Draft tokens dropped because they contradicted what the target chose."),
    ("discarded_gap", "Draft tokens dropped because they continue something the engine does not have."),
    ("discarded_over_budget", "Draft tokens dropped because the request's tree was full."),
    ("discarded_unused", "Draft tokens left in the tree when their request ended or the last edge left."),
    ("verified_tokens", "Draft tokens of edges that the target verified."),
    ("accepted_tokens", "Draft tokens of edges that the target accepted."),
    ("ngram_verified_tokens", "Tokens of vLLM's own n-gram lookup that the target verified."),
    ("ngram_accepted_tokens", "Tokens of vLLM's own n-gram lookup that the target accepted."),
    ("prediction_verified_tokens", "Tokens of users' predicted outputs that the target verified."),
    ("prediction_accepted_tokens", "Tokens of users' predicted outputs that the target accepted."),
    ("tree_hits", "Rejections after which a branch of the tree held the next draft."),
    ("round_trips_saved", "Steps whose next draft was already in the tree when they ended."),
    ("ahead_tokens", "Draft tokens in the trunk when a step began, summed over steps."),
)
"""The counters that an engine reports for one request, in this order."""
VERIFIED, ACCEPTED = map([name for name, _ in REQUEST_COUNTERS].index, ("verified_tokens", "accepted_tokens"))
"""Indices of these two counters."""

ENGINE_COUNTERS = (
    *REQUEST_COUNTERS,
    ("verified_drafts", "Drafts of edges that the target verified."),
    ("ngram_verified_drafts", "Drafts of vLLM's own n-gram lookup that the target verified."),
    ("prediction_verified_drafts", "Drafts from users' predicted outputs that the target verified."),
    ("proposals_kept", "Proposals kept in a proposal tree."),
    ("proposals_late", "Proposals for positions that were already decided."),
    ("proposals_mismatch", "Proposals that contradicted what was decided meanwhile."),
    ("proposals_gap", "Proposals that continue something the engine does not have."),
    ("proposals_full", "Proposals cut because the request's tree was full."),
    ("engine_steps", "Steps of the engine."),
    ("engine_step_us", "Microseconds that these took, in total."),
    ("decode_us", "Microseconds from the end of one step to that of the next, for steps that prefilled no prompt."),
    ("plain_decode_us", "Estimated microseconds that the tokens of these steps would take without drafts."),
    ("holds", "Times a request was held for its draft."),
    ("missed_holds", "Holds that ended without a draft."),
    ("wakes", "Times a draft woke a parked engine."),
    ("wake_us", "Microseconds from a draft's arrival until the parked engine looked at it, in total."),
    ("dropped_closed", "Proposals for requests that had ended."),
    ("dropped_token_id", "Proposals with a token id outside of the vocabulary."),
    ("unexpected_frames", "Frames that a gateway should not send."),
    ("opened_requests", "Requests for which the engine created a proposal tree."),
    ("closed_requests", "Requests whose proposal tree was dropped: equal to opened_requests once all have ended."),
    ("refused_predictions", "Predicted outputs that were ignored: no text, no token ids, or too many at a time."),
    ("collected_commits", "Commits sent to edges together with later ones, since their drafts were not verified."),
    ("waited_steps", "Steps that an otherwise asynchronous engine ran synchronously."),
)
"""The counters that an engine reports in Stats, in this order: those of requests over all requests, then others."""


DEMAND_COUNTERS = (
    ("offered_requests", "Requests that arrived, admitted or refused."),
    ("admitted_requests", "Requests that engines admitted."),
    ("refused_requests", "Requests that were refused because of latency targets."),
    ("deferred_requests", "Requests that waited for a tenth of a second or more before an engine began with them."),
    ("offered_tokens", "Answer tokens of offered requests, estimated by the recent mean answer of their class."),
    ("admitted_tokens", "Answer tokens of admitted requests, estimated likewise."),
    ("refused_tokens", "Answer tokens of refused requests, estimated likewise."),
    ("deferred_tokens", "Answer tokens of deferred requests, estimated likewise."),
)
"""The counters that an engine reports in Demand, for each class of requests, in this order."""

WRAP = 2**32
"""Counters in Stats and Demand are modulo this."""


def engine_values(counters: Counter[str], table: Sequence[tuple[str, str]] = ENGINE_COUNTERS) -> tuple[int, ...]:
    return tuple(counters[name] % WRAP for name, _ in table)


class CountedSince:
    """An engine's counters without the counts that were reported before the present gateway welcomed it.

    So a gateway can add them to its sums, whichever side reconnects, and nothing is lost if an engine rejoins the same
    gateway. The first gateway gets all counts, since an engine may serve before it finds a gateway.
    """

    def __init__(self, table: Sequence[tuple[str, str]] = ENGINE_COUNTERS) -> None:
        self._table = table
        self._before: Counter[str] = Counter()
        self._reported: Counter[str] = Counter()
        self._num_welcomes = 1

    def values(self, counters: Counter[str], num_welcomes: int) -> tuple[int, ...]:
        """The values for Stats. `num_welcomes`: how many times the engine was welcomed so far, by any gateway."""
        if num_welcomes > self._num_welcomes:
            self._before, self._num_welcomes = self._reported, num_welcomes
        self._reported = Counter(counters)
        since = Counter({name: counters[name] - self._before[name] for name, _ in self._table})
        return engine_values(since, self._table)


@dataclass(frozen=True, slots=True)
class Group:
    """One step of the engine, for display."""

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
    """The steps in a frame that has just arrived; an incomplete step is left out."""
    values = frame.values
    rows = (values[at : at + 5] for at in range(0, len(values) - 4, 5))
    return [Group(now_s - ago / 1e6, took / 1e6, *counts) for ago, took, *counts in rows]


def step_times(curve_s: Sequence[float], *others_s: float) -> StepTimes:
    """The StepTimes frame with the step times that the engine has learnt (`StepCost.parts_s`)."""
    return StepTimes(tuple(_whole(seconds * 1e6) for seconds in curve_s), *(_whole(each * 1e9) for each in others_s))


def capacity_frame(with_edges: float, without_edges: float, start_s: float) -> Capacity:
    """The Capacity frame for capacities in tokens per second and a start-up time in seconds."""
    return Capacity(_whole(1e3 * with_edges), _whole(1e3 * without_edges), _whole(1e3 * start_s))


def _whole(number: float) -> int:
    return min(max(0, round(number)), MAX_UINT32)


def request_values(counters: Counter[str]) -> tuple[int, ...]:
    """A request's counters for Report, capped at 2**32 - 1: they need not wrap, as no rates are computed from them."""
    return tuple(min(counters[name], MAX_UINT32) for name, _ in REQUEST_COUNTERS)
