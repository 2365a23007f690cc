from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.drafters import Candidate
from edge_client.drafting.draft_tree import Node
from edge_client.drafting.jobs import Job, NotFiniteError, Said, Sequences, one_by_one, run_pass
from edge_client.drafting.kept_contexts import MIN_SHARED_TOKENS
from edge_client.drafting.noise import NUM_CANDIDATES, Noise
from edge_client.drafting.pacing import Pace
from edge_client.drafting.pass_times import PassTimes
from edge_client.drafting.passes import MAX_CHAIN
from edge_client.drafting.speculation import MAX_ENTRIES, MAX_SHORT, Speculation
from tests.helpers import Guess, ListSequence
from vllm_specedge.engine.proposal_tree import Fate, ProposalTree
from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.frames import Close, CloseReason, Commit, Open, Ping, Propose
from vllm_specedge.wire.sampling import Sampling

CREDIT = 3
PROMPT = (10, 11)
PASS_S = 0.001
PATIENCE_S = 0.5


class PlainPace(Pace):
    """Every draft is worth sending; a server without a draft gets all immediately, new tokens PATIENCE_S later.

    The real pace of edges has separate tests.
    """

    def committed(self, num_tokens: int) -> None:
        pass

    def horizon(self, max_draft: int, credit: int) -> int:
        return credit

    def is_enough(self, survivals: list[float]) -> bool:
        return False

    def is_worth_a_frame(self, expected: float) -> bool:
        return expected > 0.0

    def deadline_s(self, committed_s: float, now_s: float) -> float:
        return now_s + PATIENCE_S


class Edge:
    """Runs the jobs of a Speculation as the client does."""

    def __init__(self, guess: Guess, pace: Pace, **options: int) -> None:
        self.speculation = Speculation(options.pop("max_context_tokens", 1000), pace=pace, **options)
        self.sequences = Sequences(lambda: ListSequence(guess), self.speculation.needs)
        self.running: tuple[tuple[Job, ...], list[Said]] | None = None
        self.now_s = 1.0

    def receive(self, frame: Frame) -> list[Frame]:
        return self.speculation.receive(frame, self.now_s)

    def open(self, number: int, prompt: Sequence[int], credit: int = CREDIT, max_draft: int = CREDIT) -> None:
        assert self.receive(Open(number, len(prompt), max_draft, credit, "")) == []
        assert self.receive(Commit(number, 0, tuple(prompt))) == []

    def start(self) -> Job | None:
        """Start the next job, if there is one and none is running."""
        jobs = () if self.running else self.speculation.next_pass()
        if not jobs:
            return None
        self.running = jobs, run_pass(jobs, self.sequences.of(jobs))
        return jobs[0]

    def finish(self) -> list[Frame]:
        if self.running is None:
            return []
        jobs, said = self.running
        self.running = None
        self.now_s += PASS_S
        return self.speculation.drafted(jobs, said, PASS_S, self.now_s)

    def draft(self, num_passes: int = 100) -> list[Frame]:
        """Run up to `num_passes` jobs; returns the frames sent."""
        frames: list[Frame] = []
        for _ in range(num_passes):
            if self.start() is None:
                break
            frames += self.finish()
        return frames

    def draft_and_wait(self) -> list[Frame]:
        """Run all jobs, then wait until nothing more is due; returns the frames sent."""
        frames = self.draft()
        while (due_s := self.speculation.due_s) is not None:
            self.now_s = due_s + 0.0001
            frames += self.speculation.poll(self.now_s)
        return frames


Following = dict[int, list[tuple[int, float]]]
"""Candidates after a token, with their probabilities."""


def says(following: Following) -> Guess:
    """A draft model that looks only at the last token; after one that is not listed comes its successor."""

    def guess(past: Sequence[int]) -> list[Candidate]:
        return [Candidate(*item) for item in following.get(past[-1], [(past[-1] + 1, 0.9)])]

    return guess


COUNTING: Following = {11: [(20, 0.9)]}
"""After the prompt: 20, 21, 22, ..."""
FORKED: Following = {11: [(20, 0.6), (30, 0.4)]}
"""After the prompt: 20, 21, 22, ... or 30, 31, 32, ..."""


def edge_that_says(following: Following, **options: int) -> Edge:
    return Edge(says(following), PlainPace(), **options)


def opened(following: Following = COUNTING, credit: int = CREDIT, **options: int) -> Edge:
    """An edge that has one request, with the prompt."""
    edge = edge_that_says(following, **options)
    edge.open(0, PROMPT, credit)
    return edge


def chain_job(keep: int, *tokens: int, request: int = 0) -> Job:
    return Job(request, keep, (), tokens, (), 1)


# -- commits and the draft ----------------------------------------------------------------------------------------


def test_a_whole_draft_is_proposed_when_the_credit_is_used_up() -> None:
    edge = opened()
    assert edge.start() == chain_job(0, *PROMPT)
    assert edge.finish() == []
    assert edge.draft(1) == []
    assert edge.draft() == [Propose(0, 1, (11, 20, 21, 22))]
    assert edge.start() is None


def test_a_proposal_starts_with_the_token_that_what_is_new_follows() -> None:
    edge = opened()
    edge.draft()
    edge.receive(Commit(0, 2, (20, 21)))
    assert edge.draft_and_wait() == [Propose(0, 4, (22, 23, 24))]


def test_a_commit_that_agrees_costs_nothing_and_gives_credit_back() -> None:
    edge = opened()
    edge.draft()
    assert edge.receive(Commit(0, 2, (20, 21))) == []
    assert edge.start() == chain_job(4, 22)
    edge.finish()
    assert edge.start() == chain_job(5, 23)
    edge.finish()
    assert edge.start() is None
    assert edge.speculation.stats.acceptance == 1.0


