from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.helpers import fitting, refused
from vllm_specedge.errors import ByeCode
from vllm_specedge.gateway.effects import Effect, RequestReport, ToEdge, ToEngine
from vllm_specedge.gateway.known import MAX_UNREAD_TOKENS, PRIVATE, ROLES, RouterLimits
from vllm_specedge.gateway.prefix_memory import MAX_EXTRA_LOAD, PrefixMemory
from vllm_specedge.gateway.router import MAX_GAPS, MAX_REPORT_VALUES, MAX_REPORTS, Router
from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.engine_frames import (
    Assign,
    Edges,
    EngineHello,
    EngineOpen,
    EngineWelcome,
    Groups,
    Report,
    Stats,
    StepTimes,
)
from vllm_specedge.wire.frames import (
    MAX_UINT32,
    PROTOCOL_VERSION,
    Bye,
    Close,
    CloseReason,
    Commit,
    Hello,
    Open,
    Ping,
    Pong,
    Propose,
    Welcome,
    commits,
)

ALL_ROLES = frozenset(ROLES)
ENGINE = b"e"
VOCAB_SIZE = 1000
ENGINE_HELLO = EngineHello(PROTOCOL_VERSION, "toy", "f", VOCAB_SIZE)
HEARTBEAT_MS = RouterLimits().heartbeat_ms


def edge_hello(
    role: str = "pool", fingerprint: str = "f", max_requests: int = 4, version: int = PROTOCOL_VERSION
) -> Hello:
    return Hello(version, "test", "laptop", role, fingerprint, max_requests)


def refusal_of(effects: list[Effect]) -> Bye:
    [effect] = effects
    assert isinstance(effect, ToEdge)
    assert isinstance(effect.frame, Bye)
    return effect.frame


def ready_router(**limits: int) -> Router:
    router = Router(RouterLimits(**{"credit_tokens": 5, **limits}))
    router.from_engine(ENGINE, ENGINE_HELLO)
    return router


def open_request(router: Router, number: int, tokens: Iterable[int] = (1, 2, 3), session: str = "") -> list[Effect]:
    tokens = tuple(tokens)
    frames: list[Frame] = [EngineOpen(number, len(tokens), 5, session), *commits(number, 0, tokens)]
    return [effect for frame in frames for effect in router.from_engine(ENGINE, frame)]


# -- engines ------------------------------------------------------------------------------------------------------


def test_an_engine_is_welcomed_and_told_how_many_edges_could_draft_for_it() -> None:
    router = Router(RouterLimits())
    assert router.from_engine(ENGINE, ENGINE_HELLO) == [
        ToEngine(ENGINE, EngineWelcome(PROTOCOL_VERSION)),
        ToEngine(ENGINE, Edges(0)),
    ]


def test_an_engine_of_another_version_is_turned_away() -> None:
    [effect] = Router(RouterLimits()).from_engine(ENGINE, EngineHello(PROTOCOL_VERSION + 1, "toy", "f", 9))
    assert isinstance(effect.frame, Bye)
    assert effect.frame.code == ByeCode.VERSION


def test_an_engine_that_has_not_said_hello_is_told_to() -> None:
    router = Router(RouterLimits())
    frames: list[Frame] = [EngineOpen(0, 1, 5, ""), Ping(1), Stats((1,)), StepTimes((), 0, 0, 0), Report(0, (1,))]
    for frame in frames:
        [effect] = router.from_engine(ENGINE, frame)
        assert isinstance(effect.frame, Bye)
        assert effect.frame.code == ByeCode.GOING_AWAY


def test_an_engine_is_answered_counted_and_not_believed_everything() -> None:
    router = ready_router()
    assert router.from_engine(ENGINE, Ping(7)) == [ToEngine(ENGINE, Pong(7))]
    assert router.from_engine(ENGINE, Stats((1, 2))) == []
    assert router.engine_totals[:3] == [1, 2, 0]
    assert router.from_engine(ENGINE, StepTimes((5, 6), 1, 2, 3)) == []
    assert router.step_times() == {0: StepTimes((5, 6), 1, 2, 3)}
    assert router.from_engine(ENGINE, Propose(0, 0, (1,))) == []
    assert router.counters["unexpected_engine_frames"] == 1


def test_an_engine_that_says_hello_again_starts_anew() -> None:
    router = ready_router()
    router.edge_hello(1, edge_hello(), "s", ALL_ROLES)
    open_request(router, 0)
    assert router.from_engine(ENGINE, ENGINE_HELLO) == [
        ToEdge(1, Close(0, CloseReason.FINISHED)),
        ToEngine(ENGINE, EngineWelcome(PROTOCOL_VERSION)),
        ToEngine(ENGINE, Edges(1)),
    ]
    assert router.num_requests == 0


def test_an_engine_that_leaves_takes_its_waiting_requests_along() -> None:
    """A place freed by its first request must not go to its second."""
    router = ready_router()
    router.from_engine(b"other", ENGINE_HELLO)
    router.edge_hello(1, edge_hello(max_requests=1), "s", ALL_ROLES)
    open_request(router, 0)
    open_request(router, 1)
    router.from_engine(b"other", EngineOpen(0, 1, 5, ""))
    router.from_engine(b"other", Commit(0, 0, (9,)))
    assert router.engine_left(ENGINE) == [
        ToEdge(1, Close(0, CloseReason.FINISHED)),
        ToEdge(1, Open(1, 1, 5, 5, "")),
        ToEdge(1, Commit(1, 0, (9,))),
        ToEdge(1, Ping(2)),
        ToEngine(b"other", Assign(0, 2)),
    ]
    assert router.engine_left(ENGINE) == []


