from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.speculation import MAX_SHORT, Job, Speculation
from tests.helpers import ListSequence
from vllm_specedge.frames import Close, CloseReason, Commit, Open, Ping, Propose

CREDIT = 3
PROMPT = (10, 11)


def opened(num_prompt: int = 2, credit: int = CREDIT, **options: int) -> Speculation:
    speculation = Speculation(options.pop("max_context_tokens", 100), **options)
    assert speculation.receive(Open(0, num_prompt, credit, credit, "")) == []
    return speculation


def next_job(speculation: Speculation) -> Job:
    job = speculation.next_job()
    assert job is not None
    return job


def draft(speculation: Speculation, *tokens: int | None) -> list[Propose]:
    """Run jobs that draft these tokens, one by one; returns what was proposed."""
    return [frame for token in tokens for frame in speculation.drafted(next_job(speculation), token)]  # type: ignore[misc]


def test_a_whole_draft_is_proposed_when_the_credit_is_used_up() -> None:
    speculation = opened()
    assert speculation.next_job() is None
    assert speculation.receive(Commit(0, 0, PROMPT)) == []
    assert speculation.next_job() == Job(0, 0, PROMPT, stamp=1)
    assert draft(speculation, 20, 21) == []
    assert draft(speculation, 22) == [Propose(0, 2, (20, 21, 22))]
    assert speculation.next_job() is None


def test_a_commit_that_agrees_costs_nothing_and_gives_credit_back() -> None:
    speculation = opened()
    speculation.receive(Commit(0, 0, PROMPT))
    draft(speculation, 20, 21, 22)
    speculation.receive(Commit(0, 2, (20, 21)))
    assert next_job(speculation) == Job(0, 4, (22,), stamp=1)
    assert draft(speculation, 23, 24) == [Propose(0, 5, (23, 24))]


def test_a_commit_that_disagrees_rolls_back_to_the_fork() -> None:
    speculation = opened()
    speculation.receive(Commit(0, 0, PROMPT))
    draft(speculation, 20, 21, 22)
    speculation.receive(Commit(0, 2, (20, 99)))
    assert next_job(speculation) == Job(0, 3, (99,), stamp=2)
    assert draft(speculation, 30, 31, 32) == [Propose(0, 4, (30, 31, 32))]
    assert (speculation.stats.accepted_tokens, speculation.stats.rejected_tokens) == (1, 2)
    assert speculation.stats.acceptance == pytest.approx(1 / 3)


def test_a_job_that_a_commit_overtook_drafts_nothing_but_its_prefix_is_kept() -> None:
    speculation = opened()
    speculation.receive(Commit(0, 0, PROMPT))
    draft(speculation, 20)
    job = next_job(speculation)
    assert job == Job(0, 2, (20,), stamp=1)
    speculation.receive(Commit(0, 2, (20, 50)))
    assert speculation.drafted(job, 21) == []
    assert next_job(speculation) == Job(0, 3, (50,), stamp=2)


def test_a_job_that_drafted_on_a_token_which_was_not_to_be_is_forgotten_with_it() -> None:
    speculation = opened()
    speculation.receive(Commit(0, 0, PROMPT))
    draft(speculation, 20)
    job = next_job(speculation)
    speculation.receive(Commit(0, 2, (50,)))
    assert speculation.drafted(job, 21) == []
    assert next_job(speculation) == Job(0, 2, (50,), stamp=2)


def test_a_job_that_two_commits_overtook_keeps_what_is_before_the_first_fork() -> None:
    speculation = opened()
    speculation.receive(Commit(0, 0, PROMPT))
    draft(speculation, 20, 21)
    job = next_job(speculation)
    assert job.end == 4
    speculation.receive(Commit(0, 2, (50,)))
    speculation.receive(Commit(0, 3, (51,)))
    assert speculation.drafted(job, 22) == []
    assert next_job(speculation) == Job(0, 2, (50, 51), stamp=3)


def test_a_guess_in_the_middle_of_what_is_known_is_ignored() -> None:
    speculation = opened(prefill_chunk_tokens=1)
    speculation.receive(Commit(0, 0, PROMPT))
    assert draft(speculation, 77) == []
    assert next_job(speculation) == Job(0, 1, PROMPT[1:], stamp=1)
    assert draft(speculation, 20, 21, 22) == [Propose(0, 2, (20, 21, 22))]


def test_a_guess_outside_of_the_vocabulary_is_nothing_to_say() -> None:
    speculation = opened()
    speculation.vocab_size = 100
    speculation.receive(Commit(0, 0, PROMPT))
    assert draft(speculation, 100) == [Propose(0, 2, ())]


