from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import any_frame, fitting
from vllm_specedge.engine.driver import NOTHING_ELSE, StepDriver
from vllm_specedge.engine.ledger import MAX_OPENED_TOKENS, MAX_RECORDS
from vllm_specedge.engine.plain_steps import BOOKED_EVERY_S, MEASURED_EVERY
from vllm_specedge.engine.plan import UNMEASURED, Row, Step, StepOutcome, StepPlan
from vllm_specedge.engine.requests import DraftedRequest, Source
from vllm_specedge.errors import ByeCode
from vllm_specedge.policy.coalescing import COALESCE_AFTER, COALESCED_TOKENS, UNUSED_AFTER
from vllm_specedge.policy.edge_record import EdgeRecord
from vllm_specedge.policy.probing import FIRST_PROBE_AFTER, FORCED_AFTER, PLAIN_PROBE_AFTER, PROBE_AFTER
from vllm_specedge.policy.situation import HoldLimits, Load
from vllm_specedge.policy.step_cost import StepCost
from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.engine_frames import Assign, Edges, EngineOpen, EngineWelcome, Report
from vllm_specedge.wire.frames import (
    MAX_TOKENS_PER_FRAME,
    MAX_UINT32,
    Bye,
    Close,
    CloseReason,
    Commit,
    Pong,
    Propose,
)
from vllm_specedge.wire.telemetry import REQUEST_COUNTERS, VERIFIED, request_values

VOCAB_SIZE = 100
MAX_DRAFT = 4
PROMPT = [10, 11, 12]
ANSWER_S = 0.005
STEP_S = 0.2


def outcome(request_id: str, num_tokens: int, num_verified: int, is_over: bool = False) -> StepOutcome:
    """The outcome of a step of one request."""
    verified = {request_id: num_verified} if num_verified else {}
    return StepOutcome({request_id: num_tokens}, verified, [request_id] if is_over else [])


class Driven(StepDriver):
    """Keeps the latest started plan, so that a test can state in one line what a step did."""

    last = StepPlan()

    def plan(self, rows: Iterable[Row], now_s: float, load: Load = NOTHING_ELSE) -> StepPlan:
        """Make a plan and start it."""
        self.last = self.begin(rows, now_s, load)
        self.start(self.last)
        return self.last

    def commit(self, request_id: str, num_verified: int, now_s: float) -> list[Frame]:
        """End a step that was not timed; the request already has its new tokens."""
        frames = self.end(self.last, outcome(request_id, 1 + num_verified, num_verified), Step(now_s, now_s))
        self.last.choices.pop(request_id, None)
        return frames

    def named(self, request_id: str) -> DraftedRequest:
        request = self._ledger.find(request_id)
        assert request is not None
        return request

    def record(self, request_id: str) -> EdgeRecord:
        """The record of the request's edge."""
        edge = self.named(request_id).edge
        assert edge is not None
        return edge.record


def new_driver(
    num_edges: int = 1, mode: str = "auto", token_s: float = 0.0, max_slowdown: float = inf, max_stretch: float = inf
) -> Driven:
    """A driver; each further token makes a step longer by `token_s`."""
    limits = HoldLimits(0.1, mode, max_slowdown=max_slowdown, max_stretch=max_stretch)
    driver = Driven(VOCAB_SIZE, MAX_DRAFT, limits, StepCost({1: STEP_S, 65: STEP_S + 64 * token_s}))
    if num_edges:
        assert driver.receive(Edges(num_edges), 0.0) == []
    return driver


@dataclass
class Serving:
    """A driver with one request, "r", number 0, that edge 1 drafts for and has answered twice, in time."""

    driver: Driven = field(default_factory=new_driver)
    tokens: list[int] = field(default_factory=lambda: list(PROMPT))
    now_s: float = 1.0

    def __post_init__(self) -> None:
        self.driver.open("r", self.tokens, "")
        self.receive(Assign(0, 1))
        self.decode(18)
        self.propose([19])  # the first answer includes the edge's prefill, and does not count
        self.decode(19, 20, num_verified=1)
        self.now_s += ANSWER_S
        self.propose([21])
        self.decode(21, 22, num_verified=1)

    def receive(self, frame: Frame) -> None:
        assert self.driver.receive(frame, self.now_s) == []

    def propose(
        self, tokens: Sequence[int], after: int | None = None, branches: Sequence[tuple[int, Sequence[int]]] = ()
    ) -> None:
        """A draft after the first `after` tokens, with branches at given distances before its end."""
        after = len(self.tokens) if after is None else after
        run = [self.tokens[after - 1], *tokens, *(token for _, own in branches for token in own)]
        forks = [number for back, own in branches for number in (back, len(own))]
        self.receive(Propose(0, after - 1, tuple(run), tuple(forks)))

    def go_on(self, from_token: int, tokens: Sequence[int], num_ahead: int) -> None:
        """A draft that continues from `from_token`, the trunk's token at `num_ahead`."""
        self.receive(Propose(0, len(self.tokens) + num_ahead - 1, (from_token, *tokens)))

    def give_up(self, after: int | None = None) -> None:
        self.receive(Propose(0, len(self.tokens) if after is None else after, ()))

    def decode(self, *tokens: int, num_verified: int = 0) -> list[Frame]:
        self.tokens += tokens
        frames = self.driver.commit("r", num_verified, self.now_s)
        self.driver.learn()
        return frames

    def plan(self, limit: int = 9, load: Load = NOTHING_ELSE) -> StepPlan:
        return self.driver.plan([Row("r", limit)], self.now_s, load)

    def step(self, *tokens: int, num_verified: int = 0, took_s: float = STEP_S, prefilled: int = 0) -> None:
        """A step, from its plan to its commit."""
        started_s, self.now_s = self.now_s, self.now_s + took_s
        self.tokens += tokens
        done = outcome("r", 1 + num_verified + prefilled, num_verified)
        self.driver.end(self.driver.last, done, Step(started_s, self.now_s))
        self.driver.last = StepPlan()
        self.driver.learn()

    @property
    def record(self) -> EdgeRecord:
        return self.driver.record("r")

    @property
    def rates(self) -> list[float]:
        """Estimated acceptance rates by depth."""
        return self.driver.named("r").acceptances.edge.rates


def test_nothing_is_published_without_edges() -> None:
    driver = new_driver(num_edges=0)
    tokens = list(PROMPT)
    assert driver.open("r", tokens, "") == []
    tokens.append(20)
    assert driver.commit("r", 0, 1.0) == []
    assert driver.close("r") == []


def test_without_edges_the_drafts_that_are_there_or_still_come_are_dropped() -> None:
    serving = Serving()
    serving.propose([1, 2])
    assert serving.driver.receive(Edges(0), serving.now_s) == [Close(0, CloseReason.FINISHED)]
    assert serving.driver.counters["discarded_unused"] == 2
    serving.receive(Assign(0, 1))
    serving.propose([3, 4])
    assert serving.driver.counters["dropped_closed"] == 1
    assert serving.plan() == StepPlan()


def decoded_plainly(
    driver: Driven, tokens: list[int], num_steps: int, from_s: float = 1.0, step_s: float = STEP_S
) -> None:
    """Decode in steps that are planned only where the driver asks for it."""
    for at in range(num_steps):
        started_s = from_s + at * step_s
        plan = UNMEASURED if driver.needs_no_plan else driver.begin([], started_s, Load(len(tokens), num_others=1))
        driver.start(plan)
        tokens.append(20)
        driver.end(plan, outcome("r", 1, 0), Step(started_s, started_s + step_s))


@pytest.mark.parametrize("num_steps", [1, MEASURED_EVERY, 20])
def test_what_was_decoded_without_edges_is_booked_when_one_comes(num_steps: int) -> None:
    driver, tokens = new_driver(num_edges=0), list(PROMPT)
    driver.open("r", tokens, "")
    decoded_plainly(driver, tokens, num_steps)
    assert driver.receive(Edges(1), 0.0) == []
    assert driver.counters["committed_tokens"] == driver.counters["steps"] == num_steps
    assert driver.counters["engine_steps"] == num_steps
    assert driver.named("r").speedup == 1.0
    tokens.append(21)
    assert driver.commit("r", 0, 2.0)[1:] == [Commit(0, 0, tuple(tokens))]


def test_what_was_decoded_without_edges_is_booked_now_and_then_and_at_the_end() -> None:
    driver, tokens = new_driver(num_edges=0), list(PROMPT)
    driver.open("r", tokens, "")
    step_s = 0.4 * BOOKED_EVERY_S
    decoded_plainly(driver, tokens, 1, BOOKED_EVERY_S, step_s)
    assert driver.counters["committed_tokens"] == 1
    decoded_plainly(driver, tokens, 2, BOOKED_EVERY_S + step_s, step_s)
    assert driver.counters["committed_tokens"] == 1
    decoded_plainly(driver, tokens, 1, BOOKED_EVERY_S + 3 * step_s, step_s)
    assert driver.counters["committed_tokens"] == 4
    decoded_plainly(driver, tokens, 1, BOOKED_EVERY_S + 4 * step_s, step_s)
    driver.close("r")
    assert driver.counters["committed_tokens"] == 5