def test_a_commit_that_disagrees_rolls_back_to_the_fork() -> None:
    edge = opened({**COUNTING, 99: [(40, 0.9)]})
    edge.draft()
    edge.receive(Commit(0, 2, (20, 99)))
    assert edge.start() == chain_job(3, 99)
    assert edge.finish() == []
    assert edge.draft() == [Propose(0, 3, (99, 40, 41, 42))]
    stats = edge.speculation.stats
    assert (stats.accepted_tokens, stats.rejected_tokens, stats.branch_hits) == (1, 2, 0)
    assert stats.acceptance == pytest.approx(1 / 3)


def test_a_job_that_a_commit_overtook_drafts_nothing_but_its_prefix_is_kept() -> None:
    edge = opened()
    edge.draft(1)
    assert edge.start() == chain_job(2, 20)
    edge.receive(Commit(0, 2, (20, 50)))
    assert edge.finish() == []
    assert edge.start() == chain_job(3, 50)


def test_what_was_said_behind_a_prompt_that_goes_on_is_ignored() -> None:
    edge = opened()
    edge.start()
    edge.receive(Commit(0, 2, (50,)))
    assert edge.finish() == []
    assert len(edge.speculation._requests[0].tree) == edge.speculation.stats.drafted_tokens == 0
    assert edge.start() == chain_job(2, 50)


def test_one_job_of_a_request_is_under_way_at_a_time() -> None:
    edge = opened(prefill_chunk_tokens=1)
    edge.start()
    assert edge.speculation.next_pass() == ()


def test_a_job_whose_token_is_committed_meanwhile_goes_on_from_there() -> None:
    edge = opened()
    edge.draft(1)
    assert edge.start() == chain_job(2, 20)
    assert edge.receive(Commit(0, 2, (20,))) == []
    assert edge.finish() == []
    assert edge.start() == chain_job(3, 21)


def test_a_job_that_drafted_on_a_token_which_was_not_to_be_is_forgotten_with_it() -> None:
    edge = opened()
    edge.draft(1)
    assert edge.start() == chain_job(2, 20)
    edge.receive(Commit(0, 2, (50,)))
    assert edge.finish() == []
    assert edge.start() == chain_job(2, 50)


def test_a_job_that_two_commits_overtook_keeps_what_is_before_the_first_fork() -> None:
    edge = opened()
    edge.draft(2)
    assert edge.start() == chain_job(3, 21)
    edge.receive(Commit(0, 2, (50,)))
    edge.receive(Commit(0, 3, (51,)))
    assert edge.finish() == []
    assert edge.start() == chain_job(2, 50, 51)


def test_a_guess_in_the_middle_of_what_is_known_is_ignored() -> None:
    edge = opened(prefill_chunk_tokens=1)
    assert edge.start() == chain_job(0, 10)
    assert edge.finish() == []
    assert edge.start() == chain_job(1, 11)
    assert edge.finish() == []
    assert edge.draft() == [Propose(0, 1, (11, 20, 21, 22))]


def test_commits_that_come_twice_or_overlap_change_nothing_twice() -> None:
    edge = opened()
    edge.draft(2)
    for commit in (Commit(0, 0, PROMPT), Commit(0, 1, (11, 20)), Commit(0, 2, (20,))):
        edge.receive(commit)
    assert edge.start() == chain_job(3, 21)
    assert edge.speculation.stats.committed_tokens == 1


def test_a_prompt_goes_through_in_chunks_while_it_arrives() -> None:
    edge = edge_that_says({5: [(20, 0.9)]}, prefill_chunk_tokens=2)
    edge.receive(Open(0, 5, CREDIT, CREDIT, ""))
    assert edge.start() is None
    edge.receive(Commit(0, 0, (1, 2, 3)))
    for job in (chain_job(0, 1, 2), chain_job(2, 3), None):
        assert edge.start() == job
        assert edge.finish() == []
    edge.receive(Commit(0, 3, (4, 5)))
    assert edge.start() == chain_job(3, 4, 5)
    edge.finish()
    assert edge.draft() == [Propose(0, 4, (5, 20, 21, 22))]
    assert edge.speculation.stats.committed_tokens == 0  # prompt tokens are not generated


def test_without_credit_nothing_is_drafted() -> None:
    edge = opened(credit=0)
    assert all(isinstance(frame, Propose) and not frame.tokens for frame in edge.draft())
    assert edge.start() is None


@given(st.integers(0, 9), st.sampled_from([1, 4]))
def test_nothing_is_proposed_beyond_the_credit(credit: int, max_width: int) -> None:
    edge = opened(FORKED, credit, max_width=max_width)
    known = len(PROMPT)
    for num_tokens in (0, 1, 2, 1):
        edge.receive(Commit(0, known, tuple(20 + known + i for i in range(num_tokens))))
        known += num_tokens
        for frame in edge.draft_and_wait():
            assert isinstance(frame, Propose)
            assert max(base + len(tokens) for base, tokens in frame.runs) <= known + credit
    assert len(edge.speculation._requests[0].tree) >= credit


def test_only_frames_about_requests_are_taken() -> None:
    with pytest.raises(TypeError):
        opened().receive(Ping(1))


# -- nothing to say -----------------------------------------------------------------------------------------------


def test_a_guess_outside_of_the_vocabulary_is_nothing_to_say() -> None:
    edge = opened({11: [(100, 0.9)]})
    edge.speculation.vocab_size = 100
    assert edge.draft() == [Propose(0, 2, ())]
    edge = opened({11: [(100, 0.6), (99, 0.3)], 99: []}, max_width=4)
    edge.speculation.vocab_size = 100
    assert edge.draft() == [Propose(0, 1, (11, 99))]