def test_a_draft_that_the_server_seems_not_to_have_is_proposed_again() -> None:
    speculation = opened()
    speculation.receive(Commit(0, 0, PROMPT))
    assert draft(speculation, 20, 21, 22) == [Propose(0, 2, (20, 21, 22))]
    for i in range(MAX_SHORT - 1):
        speculation.receive(Commit(0, 2 + i, (20 + i,)))
        assert draft(speculation, 23 + i) == [Propose(0, 5 + i, (23 + i,))]
    speculation.receive(Commit(0, 4, (22,)))
    assert draft(speculation, 25) == [Propose(0, 5, (23, 24, 25))]


def test_a_prompt_goes_through_in_chunks_while_it_arrives() -> None:
    speculation = opened(num_prompt=5, prefill_chunk_tokens=2)
    speculation.receive(Commit(0, 0, (1, 2, 3)))
    assert next_job(speculation).tokens == (1, 2)
    assert draft(speculation, 77) == []
    assert next_job(speculation).tokens == (3,)
    assert draft(speculation, 77) == []
    assert speculation.next_job() is None
    speculation.receive(Commit(0, 3, (4, 5)))
    assert next_job(speculation) == Job(0, 3, (4, 5), stamp=2)
    assert draft(speculation, 20, 21, 22) == [Propose(0, 5, (20, 21, 22))]
    assert speculation.stats.committed_tokens == 0  # a prompt is not the target's work


def test_a_drafter_with_nothing_to_say_proposes_what_it_has_or_passes() -> None:
    speculation = opened()
    speculation.receive(Commit(0, 0, PROMPT))
    assert draft(speculation, None) == [Propose(0, 2, ())]
    assert speculation.next_job() is None
    speculation.receive(Commit(0, 0, PROMPT))  # says nothing new
    assert speculation.next_job() is None
    speculation.receive(Commit(0, 2, (20,)))
    assert draft(speculation, 21, None) == [Propose(0, 3, (21,))]
    assert speculation.next_job() is None
    speculation.receive(Commit(0, 3, (21,)))
    assert draft(speculation, None) == [Propose(0, 4, ())]


def test_a_drafter_with_nothing_more_to_say_does_not_pass_while_its_draft_stands() -> None:
    speculation = opened()
    speculation.receive(Commit(0, 0, PROMPT))
    assert draft(speculation, 20, 21, None) == [Propose(0, 2, (20, 21))]
    speculation.receive(Commit(0, 2, (20,)))
    assert draft(speculation, None) == []


def test_the_shortest_draft_is_next() -> None:
    speculation = opened(credit=2)
    speculation.receive(Open(1, 1, 2, 2, ""))
    speculation.receive(Commit(0, 0, PROMPT))
    speculation.receive(Commit(1, 0, (5,)))
    order = []
    for token in range(4):
        job = next_job(speculation)
        order.append(job.request)
        speculation.drafted(job, token)
    assert order == [0, 1, 0, 1]


def test_a_missing_commit_gives_the_request_back() -> None:
    speculation = opened()
    speculation.receive(Commit(0, 0, PROMPT))
    assert speculation.receive(Commit(0, 3, (20,))) == [Close(0, CloseReason.GAP)]
    assert speculation.receive(Commit(0, 2, (20, 20))) == []
    assert len(speculation) == 0
    assert speculation.next_job() is None


def test_a_request_that_is_too_long_from_the_start_is_declined() -> None:
    speculation = Speculation(max_context_tokens=10)
    assert speculation.receive(Open(0, 8, 3, 3, "")) == [Close(0, CloseReason.DECLINED)]
    assert speculation.receive(Open(1, 7, 3, 3, "")) == []
    assert len(speculation) == 1


def test_a_request_that_becomes_too_long_is_declined() -> None:
    speculation = opened(max_context_tokens=7)
    speculation.receive(Commit(0, 0, PROMPT))
    assert speculation.receive(Commit(0, 2, (1, 2))) == []
    assert speculation.receive(Commit(0, 4, (3,))) == [Close(0, CloseReason.DECLINED)]


def test_commits_that_come_twice_or_overlap_change_nothing_twice() -> None:
    speculation = opened()
    speculation.receive(Commit(0, 0, PROMPT))
    draft(speculation, 20, 21)
    for commit in (Commit(0, 0, PROMPT), Commit(0, 1, (11, 20)), Commit(0, 2, (20,))):
        assert speculation.receive(commit) == []
    assert next_job(speculation) == Job(0, 3, (21,), stamp=1)
    assert speculation.stats.committed_tokens == 1