def test_the_counters_of_the_requests_that_closed_last_are_kept_by_engine() -> None:
    router = ready_router()
    router.from_engine(b"other", ENGINE_HELLO)
    for number, engine in enumerate((ENGINE, b"other", ENGINE)):
        router.from_engine(engine, EngineOpen(number, 1, 5, ""))
        [reported] = router.from_engine(engine, Report(number, (number, 7)))
        assert reported == RequestReport(number % 2, (number, 7))
        router.from_engine(engine, Close(number, CloseReason.FINISHED))
    assert list(router.reports) == [RequestReport(0, (0, 7)), RequestReport(1, (1, 7)), RequestReport(0, (2, 7))]
    router.from_engine(ENGINE, ENGINE_HELLO)
    router.from_engine(ENGINE, EngineOpen(0, 1, 5, ""))
    router.from_engine(ENGINE, Report(0, ()))
    assert router.reports[-1] == RequestReport(2, ())


def test_a_request_counts_once_and_only_if_it_is_known() -> None:
    router = ready_router()
    open_request(router, 0)
    assert [len(router.from_engine(ENGINE, Report(number, (1,)))) for number in (0, 0, 1)] == [1, 0, 0]
    assert len(router.reports) == 1
    assert (router.counters["reports"], router.counters["dropped_reports"]) == (1, 2)


def test_what_an_engine_says_of_its_steps_is_shown_if_it_has_said_hello() -> None:
    router, groups = Router(RouterLimits()), Groups((1, 2, 3, 4, 5))
    assert groups not in router.from_engine(ENGINE, groups)
    assert ready_router().from_engine(ENGINE, groups) == [groups]


def test_reports_are_bounded_in_number_and_length() -> None:
    router = ready_router()
    for number in range(MAX_REPORTS + 2):
        router.from_engine(ENGINE, EngineOpen(number, 1, 5, ""))
        router.from_engine(ENGINE, Report(number, (number,) * 1024))
        router.from_engine(ENGINE, Close(number, CloseReason.FINISHED))
    assert len(router.reports) == MAX_REPORTS
    assert router.reports[0].values == (2,) * MAX_REPORT_VALUES


# -- edges --------------------------------------------------------------------------------------------------------


def test_an_edge_is_welcomed_and_the_engines_told() -> None:
    router = ready_router()
    assert router.edge_hello(1, edge_hello(), "s", ALL_ROLES) == [
        ToEdge(1, Welcome("s", "toy", VOCAB_SIZE, HEARTBEAT_MS)),
        ToEngine(ENGINE, Edges(1)),
    ]
    assert router.edge_left(1) == [ToEngine(ENGINE, Edges(0))]
    assert router.edge_left(1) == []


@pytest.mark.parametrize(
    ("hello", "roles", "code"),
    [
        (edge_hello(version=PROTOCOL_VERSION + 1), ALL_ROLES, ByeCode.VERSION),
        (edge_hello(role="pool"), frozenset({PRIVATE}), ByeCode.ROLE),
        (edge_hello(role="admin"), ALL_ROLES, ByeCode.ROLE),
        (edge_hello(fingerprint="other"), ALL_ROLES, ByeCode.TOKENIZER),
    ],
)
def test_an_edge_that_cannot_be_of_use_is_told_why(hello: Hello, roles: frozenset[str], code: ByeCode) -> None:
    router = ready_router()
    bye = refusal_of(router.edge_hello(1, hello, "s", roles))
    assert bye.code == code
    assert len(bye.text) > 20
    assert router.edges == {}


def test_an_edge_may_come_back_when_there_is_an_engine_or_room() -> None:
    assert refusal_of(Router(RouterLimits()).edge_hello(1, edge_hello(), "s", ALL_ROLES)).code == ByeCode.NO_ENGINE
    router = ready_router(max_edges=1)
    router.edge_hello(1, edge_hello(), "s", ALL_ROLES)
    assert refusal_of(router.edge_hello(2, edge_hello(), "t", ALL_ROLES)).code == ByeCode.FULL


def test_a_drafter_without_a_tokenizer_suits_every_engine() -> None:
    router = ready_router()
    assert ToEngine(ENGINE, Edges(1)) in router.edge_hello(1, edge_hello(fingerprint=""), "s", ALL_ROLES)


def test_an_edge_is_answered_its_pings() -> None:
    router = ready_router()
    router.edge_hello(1, edge_hello(), "s", ALL_ROLES)
    assert router.from_edge(1, Ping(5)) == [ToEdge(1, Pong(5))]
    assert router.from_edge(1, Pong(5)) == []
    with pytest.raises(TypeError):
        router.from_edge(1, ENGINE_HELLO)


# -- requests -----------------------------------------------------------------------------------------------------


def test_a_request_goes_to_an_edge_when_its_prompt_is_whole() -> None:
    router = ready_router()
    router.edge_hello(1, edge_hello(), "s", ALL_ROLES)
    sampling = (1, 700, 20, 950, 3, 0, 1234)
    assert router.from_engine(ENGINE, EngineOpen(7, 3, 5, "", sampling)) == []
    assert router.from_engine(ENGINE, Commit(7, 0, (1, 2))) == []
    assert router.from_engine(ENGINE, Commit(7, 2, (3,))) == [
        ToEdge(1, Open(0, 3, 5, 5, "", sampling)),
        ToEdge(1, Commit(0, 0, (1, 2, 3))),
        ToEdge(1, Ping(1)),
        ToEngine(ENGINE, Assign(7, 2)),
    ]
    assert router.from_engine(ENGINE, Commit(7, 3, (4, 5))) == [ToEdge(1, Commit(0, 3, (4, 5)))]
    proposal = Propose(0, 5, (8, 9, 7), (1, 1))
    assert router.from_edge(1, proposal) == [ToEngine(ENGINE, replace(proposal, request=7))]
    assert router.from_engine(ENGINE, Close(7, CloseReason.FINISHED)) == [ToEdge(1, Close(0, CloseReason.FINISHED))]
    assert router.from_engine(ENGINE, Close(7, CloseReason.FINISHED)) == []
    assert router.from_engine(ENGINE, Commit(7, 5, (1,))) == []