def test_a_drafter_with_nothing_to_say_passes_once_for_each_commit() -> None:
    edge = opened({11: [], 20: [(21, 0.9)], 21: []})
    assert edge.draft() == [Propose(0, 2, ())]
    assert edge.start() is None
    assert edge.receive(Commit(0, 0, PROMPT)) == []  # nothing new
    assert edge.start() is None
    edge.receive(Commit(0, 2, (20,)))
    assert edge.draft() == [Propose(0, 2, (20, 21))]
    assert edge.receive(Commit(0, 3, (21,))) == [Propose(0, 4, ())]
    assert edge.draft() == []


def test_a_drafter_with_nothing_more_to_say_does_not_pass_while_its_draft_stands() -> None:
    edge = opened({**COUNTING, 21: []})
    assert edge.draft() == [Propose(0, 1, (11, 20, 21))]
    assert edge.receive(Commit(0, 2, (20,))) == []
    assert edge.draft() == []


def test_what_is_less_probable_than_the_floor_is_neither_run_nor_said() -> None:
    edge = opened({11: [(20, 0.9)], 20: [(21, 0.001)]})
    assert edge.draft() == [Propose(0, 1, (11, 20))]
    edge.receive(Commit(0, 2, (20,)))
    assert edge.draft() == []
    assert edge.speculation._requests[0].has_passed


# -- branches -----------------------------------------------------------------------------------------------------


def test_branches_are_run_in_the_pass_of_the_trunk_and_proposed_with_it() -> None:
    edge = opened(FORKED, max_width=4)
    edge.draft(1)
    assert edge.start() == Job(0, 2, (), (20, 30), (1, 1), 3)
    assert edge.finish() == []
    (frame,) = edge.draft()
    assert isinstance(frame, Propose)
    assert frame.runs == [(1, (11, 20, 21, 22)), (2, (30, 31, 32))]


def test_one_row_a_pass_drafts_no_branches() -> None:
    edge = opened(FORKED, max_width=1)
    assert edge.draft() == [Propose(0, 1, (11, 20, 21, 22))]
    assert len(edge.speculation._requests[0].tree) == CREDIT


def test_a_branch_that_turns_out_right_keeps_its_entries_and_goes_on_at_once() -> None:
    edge = opened(FORKED, max_width=4)
    edge.draft()
    assert edge.receive(Commit(0, 2, (30,))) == []  # the tokens after it are there already
    job = edge.start()
    assert job is not None
    assert (job.keep, len(job.moved), job.tokens) == (2, 2, (32,))
    edge.finish()
    assert edge.draft_and_wait() == [Propose(0, 4, (32, 33))]
    assert edge.speculation.stats.branch_hits == 1


def test_a_branch_that_was_proposed_is_not_proposed_again_until_it_is_longer() -> None:
    edge = opened({**COUNTING, 20: [(21, 0.6), (31, 0.4)], 32: []}, credit=4, max_width=4)
    (frame,) = edge.draft_and_wait()
    assert isinstance(frame, Propose)
    assert frame.runs == [(1, (11, 20, 21, 22, 23)), (3, (31, 32))]
    edge.receive(Commit(0, 2, (20,)))
    assert edge.draft_and_wait() == [Propose(0, 5, (23, 24))]


def test_the_second_candidate_alone_is_not_worth_saying() -> None:
    edge = opened({**FORKED, 30: []}, max_width=4)
    assert edge.draft() == [Propose(0, 1, (11, 20, 21, 22))]


def test_the_most_probable_is_run_first_whether_on_the_trunk_or_not() -> None:
    for after_20, after_30, expected in ((0.4, 1.0, (31, 21)), (1.0, 0.4, (21, 31))):
        following = {11: [(20, 0.5), (30, 0.45)], 20: [(21, after_20)], 30: [(31, after_30)]}
        edge = opened(following, max_width=2)
        edge.draft(2)
        job = edge.start()
        assert job is not None
        assert job.tokens == expected


def test_a_drafter_holds_a_bounded_number_of_draft_tokens() -> None:
    edge = opened(credit=1000, max_context_tokens=2000)
    edge.speculation.pace.floor = 0.0
    frames = edge.draft(1000)
    assert edge.start() is None
    assert len(edge.sequences.by_request[0].entries) <= len(PROMPT) + MAX_ENTRIES + 1
    assert sum(len(frame.tokens) - 1 for frame in frames if isinstance(frame, Propose)) >= MAX_ENTRIES


# -- when it is said ----------------------------------------------------------------------------------------------


def test_what_is_new_waits_for_its_time_and_is_then_said_in_one_frame() -> None:
    edge = opened()
    edge.draft()
    edge.receive(Commit(0, 2, (20, 21)))
    assert edge.draft() == []
    due_s = edge.speculation.due_s
    assert due_s is not None
    assert edge.speculation.poll(due_s - 0.001) == []
    assert edge.speculation.poll(due_s + 0.003) == [Propose(0, 4, (22, 23, 24))]
    assert edge.speculation.due_s is None
    assert edge.speculation.poll(due_s + 1.0) == []


def test_what_would_be_late_after_another_pass_is_said_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    edge = opened()
    edge.draft()
    edge.receive(Commit(0, 2, (20, 21)))
    monkeypatch.setattr(PlainPace, "deadline_s", lambda self, committed_s, now_s: now_s + PASS_S / 2)
    assert edge.draft(1) == [Propose(0, 4, (22, 23))]
    assert edge.draft(1) == []  # no pass comes after it
    assert edge.draft_and_wait() == [Propose(0, 5, (23, 24))]