def test_a_closed_request_is_forgotten_even_with_a_job_under_way() -> None:
    speculation = opened()
    speculation.receive(Commit(0, 0, PROMPT))
    job = next_job(speculation)
    speculation.receive(Close(0, CloseReason.FINISHED))
    assert speculation.drafted(job, 1) == []
    assert speculation.receive(Close(0, CloseReason.FINISHED)) == []
    assert speculation.next_job() is None


def test_without_credit_nothing_is_drafted() -> None:
    speculation = opened(credit=0)
    speculation.receive(Commit(0, 0, PROMPT))
    assert speculation.next_job() is None


def test_only_frames_about_requests_are_taken() -> None:
    with pytest.raises(TypeError):
        opened().receive(Ping(1))


# -- any target, any draft, any order -----------------------------------------------------------------------------


class Bench:
    """One request, drafted for as the client does it: a job's forward pass runs before later frames are seen."""

    def __init__(self, num_prompt: int, credit: int, chunk: int, seed: int, quality: float) -> None:
        self.credit = credit
        self.target = [Random(seed).randrange(3) for _ in range(200)]
        self.num_prompt = num_prompt
        self.known = 0
        self.sent = 0
        """The engine has committed so many tokens; so many of them have reached the edge."""
        self.quality = quality
        self.random = Random(seed + 1)
        self.speculation = Speculation(1000, prefill_chunk_tokens=chunk)
        self.speculation.receive(Open(0, num_prompt, credit, credit, ""))
        self.sequence = ListSequence(self.guess)
        self.running: tuple[Job, int | None] | None = None
        self.proposed: list[int] = []
        """What the target's side holds as this edge's trunk: position to token."""

    def guess(self, tokens: Sequence[int]) -> int | None:
        chance = self.random.random()
        if chance < self.quality:
            return self.target[len(tokens)]
        return None if chance > 0.95 else self.random.randrange(3)

    def believed(self) -> list[int]:
        request = self.speculation._requests[0]
        assert request.tokens[: request.committed] == self.target[: request.committed]
        return request.tokens

    def commit(self, num_tokens: int, overlap: int) -> None:
        base = max(0, self.known - overlap)
        self.known += num_tokens
        assert self.speculation.receive(Commit(0, base, tuple(self.target[base : self.known]))) == []

    def start(self) -> None:
        job = None if self.running else self.speculation.next_job()
        if job is None:
            return
        assert job.keep <= len(self.sequence.tokens)
        self.sequence.truncate(job.keep)
        token = self.sequence.extend(job.tokens)
        assert self.sequence.tokens == self.believed()[: job.end]
        self.running = job, token

    def end(self) -> None:
        if self.running is None:
            return
        job, token = self.running
        self.running = None
        for frame in self.speculation.drafted(job, token):
            self.check(frame)
        held = self.speculation._requests[0].held
        assert self.sequence.tokens[:held] == self.believed()[:held]

    def check(self, frame: object) -> None:
        assert isinstance(frame, Propose)
        end = frame.base + len(frame.tokens)
        assert self.num_prompt <= self.known <= max(frame.base, end)
        assert end <= self.known + self.credit
        assert list(frame.tokens) == self.believed()[frame.base :]


@settings(max_examples=150)
@given(
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 1000),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.lists(
        st.tuples(st.sampled_from(["start", "end", "both", "commit"]), st.integers(0, 4), st.integers(0, 3)),
        max_size=60,
    ),
)
def test_what_the_drafter_holds_is_always_a_prefix_of_what_is_believed(
    num_prompt: int, credit: int, chunk: int, seed: int, quality: float, acts: list[tuple[str, int, int]]
) -> None:
    bench = Bench(num_prompt, credit, chunk, seed, quality)
    for act, num_tokens, overlap in acts[:45]:
        match act:
            case "start":
                bench.start()
            case "end":
                bench.end()
            case "both":
                bench.start()
                bench.end()
            case _:
                bench.commit(num_tokens, overlap)
        assert len(bench.believed()) <= bench.known + credit
    # And it never gets stuck: left alone, it drafts all it may or says that it has nothing.
    bench.commit(max(1, num_prompt - bench.known), 0)
    bench.end()
    for _ in range(200):
        bench.start()
        if bench.running is None:
            break
        bench.end()
    request = bench.speculation._requests[0]
    assert request.is_stuck or len(request.tokens) == bench.known + credit
    assert request.sent == len(request.tokens)
