from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import any_frame
from vllm_specedge.book import MAX_OPENED_TOKENS, DraftBook, Plan, Row
from vllm_specedge.frames import (
    MAX_TOKENS_PER_FRAME,
    Assign,
    Close,
    CloseReason,
    Commit,
    Edges,
    EngineWelcome,
    Frame,
    Open,
    Pong,
    Propose,
)
from vllm_specedge.policy import HoldLimits

VOCAB_SIZE = 100
MAX_DRAFT = 4
PROMPT = [10, 11, 12]
ANSWER_S = 0.01
STEP_S = 0.05


def new_book(num_edges: int = 1, hold_limit_s: float = 0.1) -> DraftBook:
    book = DraftBook(VOCAB_SIZE, MAX_DRAFT, HoldLimits(hold_limit_s))
    book.step_s.observe(STEP_S)
    if num_edges:
        assert book.receive(Edges(num_edges), 0.0) == []
    return book


@dataclass
class Serving:
    """A book with one request, "r", number 0, that an edge drafts for and has answered twice, in time."""

    book: DraftBook = field(default_factory=new_book)
    tokens: list[int] = field(default_factory=lambda: list(PROMPT))
    now_s: float = 1.0

    def __post_init__(self) -> None:
        self.book.open("r", self.tokens, "")
        self.receive(Assign(0, True))
        self.decode(18)
        self.propose([19])  # the first answer has the edge's prefill in it, and is not counted
        self.decode(19, 20, num_verified=1)
        self.now_s += ANSWER_S
        self.propose([21])
        self.decode(21, 22, num_verified=1)

    def receive(self, frame: Frame) -> list[Frame]:
        return self.book.receive(frame, self.now_s)

    def propose(self, tokens: list[int], base: int | None = None, branch: bool = False) -> None:
        assert self.receive(Propose(0, len(self.tokens) if base is None else base, tuple(tokens), branch)) == []

    def decode(self, *tokens: int, num_verified: int = 0) -> list[Frame]:
        self.tokens += tokens
        return self.book.commit("r", num_verified, self.now_s)

    def plan(self, limit: int = 9) -> Plan:
        return self.book.plan([Row("r", limit)], self.now_s)


def test_nothing_is_published_without_edges() -> None:
    book = new_book(num_edges=0)
    tokens = list(PROMPT)
    assert book.open("r", tokens, "") == []
    tokens.append(20)
    assert book.commit("r", 0, 1.0) == []
    assert book.close("r") == []


def test_a_request_is_opened_with_its_prompt_and_followed_to_its_end() -> None:
    book = new_book()
    tokens = list(PROMPT)
    assert book.open("r", tokens, "secret") == [Open(0, 3, MAX_DRAFT, MAX_DRAFT, "secret"), Commit(0, 0, (10, 11, 12))]
    assert book.commit("r", 0, 1.0) == []  # a step of its prompt decided nothing
    tokens += [20, 21]
    assert book.commit("r", 1, 1.0) == [Commit(0, 3, (20, 21))]
    assert book.close("r") == [Close(0, CloseReason.FINISHED)]
    assert book.close("r") == []
    assert len(book) == 0


def test_a_long_prompt_travels_in_several_commits() -> None:
    tokens = list(range(50)) * 50
    opened, *commits = new_book().open("r", tokens, "")
    assert opened == Open(0, 2500, MAX_DRAFT, MAX_DRAFT, "")
    assert [len(commit.tokens) for commit in commits if isinstance(commit, Commit)] == [1024, 1024, 452]
    assert MAX_TOKENS_PER_FRAME == 1024