def test_what_a_step_verified_is_booked_to_it_though_the_last_edge_has_left_meanwhile() -> None:
    serving = Serving()
    serving.propose([23, 24])
    assert serving.plan().drafts == {"r": [23, 24]}
    before = serving.driver.counters.copy()
    serving.tokens += [23, 24]
    serving.driver.receive(Edges(0), serving.now_s)
    serving.receive(Assign(0, 1))  # one that was on its way
    serving.step(25, num_verified=2)
    counted = serving.driver.counters - before
    names = ("steps", "committed_tokens", "verified_tokens", "accepted_tokens")
    assert [counted[name] for name in names] == [1, 3, 2, 2]


def test_a_prediction_for_a_request_that_decoded_without_drafts_starts_at_its_present_length() -> None:
    driver, tokens = new_driver(num_edges=0), list(PROMPT)
    driver.open("r", tokens, "")
    decoded_plainly(driver, tokens, 3)
    driver.predict("r", [20, 20, 20, 30, 31])
    assert driver.plan([Row("r", 2)], 2.0).drafts == {"r": [30, 31]}


def test_without_edges_one_step_in_some_is_measured_and_one_after_each_prompt() -> None:
    driver, tokens = new_driver(num_edges=0), list(PROMPT)
    driver.open("r", tokens, "")
    needed = []
    for at in range(2 * MEASURED_EVERY):
        needed.append(not driver.needs_no_plan)
        decoded_plainly(driver, tokens, 1, 1.0 + at * STEP_S)
    assert needed == 2 * [*[False] * (MEASURED_EVERY - 1), True]
    driver.end(UNMEASURED, outcome("r", 7, 0), Step(9.0, 9.1))
    assert not driver.needs_no_plan


def test_the_time_of_steps_without_drafts_is_counted_and_shows_no_gain() -> None:
    driver, tokens = new_driver(num_edges=0), list(PROMPT)
    driver.open("r", tokens, "")
    decoded_plainly(driver, tokens, 40)
    assert driver.counters["decode_us"] == pytest.approx(1e6 * 40 * STEP_S, rel=0.05)
    assert driver.counters["plain_decode_us"] == pytest.approx(driver.counters["decode_us"], rel=0.05)
    assert driver.speedups.ratio == pytest.approx(1.0, rel=0.05)


def test_a_request_is_opened_with_its_prompt_and_followed_to_its_end() -> None:
    driver = new_driver()
    tokens = list(PROMPT)
    assert driver.open("r", tokens, "secret") == [
        EngineOpen(0, 3, MAX_DRAFT, "secret"),
        Commit(0, 0, (10, 11, 12)),
    ]
    assert driver.commit("r", 0, 1.0) == []  # a step of its prompt commits nothing
    assert driver.receive(Assign(0, 1), 1.0) == []
    tokens += [20, 21]
    assert driver.commit("r", 1, 1.0) == [Commit(0, 3, (20, 21))]
    assert driver.close("r") == [Report(0, request_values(driver.counters)), Close(0, CloseReason.FINISHED)]
    assert driver.close("r") == []
    assert len(driver) == 0


def test_edges_are_told_how_a_request_is_sampled() -> None:
    sampling = (1, 700, 20, 950, 3, 0, 1234)
    assert new_driver().open("r", list(PROMPT), "", sampling)[0] == EngineOpen(0, 3, MAX_DRAFT, "", sampling)


def test_a_long_prompt_travels_in_several_commits() -> None:
    tokens = list(range(50)) * 50
    opened, *commits = new_driver().open("r", tokens, "")
    assert opened == EngineOpen(0, 2500, MAX_DRAFT, "")
    assert [len(commit.tokens) for commit in commits if isinstance(commit, Commit)] == [1024, 1024, 452]
    assert MAX_TOKENS_PER_FRAME == 1024


def test_with_the_first_edge_each_request_is_opened_with_its_next_commit() -> None:
    driver = new_driver(num_edges=0)
    one, two = list(PROMPT), [7]
    driver.open("one", one, "")
    driver.open("two", two, "s")
    one.append(20)
    driver.commit("one", 0, 1.0)
    assert driver.receive(Edges(1), 2.0) == []
    one.append(21)
    assert driver.commit("one", 0, 2.0) == [EngineOpen(0, 5, MAX_DRAFT, ""), Commit(0, 0, (10, 11, 12, 20, 21))]
    two.append(8)
    assert driver.commit("two", 0, 2.0) == [EngineOpen(1, 2, MAX_DRAFT, "s"), Commit(1, 0, (7, 8))]
    assert driver.receive(Edges(2), 2.0) == []
    assert driver.receive(Assign(0, 1), 2.0) == []
    one.append(22)
    assert driver.commit("one", 0, 3.0) == [Commit(0, 5, (22,))]


def test_who_has_no_edge_is_published_when_it_gets_one() -> None:
    driver, tokens = new_driver(), list(PROMPT)
    driver.open("r", tokens, "")
    for token in (20, 21):
        tokens.append(token)
        assert driver.commit("r", 0, 1.0) == []
    assert driver.receive(Assign(0, 2), 1.5) == [Commit(0, 3, (20, 21))]
    tokens.append(22)
    assert driver.commit("r", 0, 2.0) == [Commit(0, 5, (22,))]
    assert driver.receive(Assign(0, 0), 2.5) == []
    tokens.append(23)
    assert driver.commit("r", 0, 3.0) == []
    assert driver.receive(Assign(0, 1), 3.5) == [Commit(0, 6, (23,))]


def refuse(serving: Serving, token: int) -> list[Frame]:
    """A step with a right draft, and no room to verify it."""
    serving.propose([token])
    assert serving.plan(load=Load(room=1)).drafts == {}
    return serving.decode(token)


def test_an_edge_whose_drafts_are_left_unverified_hears_of_many_tokens_at_once() -> None:
    serving = Serving()
    published = []
    for token in range(30, 30 + COALESCE_AFTER + 3 * COALESCED_TOKENS):
        published.append(refuse(serving, token))
    told = [frames[0] for frames in published if frames]
    sizes = [len(commit.tokens) for commit in told if isinstance(commit, Commit)]
    assert sizes == [1] * COALESCE_AFTER + [COALESCED_TOKENS] * 3
    assert serving.driver.counters["collected_commits"] == 3 * (COALESCED_TOKENS - 1)


def test_a_draft_that_is_verified_ends_the_rest() -> None:
    serving = Serving()
    for token in range(30, 30 + COALESCE_AFTER + 5):
        refuse(serving, token)
    base = len(serving.tokens) - 5
    serving.propose([70])
    assert serving.decode(70, 71, num_verified=1) == [Commit(0, base, tuple(serving.tokens[base:]))]
    assert serving.decode(72) == [Commit(0, base + 7, (72,))]


def test_a_request_that_rests_is_not_held() -> None:
    """Nothing was published, so its edge has nothing to answer."""
    serving = Serving()
    for token in range(30, 30 + COALESCE_AFTER + 2):
        refuse(serving, token)
    assert serving.plan().holds == {}


def late_and_wrong(serving: Serving, token: int) -> list[Frame]:
    """A step without a draft; the one that arrives meanwhile is wrong, so there is none afterwards either."""
    serving.now_s += STEP_S
    assert serving.plan(load=Load(is_pressed=True)).drafts == {}
    serving.propose([99])
    return serving.decode(token)


def test_an_edge_whose_drafts_are_never_there_in_time_hears_of_many_tokens_at_once() -> None:
    serving = Serving()
    sizes = [
        len(frames) for frames in (late_and_wrong(serving, 30) for _ in range(UNUSED_AFTER + 2 * COALESCED_TOKENS + 9))
    ]
    assert sizes[:UNUSED_AFTER] == [1] * UNUSED_AFTER
    assert sum(sizes[UNUSED_AFTER:]) == 2
    serving.propose([70, 71])
    assert serving.decode(70, 71, 72, num_verified=2) != []
    assert late_and_wrong(serving, 30) != []


def test_further_requests_of_such_an_edge_rest_from_its_first_answer_on() -> None:
    serving = Serving()
    for _ in range(UNUSED_AFTER + 1):
        late_and_wrong(serving, 30)
    tokens = [1, 2, 3]
    serving.driver.open("other", tokens, "")
    serving.receive(Assign(1, 1))
    tokens.append(4)
    assert serving.driver.commit("other", 0, serving.now_s) != []
    serving.receive(Propose(1, 3, (4, 99)))
    tokens.append(5)
    serving.now_s += STEP_S
    assert serving.driver.commit("other", 0, serving.now_s) == []