def test_a_request_waits_for_an_edge_and_is_opened_with_all_its_tokens() -> None:
    router = ready_router()
    open_request(router, 7)
    router.from_engine(ENGINE, Commit(7, 3, (4,)))
    assert router.edge_hello(1, edge_hello(), "s", ALL_ROLES)[2:] == [
        ToEdge(1, Open(0, 4, 5, 5, "")),
        ToEdge(1, Commit(0, 0, (1, 2, 3, 4))),
        ToEdge(1, Ping(1)),
        ToEngine(ENGINE, Assign(7, 2)),
    ]


def test_requests_are_spread_over_the_edges() -> None:
    router = ready_router()
    for edge in (1, 2, 3):
        router.edge_hello(edge, edge_hello(), "s", ALL_ROLES)
    for number in range(6):
        open_request(router, number)
    assert [len(info.requests) for info in router.edges.values()] == [2, 2, 2]


@pytest.mark.parametrize(("asked", "limit"), [(2, 32), (1000, 2)])
def test_an_edge_gets_no_more_requests_than_it_asked_for_and_the_operator_allows(asked: int, limit: int) -> None:
    router = ready_router(max_requests_per_edge=limit)
    router.edge_hello(1, edge_hello(max_requests=asked), "s", ALL_ROLES)
    for number in range(4):
        open_request(router, number)
    assert len(router.edges[1].requests) == 2
    effects = router.from_engine(ENGINE, Close(0, CloseReason.FINISHED))
    assert effects[-1] == ToEngine(ENGINE, Assign(2, 2))


def test_a_request_that_names_a_session_goes_to_that_edge_alone() -> None:
    router = ready_router()
    router.edge_hello(1, edge_hello(), "one", ALL_ROLES)
    router.edge_hello(2, edge_hello(PRIVATE), "two", ALL_ROLES)
    assert open_request(router, 0, session="two")[0] == ToEdge(2, Open(0, 3, 5, 5, "two"))
    assert open_request(router, 1, session="three") == []
    assert open_request(router, 2)[0] == ToEdge(1, Open(0, 3, 5, 5, ""))
    assert router.edge_left(1) == [ToEngine(ENGINE, Assign(2, 0)), ToEngine(ENGINE, Edges(1))]
    assert router.edge_left(2) == [ToEngine(ENGINE, Assign(0, 0)), ToEngine(ENGINE, Edges(0))]


def test_when_an_edge_leaves_its_requests_go_to_another() -> None:
    router = ready_router()
    router.edge_hello(1, edge_hello(), "s", ALL_ROLES)
    open_request(router, 0)
    router.edge_hello(2, edge_hello(), "t", ALL_ROLES)
    assert router.edge_left(1) == [
        ToEdge(2, Open(0, 3, 5, 5, "")),
        ToEdge(2, Commit(0, 0, (1, 2, 3))),
        ToEdge(2, Ping(1)),
        ToEngine(ENGINE, Assign(0, 3)),
        ToEngine(ENGINE, Edges(1)),
    ]


@pytest.mark.parametrize("edge", [0, 7])
def test_the_engine_is_told_the_number_of_the_edge_and_none_has_the_number_zero(edge: int) -> None:
    router = ready_router()
    router.edge_hello(edge, edge_hello(), "s", ALL_ROLES)
    assert open_request(router, 0)[-1] == ToEngine(ENGINE, Assign(0, edge + 1))
    assert open_request(router, 1)[-1] == ToEngine(ENGINE, Assign(1, edge + 1))


def test_a_request_that_is_declined_goes_to_another_edge_and_never_back() -> None:
    router = ready_router()
    router.edge_hello(1, edge_hello(), "s", ALL_ROLES)
    open_request(router, 0)
    assert router.from_edge(1, Close(0, CloseReason.DECLINED)) == [ToEngine(ENGINE, Assign(0, 0))]
    assert router.from_edge(1, Close(0, CloseReason.DECLINED)) == []
    assert router.edge_hello(2, edge_hello(), "t", ALL_ROLES)[-1] == ToEngine(ENGINE, Assign(0, 3))
    assert router.edge_left(2)[0] == ToEngine(ENGINE, Assign(0, 0))


def test_room_that_a_declined_request_leaves_is_given_to_one_that_waits() -> None:
    router = ready_router()
    router.edge_hello(1, edge_hello(max_requests=1), "s", ALL_ROLES)
    open_request(router, 0)
    open_request(router, 1, tokens=[5])
    assert router.from_edge(1, Close(0, CloseReason.DECLINED)) == [
        ToEngine(ENGINE, Assign(0, 0)),
        ToEdge(1, Open(1, 1, 5, 5, "")),
        ToEdge(1, Commit(1, 0, (5,))),
        ToEdge(1, Ping(2)),
        ToEngine(ENGINE, Assign(1, 2)),
    ]


def test_an_edge_that_lost_track_gets_its_request_anew() -> None:
    router = ready_router()
    router.edge_hello(1, edge_hello(), "s", ALL_ROLES)
    open_request(router, 0)
    assert router.from_edge(1, Close(0, CloseReason.GAP)) == [
        ToEdge(1, Open(1, 3, 5, 5, "")),
        ToEdge(1, Commit(1, 0, (1, 2, 3))),
        ToEdge(1, Ping(2)),
        ToEngine(ENGINE, Assign(0, 2)),
    ]


def test_an_edge_that_loses_track_of_a_request_again_and_again_does_not_get_it_again() -> None:
    router = ready_router()
    router.edge_hello(1, edge_hello(), "s", ALL_ROLES)
    open_request(router, 0)
    for number in range(MAX_GAPS):
        assert router.from_edge(1, Close(number, CloseReason.GAP))[-1] == ToEngine(ENGINE, Assign(0, 2))
    assert router.from_edge(1, Close(MAX_GAPS, CloseReason.GAP)) == [ToEngine(ENGINE, Assign(0, 0))]


