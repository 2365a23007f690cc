"""What commits and late proposals teach of how right drafts are. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

from vllm_specedge.engine.proposal_tree import Advance
from vllm_specedge.engine.requests import DraftedRequest, Source
from vllm_specedge.policy.acceptance import Acceptance
from vllm_specedge.policy.edge_record import EdgeRecord
from vllm_specedge.policy.ngram_budget import NgramBudget
from vllm_specedge.wire.frames import num_equal


class Lesson(NamedTuple):
    """One commit of a request, and what was known and expected when it came."""

    request: DraftedRequest
    record: EdgeRecord | None
    """The record of the edge that the request had."""
    acceptance: Acceptance
    """How right that edge's drafts for it are thought to be."""
    draft: Sequence[int]
    """What the trunk held, as far as it can teach."""
    decided: Sequence[int]
    num_verified: int
    source: Source
    """Whose draft the step verified."""
    suggestion: Sequence[int]
    predicted: Sequence[int]
    num_ahead: int
    """Tokens of the trunk before the commit."""
    done: Advance
    is_saved: bool
    """There is a draft for what follows."""

    @property
    def num_accepted(self) -> int:
        return min(len(self.decided) - 1, self.num_verified)


class Learning:
    """Lessons that are kept until there is time for them: the engine's while its workers compute."""

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
    """Where all was accepted, the token behind shows how right the next one was that was not verified.

    Else what lies deeper than what is verified would never be seen, and stay out for ever once it seemed poor.
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
    """What was there and not verified shows how right it was too: so that it can pay again."""
    decided, acceptances = lesson.decided, lesson.request.acceptances
    others = ((lesson.suggestion, acceptances.ngram), (lesson.predicted, acceptances.prediction))
    for tokens, acceptance in others:
        if tokens:
            acceptance.observe(num_equal(tokens, decided), min(len(tokens), len(decided)))
    if not lesson.num_verified or lesson.source is not Source.EDGE:
        draft = lesson.draft[: len(decided)]
        lesson.acceptance.observe(num_equal(draft, decided), len(draft))


def learn_from_late(request: DraftedRequest, base: int, draft: Sequence[int]) -> None:
    """How right a proposal for position `base` was can be seen without verifying it, once its positions are decided.

    Without this an edge that was wrong a few times, and so is not waited for and comes late, would stay so.
    """
    decided = request.tokens[base : request.tree.length]
    request.acceptances.edge.observe(num_equal(draft, decided), min(len(draft), len(decided)))


def learn_answer(request: DraftedRequest, base: int, num_tokens: int, now_s: float) -> None:
    """How long the edge took to answer a commit that left the request without a draft.

    A proposal answers each of those lengths that it covers, for its past is that of the request.
    """
    edge = request.edge
    if edge is None:
        return
    for length in [length for length in edge.emptied_s if base <= length < base + num_tokens]:
        emptied_s = edge.emptied_s.pop(length)
        in_time = length == request.tree.length
        if edge.has_answered:
            edge.record.answered(now_s - emptied_s, in_time, base + num_tokens - length)
        edge.has_answered = True  # the first answer has the edge's prefill in it