def test_who_has_not_answered_yet_hears_of_every_token() -> None:
    """A long prompt takes its edge a while."""
    serving = Serving()
    serving.receive(Assign(0, 2))
    for _ in range(2 * UNUSED_AFTER):
        serving.now_s += STEP_S
        assert serving.decode(30) != []


def test_a_step_of_many_requests_is_one() -> None:
    record = EdgeRecord()
    for _ in range(100):
        record.stepped(is_verified=False, now_s=1.0)
    record.stepped(is_verified=False, now_s=2.0)
    assert record.num_unused == 2
    record.stepped(is_verified=True, now_s=2.0)
    assert record.num_unused == 0


def test_a_draft_that_came_during_the_step_was_not_refused() -> None:
    serving = Serving()
    for token in range(30, 30 + 3 * COALESCE_AFTER):
        assert serving.plan().drafts == {}
        serving.propose([token])
        assert serving.decode(token) != []


def test_contexts_are_opened_a_bounded_number_of_tokens_a_step() -> None:
    """An edge that joins and leaves must not make the engine encode all contexts at once."""
    driver = new_driver(num_edges=0)
    contexts = [[1] * MAX_OPENED_TOKENS, [2] * 10]
    for number, tokens in enumerate(contexts):
        driver.open(str(number), tokens, "")
    driver.receive(Edges(1), 1.0)
    for tokens in contexts:
        tokens.append(3)
    assert isinstance(driver.commit("0", 0, 1.0)[0], EngineOpen)
    assert driver.commit("1", 0, 1.0) == []
    driver.plan([], 2.0)
    contexts[1].append(4)
    assert driver.commit("1", 0, 2.0)[0] == EngineOpen(1, 12, MAX_DRAFT, "")


def test_when_the_last_edge_leaves_the_gateway_is_told_to_forget_all_requests() -> None:
    """Otherwise requests that end while there is no edge would stay at the gateway, and at the next edge, forever."""
    driver = new_driver()
    two = list(PROMPT)
    driver.open("one", list(PROMPT), "")
    driver.open("two", two, "")
    assert driver.receive(Edges(0), 1.0) == [Close(0, CloseReason.FINISHED), Close(1, CloseReason.FINISHED)]
    assert driver.receive(Edges(0), 1.0) == []
    assert driver.close("one") == []
    driver.receive(Edges(1), 1.0)
    two.append(20)
    assert driver.commit("two", 0, 2.0) == [EngineOpen(1, 4, MAX_DRAFT, ""), Commit(1, 0, (*PROMPT, 20))]


def test_a_new_gateway_is_told_everything_again() -> None:
    driver = new_driver()
    tokens = list(PROMPT)
    driver.open("r", tokens, "")
    assert driver.receive(EngineWelcome(1), 1.0) == []
    assert driver.num_edges == 0
    driver.receive(Edges(1), 1.0)
    tokens.append(20)
    assert driver.commit("r", 0, 2.0) == [EngineOpen(0, 4, MAX_DRAFT, ""), Commit(0, 0, (*PROMPT, 20))]


def test_a_draft_is_offered_up_to_the_limits_of_row_and_book() -> None:
    serving = Serving()
    serving.propose([1, 2, 3, 4, 5, 6])
    assert serving.plan(limit=9).drafts == {"r": [1, 2, 3, 4]}
    assert serving.plan(limit=2).drafts == {"r": [1, 2]}
    assert serving.plan(limit=0) == serving.plan(limit=-1) == StepPlan()


def test_a_draft_is_followed_by_what_was_proposed_beyond_it() -> None:
    serving = Serving()
    serving.propose([1, 2])
    serving.go_on(2, [3, 4], num_ahead=2)
    serving.go_on(9, [9], num_ahead=4)
    serving.decode(1, num_verified=1)
    assert serving.plan().drafts == {"r": [2, 3, 4]}
    assert serving.driver.counters["proposals_gap"] == 1


def test_a_late_tail_is_still_used() -> None:
    serving = Serving()
    after = len(serving.tokens)
    serving.decode(30)
    serving.decode(31)
    serving.propose([30, 31, 32, 33], after)
    assert serving.plan().drafts == {"r": [32, 33]}
    serving.propose([30, 99, 98], after)
    assert serving.plan().drafts == {"r": [32, 33]}
    assert serving.driver.counters["proposals_mismatch"] == 1


def test_a_branch_is_offered_after_the_trunk_was_rejected_and_gone_on_from() -> None:
    serving = Serving()
    serving.propose([1, 2, 3], branches=[(2, [7, 8])])
    assert serving.plan().drafts == {"r": [1, 2, 3]}
    serving.decode(1, 7, num_verified=3)
    serving.go_on(8, [9], num_ahead=1)
    assert serving.plan().drafts == {"r": [8, 9]}
    assert serving.driver.counters["tree_hits"] == 1


def test_a_branch_that_was_taken_before_it_arrived_is_offered_and_gone_on_from() -> None:
    serving = Serving()
    assert serving.plan().holds
    serving.decode(7)
    serving.propose([1, 2], after=len(serving.tokens) - 1, branches=[(2, [7, 8])])
    serving.go_on(8, [9], num_ahead=1)
    assert serving.plan() == StepPlan(drafts={"r": [8, 9]})


def test_token_ids_outside_of_the_vocabulary_are_dropped_and_counted() -> None:
    serving = Serving()
    serving.propose([1, VOCAB_SIZE])
    assert serving.plan().drafts == {}
    assert serving.driver.counters["dropped_token_id"] == 1
    serving.propose([1, VOCAB_SIZE - 1])
    assert serving.plan().drafts == {"r": [1, VOCAB_SIZE - 1]}


def test_proposals_for_requests_that_are_over_are_dropped_and_counted() -> None:
    serving = Serving()
    serving.driver.close("r")
    serving.propose([1])
    assert serving.driver.counters["dropped_closed"] == 1


def test_a_request_is_held_for_its_draft_until_it_comes() -> None:
    serving = Serving()
    plan = serving.plan()
    assert plan.drafts == {}
    assert plan.holds["r"] == pytest.approx(serving.now_s + ANSWER_S + 4 * ANSWER_S / 2)
    assert serving.plan().holds == plan.holds
    assert serving.driver.counters["holds"] == 1
    serving.propose([1, 2])
    assert serving.plan() == StepPlan(drafts={"r": [1, 2]})
    assert serving.driver.counters["missed_holds"] == 0


def test_a_hold_ends_and_counts_as_a_miss() -> None:
    serving = Serving()
    serving.now_s = serving.plan().holds["r"]
    assert serving.plan() == serving.plan() == StepPlan()
    assert (serving.driver.counters["holds"], serving.driver.counters["missed_holds"]) == (1, 1)


def test_after_two_misses_a_request_is_not_held_until_its_edge_is_in_time_again() -> None:
    serving = Serving()
    for token in (30, 31):
        serving.now_s = serving.plan().holds["r"]
        assert serving.plan() == StepPlan()
        serving.decode(token)
    assert serving.plan() == StepPlan()
    serving.now_s += ANSWER_S
    serving.propose([31], after=len(serving.tokens) - 1)  # too late
    assert serving.plan() == StepPlan()
    serving.propose([1])
    serving.decode(1, 2, num_verified=1)
    assert serving.plan().holds.keys() == {"r"}


def test_a_request_is_not_held_before_its_edge_has_answered_once() -> None:
    driver = new_driver()
    tokens = list(PROMPT)
    driver.open("r", tokens, "")
    driver.receive(Assign(0, 1), 1.0)
    tokens.append(20)
    driver.commit("r", 0, 1.0)
    assert driver.plan([Row("r", 9)], 1.0) == StepPlan()


@pytest.mark.parametrize(("edge", "mode", "is_held"), [(1, "auto", True), (2, "auto", False), (2, "wait", True)])
def test_an_edge_keeps_its_record_from_one_request_to_the_next(edge: int, mode: str, is_held: bool) -> None:
    """A new request is held for an edge that is known to be quick, but only after its first answer for this request,
    which includes the prefill; it is not held for an edge of which only that answer is known."""
    serving = Serving(new_driver(mode=mode))
    tokens, driver = list(PROMPT), serving.driver
    driver.open("new", tokens, "")
    serving.receive(Assign(1, edge))
    for _ in range(3):  # its edge computes the prompt
        tokens.append(20)
        driver.commit("new", 0, serving.now_s)
        assert driver.plan([Row("new", 9)], serving.now_s) == StepPlan()
    serving.receive(Propose(1, len(tokens) - 1, (20, 21)))
    tokens += [21, 22]
    driver.commit("new", 1, serving.now_s)
    assert bool(driver.plan([Row("new", 9)], serving.now_s).holds) == is_held
    assert (driver.record("new") is serving.record) == (edge == 1)


