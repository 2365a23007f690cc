"""What an engine counts, of each request and in all: names and meanings, in the order in which they travel. Pure."""

from collections import Counter

from vllm_specedge.frames import MAX_UINT32, StepTimes
from vllm_specedge.stepcost import StepCost

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
    ("tree_hits", "Rejections after which a branch of the tree held the next draft."),
    ("round_trips_saved", "Steps whose next draft was in the tree already when they ended."),
    ("ahead_tokens", "Draft tokens in the trunk when a step began, summed over steps."),
)
"""What an engine reports of one request, in this order."""

ENGINE_COUNTERS = (
    *REQUEST_COUNTERS,
    ("verified_drafts", "Drafts of edges that the target verified."),
    ("proposals_kept", "Proposals kept in a proposal tree."),
    ("proposals_late", "Proposals for positions that were decided already."),
    ("proposals_mismatch", "Proposals that contradicted what was decided meanwhile."),
    ("proposals_gap", "Proposals that continue something the engine does not have."),
    ("proposals_full", "Proposals cut because the request's tree was full."),
    ("engine_steps", "Steps of the engine."),
    ("engine_step_us", "Microseconds that these took, in total."),
    ("holds", "Times a request was held for its draft."),
    ("missed_holds", "Holds that ended without a draft."),
    ("wakes", "Times a draft woke a parked engine."),
    ("wake_us", "Microseconds from a draft's arrival to the parked engine's looking at it, in total."),
    ("dropped_closed", "Proposals for requests that were over."),
    ("dropped_token_id", "Proposals with a token id outside of the vocabulary."),
    ("unexpected_frames", "Frames a gateway should not send."),
    ("opened_requests", "Requests that the engine began to keep a proposal tree for."),
    ("closed_requests", "Requests whose proposal tree was given up: as many, once all are over."),
    ("collected_commits", "Commits that edges heard of with later ones, since their drafts were not verified."),
)
"""What an engine reports in Stats, in this order: the same over all requests, and what is counted only in total."""


def engine_values(counters: Counter[str]) -> tuple[int, ...]:
    """An engine's counters as Stats carries them; they wrap at 2**32, as a restart would reset them."""
    return tuple(counters[name] % 2**32 for name, _ in ENGINE_COUNTERS)


def step_times(cost: StepCost) -> StepTimes:
    """What the engine has learnt its steps to take, as StepTimes carries it."""
    curve_s, *others_s = cost.parts_s
    return StepTimes(tuple(_whole(seconds * 1e6) for seconds in curve_s), *(_whole(each * 1e9) for each in others_s))


def _whole(number: float) -> int:
    return min(round(number), MAX_UINT32)


def request_values(counters: Counter[str]) -> tuple[int, ...]:
    """A request's counters as Report carries them; they stop at 2**32 - 1, since no rate is taken of them."""
    return tuple(min(counters[name], MAX_UINT32) for name, _ in REQUEST_COUNTERS)
