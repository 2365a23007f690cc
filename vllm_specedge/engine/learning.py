"""Learning the acceptance of drafts from commits and late proposals. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

from vllm_specedge.engine.proposal_tree import Advance
from vllm_specedge.engine.requests import DraftedRequest, Source
from vllm_specedge.policy.acceptance import Acceptance
from vllm_specedge.policy.edge_record import EdgeRecord
from vllm_specedge.policy.ngram_budget import NgramBudget
from vllm_specedge.wire.frames import num_equal


class Lesson(NamedTuple):
    """One commit of a request, and the drafts and estimates at that time."""

    request: DraftedRequest
    record: EdgeRecord | None
    """The record of the request's edge at that time."""
    acceptance: Acceptance
    """The estimated acceptance of that edge's drafts for the request."""
    draft: Sequence[int]
    """The first tokens of the trunk, as many as can be compared."""
    decided: Sequence[int]
    num_verified: int
    source: Source
    """The source of the verified draft."""
    suggestion: Sequence[int]
    predicted: Sequence[int]
    num_ahead: int
    """Tokens of the trunk before the commit."""
    done: Advance
    is_saved: bool
    """Whether there is a draft for the next step."""

    @property
    def num_accepted(self) -> int:
        return min(len(self.decided) - 1, self.num_verified)


class Learning:
    """Lessons kept until there is time for them, while the engine's workers compute."""

    def __init__(self, ngram_budget: NgramBudget) -> None:
        self._ngram_budget = ngram_budget
        self._lessons: list[Lesson] = []

    def note(self, lesson: Lesson) -> None:
        self._lessons.append(lesson)

    def learn(self) -> None:
        for lesson in self._lessons:
            self._count(lesson)
            if lesson.num_verified and lesson.source is Source.EDGE:
                _learn_verified(lesson)
            _learn_unverified(lesson)
        self._lessons.clear()

    def _count(self, lesson: Lesson) -> None:
        request, done = lesson.request, lesson.done
        request.count("committed_tokens", len(lesson.decided))
        request.count("ahead_tokens", lesson.num_ahead)
        request.count("steps", 1)
        request.count("discarded_mismatch", done.pruned)
        request.count("tree_hits", done.is_hit)
        request.count("round_trips_saved", lesson.is_saved)
        if not lesson.num_verified:
            return
        kind = lesson.source.value
        request.count(f"{kind}verified_tokens", lesson.num_verified)
        request.count(f"{kind}accepted_tokens", lesson.num_accepted)
        request.totals[f"{kind}verified_drafts"] += 1
        if lesson.source is Source.NGRAM:
            self._ngram_budget.accepted(lesson.num_accepted)


def _learn_verified(lesson: Lesson) -> None:
    """Learn from verified tokens. If all were accepted, the target's next token also tells whether the next draft token
    was right.

    Otherwise tokens deeper than those verified would never be measured, and stay unverified once they seemed poor.
    """
    num_verified, num_accepted = lesson.num_verified, lesson.num_accepted
    if num_accepted < num_verified and lesson.record is not None:
        lesson.record.hit.observe(float(lesson.done.is_hit))
    draft, decided = lesson.draft[: num_verified + 1], lesson.decided
    is_all = num_accepted == num_verified < len(draft)
    if is_all and list(draft[:num_verified]) == list(decided[:num_verified]):
        lesson.acceptance.observe(num_equal(draft, decided), num_verified + 1)
    else:
        lesson.acceptance.observe(num_accepted, num_verified)


def _learn_unverified(lesson: Lesson) -> None:
    """Learn from drafts that were there and not verified, so that they can pay again."""
    decided, acceptances = lesson.decided, lesson.request.acceptances
    others = ((lesson.suggestion, acceptances.ngram), (lesson.predicted, acceptances.prediction))
    for tokens, acceptance in others:
        if tokens:
            acceptance.observe(num_equal(tokens, decided), min(len(tokens), len(decided)))
    if not lesson.num_verified or lesson.source is not Source.EDGE:
        draft = lesson.draft[: len(decided)]
        lesson.acceptance.observe(num_equal(draft, decided), len(draft))


def learn_from_late(request: DraftedRequest, base: int, draft: Sequence[int]) -> None:
    """Learn from a late proposal for position `base`: its positions are decided, so it can be compared with them.

    Without this, an edge that was wrong a few times, and is late because the server does not wait for it, would stay
    so.
    """
    decided = request.tokens[base : request.tree.length]
    request.acceptances.edge.observe(num_equal(draft, decided), min(len(draft), len(decided)))


def learn_answer(request: DraftedRequest, base: int, num_tokens: int, now_s: float) -> None:
    """Record how long the edge took to answer a commit that left the request without a draft.

    A proposal answers each of the awaited lengths that it covers, as its past is that of the request.
    """
    edge = request.edge
    if edge is None:
        return
    for length in [length for length in edge.emptied_s if base <= length < base + num_tokens]:
        emptied_s = edge.emptied_s.pop(length)
        in_time = length == request.tree.length
        if edge.has_answered:
            edge.record.answered(now_s - emptied_s, in_time, base + num_tokens - length)
        edge.has_answered = True  # the first answer includes the edge's prefill