def test_a_new_edge_is_thought_to_be_as_right_as_others_here_and_a_new_request_as_its_edge() -> None:
    serving = Serving()
    for _ in range(40):
        serving.propose([1, 2])
        serving.decode(9, num_verified=2)
    edge_rates = list(serving.record.acceptance.rates)
    serving.receive(Assign(0, 1))
    assert serving.rates == edge_rates
    serving.receive(Assign(0, 2))
    assert serving.record.acceptance.rates == serving.rates == serving.driver._ledger.acceptances.edge.rates
    assert serving.rates[0] < 0.3


def test_another_edge_that_is_assigned_is_not_judged_by_the_first_one_s_record() -> None:
    serving = Serving()
    serving.receive(Assign(0, 2))
    serving.decode(30)
    assert serving.plan() == StepPlan()
    serving.receive(Assign(0, 1))
    serving.decode(31)
    assert serving.plan() == StepPlan()
    serving.propose([32])
    serving.decode(32, 33, num_verified=1)
    assert serving.plan().holds.keys() == {"r"}


def test_the_records_of_the_edges_assigned_last_are_kept_and_no_more() -> None:
    serving = Serving()
    first = serving.record
    for edge in range(2, MAX_RECORDS + 1):
        serving.receive(Assign(0, edge))
    serving.receive(Assign(0, 1))
    assert serving.record is first
    second = serving.driver._ledger._records[2]
    for edge in range(MAX_RECORDS + 1, MAX_RECORDS + 3):
        serving.receive(Assign(0, edge))
    assert len(serving.driver._ledger._records) == MAX_RECORDS
    serving.receive(Assign(0, 1))
    assert serving.record is first
    serving.receive(Assign(0, 2))
    assert serving.record is not second
    assert len(serving.driver._ledger._records) == MAX_RECORDS


def test_a_new_gateway_numbers_its_edges_anew() -> None:
    serving = Serving()
    for frame in (EngineWelcome(1), Edges(1), Assign(0, 1)):
        serving.receive(frame)
    serving.decode(30)
    assert serving.plan() == StepPlan()


def test_a_new_edge_is_not_waited_for_before_there_is_a_commit_that_it_could_answer_and_it_has_answered_one() -> None:
    serving = Serving(new_driver(mode="wait"))
    assert serving.plan().holds
    serving.receive(Assign(0, 1))
    assert serving.plan() == StepPlan()
    serving.decode(30)
    assert serving.plan() == StepPlan()
    serving.propose([31])
    serving.decode(31, 32, num_verified=1)
    assert serving.plan().holds


def test_an_edge_that_passes_is_not_waited_for_at_this_position_only() -> None:
    serving = Serving()
    serving.give_up()
    assert serving.plan() == StepPlan()
    serving.decode(30)
    assert serving.plan().holds.keys() == {"r"}


def test_a_pass_for_another_position_is_nothing() -> None:
    serving = Serving()
    serving.give_up(len(serving.tokens) - 1)
    serving.give_up(len(serving.tokens) + 1)
    assert serving.plan().holds.keys() == {"r"}


def test_a_pass_leaves_an_earlier_draft_in_place() -> None:
    serving = Serving()
    serving.propose([1, 2])
    serving.give_up()
    assert serving.plan().drafts == {"r": [1, 2]}


@pytest.mark.parametrize("frame", [Assign(0, 0), EngineWelcome(1)])
def test_a_request_that_loses_its_edge_is_not_held(frame: Frame) -> None:
    serving = Serving()
    assert serving.plan().holds
    serving.receive(frame)
    assert serving.plan() == StepPlan()


def test_a_lost_gateway_frees_everything_and_drops_the_drafts_that_are_there() -> None:
    serving = Serving()
    held = [40]
    serving.driver.open("held", held, "")
    serving.propose([1, 2])
    serving.receive(Bye(ByeCode.GOING_AWAY, "it is away"))
    rows = [Row("r", 9), Row("held", 9)]
    assert serving.driver.plan(rows, serving.now_s) == StepPlan()
    assert serving.driver.counters["discarded_unused"] == 2
    assert serving.decode(1) == []
    assert serving.driver.close("r") == []


@pytest.mark.parametrize("load", [Load(prefill=1), Load(is_pressed=True)])
def test_nobody_is_held_while_there_are_prompts(load: Load) -> None:
    serving = Serving()
    assert serving.plan(load=load) == StepPlan()
    assert serving.plan().holds


@pytest.mark.parametrize("load", [Load(prefill=1), Load(is_pressed=True)])
def test_an_edge_that_a_prompt_leaves_no_time_to_answer_has_not_missed(load: Load) -> None:
    """Otherwise the server would stop waiting for it after two prompts."""
    serving = Serving()
    assert serving.plan().holds
    serving.now_s += ANSWER_S / 2
    assert serving.plan(load=load) == StepPlan()
    assert serving.driver.counters["missed_holds"] == serving.record.num_misses == 0


def test_who_always_waits_has_not_missed_a_draft_before_the_limit() -> None:
    """In this mode a wait lasts until hold_limit_s, whatever the edge's record says."""
    serving = Serving(new_driver(mode="wait"))
    until_s = serving.plan().holds["r"]
    serving.now_s += serving.record.late_after_s + ANSWER_S
    assert serving.now_s < until_s
    assert serving.plan(load=Load(prefill=1)) == StepPlan()
    assert serving.driver.counters["missed_holds"] == serving.record.num_misses == 0


def test_an_edge_that_often_missed_is_waited_for_again_after_it_was_in_time_for_long() -> None:
    """Each answer shows an edge's punctuality, even if no request waits for it."""
    serving = Serving()
    for _ in range(30):
        serving.record.missed()
    assert serving.plan() == StepPlan()
    for number in range(200):
        serving.now_s += ANSWER_S
        serving.propose([1, 2])
        serving.decode(*[[1, 2, 9], [9]][number % 2], num_verified=2)
    assert serving.record.num_misses == 0
    assert serving.plan().holds


def test_when_room_is_short_the_more_important_request_s_draft_is_verified() -> None:
    serving = Serving()
    other = list(PROMPT)
    serving.driver.open("other", other, "")
    serving.driver.receive(Propose(1, len(other) - 1, (other[-1], 1)), serving.now_s)
    serving.driver.named("other").acceptances = serving.driver.named("r").acceptances
    serving.propose([1])
    for priorities, key in (((0, 0), "r"), ((0, -1), "other"), ((-1, 0), "r")):
        rows = [Row(id_, 9, priority) for id_, priority in zip(("r", "other"), priorities, strict=True)]
        assert serving.driver.plan(rows, serving.now_s, Load(room=3)).drafts == {key: [1]}


def test_a_target_for_inter_token_latency_bounds_what_is_verified() -> None:
    serving = Serving(new_driver(token_s=STEP_S / 100))
    serving.propose([1, 2, 3, 4])
    for limit, num_verified in ((0.9, 0), (1.021, 2), (1.1, 4)):
        load = Load(step_limit_s=limit * STEP_S)
        assert serving.plan(load=load).drafts.get("r", []) == [1, 2, 3, 4][:num_verified]


def test_requests_of_others_are_planned_plainly() -> None:
    assert Serving().driver.plan([Row("unknown", 5)], 1.0) == StepPlan()
    assert Serving().driver.commit("unknown", 0, 1.0) == []


def test_a_request_that_nobody_may_draft_for_waits_no_longer_for_the_drafts_of_others_than_it_may_be_slowed() -> None:
    serving = Serving(new_driver(max_slowdown=1.01))
    serve(serving, 50, 4)
    rows, plain = [Row("r", 9)], Row("thinks within a budget", 9)
    assert serving.driver.begin(rows, serving.now_s).wait_until_s is not None
    plan = serving.driver.begin([*rows, plain], serving.now_s)
    assert plan.num_rows == 2
    assert plan.wait_until_s is None
    assert plan == serving.driver.begin(rows, serving.now_s, Load(num_others=1))


def test_what_is_learnt_late_is_of_the_edge_that_drafted_and_of_what_it_drafted() -> None:
    serving = Serving()
    first = serving.record
    rates = list(first.acceptance.rates)
    serving.propose([30, 31])
    serving.tokens += [30, 40]
    serving.driver.commit("r", 2, serving.now_s)  # another edge takes over before anything is learnt
    serving.receive(Assign(0, 2))
    other = list(serving.rates)
    serving.driver.learn()
    assert first.acceptance.rates[0] > rates[0]
    assert first.acceptance.rates[1] < rates[1]
    assert serving.rates == other