def test_a_commit_that_disagrees_makes_what_was_to_be_said_void() -> None:
    edge = opened()
    edge.draft()
    edge.receive(Commit(0, 2, (20,)))
    edge.draft()
    assert edge.speculation.due_s is not None
    edge.receive(Commit(0, 3, (99,)))
    assert edge.speculation.due_s is None
    assert edge.speculation.poll(1e9) == []


def test_each_request_is_heard_at_its_own_time() -> None:
    edge = opened()
    edge.open(1, PROMPT)
    edge.draft()
    edge.receive(Commit(0, 2, (20,)))
    edge.draft()
    edge.now_s += 0.2
    edge.receive(Commit(1, 2, (20, 21)))
    edge.draft()
    frames = []
    while (due_s := edge.speculation.due_s) is not None:
        frames += edge.speculation.poll(due_s)
    assert frames == [Propose(0, 4, (22, 23)), Propose(1, 4, (22, 23, 24))]


def test_a_server_that_has_nothing_is_told_as_soon_as_it_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlainPace, "is_enough", lambda self, survivals: len(survivals) == 2)
    edge = opened(credit=5)
    assert edge.draft(2) == [Propose(0, 1, (11, 20, 21))]


def test_while_a_pass_is_under_way_more_is_to_come() -> None:
    edge = opened()
    edge.draft(2)
    edge.start()
    assert edge.receive(Commit(0, 2, (20,))) == []
    assert edge.finish() == []
    assert edge.draft() == [Propose(0, 2, (20, 21, 22, 23))]


def test_what_is_not_worth_a_frame_waits_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlainPace, "is_worth_a_frame", lambda self, expected: expected > 1.5)
    edge = opened()
    edge.draft()
    assert edge.receive(Commit(0, 2, (20,))) == []
    assert edge.draft() == []
    assert edge.speculation.due_s is None
    assert edge.receive(Commit(0, 3, (21,))) == []
    assert edge.draft_and_wait() == [Propose(0, 4, (22, 23, 24))]


# -- lost proposals -----------------------------------------------------------------------------------------------


def test_a_draft_that_the_server_seems_not_to_have_is_proposed_again() -> None:
    edge = opened()
    assert edge.draft() == [Propose(0, 1, (11, 20, 21, 22))]
    for i in range(MAX_SHORT - 1):
        edge.receive(Commit(0, 2 + i, (20 + i,)))
        assert edge.draft_and_wait() == [Propose(0, 4 + i, (22 + i, 23 + i))]
    last = 1 + MAX_SHORT
    assert edge.receive(Commit(0, last, (18 + last,))) == []
    assert edge.draft() == [Propose(0, last, tuple(range(18 + last, 18 + last + CREDIT + 1)))]


def test_only_short_commits_in_a_row_show_a_loss() -> None:
    edge = opened(credit=2 * (CREDIT + 1))
    edge.draft()
    known = len(PROMPT)
    for num_tokens in (1, 1, CREDIT + 1) * 3:
        edge.receive(Commit(0, known, tuple(range(known + 18, known + 18 + num_tokens))))
        known += num_tokens
        assert all(frame.base > known for frame in edge.draft_and_wait() if isinstance(frame, Propose))


def test_no_proposal_is_thought_lost_before_it_could_have_been_heard_of() -> None:
    edge = opened()
    edge.speculation.pace.rtt_s = 3.5 * PATIENCE_S
    edge.draft()
    bases = []
    for i in range(6):
        frames = edge.receive(Commit(0, 2 + i, (20 + i,))) + edge.draft_and_wait()
        bases += [frame.base - (2 + i) for frame in frames if isinstance(frame, Propose)]
    assert bases == [2, 2, 2, 2, 0, 2]  # the fifth: all from the last committed token on


def test_commits_that_are_as_long_as_they_can_be_show_that_proposals_arrive() -> None:
    edge = opened(credit=6)
    edge.draft()
    for i in range(2 * MAX_SHORT):
        base = 2 + i * (CREDIT + 1)
        edge.receive(Commit(0, base, tuple(range(base + 18, base + 18 + CREDIT + 1))))
        frames = edge.draft_and_wait()
        assert all(frame.base > base + CREDIT for frame in frames if isinstance(frame, Propose))


# -- requests that begin and end ----------------------------------------------------------------------------------


def test_a_missing_commit_gives_the_request_back() -> None:
    edge = opened()
    assert edge.receive(Commit(0, 3, (20,))) == [Close(0, CloseReason.GAP)]
    assert edge.receive(Commit(0, 2, (20, 20))) == []
    assert len(edge.speculation) == 0
    assert edge.start() is None


def test_a_request_that_is_too_long_from_the_start_is_declined() -> None:
    edge = edge_that_says({}, max_context_tokens=10)
    assert edge.receive(Open(0, 8, 3, 3, "")) == [Close(0, CloseReason.DECLINED)]
    assert edge.receive(Open(1, 7, 3, 3, "")) == []
    assert len(edge.speculation) == 1


def test_a_request_that_becomes_too_long_is_declined() -> None:
    edge = opened(max_context_tokens=7)
    assert edge.receive(Commit(0, 2, (1, 2))) == []
    assert edge.receive(Commit(0, 4, (3,))) == [Close(0, CloseReason.DECLINED)]
    assert len(edge.speculation) == 0


def test_more_requests_than_allowed_are_declined_until_one_ends() -> None:
    edge = opened(max_requests=1)
    assert edge.receive(Open(1, 1, 3, 3, "")) == [Close(1, CloseReason.DECLINED)]
    edge.receive(Close(0, CloseReason.FINISHED))
    assert edge.receive(Open(1, 1, 3, 3, "")) == []