def test_an_edge_gets_no_more_long_prompts_until_it_has_read_those_it_has() -> None:
    router = ready_router()
    router.edge_hello(1, edge_hello(), "s", ALL_ROLES)
    assert open_request(router, 0, [1] * MAX_UNREAD_TOKENS)[-1] == ToEngine(ENGINE, Assign(0, 2))
    assert open_request(router, 1) == []
    for stamp in (0, 2):
        assert router.from_edge(1, Pong(stamp)) == []
    assert router.from_edge(1, Pong(1)) == [
        ToEdge(1, Open(1, 3, 5, 5, "")),
        ToEdge(1, Commit(1, 0, (1, 2, 3))),
        ToEdge(1, Ping(2)),
        ToEngine(ENGINE, Assign(1, 2)),
    ]


def test_commits_that_went_missing_end_the_drafting_for_a_request() -> None:
    router = ready_router()
    router.edge_hello(1, edge_hello(), "s", ALL_ROLES)
    open_request(router, 0)
    assert router.from_engine(ENGINE, Commit(0, 4, (9,))) == [
        ToEdge(1, Close(0, CloseReason.GAP)),
        ToEngine(ENGINE, Assign(0, 0)),
    ]
    assert router.counters["commit_gaps"] == 1
    assert router.num_requests == 0


def test_a_request_that_an_engine_opens_again_moves() -> None:
    router = ready_router()
    router.edge_hello(1, edge_hello(), "s", ALL_ROLES)
    open_request(router, 0)
    assert open_request(router, 0, tokens=[8])[:2] == [
        ToEdge(1, Close(0, CloseReason.MOVED)),
        ToEdge(1, Open(1, 1, 5, 5, "")),
    ]


def test_requests_over_a_limit_are_not_drafted_for() -> None:
    router = ready_router(max_requests=1, max_context_tokens=4)
    router.edge_hello(1, edge_hello(), "s", ALL_ROLES)
    assert open_request(router, 0, tokens=range(5)) == []
    assert open_request(router, 1)[-1] == ToEngine(ENGINE, Assign(1, 2))
    assert open_request(router, 2) == []
    assert router.counters["requests_over_limit"] == 2
    assert ToEdge(1, Close(0, CloseReason.GAP)) in router.from_engine(ENGINE, Commit(1, 3, (4, 5)))


# -- prefixes -----------------------------------------------------------------------------------------------------

FIRST, SECOND = tuple(range(300)), tuple(range(500, 800))


def edge_of(router: Router, number: int) -> int | None:
    """The edge that drafts for a request of ENGINE."""
    edges = [id_ for id_, info in router.edges.items() if (ENGINE, number) in info.requests.values()]
    assert len(edges) <= 1
    return edges[0] if edges else None


def close_request(router: Router, number: int) -> None:
    router.from_engine(ENGINE, Close(number, CloseReason.FINISHED))


def router_with_pool(*edges: int, max_requests: int = 8) -> Router:
    router = ready_router()
    for edge in edges:
        router.edge_hello(edge, edge_hello(max_requests=max_requests), f"s{edge}", ALL_ROLES)
    return router


def test_a_follow_up_goes_to_the_edge_that_knows_its_conversation() -> None:
    router = router_with_pool(1, 2)
    open_request(router, 0, FIRST)
    open_request(router, 1, SECOND)
    assert (edge_of(router, 0), edge_of(router, 1)) == (1, 2)
    answer = tuple(range(900, 999))
    router.from_engine(ENGINE, Commit(1, len(SECOND), answer))
    close_request(router, 0)
    close_request(router, 1)
    open_request(router, 2, (*SECOND, *answer, 1, 2, 3))
    assert edge_of(router, 2) == 2
    assert router.counters["assigned_by_prefix"] == 1
    open_request(router, 3, SECOND)
    assert edge_of(router, 3) == 2


def test_what_was_generated_is_known_too() -> None:
    """The prompt is shorter than a block: only the tokens after it can be recognized."""
    router = router_with_pool(1, 2)
    open_request(router, 0, [9])
    open_request(router, 1, [8])
    router.from_engine(ENGINE, Commit(1, 1, FIRST))
    close_request(router, 0)
    close_request(router, 1)
    open_request(router, 2, (8, *FIRST, 1))
    assert edge_of(router, 2) == 2


def test_an_unrelated_request_goes_to_the_least_loaded_edge() -> None:
    router = router_with_pool(1, 2, 3)
    open_request(router, 0, FIRST)
    open_request(router, 1, FIRST)
    assert [len(info.requests) for info in router.edges.values()] == [2, 0, 0]
    open_request(router, 2, SECOND)
    # Blocks count from the start: text that is equal only later is not a prefix.
    open_request(router, 3, (5, *FIRST))
    assert (edge_of(router, 2), edge_of(router, 3)) == (2, 3)
    assert router.counters["assigned_by_prefix"] == 1


def test_an_edge_that_is_clearly_busier_does_not_get_a_follow_up() -> None:
    router = router_with_pool(1, 2)
    for number in range(1 + MAX_EXTRA_LOAD):
        open_request(router, number, FIRST)
        assert edge_of(router, number) == 1
    open_request(router, 9, FIRST)
    assert edge_of(router, 9) == 2
    # Both know it now, and the one that read it last comes first.
    open_request(router, 10, FIRST)
    assert edge_of(router, 10) == 2


def test_a_common_beginning_that_is_not_most_of_a_context_only_settles_ties() -> None:
    router = router_with_pool(1, 2)
    system = FIRST[:128]
    open_request(router, 0, SECOND)
    open_request(router, 1, (*system, *SECOND))
    assert edge_of(router, 1) == 2
    open_request(router, 2, (*system, *range(900, 999), *SECOND))
    assert edge_of(router, 2) == 2  # as loaded as edge 1
    open_request(router, 3, (*system, *range(800, 900), *SECOND))
    assert edge_of(router, 3) == 1


def test_a_full_edge_does_not_get_a_follow_up() -> None:
    router = router_with_pool(1, 2, max_requests=1)
    open_request(router, 0, FIRST)
    open_request(router, 1, FIRST)
    assert edge_of(router, 1) == 2