def test_whether_it_is_learnt_at_once_or_with_the_next_step_makes_no_difference() -> None:
    def learnt(is_late: bool) -> tuple[list[float], dict[str, int]]:
        serving = Serving()
        for token in range(30, 40):
            serving.propose([token, token + 1 if token % 3 else 0])
            serving.tokens += [token, 50]
            serving.driver.commit("r", 2, serving.now_s)
            if not is_late:
                serving.driver.learn()
            serving.step()
        return serving.rates, dict(serving.driver.counters)

    assert learnt(True) == learnt(False)


def test_how_right_a_draft_was_is_learnt_though_it_was_not_verified() -> None:
    """Otherwise a server on which drafts do not pay would never learn that they have become better."""
    serving = Serving()
    for decided, is_right in (((1, 2, 3), True), ((1, 9), False)):
        before = list(serving.rates)
        for _ in range(3):
            serving.propose([1, 2, 3])
            serving.decode(*decided)
            serving.decode(50)
        assert serving.rates[0] > before[0]
        assert (serving.rates[1] > before[1]) == is_right
        assert (serving.rates[2] == before[2]) != is_right
    assert serving.driver.counters["verified_drafts"] == 2


def test_how_right_a_draft_was_is_learnt_from_what_came_too_late_to_be_verified() -> None:
    """Otherwise an edge that was wrong at first would never be waited for again, and so be late forever."""
    serving = Serving()

    def come_late(draft: Sequence[int]) -> None:
        for _ in range(UNUSED_AFTER):
            after = len(serving.tokens)
            serving.decode(1, 2)
            serving.now_s += ANSWER_S
            serving.propose(draft, after)

    for _ in range(40):
        serving.now_s += ANSWER_S
        serving.propose([1, 2])
        serving.decode(9, num_verified=2)
    assert serving.rates[0] < 0.2
    come_late([1, 2])
    assert serving.rates[0] > 0.6
    serving.propose([5])
    serving.decode(5, 6, num_verified=1)  # else it would rest, and receive few commits that it could answer
    come_late([9, 9])
    assert serving.rates[0] < 0.4


def test_late_drafts_for_another_past_say_nothing_of_how_right_an_edge_is() -> None:
    serving = Serving()
    for _ in range(UNUSED_AFTER - 1):
        serving.decode(1, 2)
        serving.now_s += ANSWER_S
        serving.receive(Propose(0, len(serving.tokens) - 3, (99, 9, 9)))
    serving.decode(1)
    assert serving.plan().holds


@pytest.mark.parametrize("answer_s", [0.004, 0.012])
def test_an_answer_is_measured_from_the_commit_it_answers_even_if_more_were_made_meanwhile(answer_s: float) -> None:
    """The edge read two commits together and answers the second: a draft starts with a token that it knows."""
    serving = Serving()
    for token in range(60):
        serving.decode(token)
        serving.now_s += STEP_S
        serving.decode(token)
        serving.now_s += answer_s
        serving.propose([60])
        serving.decode(60, 61, num_verified=1)
    assert serving.record.answer_s.mean == pytest.approx(answer_s, abs=1e-4)


def test_only_the_answer_to_a_commit_that_left_no_draft_is_measured() -> None:
    """An edge that drafts ahead sends when it has a draft, not when the server waits for one."""
    serving = Serving()
    for _ in range(40):
        serving.propose([1, 2, 3])
        serving.decode(1)
        serving.now_s += 5 * ANSWER_S
        serving.propose([2, 3, 4])
        serving.decode(2, 3, 4, 9, num_verified=3)
        serving.now_s += ANSWER_S
        serving.receive(Propose(0, len(serving.tokens) - 1, (99, 1)))  # for another past: no answer
        serving.now_s += ANSWER_S
        serving.propose([5])
        serving.decode(5, 6, num_verified=1)
        serving.now_s += 2 * ANSWER_S
    assert serving.record.answer_s.mean == pytest.approx(2 * ANSWER_S, abs=1e-4)


def test_how_often_branches_hit_is_learnt_from_drafts_that_were_verified() -> None:
    serving = Serving()
    hit = serving.record.hit
    for _ in range(40):
        serving.propose([1, 2, 3], branches=[(2, [7, 8])])
        serving.decode(1, 7, num_verified=3)
        serving.decode(9)
    assert hit.mean == pytest.approx(1, abs=0.01)
    for token in range(40):
        serving.decode(token)
        serving.driver.suggest({"r": [1]}, 0.0)
        assert serving.plan().drafts
        serving.decode(1, 2, num_verified=1)
    assert hit.mean == pytest.approx(1, abs=0.01)


def test_what_is_kept_for_an_edge_that_never_answers_is_bounded() -> None:
    serving = Serving()
    for _ in range(100):
        serving.decode(1)
    edge = serving.driver.named("r").edge
    assert edge is not None
    assert len(edge.emptied_s) <= 32


# -- vLLM's own n-gram drafts -------------------------------------------------------------------------------------


def test_a_suggestion_is_verified_where_there_is_no_draft_and_instead_of_waiting_for_one() -> None:
    serving = Serving()
    assert serving.plan().holds
    serving.driver.suggest({"r": [1, 2, 3, 4, 5]}, 0.0)
    assert serving.plan() == StepPlan(drafts={"r": [1, 2, 3, 4]})
    assert serving.plan(limit=2) == StepPlan(drafts={"r": [1, 2]})
    assert serving.plan(limit=0) == StepPlan()
    serving.propose([7, 8])
    assert serving.plan() == StepPlan(drafts={"r": [7, 8]})
    serving.decode(7, 8, 9, num_verified=2)
    assert serving.driver.counters["ngram_verified_tokens"] == 0
    assert serving.plan().drafts == {}  # forgotten: it was for another position
    serving.driver.suggest({"r": []}, 0.0)
    assert serving.plan().drafts == {}
    serving.driver.suggest({"unknown": [1]}, 0.0)


def test_a_suggestion_is_taken_instead_of_a_draft_if_more_of_it_is_expected_to_be_accepted() -> None:
    serving = Serving()

    def take(draft: list[int], suggestion: list[int]) -> list[int]:
        serving.propose(draft)
        serving.driver.suggest({"r": suggestion}, 0.0)
        return serving.plan().drafts["r"]

    assert take([7], [1, 2, 3]) == [1, 2, 3]
    serving.decode(9, num_verified=3)
    assert take([7, 8, 9], [1, 2, 3]) == [7, 8, 9]
    serving.decode(7, 8, 9, 10, num_verified=3)
    taken = []
    for _ in range(10):  # unverified drafts also show their accuracy
        taken.append(take([7, 8, 9], [1]))
        serving.decode(1, *[2][: taken[-1] == [1]], num_verified=len(taken[-1]))
    assert taken[0] == [7, 8, 9]
    assert taken[-1] == [1]


def test_of_a_draft_only_what_follows_the_tokens_in_flight_is_of_use() -> None:
    serving = Serving()
    serving.propose([30, 31, 32])
    plans = [serving.driver.begin([Row("r", 9, num_in_flight=number)], serving.now_s) for number in range(4)]
    assert [plan.drafts for plan in plans] == [{"r": [30, 31, 32]}, {"r": [31, 32]}, {"r": [32]}, {}]


def test_tokens_a_second_are_told_apart_by_whether_a_step_was_waited_for() -> None:
    serving = Serving()
    for number in range(60):
        has_gap = bool(number % 2)
        serving.driver.last = StepPlan(num_rows=1, has_gap=has_gap)
        serving.step(40, *[41] * has_gap, num_verified=has_gap, took_s=STEP_S)
    assert serving.driver.speedups.gain_of_waiting == pytest.approx(2.0, rel=0.1)
    assert serving.driver.counters["waited_steps"] == 30


def test_what_an_earlier_try_of_waiting_gave_counts_little() -> None:
    """Steps that waited yielded one token each; later ones, after a pause, yield two."""
    serving = Serving()

    def step(number: int, has_gap: bool, *decided: int) -> None:
        for _ in range(number):
            serving.driver.last = StepPlan(num_rows=1, has_gap=has_gap)
            serving.step(*decided, num_verified=len(decided) - 1, took_s=STEP_S * (1.8 if has_gap else 1.0))

    step(60, True, 40)
    step(60, False, 40)
    assert serving.driver.speedups.gain_of_waiting < 0.9
    step(8, True, 40, 41, 42)
    assert serving.driver.speedups.gain_of_waiting > 1.0