def test_with_the_first_edge_each_request_is_opened_with_its_next_commit() -> None:
    book = new_book(num_edges=0)
    one, two = list(PROMPT), [7]
    book.open("one", one, "")
    book.open("two", two, "s")
    one.append(20)
    book.commit("one", 0, 1.0)
    assert book.receive(Edges(1), 2.0) == []
    one.append(21)
    assert book.commit("one", 0, 2.0) == [Open(0, 5, MAX_DRAFT, MAX_DRAFT, ""), Commit(0, 0, (10, 11, 12, 20, 21))]
    two.append(8)
    assert book.commit("two", 0, 2.0) == [Open(1, 2, MAX_DRAFT, MAX_DRAFT, "s"), Commit(1, 0, (7, 8))]
    assert book.receive(Edges(2), 2.0) == []
    one.append(22)
    assert book.commit("one", 0, 3.0) == [Commit(0, 5, (22,))]


def test_contexts_are_opened_a_bounded_number_of_tokens_a_step() -> None:
    """An edge that comes and goes must not make the engine encode every context at once."""
    book = new_book(num_edges=0)
    contexts = [[1] * MAX_OPENED_TOKENS, [2] * 10]
    for number, tokens in enumerate(contexts):
        book.open(str(number), tokens, "")
    book.receive(Edges(1), 1.0)
    for tokens in contexts:
        tokens.append(3)
    assert isinstance(book.commit("0", 0, 1.0)[0], Open)
    assert book.commit("1", 0, 1.0) == []
    book.plan([], 2.0)
    contexts[1].append(4)
    assert book.commit("1", 0, 2.0)[0] == Open(1, 12, MAX_DRAFT, MAX_DRAFT, "")


def test_when_the_last_edge_leaves_the_gateway_is_told_to_forget_all_requests() -> None:
    """Else those that end while there is no edge would stay with the gateway, and with the next edge, for ever."""
    book = new_book()
    two = list(PROMPT)
    book.open("one", list(PROMPT), "")
    book.open("two", two, "")
    assert book.receive(Edges(0), 1.0) == [Close(0, CloseReason.FINISHED), Close(1, CloseReason.FINISHED)]
    assert book.receive(Edges(0), 1.0) == []
    assert book.close("one") == []
    book.receive(Edges(1), 1.0)
    two.append(20)
    assert book.commit("two", 0, 2.0) == [Open(1, 4, MAX_DRAFT, MAX_DRAFT, ""), Commit(1, 0, (*PROMPT, 20))]


def test_a_new_gateway_is_told_everything_again() -> None:
    book = new_book()
    tokens = list(PROMPT)
    book.open("r", tokens, "")
    assert book.receive(EngineWelcome(1), 1.0) == []
    assert book.num_edges == 0
    book.receive(Edges(1), 1.0)
    tokens.append(20)
    assert book.commit("r", 0, 2.0) == [Open(0, 4, MAX_DRAFT, MAX_DRAFT, ""), Commit(0, 0, (*PROMPT, 20))]


def test_a_draft_is_offered_up_to_the_limits_of_row_and_book() -> None:
    serving = Serving()
    serving.propose([1, 2, 3, 4, 5, 6])
    assert serving.plan(limit=9).drafts == {"r": [1, 2, 3, 4]}
    assert serving.plan(limit=2).drafts == {"r": [1, 2]}
    assert serving.plan(limit=0) == serving.plan(limit=-1) == Plan()


def test_a_draft_is_followed_by_what_was_proposed_beyond_it() -> None:
    serving = Serving()
    serving.propose([1, 2])
    serving.propose([3, 4], base=len(serving.tokens) + 2)
    serving.decode(1, num_verified=1)
    assert serving.plan().drafts == {"r": [2, 3, 4]}


def test_a_late_tail_is_still_used() -> None:
    serving = Serving()
    base = len(serving.tokens)
    serving.decode(30)
    serving.decode(31)
    serving.propose([30, 31, 32, 33], base=base)
    assert serving.plan().drafts == {"r": [32, 33]}
    serving.propose([30, 99, 98], base=base)
    assert serving.plan().drafts == {"r": [32, 33]}
    assert serving.book.counters["proposals_mismatch"] == 1


def test_a_branch_is_offered_after_the_trunk_was_rejected() -> None:
    serving = Serving()
    serving.propose([1, 2, 3])
    serving.propose([7, 8], base=len(serving.tokens) + 1, branch=True)
    serving.decode(1, 7, num_verified=3)
    assert serving.plan().drafts == {"r": [8]}