def test_a_request_that_was_declined_does_not_go_back_for_its_prefix() -> None:
    router = router_with_pool(1, 2)
    open_request(router, 0, FIRST)
    router.from_edge(1, Close(0, CloseReason.DECLINED))
    assert edge_of(router, 0) == 2
    open_request(router, 1, FIRST)
    assert edge_of(router, 1) == 2  # which had it last


def test_an_edge_that_left_is_forgotten_even_if_its_number_comes_back() -> None:
    memory = PrefixMemory()
    router = Router(RouterLimits(), memory)
    router.from_engine(ENGINE, ENGINE_HELLO)
    for edge in (1, 2):
        router.edge_hello(edge, edge_hello(), f"s{edge}", ALL_ROLES)
    open_request(router, 0, SECOND)
    open_request(router, 1, FIRST)
    assert edge_of(router, 1) == 2
    close_request(router, 1)
    assert len(memory) == len(FIRST) // 64 + len(SECOND) // 64
    router.edge_left(2)
    assert len(memory) == len(SECOND) // 64
    router.edge_hello(2, edge_hello(), "s2", ALL_ROLES)
    close_request(router, 0)
    open_request(router, 2, FIRST)
    assert edge_of(router, 2) == 1
    assert router.counters["assigned_by_prefix"] == 0


def test_a_request_that_names_a_session_neither_follows_a_prefix_nor_leaves_one() -> None:
    router = router_with_pool(1, 2)
    router.edge_hello(3, edge_hello(PRIVATE), "mine", ALL_ROLES)
    open_request(router, 0, SECOND)
    open_request(router, 1, FIRST)
    assert edge_of(router, 1) == 2
    for number, session, edge in ((2, "s2", 2), (3, "mine", 3), (4, "s1", 1)):
        open_request(router, number, FIRST, session)
        assert edge_of(router, number) == edge
        close_request(router, number)
    assert router.counters["assigned_by_prefix"] == 0
    open_request(router, 5, FIRST)
    assert edge_of(router, 5) == 2


def test_what_is_remembered_of_prefixes_is_bounded() -> None:
    memory = PrefixMemory()
    for first in range(300):
        memory.remember(array("I", [first, *range(10_000)]), first)
        assert len(memory) <= 4096
    assert len(memory) == 4096
    assert list(memory.holders(array("I", [0, *range(10_000)]))) == []
    assert next(memory.holders(array("I", [299, *range(10_000)]))) == (1.0, 299)


_contexts = st.lists(st.integers(0, 1), max_size=12)


@given(st.lists(st.tuples(_contexts, st.integers(0, 3), st.booleans()), max_size=12), _contexts, st.integers(1, 8))
@example([([0, 0], 0, False), ([1, 1], 1, False), ([0, 0], 0, False), ([0, 1], 2, False)], [0, 0], 2)
def test_the_longest_beginnings_that_were_used_last_are_known(
    events: list[tuple[list[int], int, bool]], wanted: list[int], max_kept: int
) -> None:
    """Against a list of all prefixes of whole blocks (2 tokens, at most 4 blocks), the last used one at the end."""
    memory = PrefixMemory(block_tokens=2, max_blocks=4, max_kept=max_kept)
    known: dict[tuple[int, ...], int] = {}
    for tokens, edge, leaves in events:
        if leaves:
            memory.forget(edge)
            known = {beginning: holder for beginning, holder in known.items() if holder != edge}
        else:
            memory.remember(array("I", tokens), edge)
            for beginning in beginnings(tokens):
                known.pop(beginning, None)
                known[beginning] = edge
            known = dict(list(known.items())[-max_kept:])
        assert len(memory) == len(known)
    parts = [(beginning, known[beginning]) for beginning in reversed(beginnings(wanted)) if beginning in known]
    assert list(memory.holders(array("I", wanted))) == [
        (len(beginning) / min(len(wanted), 8), edge) for beginning, edge in parts
    ]


def beginnings(tokens: list[int]) -> list[tuple[int, ...]]:
    return [tuple(tokens[:end]) for end in range(2, min(len(tokens), 8) + 1, 2)]


class FewConversations:
    """A router whose edges know most of the new contexts, whether they may draft for them or not."""

    def __init__(self, hellos: list[Hello]) -> None:
        self.router = Router(RouterLimits(), PrefixMemory(block_tokens=1))
        self.router.from_engine(ENGINE, ENGINE_HELLO)
        for id_, hello in enumerate(hellos):
            self.router.edge_hello(id_, hello, f"s{id_}", ALL_ROLES)
        self.sessions: dict[int, str] = {}
        """Session of each live request."""
        self.declined: set[tuple[int, int]] = set()
        self.num_opened = 0

    def may(self, edge: int, number: int) -> bool:
        session, info = self.sessions[number], self.router.edges[edge]
        is_asked = session == info.session if session else info.hello.role == "pool"
        return is_asked and (edge, number) not in self.declined

    def open(self, conversation: int, session: str) -> None:
        number = self.num_opened
        self.num_opened += 1
        self.sessions[number] = session
        infos = self.router.edges.items()
        loads = {edge: len(info.requests) for edge, info in infos if info.has_room and self.may(edge, number)}
        open_request(self.router, number, [conversation, conversation, 100 + number], session)
        edge = edge_of(self.router, number)
        assert edge in loads if loads else edge is None
        assert edge is None or loads[edge] <= min(loads.values()) + MAX_EXTRA_LOAD

    def close(self, number: int) -> None:
        del self.sessions[number]
        close_request(self.router, number)

    def decline(self, number: int) -> None:
        edge = edge_of(self.router, number)
        if edge is not None:
            self.declined.add((edge, number))
            [its_number] = [n for n, key in self.router.edges[edge].requests.items() if key[1] == number]
            self.router.from_edge(edge, Close(its_number, CloseReason.DECLINED))