def test_a_suggestion_needs_no_edge() -> None:
    driver = new_driver(num_edges=0)
    tokens = list(PROMPT)
    driver.open("r", tokens, "")
    driver.suggest({"r": [1, 2]}, 0.0)
    assert driver.plan([Row("r", 9)], 1.0) == StepPlan(drafts={"r": [1, 2]})
    tokens += [1, 2, 3]
    assert driver.commit("r", 2, 1.0) == []
    driver.learn()
    assert driver.counters["ngram_accepted_tokens"] == driver.counters["ngram_verified_tokens"] == 2


def test_suggestions_that_do_not_pay_are_left_until_they_were_right_unverified() -> None:
    serving = Serving(new_driver(token_s=STEP_S / 10))

    def is_used(suggestion: list[int], decided: list[int]) -> bool:
        serving.driver.suggest({"r": suggestion}, 0.0)
        draft = serving.plan().drafts.get("r", [])
        assert draft == suggestion[: len(draft)]
        serving.decode(*decided, num_verified=len(draft))
        return bool(draft)

    used = [is_used([1, 2, 3, 4], [9]) for _ in range(20)]
    assert used[0]
    assert not used[-1]
    assert used == sorted(used, reverse=True)
    used = [is_used([1, 2, 3, 4], [1]) for _ in range(20)]
    assert not used[0]
    assert used[-1]
    assert used == sorted(used)


def test_what_a_suggestion_was_worth_says_nothing_of_the_edge() -> None:
    serving = Serving()
    before = dict(serving.driver.counters)
    rates = list(serving.rates)
    held_until_s = serving.plan().holds["r"] - serving.now_s
    serving.decode(60)
    for token in range(30):
        serving.driver.suggest({"r": [token, 99]}, 0.0)
        assert serving.plan().drafts["r"] == [token, 99]
        serving.decode(token, 50, num_verified=2)
    assert serving.plan().holds["r"] - serving.now_s == pytest.approx(held_until_s)
    assert serving.rates == rates
    counters = serving.driver.counters
    for name in ("verified_drafts", "verified_tokens", "accepted_tokens", "tree_hits", "missed_holds"):
        assert counters[name] == before.get(name, 0)
    assert (counters["ngram_verified_tokens"], counters["ngram_accepted_tokens"]) == (60, 30)


# -- predicted outputs --------------------------------------------------------------------------------------------


def test_a_prediction_is_verified_where_there_is_no_edge_and_followed_as_the_answer_grows() -> None:
    driver = new_driver(num_edges=0)
    tokens = list(PROMPT)
    driver.open("r", tokens, "")
    tokens += [1, 2]
    driver.commit("r", 0, 1.0)
    driver.predict("r", [1, 2, 3, 4, 5, 6, 7, 8])  # comes late, and is caught up with
    assert driver.locally_drafted == {"r"}
    assert driver.plan([Row("r", 9)], 1.0) == StepPlan(drafts={"r": [3, 4, 5, 6]})
    tokens += [3, 4, 9]  # the target says another token than 5
    driver.commit("r", 4, 2.0)
    assert driver.plan([Row("r", 9)], 2.0) == StepPlan(drafts={"r": [6, 7, 8]})
    driver.learn()
    assert driver.counters["prediction_verified_tokens"] == 4
    assert driver.counters["prediction_accepted_tokens"] == 2
    assert driver.counters["prediction_verified_drafts"] == 1
    driver.close("r")
    assert driver.locally_drafted == set()


@pytest.mark.parametrize("said", [[], [1, VOCAB_SIZE], [-1, 1]])
def test_a_prediction_that_is_none_is_left_out_and_counted(said: list[int]) -> None:
    driver = new_driver(num_edges=0)
    driver.open("r", list(PROMPT), "")
    driver.predict("r", said)
    driver.predict("another", [1])
    assert driver.locally_drafted == set()
    assert driver.counters["refused_predictions"] == 1
    assert driver.plan([Row("r", 9)], 1.0) == StepPlan()


def test_what_a_prediction_was_worth_says_nothing_of_the_edge() -> None:
    serving = Serving()
    rates, verified = list(serving.rates), serving.driver.counters["verified_tokens"]
    serving.driver.predict("r", [18, 19, 20, 21, 22, *[7] * 40])
    for _ in range(20):
        draft = serving.plan().drafts.get("r", [])
        serving.decode(8, num_verified=len(draft))
    assert serving.rates == rates
    assert serving.driver.counters["verified_tokens"] == verified
    assert serving.driver.counters["prediction_verified_tokens"] > 0


# -- counters -----------------------------------------------------------------------------------------------------


def test_what_an_engine_reports_is_what_happened() -> None:
    serving = Serving()
    length = len(serving.tokens)
    serving.propose([1, 2, 3], branches=[(1, [9, 8, 7])])
    serving.propose([1, 2])
    serving.go_on(5, [6], num_ahead=3)
    serving.decode(1, 2, 9, num_verified=3)
    serving.decode(4)
    serving.propose([1, 2], after=length)
    serving.propose([1, 2], after=length)
    serving.propose([1, 2, 9, 5, 6], after=length)
    [report, _] = serving.driver.close("r")
    assert isinstance(report, Report)
    said = dict(zip((name for name, _ in REQUEST_COUNTERS), report.values, strict=True))
    assert said == {
        "steps": 5,
        "committed_tokens": 1 + 2 + 2 + 3 + 1,
        "proposed_tokens": 1 + 1 + 6 + 2 + 1 + 2 + 2 + 5,
        "repeated_tokens": 2,
        "discarded_late": 2 + 2,
        "discarded_mismatch": 1 + 2 + 5,
        "discarded_gap": 1,
        "discarded_over_budget": 0,
        "discarded_unused": 0,
        "verified_tokens": 1 + 1 + 3,
        "accepted_tokens": 1 + 1 + 2,
        "ngram_verified_tokens": 0,
        "ngram_accepted_tokens": 0,
        "prediction_verified_tokens": 0,
        "prediction_accepted_tokens": 0,
        "tree_hits": 1,
        "round_trips_saved": 1,
        "ahead_tokens": 1 + 1 + 3 + 2,
    }
    assert serving.driver.counters["verified_drafts"] == 3
    assert serving.driver.counters["proposals_mismatch"] == 1


def test_a_counter_that_no_longer_fits_says_so() -> None:
    serving = Serving()
    serving.driver.named("r").counters["steps"] = MAX_UINT32 + 7
    [report, _] = serving.driver.close("r")
    assert isinstance(report, Report)
    assert report.values[0] == MAX_UINT32


def test_frames_that_a_gateway_has_no_business_sending_are_counted() -> None:
    driver = new_driver()
    assert driver.receive(Pong(1), 1.0) == []
    assert driver.receive(EngineOpen(0, 1, 1, ""), 1.0) == []
    assert driver.counters["unexpected_frames"] == 2


# -- a step has two ends -----------------------------------------------------------------------------------------


def test_what_a_step_verified_for_a_request_that_ended_in_it_is_booked_to_that_step() -> None:
    serving = Serving()
    serving.step(30)
    serving.propose([31, 32])
    plan = serving.plan()
    serving.driver.speedups.take_groups()
    started_s, serving.now_s = serving.now_s, serving.now_s + STEP_S
    serving.tokens += [31, 32, 33]
    frames = serving.driver.end(plan, outcome("r", 3, 2, is_over=True), Step(started_s, serving.now_s))
    [group] = serving.driver.speedups.take_groups()
    assert (group.requests, group.verified, group.accepted) == (1, 2, 2)
    assert group.ended_s == serving.now_s
    commit, report, close = frames
    assert isinstance(commit, Commit)
    assert commit.tokens == (31, 32, 33)
    assert isinstance(report, Report)
    assert report.values[VERIFIED] == serving.driver.counters["verified_tokens"]
    assert close == Close(0, CloseReason.FINISHED)


def test_what_a_request_made_in_its_last_step_is_priced_by_that_step() -> None:
    """Not by the previous step, which may have had another size."""

    def speedup(num_right_at_last: int) -> float:
        serving = Serving()
        serve(serving, 50, 0)
        plan = serving.plan()
        started_s, serving.now_s = serving.now_s, serving.now_s + STEP_S
        serving.tokens += [1] * (1 + num_right_at_last)
        done = outcome("r", 1 + num_right_at_last, num_right_at_last, is_over=True)
        serving.driver.end(plan, done, Step(started_s, serving.now_s))
        return serving.driver.speedups.ratio

    assert speedup(4) > speedup(0) == pytest.approx(1, rel=0.02)


def test_a_plan_may_be_asked_for_several_times_and_counts_once() -> None:
    """An engine whose edge is busy asks more often; its probes must not come earlier."""
    serving = Serving()
    for _ in range(FIRST_PROBE_AFTER):
        serving.propose([1])
        plans = [serving.driver.begin([Row("r", 9)], serving.now_s, Load(room=1)) for _ in range(3)]
        assert plans[0] == plans[1] == plans[2] == StepPlan()
        assert serving.driver._probing.num_refused < FIRST_PROBE_AFTER
        serving.driver.start(plans[-1])
        serving.decode(1)
    assert serving.driver._probing.num_refused == FIRST_PROBE_AFTER