def test_token_ids_outside_of_the_vocabulary_are_dropped_and_counted() -> None:
    serving = Serving()
    serving.propose([1, VOCAB_SIZE])
    assert serving.plan().drafts == {}
    assert serving.book.counters["dropped_token_id"] == 1
    serving.propose([1, VOCAB_SIZE - 1])
    assert serving.plan().drafts == {"r": [1, VOCAB_SIZE - 1]}


def test_proposals_for_requests_that_are_over_are_dropped_and_counted() -> None:
    serving = Serving()
    serving.book.close("r")
    serving.propose([1])
    assert serving.book.counters["dropped_closed"] == 1


def test_a_request_is_held_for_its_draft_until_it_comes() -> None:
    serving = Serving()
    plan = serving.plan()
    assert plan.drafts == {}
    assert plan.holds["r"] == pytest.approx(serving.now_s + ANSWER_S + 4 * ANSWER_S / 2)
    assert serving.plan().holds == plan.holds
    assert serving.book.counters["holds"] == 1
    serving.propose([1, 2])
    assert serving.plan() == Plan(drafts={"r": [1, 2]})
    assert serving.book.counters["missed_holds"] == 0


def test_a_hold_ends_and_counts_as_a_miss() -> None:
    serving = Serving()
    serving.now_s = serving.plan().holds["r"]
    assert serving.plan() == serving.plan() == Plan()
    assert (serving.book.counters["holds"], serving.book.counters["missed_holds"]) == (1, 1)


def test_after_two_misses_a_request_is_not_held_until_its_edge_is_in_time_again() -> None:
    serving = Serving()
    for token in (30, 31):
        serving.now_s = serving.plan().holds["r"]
        assert serving.plan() == Plan()
        serving.decode(token)
    assert serving.plan() == Plan()
    serving.now_s += ANSWER_S
    serving.propose([31], base=len(serving.tokens) - 1)  # too late
    assert serving.plan() == Plan()
    serving.propose([1])
    serving.decode(1, 2, num_verified=1)
    assert serving.plan().holds.keys() == {"r"}


def test_a_request_is_not_held_before_its_edge_has_answered_once() -> None:
    book = new_book()
    tokens = list(PROMPT)
    book.open("r", tokens, "")
    book.receive(Assign(0, True), 1.0)
    tokens.append(20)
    book.commit("r", 0, 1.0)
    assert book.plan([Row("r", 9)], 1.0) == Plan()


def test_a_new_edge_starts_with_a_clean_record() -> None:
    serving = Serving()
    serving.receive(Assign(0, True))
    assert serving.plan() == Plan()


def test_an_edge_that_passes_is_not_waited_for_at_this_position_only() -> None:
    serving = Serving()
    serving.propose([])
    assert serving.plan() == Plan()
    serving.decode(30)
    assert serving.plan().holds.keys() == {"r"}


def test_a_pass_for_another_position_is_nothing() -> None:
    serving = Serving()
    serving.propose([], base=len(serving.tokens) - 1)
    serving.propose([], base=len(serving.tokens) + 1)
    assert serving.plan().holds.keys() == {"r"}


def test_a_pass_leaves_an_earlier_draft_in_place() -> None:
    serving = Serving()
    serving.propose([1, 2])
    serving.propose([])
    assert serving.plan().drafts == {"r": [1, 2]}


@pytest.mark.parametrize("frame", [Assign(0, False), EngineWelcome(1)])
def test_a_request_that_loses_its_edge_is_not_held(frame: Frame) -> None:
    serving = Serving()
    assert serving.plan().holds
    serving.receive(frame)
    assert serving.plan() == Plan()


def test_a_lost_gateway_frees_everything_and_leaves_the_drafts_that_are_there() -> None:
    serving = Serving()
    held = [40]
    serving.book.open("held", held, "")
    serving.propose([1, 2])
    serving.book.lost_gateway()
    rows = [Row("r", 9), Row("held", 9)]
    assert serving.book.plan(rows, serving.now_s) == Plan(drafts={"r": [1, 2]})
    assert serving.decode(1) == []
    assert serving.book.close("r") == []