def test_a_closed_request_is_forgotten_even_with_a_job_under_way() -> None:
    edge = opened()
    edge.start()
    edge.receive(Close(0, CloseReason.FINISHED))
    assert not edge.speculation.needs(0)
    assert edge.finish() == []
    assert edge.receive(Close(0, CloseReason.FINISHED)) == []
    assert edge.start() is None


def test_a_request_that_the_draft_model_failed_on_is_given_back() -> None:
    edge = opened()
    edge.start()
    assert edge.speculation.decline(0) == [Close(0, CloseReason.DECLINED)]
    assert edge.speculation.decline(0) == []
    assert edge.finish() == []


def test_where_the_cache_is_full_contexts_of_ended_requests_are_forgotten() -> None:
    edge = with_an_ended_request()
    assert edge.speculation.needs(0)
    edge.speculation.forget_kept()
    assert not edge.speculation.needs(0)


def test_a_number_that_is_opened_again_begins_anew() -> None:
    edge = opened()
    edge.draft(2)
    edge.start()
    edge.open(0, (10, 12))
    assert edge.finish() == []
    assert edge.start() == chain_job(0, 10, 12)


def test_the_likeliest_token_of_all_requests_is_run_next_and_committed_ones_before_it() -> None:
    edge = opened({11: [(20, 0.8)], 5: [(40, 0.9)], 40: [(41, 0.5)], 20: [(21, 1.0)], 21: []})
    edge.open(1, (5,))
    order = []
    while job := edge.start():
        order.append(job.tokens)
        edge.finish()
    assert order == [PROMPT, (5,), (40,), (20,), (21,), (41,)]


def test_requests_of_equal_needs_take_turns() -> None:
    edge = opened()
    edge.open(1, PROMPT)
    order = []
    while job := edge.start():
        order.append(job.request)
        edge.finish()
    assert order == [0, 1, 0, 1, 0, 1]


# -- the contexts of ended requests -------------------------------------------------------------------------------

LONG = tuple(range(100, 100 + MIN_SHARED_TOKENS + 4))


def with_an_ended_request(**options: int) -> Edge:
    """Request 0 had the prompt LONG, and is over."""
    edge = edge_that_says({}, **{"max_kept": 2, **options})
    edge.open(0, LONG)
    edge.draft()
    edge.receive(Close(0, CloseReason.FINISHED))
    return edge


def test_a_request_that_begins_as_an_ended_one_starts_from_its_entries() -> None:
    edge = with_an_ended_request()
    edge.open(1, (*LONG[:-1], 7, 8))
    shared = len(LONG) - 1
    assert edge.start() == Job(1, shared, (), (7, 8), (), 1, source=0)
    edge.finish()
    assert edge.draft() == [Propose(1, shared + 1, (8, 9, 10, 11))]
    assert edge.speculation.stats.reused_tokens == shared
    assert not edge.speculation.needs(0)
    edge.open(2, LONG)
    assert edge.start() == chain_job(0, *LONG, request=2)  # the entries are taken


def test_of_the_same_prompt_at_least_the_last_token_is_run() -> None:
    edge = with_an_ended_request()
    edge.open(1, LONG)
    assert edge.start() == Job(1, len(LONG) - 1, (), LONG[-1:], (), 1, source=0)


def test_what_was_generated_is_gone_on_from_too() -> None:
    edge = edge_that_says({}, max_kept=1)
    edge.open(0, LONG)
    edge.draft()
    answer = tuple(LONG[-1] + 1 + i for i in range(3))
    edge.receive(Commit(0, len(LONG), answer))
    edge.draft()
    edge.receive(Close(0, CloseReason.FINISHED))
    edge.open(1, (*LONG, *answer, 7))
    assert edge.start() == Job(1, len(LONG) + 3, (), (7,), (), 1, source=0)


def test_what_only_begins_alike_is_not_worth_it() -> None:
    edge = with_an_ended_request()
    other = (*LONG[: MIN_SHARED_TOKENS - 1], 7, 8, 9)
    edge.open(1, other)
    assert edge.start() == chain_job(0, *other, request=1)


def test_the_ended_request_that_shares_most_is_gone_on_from() -> None:
    edge = edge_that_says({}, max_kept=2)
    edge.open(0, LONG)
    edge.open(1, (*LONG[:-2], 7))
    edge.draft()
    for number in (0, 1):
        edge.receive(Close(number, CloseReason.FINISHED))
    edge.open(2, (*LONG[:-2], 7, 8))
    job = edge.start()
    assert job is not None
    assert (job.source, job.keep) == (1, len(LONG) - 1)


def test_a_prompt_is_waited_for_in_full_while_it_may_begin_as_an_ended_one() -> None:
    edge = with_an_ended_request()
    edge.receive(Open(1, len(LONG) + 1, 3, 3, ""))
    edge.receive(Commit(1, 0, LONG[:5]))
    assert edge.start() is None
    edge.receive(Commit(1, 5, (*LONG[5:], 7)))
    job = edge.start()
    assert job is not None
    assert (job.source, job.tokens) == (0, (7,))


def test_a_request_that_ended_with_a_job_under_way_is_gone_on_from_when_it_is_done() -> None:
    edge = edge_that_says({}, max_kept=1)
    edge.open(0, LONG)
    edge.start()
    edge.receive(Close(0, CloseReason.FINISHED))
    edge.open(1, (*LONG, 7))
    assert edge.finish() == []
    assert edge.start() == Job(1, len(LONG), (), (7,), (), 1, source=0)