def test_a_request_in_several_plans_is_held_once() -> None:
    serving = Serving()
    for _ in range(3):
        assert serving.driver.begin([Row("r", 9)], serving.now_s).holds
    assert serving.driver.counters["holds"] == 0
    serving.plan()
    assert serving.driver.counters["holds"] == 1


# -- whatever happens ---------------------------------------------------------------------------------------------

near = st.integers(0, 12)
few = st.integers(0, 2)  # so that drafts and decisions often agree


@st.composite
def proposals(draw: st.DrawFn) -> Propose:
    tokens = draw(st.lists(few, max_size=8))
    branches = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=2))
    rude = draw(st.sampled_from([[], [], [], [VOCAB_SIZE - 1], [VOCAB_SIZE]]))
    return fitting(draw(st.integers(0, 3)), draw(near), (*tokens, *rude), branches)


@dataclass(frozen=True)
class Act:
    """An action of the engine on request `i`."""

    kind: str
    i: int
    tokens: list[int]


@dataclass(frozen=True)
class GoodDraft:
    """An edge's frame for request `i` that starts with a token it knows, `back` before the last."""

    i: int
    back: int
    tokens: list[int]
    branches: list[tuple[int, int]]


frames = (
    proposals()
    | st.builds(Assign, st.integers(0, 3), st.integers(0, 2))
    | st.builds(Edges, st.integers(0, 2))
    | any_frame()
)
runs = st.lists(few, max_size=6)
acts = (
    st.builds(Act, st.sampled_from(["step", "step", "suggest", "predict", "plan"]), st.integers(0, 1), runs)
    | st.builds(GoodDraft, st.integers(0, 1), st.integers(0, 3), runs, st.lists(st.tuples(near, near), max_size=2))
    | st.builds(Act, st.sampled_from(["open", "close", "step"]), st.integers(0, 2), runs)
    | frames
)
histories = st.lists(acts, min_size=10, max_size=60)


class Engine:
    """Acts as the engine around a driver, and sends whatever a gateway may send."""

    def __init__(self, limit: int) -> None:
        self.driver = new_driver(num_edges=0)
        self.limit = limit
        self.views: dict[str, list[int]] = {}
        self.plan = StepPlan()
        self.now_s = 0.0
        self.counted: list[dict[str, int]] = []
        """For each ended request: its counters, and how many committed tokens its tree held."""
        self._held: dict[str, int] = {}
        self._heard: dict[int, list[int]] = {}

    def do(self, act: Act | GoodDraft | Frame) -> None:
        self.now_s += 0.01
        match act:
            case Act():
                self._act(f"r{act.i}", act)
            case GoodDraft():
                self._draft(f"r{act.i}", act)
            case _:
                self._publish(self.driver.receive(act, self.now_s))
        self.look()

    def _publish(self, frames: Sequence[Frame]) -> None:
        """Check that a gateway receives for each request Open, then its tokens without a gap, then Close."""
        for frame in frames:
            match frame:
                case EngineOpen():
                    self._heard[frame.request] = []
                case Commit():
                    heard = self._heard[frame.request]
                    assert frame.tokens
                    assert frame.base == len(heard)
                    heard += frame.tokens
                    assert heard == self.views[self.driver._ledger._ids[frame.request]][: len(heard)]
                case Close():
                    del self._heard[frame.request]
                case _:
                    assert isinstance(frame, Report)

    def look(self) -> None:
        """Make a StepPlan, and check that all of it is legal."""
        self.plan = plan = self.driver.plan([Row(f"r{i}", self.limit) for i in range(3)], self.now_s)
        assert plan.drafts.keys() | plan.holds.keys() <= self.views.keys()
        assert not plan.drafts.keys() & plan.holds.keys()
        for id_, draft in plan.drafts.items():
            assert 0 < len(draft) <= min(self.limit, MAX_DRAFT)
            assert all(0 <= token < VOCAB_SIZE for token in draft)
            request = self.driver.named(id_)
            match plan.verdict(id_)[0]:
                case Source.NGRAM:
                    known = request.suggestion
                case Source.PREDICTION:
                    known = request.prediction.draft(len(draft))
                case Source.EDGE:
                    known = request.tree.chain(len(draft))
            assert draft == list(known[: len(draft)])
        assert all(self.now_s < until_s <= self.now_s + 0.1 for until_s in plan.holds.values())
        assert plan.wait_until_s is None or plan.holds.keys() == self.views.keys()

    def _act(self, id_: str, act: Act) -> None:
        view = self.views.get(id_)
        if act.kind == "open" and view is None:
            self.views[id_], self._held[id_] = [0, *act.tokens], 0
            self._publish(self.driver.open(id_, self.views[id_], ""))
        elif act.kind == "close":
            self._close(id_)
        elif act.kind == "suggest":
            self.driver.suggest({id_: act.tokens}, 0.0)
        elif act.kind == "predict":
            self.driver.predict(id_, act.tokens)
        elif act.kind == "step" and view is not None:
            self._step(id_, view, act.tokens)

    def _step(self, id_: str, view: list[int], chosen: list[int]) -> None:
        """Run a step: the target chooses these tokens one after the other, as long as the draft has predicted them."""
        draft = self.plan.drafts.get(id_, [])
        num_right = next(
            (i for i, pair in enumerate(zip(draft, chosen, strict=False)) if pair[0] != pair[1]), len(draft)
        )
        tokens = chosen[: num_right + 1]
        node = self.driver.named(id_).tree._root
        for token in tokens:
            if token not in node.children:
                break
            node = node.children[token]
            self._held[id_] += 1
        view += tokens
        self._publish(self.driver.commit(id_, len(draft), self.now_s))

    def _draft(self, id_: str, draft: GoodDraft) -> None:
        if id_ in self.views:
            base = max(0, len(self.views[id_]) - 1 - draft.back)
            tokens = (*self.views[id_][base:], *draft.tokens)
            self.driver.receive(fitting(self.driver.named(id_).number, base, tokens, draft.branches), self.now_s)

    def _close(self, id_: str) -> None:
        request = self.driver._ledger.find(id_)
        frames = self.driver.close(id_)
        self._publish(frames)
        if self.views.pop(id_, None) is None or request is None:
            assert frames == []
            return
        assert frames in ([], [Report(request.number, request_values(request.counters)), Close(request.number, 0)])
        assert request.counters.keys() <= {name for name, _ in REQUEST_COUNTERS}
        self.counted.append({**request.counters, "held": self._held.pop(id_)})

    def end(self) -> None:
        for id_ in list(self.views):
            self._close(id_)
        assert len(self.driver) == 0


START = [Act("open", 0, [0]), Edges(1), Act("open", 1, [1]), Assign(0, 1), Assign(1, 1)]


@given(histories, st.integers(0, 6))
def test_whatever_a_hostile_gateway_sends_only_legal_drafts_are_offered(
    acts: list[Act | GoodDraft | Frame], limit: int
) -> None:
    engine = Engine(limit)
    for act in [*START, *acts]:
        engine.do(act)
    assert len(engine.driver) == len(engine.views)


@given(histories, st.integers(1, 6))
def test_every_proposed_and_every_committed_token_is_accounted_for(
    acts: list[Act | GoodDraft | Frame], limit: int
) -> None:
    engine = Engine(limit)
    for act in [*START, *acts]:
        engine.do(act)
    engine.end()
    for counters in engine.counted:
        said = {name: counters.get(name, 0) for name, _ in REQUEST_COUNTERS}
        discarded = sum(number for name, number in said.items() if name.startswith("discarded_"))
        assert said["proposed_tokens"] == said["repeated_tokens"] + discarded + counters["held"]
        accepted = sum(said[f"{source.value}accepted_tokens"] for source in Source)
        assert said["committed_tokens"] == said["steps"] + accepted
        assert said["ngram_accepted_tokens"] <= said["ngram_verified_tokens"]
        assert said["prediction_accepted_tokens"] <= said["prediction_verified_tokens"]
        assert said["accepted_tokens"] <= min(said["verified_tokens"], counters["held"])
        assert said["tree_hits"] <= said["round_trips_saved"] <= said["steps"]
    for name, _ in REQUEST_COUNTERS:
        assert engine.driver.counters[name] == sum(counters.get(name, 0) for counters in engine.counted)


# -- what steps take ----------------------------------------------------------------------------------------------