def test_requests_of_others_are_planned_plainly() -> None:
    assert Serving().book.plan([Row("unknown", 5)], 1.0) == Plan()
    assert Serving().book.commit("unknown", 0, 1.0) == []


def test_how_right_a_draft_was_is_learnt_from_what_came_too_late_to_be_verified() -> None:
    """Else an edge that was wrong at first would never be waited for again, and so come too late for ever."""
    serving = Serving()
    for _ in range(40):
        serving.now_s += ANSWER_S
        serving.propose([1, 2])
        serving.decode(9, num_verified=2)
    assert serving.plan().holds == {}
    for _ in range(40):
        base = len(serving.tokens)
        serving.decode(1, 2)
        serving.now_s += ANSWER_S
        serving.propose([1, 2], base=base)
    serving.decode(1)
    assert "r" in serving.plan().holds


def test_what_an_engine_reports_is_what_happened() -> None:
    serving = Serving()
    serving.propose([1, 2, 3])
    serving.decode(1, 2, 9, num_verified=3)
    serving.decode(8)
    counters = serving.book.counters
    assert counters["committed_tokens"] == 1 + 2 + 2 + 3 + 1
    assert counters["steps"] == 5
    assert counters["verified_drafts"] == 3
    assert counters["verified_tokens"] == 1 + 1 + 3
    assert counters["accepted_tokens"] == 1 + 1 + 2
    assert counters["proposed_tokens"] == 1 + 1 + 3


def test_frames_that_a_gateway_has_no_business_sending_are_counted() -> None:
    book = new_book()
    assert book.receive(Pong(1), 1.0) == []
    assert book.receive(Open(0, 1, 1, 1, ""), 1.0) == []
    assert book.counters["unexpected_frames"] == 2


near = st.integers(0, 8)
hostile_frames = st.one_of(
    any_frame(),
    st.builds(
        Propose,
        st.integers(0, 3),
        near,
        st.lists(st.integers(0, 3) | st.integers(VOCAB_SIZE - 2, VOCAB_SIZE + 1), max_size=6).map(tuple),
        st.booleans(),
    ),
    st.builds(Assign, st.integers(0, 3), st.booleans()),
    st.builds(Edges, st.integers(0, 2)),
)
engine_acts = st.tuples(
    st.sampled_from(["open", "close", "commit", "plan"]), st.integers(0, 2), st.lists(st.integers(0, 3), max_size=3)
)


@given(st.lists(hostile_frames | engine_acts, max_size=40), st.integers(0, 6))
def test_whatever_a_hostile_gateway_sends_only_legal_drafts_are_offered(
    acts: list[Frame | tuple[str, int, list[int]]], limit: int
) -> None:
    book = new_book(num_edges=0)
    views: dict[str, list[int]] = {}
    rows = [Row(f"r{i}", limit) for i in range(3)]
    for second, act in enumerate(acts):
        now_s = second / 100
        match act:
            case ("open", i, tokens) if f"r{i}" not in views:
                views[f"r{i}"] = [0, *tokens]
                book.open(f"r{i}", views[f"r{i}"], "")
            case ("close", i, _):
                book.close(f"r{i}")
                views.pop(f"r{i}", None)
            case ("commit", i, tokens) if f"r{i}" in views:
                views[f"r{i}"] += tokens
                book.commit(f"r{i}", len(tokens), now_s)
            case tuple():
                pass
            case _:
                book.receive(act, now_s)
        plan = book.plan(rows, now_s)
        assert plan.drafts.keys() | plan.holds.keys() <= views.keys()
        assert not plan.drafts.keys() & plan.holds.keys()
        for draft in plan.drafts.values():
            assert 0 < len(draft) <= min(limit, MAX_DRAFT)
            assert all(0 <= token < VOCAB_SIZE for token in draft)
        assert all(now_s < until_s <= now_s + 0.1 for until_s in plan.holds.values())
    assert len(book) == len(views)