def test_the_contexts_that_ended_last_are_kept() -> None:
    edge = edge_that_says({}, max_kept=2)
    for number in range(4):
        edge.open(number, [1000 * number + i for i in range(MIN_SHARED_TOKENS)])
        edge.draft()
    for number in range(4):
        edge.receive(Close(number, CloseReason.FINISHED))
    assert [edge.speculation.needs(number) for number in range(4)] == [False, False, True, True]


def test_nothing_goes_on_from_what_a_failing_draft_model_left() -> None:
    edge = edge_that_says({}, max_kept=1)
    edge.open(0, LONG)
    edge.start()
    edge.receive(Close(0, CloseReason.FINISHED))
    assert edge.speculation.decline(0) == []
    assert not edge.speculation.needs(0)


def test_nothing_goes_on_from_a_number_that_is_in_use_again() -> None:
    edge = with_an_ended_request()
    edge.open(0, (1, 2, 3))
    edge.draft()
    edge.open(1, LONG)
    assert edge.start() == chain_job(0, *LONG, request=1)


# -- any target, any draft, any order -----------------------------------------------------------------------------

VOCAB_SIZE = 5


def choose(tokens: Sequence[int]) -> int:
    """The target."""
    return crc32(bytes([*tokens[-3:], len(tokens) % 7])) % VOCAB_SIZE


@dataclass
class Text:
    """A request on the server: the first `sent` of its tokens have reached the edge."""

    num_prompt: int
    credit: int
    max_draft: int
    tokens: list[int]
    sent: int = 0
    server: ProposalTree = field(default_factory=lambda: ProposalTree(0))

    @property
    def known(self) -> list[int]:
        return self.tokens[: self.sent]