def test_one_slow_step_does_not_keep_a_lookup_that_is_right_from_being_verified() -> None:
    serving = Serving(new_driver(token_s=STEP_S / 100))
    for token in range(100):
        serving.step(token)
    serving.step(1, 2, num_verified=1, took_s=10 * STEP_S)
    for token in range(30):
        serving.driver.suggest({"r": [token, 0, 0, 0]}, 0.0)
        num_verified = len(serving.plan().drafts.get("r", ()))
        assert num_verified
        serving.step(token, 99, num_verified=num_verified, took_s=STEP_S * 1.01)


def test_what_lies_deeper_than_what_is_verified_is_learnt_where_all_of_that_was_accepted() -> None:
    """Otherwise a depth that once had bad luck would be excluded forever."""
    serving = Serving()
    serving.propose([1, 2, 3])
    before = serving.rates[1]
    serving.decode(1, 2, num_verified=1)
    assert serving.rates[1] > before
    serving.propose([1, 2, 3])
    before = serving.rates[1]
    serving.decode(1, 9, num_verified=1)
    assert serving.rates[1] < before


def verified_of_three(serving: Serving, token_s: float) -> int:
    """How many of three right draft tokens a step verifies if each makes it longer by `token_s`."""
    serving.propose([1, 2, 3])
    number = len(serving.plan().drafts.get("r", ()))
    serving.step(*[1, 2, 3, 9][: number + 1], num_verified=number, took_s=STEP_S + number * token_s)
    return number


def test_where_drafts_do_not_pay_a_little_is_tried_now_and_then_until_they_do() -> None:
    """The cost of verifying can only be measured by verifying."""
    serving = Serving(new_driver(token_s=2 * STEP_S))
    while_costly = [verified_of_three(serving, 2 * STEP_S) for _ in range(4 * PROBE_AFTER)]
    tries = [index for index, number in enumerate(while_costly) if number]
    refused = [after - before - 1 for before, after in pairwise([-1, *tries])]
    assert refused == [FIRST_PROBE_AFTER * 2**number for number in range(4)] + [PROBE_AFTER] * 2
    assert sum(while_costly) == len(tries)
    while_free = [verified_of_three(serving, 0.0) for _ in range(20 * PROBE_AFTER)]
    assert min(while_free[-20:]) > 0


def test_what_seems_to_cost_more_than_is_allowed_is_tried_all_the_same_or_it_would_seem_so_for_ever() -> None:
    serving = Serving(new_driver(token_s=2 * STEP_S, max_stretch=1.5))
    while_costly = [verified_of_three(serving, 2 * STEP_S) for _ in range(4 * FORCED_AFTER * PROBE_AFTER)]
    tries = [index for index, number in enumerate(while_costly) if number]
    refused = [after - before - 1 for before, after in pairwise([-1, *tries])]
    assert refused[:5] == [FORCED_AFTER * FIRST_PROBE_AFTER * 2**number for number in range(5)]
    assert set(refused[5:]) == {FORCED_AFTER * PROBE_AFTER}
    while_free = [verified_of_three(serving, 0.0) for _ in range(20 * FORCED_AFTER * PROBE_AFTER)]
    assert min(while_free[-20:]) > 0


def test_where_drafts_always_pay_one_step_is_plain_now_and_then() -> None:
    """The time of a plain step can only be measured by a plain step."""
    serving = Serving()
    verified = [verified_of_three(serving, 0.0) for _ in range(4 * PLAIN_PROBE_AFTER)]
    plain = [index for index, number in enumerate(verified) if not number]
    assert plain == [PLAIN_PROBE_AFTER, 2 * PLAIN_PROBE_AFTER + 1, 3 * PLAIN_PROBE_AFTER + 2]


def test_steps_without_a_draft_are_plain_so_that_none_need_be_made_so() -> None:
    serving = Serving()
    for _ in range(3):
        assert all(verified_of_three(serving, 0.0) == 3 for _ in range(PLAIN_PROBE_AFTER - 1))
        serving.plan(limit=0)
        serving.step(9)


def test_while_all_wait_no_step_is_counted() -> None:
    serving = Serving()
    for _ in range(PLAIN_PROBE_AFTER):
        assert serving.plan().wait_until_s is not None
        serving.now_s += ANSWER_S
        assert verified_of_three(serving, 0.0) == 3
    assert verified_of_three(serving, 0.0) == 0


@pytest.mark.parametrize("mode", ["wait", "never-wait"])
def test_where_all_is_verified_whatever_it_costs_no_step_is_made_plain(mode: str) -> None:
    serving = Serving(new_driver(mode=mode))
    assert all(verified_of_three(serving, 0.0) == 3 for _ in range(2 * PLAIN_PROBE_AFTER))


@pytest.mark.parametrize(("right_every", "growth"), [(10, 0.3), (3, 0.6), (2, 1.0), (2, 0.7)])
def test_where_drafts_are_always_there_and_do_not_pay_that_is_found_out(right_every: int, growth: float) -> None:
    """Even if they cost nothing in the profile at start-up."""
    serving = Serving()
    verified = []
    for number in range(2 * PLAIN_PROBE_AFTER):
        serving.propose([1, 2, 3])
        verified.append(len(serving.plan().drafts.get("r", ())))
        tokens = [1, 9] if verified[-1] and number % right_every == 0 else [9]
        serving.step(*tokens, num_verified=verified[-1], took_s=STEP_S * (1 + growth * verified[-1]))
    assert verified[0] > 0
    assert sum(verified[-100:]) < 10


def test_where_drafts_are_right_and_there_and_even_so_do_not_pay_that_is_found_out() -> None:
    """With only an occasional plain step to learn from, and a curve that starts flat."""
    serving = Serving()
    verified = [verified_of_three(serving, 1.2 * STEP_S) for _ in range(2000)]
    assert sum(verified[-100:]) < 20


def test_steps_and_their_time_are_counted() -> None:
    serving = Serving()
    serving.step(1, took_s=0.25)
    serving.step(1, 2, num_verified=1, took_s=0.5)
    serving.step(took_s=0.125, prefilled=100)
    assert (serving.driver.counters["engine_steps"], serving.driver.counters["engine_step_us"]) == (3, 875_000)


def serve(serving: Serving, num_steps: int, num_right: int, took_s: float = STEP_S) -> None:
    """Run `num_steps` steps, in each of which `num_right` draft tokens are verified and right."""
    for _ in range(num_steps):
        serving.plan()
        serving.step(*[1] * (num_right + 1), num_verified=num_right, took_s=took_s)


@pytest.mark.parametrize("num_right", [0, 1, 4])
def test_the_speedup_is_how_many_tokens_a_plain_step_s_time_brings(num_right: int) -> None:
    serving = Serving()
    assert serving.driver.speedups.ratio == 1.0
    serve(serving, 400, num_right)
    assert serving.driver.speedups.ratio == pytest.approx(1 + num_right, rel=0.02)


def test_neither_prompts_nor_an_idle_server_count_as_slow() -> None:
    serving = Serving()
    serve(serving, 400, 1)
    for _ in range(20):
        serving.plan()
        serving.step(1, took_s=10 * STEP_S, prefilled=1000)
    assert serving.driver.speedups.ratio == pytest.approx(2, rel=0.02)
    serving.driver.close("r")
    serving.now_s += 1000.0
    serving.tokens = list(PROMPT)
    serving.driver.open("r", serving.tokens, "")
    serving.step(1, prefilled=len(PROMPT))
    serve(serving, 1, 1)
    assert serving.driver.speedups.ratio == pytest.approx(2, rel=0.02)


def test_a_wait_counts_as_time_spent() -> None:
    serving = Serving()
    for _ in range(400):
        serving.plan()
        serving.now_s += STEP_S
        serving.step(1, 1, num_verified=1)
    assert serving.driver.speedups.ratio == pytest.approx(1, rel=0.02)


def test_a_request_may_wait_for_its_draft_once_drafts_have_made_it_faster() -> None:
    """No request's tokens may come much later than without drafts."""
    serving = Serving(new_driver(max_slowdown=1.01))
    assert serving.plan() == StepPlan()
    serve(serving, 10, 2)
    assert serving.plan().holds
    serve(serving, 200, 0, 1.2 * STEP_S)
    assert serving.plan() == StepPlan()


def test_what_edges_bring_is_the_share_of_requests_that_have_one_and_how_right_drafts_are_here() -> None:
    assert new_driver().edge_drafts.share == 0.0
    serving = Serving()
    assert serving.driver.edge_drafts.share == 1.0
    serving.driver.open("other", list(PROMPT), "")
    assert serving.driver.edge_drafts.share == 0.5
    before = serving.driver.edge_drafts.survivals
    assert before == sorted(before, reverse=True)
    serving.propose([23, 24])
    serving.decode(23, 24, 25, num_verified=2)
    assert serving.driver.edge_drafts.survivals > before