@settings(max_examples=150)
@given(
    st.lists(st.builds(edge_hello, st.sampled_from(["pool", "pool", "private"]), max_requests=st.integers(1, 3))),
    st.lists(st.tuples(st.sampled_from(["open", "open", "close", "decline"]), st.integers(0, 9), st.integers(0, 2))),
)
def test_prefixes_only_choose_among_edges_that_may_and_can(
    hellos: list[Hello], events: list[tuple[str, int, int]]
) -> None:
    world = FewConversations(hellos)
    for event, pick, conversation in events:
        numbers = list(world.sessions)
        if event == "open" or not numbers:
            world.open(conversation, session=f"s{pick}" if pick < 3 else "")
        elif event == "close":
            world.close(numbers[pick % len(numbers)])
        else:
            world.decline(numbers[pick % len(numbers)])
        owners = {number: edge_of(world.router, number) for number in world.sessions}
        assert all(edge is None or world.may(edge, number) for number, edge in owners.items())
        assert all(len(info.requests) <= info.hello.max_requests for info in world.router.edges.values())


# -- proposals ----------------------------------------------------------------------------------------------------


def test_proposals_that_cannot_come_true_are_dropped_and_counted() -> None:
    router = ready_router()
    router.edge_hello(1, edge_hello(), "s", ALL_ROLES)
    open_request(router, 0)
    assert router.from_edge(1, Propose(9, 2, (3, 1))) == []
    assert router.from_edge(1, Propose(0, 0, (1, 2, 3))) == []
    assert router.from_edge(1, Propose(0, 0, (1, 2, 3, 3), (1, 1))) == []
    assert router.from_edge(1, Propose(0, 2, ())) == []
    assert router.from_edge(1, Propose(0, 2, (3, *[1] * 6))) == []
    assert router.from_edge(1, Propose(0, 2, (3, 1, *[1] * 6), (1, 6))) == []
    assert router.from_edge(1, Propose(0, 9, ())) == []
    assert router.counters == {"assigned": 1, "dropped_closed": 1, "dropped_late": 3, "dropped_ahead": 3}


def test_a_late_proposal_whose_tail_is_ahead_and_a_pass_go_through() -> None:
    router = ready_router()
    router.edge_hello(1, edge_hello(), "s", ALL_ROLES)
    open_request(router, 4)
    late = Propose(0, 1, (2, 3, 4))
    late_but_for_a_branch = Propose(0, 1, (2, 9, 3, 4), (1, 2))
    up_to_the_credit = Propose(0, 2, (3, *[1] * 5, *[5] * 5), (5, 5))
    for proposal in (late, late_but_for_a_branch, up_to_the_credit, Propose(0, 3, ())):
        assert router.from_edge(1, proposal) == [ToEngine(ENGINE, replace(proposal, request=4))]
    assert router.counters["proposed_tokens"] == router.edges[1].num_proposed_tokens == 2 + 3 + 10


@pytest.mark.parametrize("credit", [1, 8, 32])
def test_the_operator_s_credit_goes_before_the_engine_s(credit: int) -> None:
    router = ready_router(credit_tokens=credit)
    router.edge_hello(1, edge_hello(), "s", ALL_ROLES)
    assert open_request(router, 0)[0] == ToEdge(1, Open(0, 3, 5, credit, ""))
    assert len(router.from_edge(1, Propose(0, 2, (3, *[1] * credit)))) == 1
    assert router.from_edge(1, Propose(0, 2, (3, *[1] * (credit + 1)))) == []


def test_a_token_id_outside_of_the_vocabulary_ends_the_connection() -> None:
    router = ready_router()
    router.edge_hello(1, edge_hello(), "s", ALL_ROLES)
    open_request(router, 0)
    bye = refusal_of(router.from_edge(1, Propose(0, 3, (VOCAB_SIZE,))))
    assert bye.code == ByeCode.TOKEN_ID
    assert str(VOCAB_SIZE) in bye.text


# -- everything at once -------------------------------------------------------------------------------------------

CREDIT = 4
LIMITS = RouterLimits(max_edges=4, max_requests_per_edge=3, max_requests=6, max_context_tokens=60, credit_tokens=CREDIT)
ENGINES = {b"a": EngineHello(PROTOCOL_VERSION, "A", "fa", 500), b"b": EngineHello(PROTOCOL_VERSION, "B", "fb", 400)}
NUM_COMMON = 2
"""Every prompt starts with this many tokens of two kinds, so that contexts share prefixes."""
SESSIONS = [f"session {edge}" for edge in range(6)]


@dataclass
class Request:
    opening: Open
    tokens: list[int] = field(default_factory=list)
    declined: set[int] = field(default_factory=set)
    num_gaps: int = 0
    edge: int = 0
    """The latest number sent to the engine."""

    @property
    def is_known(self) -> bool:
        return len(self.tokens) >= self.opening.num_tokens


@dataclass
class Edge:
    """An edge's view: its open requests by number, with the tokens sent to it."""

    hello: Hello
    session: str
    seen: dict[int, tuple[Open, list[int]]] = field(default_factory=dict)

    @property
    def has_room(self) -> bool:
        return len(self.seen) < min(self.hello.max_requests, LIMITS.max_requests_per_edge)


Key = tuple[bytes, int]