class Bench(Edge):
    """Several requests with a common prefix, and a server that receives every frame immediately."""

    def __init__(
        self, seed: int, quality: float, max_width: int, chunk: int, max_kept: int, rtt_s: float, shared: int = 0
    ) -> None:
        super().__init__(
            self.guess,
            Pace(rtt_s=rtt_s),
            max_width=max_width,
            max_shared_rows=shared,
            prefill_chunk_tokens=chunk,
            max_kept=max_kept,
            max_requests=3,
        )
        self.random = Random(seed)
        self.quality = quality
        self.story = [self.random.randrange(VOCAB_SIZE) for _ in range(45)]
        self.said: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
        self.texts: dict[int, Text] = {}
        self.next_number = 0

    def guess(self, past: Sequence[int]) -> list[Candidate]:
        candidates = self.candidates(past) if self.random.random() < 0.96 else []
        for width in range(4):
            self.said.setdefault(tuple(past), set()).add(tuple(candidate.token for candidate in candidates[:width]))
        return candidates

    def candidates(self, past: Sequence[int]) -> list[Candidate]:
        right = choose(past)
        others = self.random.sample([token for token in range(VOCAB_SIZE) if token != right], 2)
        place = 0 if self.random.random() < self.quality else self.random.randrange(3)
        tokens = [*others[:place], right, *others[place:]]
        shares = sorted((self.random.random() for _ in tokens), reverse=True)
        return [Candidate(token, share / sum(shares)) for token, share in zip(tokens, shares, strict=True)]

    def begin(self, num_prompt: int, variety: int, again: int | None) -> None:
        """Open a request, with a new number or one that is or was in use."""
        number = self.next_number if again is None else min(again, self.next_number)
        self.next_number = max(self.next_number, number + 1)
        credit, max_draft = self.random.randint(1, 10), self.random.randint(1, 5)
        prompt = self.story[:num_prompt]
        prompt[-1] = (prompt[-1] + variety) % VOCAB_SIZE
        answers = self.receive(Open(number, num_prompt, max_draft, credit, ""))
        if answers:
            assert answers == [Close(number, CloseReason.DECLINED)]
            assert len(self.speculation) == 3
        else:
            self.texts[number] = Text(num_prompt, credit, max_draft, prompt)

    def commit(self, which: int, num_tokens: int, overlap: int, skipped: int = 0) -> None:
        number, text = self.pick(which)
        base = max(0, text.sent - overlap) + skipped
        end = max(base, text.sent) + num_tokens
        while len(text.tokens) < end:
            text.tokens.append(choose(text.tokens))
        known, text.sent = text.known, max(end, text.sent)
        if base <= len(known):
            text.server.advance(text.tokens[len(known) : text.sent])
        answers = self.receive(Commit(number, base, tuple(text.tokens[base:end])))
        if base > len(known):
            assert answers == [Close(number, CloseReason.GAP)]
            del self.texts[number]
        else:
            self.check_frames(answers)

    def pick(self, which: int) -> tuple[int, Text]:
        if not self.texts:
            self.begin(3, 0, None)
        number = sorted(self.texts)[which % len(self.texts)]
        return number, self.texts[number]

    def close(self, which: int) -> None:
        number, _ = self.pick(which)
        del self.texts[number]
        assert self.receive(Close(number, CloseReason.FINISHED)) == []

    def fail(self) -> None:
        """The draft model fails; its context is then unknown."""
        jobs, self.running = self.running[0] if self.running is not None else (), None
        for job in jobs:
            if not self.speculation.needs(job.request):
                continue
            self.sequences.by_request[job.request].entries.clear()
            is_live = self.texts.pop(job.request, None) is not None
            answers = self.speculation.decline(job.request)
            assert answers == ([Close(job.request, CloseReason.DECLINED)] if is_live else [])

    def poll(self, after_s: float) -> None:
        self.now_s += after_s
        self.check_frames(self.speculation.poll(self.now_s))

    def check_frames(self, frames: list[Frame]) -> None:
        for frame in frames:
            assert isinstance(frame, Propose)
            text = self.texts[frame.request]
            assert text.sent >= text.num_prompt
            if not frame.tokens:
                assert frame.base == text.sent
                continue
            trunk = self.speculation._requests[frame.request].tree.trunk()
            known = [*text.known, *(node.token for node in trunk)]
            (base, run), *branches = frame.runs
            assert base + len(run) <= text.sent + text.credit
            assert len(run) > 1 or branches
            assert known[base : base + len(run)] == list(run)
            for base, tokens in branches:
                assert base + len(tokens) <= text.sent + text.credit
                self.check_branch(trunk[base - text.sent].parent, tokens)
            assert {done.fate for done in text.server.insert(frame.runs, text.known)} == {Fate.KEPT}

    def check_branch(self, node: Node | None, tokens: Sequence[int]) -> None:
        """Check a branch that leaves the trunk after this node."""
        assert len(tokens) > 1
        for index, token in enumerate(tokens):
            assert node is not None
            place = [child.token for child in node.children].index(token)
            assert place > 0 if index == 0 else place == 0
            node = node.children[place]

    def check(self) -> None:
        """Check that the entries are as recorded, and that the server has what was sent."""
        for number, tokens in self.speculation._kept._tokens.items():
            assert self.sequences.by_request[number].past(len(tokens) - 1) == tokens
        assert set(self.texts) == set(self.speculation._requests)
        for number, text in self.texts.items():
            tree = self.speculation._requests[number].tree
            assert tree.tokens == text.known
            stack = [(tuple(text.known), tree.root)]
            while stack:
                past, node = stack.pop()
                if node.entry is not None:
                    assert self.sequences.by_request[number].past(node.entry) == list(past)
                if node.is_expanded:
                    assert tuple(child.token for child in node.children) in self.said[past]
                stack += [((*past, child.token), child) for child in node.children]
            if tree.num_prefix:
                assert self.sequences.by_request[number].past(tree.num_prefix - 1) == text.known[: tree.num_prefix]
            assert self.speculation._requests[number].credit == text.credit
            sent = [node.token for node in tree.trunk() if node.is_sent]
            assert text.server.chain(len(sent)) == sent

    def settle(self) -> None:
        """Run until nothing changes, with something to draft for in each request."""
        for which in range(len(self.texts)):
            _, text = self.pick(which)
            self.commit(which, max(1, text.num_prompt - text.sent), 0)
        for _ in range(500):
            self.check_frames(self.finish())
            if self.start() is None:
                due_s = self.speculation.due_s
                if due_s is None:
                    break
                self.poll(max(0.0, due_s - self.now_s) + 1e-4)
        assert self.running is None
        assert self.speculation.due_s is None
        for number in self.texts:
            self.check_settled(number)

    def check_settled(self, number: int) -> None:
        """Check that it drafted as far as it should, and sent what is worth sending."""
        request, pace = self.speculation._requests[number], self.speculation.pace
        tree = request.tree
        assert tree.is_caught_up
        assert tree.root.is_expanded
        limit = tree.root.position + pace.horizon(request.max_draft, request.credit)
        trunk = [node for node in tree.trunk() if node.survival >= pace.floor]
        num_entered = sum(node.entry is not None for node in tree.root.below())
        assert num_entered >= MAX_ENTRIES or all(node.is_expanded or node.position >= limit for node in trunk)
        unsent = [node for node in trunk if not node.is_sent]
        if trunk:
            assert trunk[0].is_sent
        elif len(self.texts) == 1:  # else the floor may have risen meanwhile
            assert request.has_passed
        assert not pace.is_worth_a_frame(sum(node.survival for node in unsent)) or len(self.texts) > 1

    def act(self) -> None:
        """Do a random action, the usual ones most often."""
        which = self.random.randrange(3)
        match self.random.choice(ACTS):
            case "start":
                self.start()
            case "finish":
                self.check_frames(self.finish())
            case "draft":
                for _ in range(self.random.randint(1, 12)):
                    self.check_frames(self.finish())
                    self.start()
            case "commit":
                _, text = self.pick(which)
                num_tokens = self.random.randrange(text.max_draft + 2)
                if text.sent < text.num_prompt and self.random.random() < 0.7:
                    num_tokens = text.num_prompt - text.sent
                self.commit(which, num_tokens, overlap=self.random.randrange(3))
            case "wait":
                self.poll(self.random.choice([0.0, 0.0003, 0.01, 0.2]))
            case "close":
                self.close(which)
            case "open":
                self.begin(self.random.randint(1, 45), self.random.randrange(2), None)
                _, text = self.pick(-1)
                if self.random.random() < 0.7:
                    self.commit(-1, max(0, text.num_prompt - text.sent), 0)
            case "again":
                self.begin(self.random.randint(1, 45), 0, again=self.random.randint(0, self.next_number))
            case "gap":
                self.commit(which, 1, 0, skipped=1)
            case _:
                self.fail()


ACTS = ["draft", "commit"] * 20 + ["start", "finish", "wait", "close", "open", "open"] * 4 + ["again", "gap", "fail"]


@settings(max_examples=70)
@given(
    seed=st.integers(0, 10**6),
    num_acts=st.integers(20, 100),
    quality=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    max_width=st.sampled_from([1, 2, 4, 8]),
    chunk=st.sampled_from([1, 4, 50]),
    max_kept=st.sampled_from([0, 2, 2]),
    rtt_s=st.sampled_from([0.0, 0.005, 0.1]),
    shared=st.sampled_from([0, 16]),
)
def test_entries_are_what_they_are_thought_to_be_and_the_server_can_use_all_that_is_said(
    seed: int, num_acts: int, quality: float, max_width: int, chunk: int, max_kept: int, rtt_s: float, shared: int
) -> None:
    bench = Bench(seed, quality, max_width, chunk, max_kept, rtt_s, shared)
    for _ in range(num_acts):
        bench.act()
        bench.check()
    bench.settle()
    bench.check()


# -- several requests in one pass ----------------------------------------------------------------------------------

CERTAIN = {token: [(token + 1, 0.99)] for token in range(200)}


def sharing(num_requests: int, row_s: float = 0.0, max_shared_rows: int = 16) -> Edge:
    """Requests with prefilled prompts, and no draft yet."""
    pace = PlainPace(PassTimes({1: 0.01, 8: 0.01 + 7 * row_s}))
    says = lambda past: [Candidate(*each) for each in CERTAIN[past[-1]]]  # noqa: E731
    edge = Edge(says, pace, max_width=4, max_shared_rows=max_shared_rows)
    for number in range(num_requests):
        edge.open(number, [10 + number, 20 * (1 + number)], credit=8)
        edge.start()
        edge.finish()
    return edge


def test_requests_share_a_pass_where_rows_cost_nothing() -> None:
    edge = sharing(4)
    for _ in range(3):
        assert edge.start() is not None
        jobs = edge.running[0] if edge.running else ()
        assert sorted(job.request for job in jobs) == [0, 1, 2, 3], "each has a row in each pass"
        edge.finish()


def test_a_committed_token_shares_the_pass_that_others_draft_in() -> None:
    edge = sharing(2)
    edge.receive(Commit(0, 2, (99,)))
    edge.start()
    jobs = {job.request: job for job in (edge.running[0] if edge.running else ())}
    assert jobs.keys() == {0, 1}
    assert (jobs[0].tokens, jobs[0].parents) == ((99,), ())
    assert jobs[1].tokens == (41,)
    edge.finish()
    edge.start()
    jobs = {job.request: job for job in (edge.running[0] if edge.running else ())}
    assert jobs[0].tokens == (100,), "what follows it was drafted in the same pass"


def test_where_rows_cost_as_much_as_passes_each_has_its_turn() -> None:
    edge = sharing(3, row_s=0.02)
    turns = []
    for _ in range(6):
        edge.start()
        jobs = edge.running[0] if edge.running else ()
        assert len(jobs) == 1
        turns.append(jobs[0].request)
        edge.finish()
    assert set(turns[:3]) == {0, 1, 2}


def test_a_prompt_and_many_committed_tokens_are_passes_of_their_own() -> None:
    edge = sharing(2)
    edge.receive(Commit(0, 2, tuple(range(90, 90 + MAX_CHAIN + 1))))
    first = edge.start()
    assert first is not None
    assert (first.request, len(first.tokens)) == (0, MAX_CHAIN + 1)
    assert edge.running is not None
    assert len(edge.running[0]) == 1


def test_several_committed_tokens_of_all_requests_are_one_pass() -> None:
    edge = sharing(3)
    for number in range(3):
        edge.receive(Commit(number, 2, (98, 99)))
    edge.start()
    assert [job.tokens for job in (edge.running[0] if edge.running else ())] == [(98, 99)] * 3


def test_a_drafter_that_cannot_share_has_one_request_a_pass() -> None:
    edge = sharing(3, max_shared_rows=0)
    edge.start()
    assert edge.running is not None
    assert len(edge.running[0]) == 1


# -- what a draft model may say ------------------------------------------------------------------------------------


@pytest.mark.parametrize("claimed", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_probability_gets_no_further_than_the_pass(claimed: float) -> None:
    edge = opened({11: [(20, 0.6), (30, claimed)]}, max_width=4)
    with pytest.raises(NotFiniteError):
        edge.start()


def test_what_is_no_number_fails_its_own_request_of_a_shared_pass() -> None:
    edge = sharing(2)
    jobs = edge.speculation.next_pass()
    assert len(jobs) == 2
    sequences = edge.sequences.of(jobs)
    sick = [[Candidate(1, float("nan"))]]
    with pytest.raises(NotFiniteError) as caught:
        run_pass(jobs, sequences, lambda parts: [sick, *one_by_one(parts[1:])])
    assert caught.value.failed == [jobs[0]]
    num_before = edge.speculation.stats.drafted_tokens
    edge.speculation.decline(jobs[0].request)
    edge.running = jobs, caught.value.said
    edge.finish()
    assert edge.speculation.stats.drafted_tokens == num_before + 1
    edge.start()
    assert [job.request for job in (edge.running[0] if edge.running else ())] == [jobs[1].request]


# -- sampled requests ----------------------------------------------------------------------------------------------


def test_where_the_target_samples_the_draft_has_its_noise() -> None:
    """Trunk and branches have the draft's best tokens after adding the noise, at each position."""
    sampling = Sampling(1.0, 0, 1.0, 77, len(PROMPT))
    likely = [Candidate(token, 0.6 * 0.4**token) for token in range(20)]
    edge = Edge(lambda past: likely, PlainPace())
    assert edge.receive(Open(0, len(PROMPT), CREDIT, CREDIT, "", sampling.fields())) == []
    edge.receive(Commit(0, 0, PROMPT))
    job = edge.start()
    assert job is not None
    assert job.width == NUM_CANDIDATES
    frames = edge.finish() + edge.draft_and_wait()
    proposed = [token for frame in frames if isinstance(frame, Propose) for token in frame.tokens]
    noise = Noise(sampling)
    wanted = [noise.chosen(likely, len(PROMPT) + depth, 1)[0].token for depth in range(CREDIT)]
    assert wanted != [0] * CREDIT, "noise changes nothing here"
    assert proposed == [PROMPT[-1], *wanted]