class Routing(RuleBasedStateMachine):
    """One token of each prompt is unique, so that an edge's view identifies the request."""

    @initialize()
    def begin(self) -> None:
        self.router = Router(LIMITS, PrefixMemory(block_tokens=1, max_blocks=5, max_kept=12))
        self.engines: dict[bytes, int] = {}
        """The number of edges last reported to each engine."""
        self.requests: dict[Key, Request] = {}
        self.edges: dict[int, Edge] = {}
        self.pings: list[tuple[int, int]] = []
        self.num_serials = 0
        self.next_edge = 0

    # -- what the effects must be ---------------------------------------------------------------------------------

    def carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, ToEdge):
                self.at_edge(effect.edge, effect.frame)
            else:
                self.at_engine(effect.engine, effect.frame)

    def at_engine(self, engine: bytes, frame: Frame) -> None:
        assert engine in ENGINES
        match frame:
            case Edges():
                self.engines[engine] = frame.num_edges
            case Assign():
                if (engine, frame.request) in self.requests:
                    self.requests[engine, frame.request].edge = frame.edge
            case Propose():
                request = self.requests[engine, frame.request]
                assert request.edge
                assert all(token < ENGINES[engine].vocab_size for token in frame.tokens)
                end = max(base + len(tokens) for base, tokens in frame.runs)
                assert end <= len(request.tokens) + CREDIT
                assert not frame.tokens or end > len(request.tokens)
            case _:
                assert isinstance(frame, EngineWelcome)

    def at_edge(self, id_: int, frame: Frame) -> None:
        edge = self.edges[id_]
        match frame:
            case Open():
                assert frame.request not in edge.seen
                assert frame.credit == CREDIT
                edge.seen[frame.request] = (frame, [])
            case Commit() if not edge.seen[frame.request][1]:
                edge.seen[frame.request][1].extend(frame.tokens)
                self.was_given(edge, self.key_of(list(frame.tokens)))
            case Commit():
                tokens = edge.seen[frame.request][1]
                assert frame.base <= len(tokens)
                overlap = tokens[frame.base :]
                assert list(frame.tokens[: len(overlap)]) == overlap[: len(frame.tokens)]
                tokens += frame.tokens[len(overlap) :]
            case Close():
                del edge.seen[frame.request]
            case Ping():
                self.pings.append((id_, frame.stamp))
            case Bye():
                del self.edges[id_]
                self.carry_out(self.router.edge_left(id_))
            case _:
                assert isinstance(frame, Welcome)
                assert frame.session == edge.session

    def was_given(self, edge: Edge, key: Key) -> None:
        """Check that a request was assigned to an edge with about the lowest load, regardless of known prefixes."""
        loads = [
            len(other.seen)
            for id_, other in self.edges.items()
            if other.has_room and self.suits(other, key) and id_ not in self.requests[key].declined
        ]
        assert len(edge.seen) - 1 <= min(loads, default=MAX_UINT32) + MAX_EXTRA_LOAD

    def key_of(self, tokens: list[int]) -> Key:
        unique = tokens[NUM_COMMON]
        [key] = [key for key, request in self.requests.items() if unique in request.tokens]
        return key

    def suits(self, edge: Edge, key: Key) -> bool:
        session = self.requests[key].opening.session
        may = session == edge.session if session else edge.hello.role == "pool"
        return may and edge.hello.fingerprint in ("", ENGINES[key[0]].fingerprint)

    @invariant()
    def every_edge_sees_its_own_requests_as_they_are(self) -> None:
        owners: dict[Key, int] = {}
        for id_, edge in self.edges.items():
            assert len(edge.seen) <= min(edge.hello.max_requests, LIMITS.max_requests_per_edge)
            for opened, tokens in edge.seen.values():
                key = self.key_of(tokens)
                assert tokens == self.requests[key].tokens
                assert self.requests[key].is_known
                assert opened.num_tokens <= len(tokens)
                assert self.suits(edge, key)
                assert id_ not in self.requests[key].declined
                assert key not in owners
                owners[key] = id_
        told = {key: request.edge - 1 for key, request in self.requests.items() if request.edge}
        assert told == owners

    @invariant()
    def no_request_waits_while_an_edge_that_suits_has_room(self) -> None:
        for key, request in self.requests.items():
            if request.is_known and not request.edge:
                for id_, edge in self.edges.items():
                    assert not (edge.has_room and self.suits(edge, key)) or id_ in request.declined

    @invariant()
    def everything_is_bounded_and_counted(self) -> None:
        assert self.router.num_requests == len(self.requests) <= LIMITS.max_requests
        assert self.router.edges.keys() == self.edges.keys()
        assert len(self.edges) <= LIMITS.max_edges
        for engine, num_edges in self.engines.items():
            fingerprints = ("", ENGINES[engine].fingerprint)
            assert num_edges == sum(edge.hello.fingerprint in fingerprints for edge in self.edges.values())

    # -- what happens ---------------------------------------------------------------------------------------------

    @rule(engine=st.sampled_from(list(ENGINES)))
    def engine_joins(self, engine: bytes) -> None:
        self.requests = {key: request for key, request in self.requests.items() if key[0] != engine}
        self.carry_out(self.router.from_engine(engine, ENGINES[engine]))

    @precondition(lambda self: self.engines)
    @rule(data=st.data(), is_sure=st.integers(0, 4))
    def engine_leaves(self, data: st.DataObject, is_sure: int) -> None:
        if is_sure == 0:
            engine = data.draw(st.sampled_from(list(self.engines)))
            del self.engines[engine]
            self.requests = {key: request for key, request in self.requests.items() if key[0] != engine}
            self.carry_out(self.router.engine_left(engine))

    @rule(role=st.sampled_from(ROLES), fingerprint=st.sampled_from(["", "fa", "fb"]), room=st.integers(0, 5))
    def edge_joins(self, role: str, fingerprint: str, room: int) -> None:
        id_, session = self.next_edge, SESSIONS[self.next_edge % len(SESSIONS)]
        self.next_edge += 1
        if any(edge.session == session for edge in self.edges.values()):
            return
        hello = edge_hello(role, fingerprint, room)
        self.edges[id_] = Edge(hello, session)
        is_full = len(self.edges) > LIMITS.max_edges
        has_engine = any(fingerprint in ("", ENGINES[engine].fingerprint) for engine in self.engines)
        self.carry_out(self.router.edge_hello(id_, hello, session, ALL_ROLES))
        assert (id_ in self.edges) == (has_engine and not is_full)

    @precondition(lambda self: self.edges)
    @rule(data=st.data())
    def edge_leaves(self, data: st.DataObject) -> None:
        id_ = data.draw(st.sampled_from(list(self.edges)))
        del self.edges[id_]
        self.carry_out(self.router.edge_left(id_))

    @precondition(lambda self: self.engines)
    @rule(
        data=st.data(),
        number=st.integers(0, 5),
        num_tokens=st.integers(NUM_COMMON + 1, NUM_COMMON + 4),
        num_missing=st.just(0) | st.integers(0, 2),
        session=st.just("") | st.sampled_from(SESSIONS),
    )
    def request_opens(self, data: st.DataObject, number: int, num_tokens: int, num_missing: int, session: str) -> None:
        engine = data.draw(st.sampled_from(list(self.engines)))
        self.requests.pop((engine, number), None)
        opening = EngineOpen(number, num_tokens, 5, session)
        if len(self.requests) < LIMITS.max_requests:
            self.requests[engine, number] = Request(opening)
        self.carry_out(self.router.from_engine(engine, opening))
        self.request_goes_on(data, (engine, number), max(0, num_tokens - num_missing), 0)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), num_tokens=st.integers(0, 6), overlap=st.integers(0, 2))
    def any_request_goes_on(self, data: st.DataObject, num_tokens: int, overlap: int) -> None:
        self.request_goes_on(data, data.draw(st.sampled_from(list(self.requests))), num_tokens, overlap)

    def request_goes_on(self, data: st.DataObject, key: Key, num_tokens: int, overlap: int) -> None:
        request = self.requests.get(key)
        if request is None:
            return
        tokens = data.draw(st.lists(st.integers(0, 9), min_size=num_tokens, max_size=num_tokens))
        for index, position in enumerate(range(len(request.tokens), len(request.tokens) + num_tokens)):
            if position < NUM_COMMON:
                tokens[index] %= 2
            elif position == NUM_COMMON:
                self.num_serials += 1
                tokens[index] = 100 + self.num_serials
        base = max(0, len(request.tokens) - overlap)
        frame = Commit(key[1], base, (*request.tokens[base:], *tokens))
        request.tokens += tokens
        if len(request.tokens) > LIMITS.max_context_tokens:
            del self.requests[key]
        self.carry_out(self.router.from_engine(key[0], frame))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), is_gap=st.booleans())
    def request_ends(self, data: st.DataObject, is_gap: bool) -> None:
        key = data.draw(st.sampled_from(list(self.requests)))
        base = len(self.requests.pop(key).tokens) + 1
        self.carry_out(self.router.from_engine(key[0], Commit(key[1], base, (1,)) if is_gap else Close(key[1], 0)))

    @precondition(lambda self: self.pings)
    @rule(data=st.data())
    def edge_answers_a_ping(self, data: st.DataObject) -> None:
        id_, stamp = data.draw(st.sampled_from(self.pings))
        if id_ in self.edges:
            self.carry_out(self.router.from_edge(id_, Pong(stamp)))

    @precondition(lambda self: any(edge.seen for edge in self.edges.values()))
    @rule(data=st.data(), reason=st.integers(0, 4))
    def edge_declines(self, data: st.DataObject, reason: int) -> None:
        id_, number = data.draw(st.sampled_from([(id_, n) for id_, edge in self.edges.items() for n in edge.seen]))
        _, tokens = self.edges[id_].seen.pop(number)
        request = self.requests[self.key_of(tokens)]
        request.num_gaps += reason == CloseReason.GAP
        if reason != CloseReason.GAP or request.num_gaps > MAX_GAPS:
            request.declined.add(id_)
        self.carry_out(self.router.from_edge(id_, Close(number, reason)))

    @precondition(lambda self: self.edges)
    @rule(
        data=st.data(),
        number=st.integers(0, 4),
        offset=st.integers(-3, 6),
        tokens=st.lists(st.integers(0, 9), max_size=6),
        is_rude=st.integers(0, 9),
        branches=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=2),
    )
    def edge_proposes_anything(
        self,
        data: st.DataObject,
        number: int,
        offset: int,
        tokens: list[int],
        is_rude: int,
        branches: list[tuple[int, int]],
    ) -> None:
        id_ = data.draw(st.sampled_from(list(self.edges)))
        edge = self.edges[id_]
        if is_rude == 0:
            tokens = [*tokens, data.draw(st.integers(398, 502))]
        number = data.draw(st.sampled_from([*edge.seen, number]))
        known = edge.seen[number][1] if number in edge.seen else []
        base = max(0, len(known) + offset)
        proposal = fitting(number, base, tokens, branches)
        effects = self.router.from_edge(id_, proposal)
        assert effects == self.expected(id_, proposal)
        self.carry_out(effects)

    def expected(self, id_: int, proposal: Propose) -> list[Effect]:
        number, tokens = proposal.request, proposal.tokens
        if number not in self.edges[id_].seen:
            return []
        known = self.edges[id_].seen[number][1]
        engine, request = self.key_of(known)
        vocab_size = ENGINES[engine].vocab_size
        bad = [token for token in tokens if token >= vocab_size]
        if bad:
            text = f"Token id {bad[0]} is outside of the model's vocabulary of {vocab_size}."
            return [ToEdge(id_, Bye(ByeCode.TOKEN_ID, text))]
        backs, lengths = proposal.branches[::2], proposal.branches[1::2]
        num_trunk = len(tokens) - sum(lengths)
        trunk_end = proposal.base + num_trunk
        if len(backs) != len(lengths) or num_trunk < bool(backs) or any(back > trunk_end for back in backs):
            return [ToEdge(id_, Bye(ByeCode.PROTOCOL, str(refused(lambda: proposal.runs))))]
        end = max([trunk_end, *(trunk_end - back + length for back, length in zip(backs, lengths, strict=True))])
        is_late = end <= len(known) if tokens else end != len(known)
        if end > len(known) + CREDIT or is_late:
            return []
        return [ToEngine(engine, replace(proposal, request=request))]


Routing.TestCase.settings = settings(max_examples=50, stateful_step_count=40)
TestRouting: Any = Routing.TestCase
