"""Figures of the status page: sums over engines that join, leave and wrap around, and the edges' numbers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_specedge.gateway.known import ROLES, RouterLimits
from vllm_specedge.gateway.router import Router
from vllm_specedge.gateway.status import GROUPS_S, HOUR_S, MAX_GROUPS, MAX_NAME, NOW_S, SAMPLE_S, Overview
from vllm_specedge.wire.codec import encode
from vllm_specedge.wire.engine_frames import EngineHello, EngineOpen, Groups, Report, Stats
from vllm_specedge.wire.frames import PROTOCOL_VERSION, Commit, Hello, Propose
from vllm_specedge.wire.telemetry import ENGINE_COUNTERS, REQUEST_COUNTERS, Group, groups_frame, groups_of

INDEX = {name: index for index, (name, _) in enumerate(ENGINE_COUNTERS)}
WRAP = 2**32


def stats(**values: int) -> Stats:
    counted = [0] * len(ENGINE_COUNTERS)
    for name, value in values.items():
        counted[INDEX[name]] = value % WRAP
    return Stats(tuple(counted))


def engine(router: Router, name: bytes, **values: int) -> None:
    if name not in router.engines:
        router.from_engine(name, EngineHello(PROTOCOL_VERSION, "toy", "f", 9))
    router.from_engine(name, stats(**values))


def test_at_first_nothing_is_known() -> None:
    view = Overview().view(Router(RouterLimits()), {}, 0.0)
    assert view["models"] == view["edges"] == view["groups"] == []
    assert set(view["now"].values()) == {None}  # type: ignore[attr-defined]
    assert view["now"].keys() == view["hour"].keys()  # type: ignore[attr-defined]


def test_figures_are_those_of_the_last_seconds_and_the_last_hour() -> None:
    router, overview = Router(RouterLimits()), Overview()
    for second in range(0, 4002, 2):
        slow = second <= 3000
        base = second * 10 if slow else 30_000 + (second - 3000) * 40
        engine(
            router,
            b"a",
            committed_tokens=base,
            steps=second * 10,
            verified_drafts=second * 5,
            engine_steps=second * 10,
            engine_step_us=second * 10 * 50_000,
            verified_tokens=second * 20,
            accepted_tokens=second * 10,
            decode_us=second * 400_000,
            plain_decode_us=second * 600_000,
        )
        overview.sample(router, float(second))
    now, hour = (overview.view(router, {}, 4000.0)[name] for name in ("now", "hour"))
    assert now["tokens_per_s"] == pytest.approx(40.0)  # type: ignore[index]
    assert hour["tokens_per_s"] == pytest.approx((2600 * 10 + 1000 * 40) / 3600, rel=0.01)  # type: ignore[index]
    for figures in (now, hour):
        assert figures["step_ms"] == pytest.approx(50.0)  # type: ignore[index]
        assert figures["speedup"] == pytest.approx(1.5)  # type: ignore[index]
        assert figures["acceptance"] == pytest.approx(0.5)  # type: ignore[index]
        assert figures["edge_share"] == pytest.approx(0.5)  # type: ignore[index]
        assert figures["plain_share"] == pytest.approx(0.5)  # type: ignore[index]
    assert now["from_edges"] == pytest.approx(10 / 40)  # type: ignore[index]


@given(
    st.lists(
        st.dictionaries(st.sampled_from([b"a", b"b", b"c"]), st.integers(0, WRAP - 1)),
        min_size=2,
        max_size=int(NOW_S / SAMPLE_S),
    ),
)
def test_engines_come_go_and_wrap_around(rounds: list[dict[bytes, int]]) -> None:
    """Each time that an engine joins it counts from 0."""
    router, overview, counted, expected = Router(RouterLimits()), Overview(), dict[bytes, int](), 0
    present: set[bytes] = set()
    for number, more in enumerate(rounds):
        for name in present - more.keys():
            router.engine_left(name)
            del counted[name]
        for name, tokens in more.items():
            counted[name] = counted.get(name, 0) + tokens
            engine(router, name, committed_tokens=counted[name])
            expected += tokens if number else 0
        present = set(more)
        overview.sample(router, number * SAMPLE_S)
    now = overview.view(router, {}, len(rounds) * SAMPLE_S)["now"]
    seconds = (len(rounds) - 1) * SAMPLE_S
    assert now["tokens_per_s"] == pytest.approx(expected / seconds, abs=1e-3)  # type: ignore[index]


def test_samples_are_taken_no_more_often_than_needed_and_kept_for_an_hour() -> None:
    router, overview = Router(RouterLimits()), Overview()
    for tick in range(int(10 * HOUR_S)):
        overview.sample(router, tick / 2)
    assert len(overview._samples) == HOUR_S / SAMPLE_S + 1


def test_an_edge_s_numbers() -> None:
    router, overview = Router(RouterLimits()), Overview()
    router.from_engine(b"a", EngineHello(PROTOCOL_VERSION, "toy", "f", 9))
    router.edge_hello(1, Hello(PROTOCOL_VERSION, "client/1", "n" * 200, "pool", "f", 4), "s", frozenset(ROLES))
    overview.sample(router, 0.0)
    router.from_engine(b"a", EngineOpen(0, 2, 5, ""))
    router.from_engine(b"a", Commit(0, 0, (1, 2)))
    router.from_edge(1, Propose(0, 1, (2, 3, 4)))
    router.from_engine(b"a", Commit(0, 2, (3, 4, 5, 6)))
    values = dict.fromkeys((name for name, _ in REQUEST_COUNTERS), 0) | {"verified_tokens": 4, "accepted_tokens": 3}
    router.from_engine(b"a", Report(0, tuple(values.values())))
    overview.sample(router, SAMPLE_S)
    (edge,) = overview.view(router, {1: 0.0215}, SAMPLE_S)["edges"]  # type: ignore[misc]
    assert edge == {
        "number": 1,
        "name": "n" * MAX_NAME,
        "client": "client/1",
        "role": "pool",
        "rtt_ms": 21.5,
        "requests": 1,
        "proposed": 2,
        "accepted": 3,
        "acceptance": 0.75,
        "tokens_per_s": 4 / SAMPLE_S,
    }


GROUPS = st.builds(
    Group,
    ended_s=st.floats(0, 99),
    took_s=st.floats(0, 9),
    requests=st.integers(0, 999),
    verified=st.integers(0, 999),
    accepted=st.integers(0, 999),
)


@given(st.lists(GROUPS, max_size=40), st.floats(100, 110))
def test_steps_travel_and_are_shown_while_they_are_recent(groups: list[Group], now_s: float) -> None:
    frame = groups_frame(groups, now_s)
    encode(frame)
    overview = Overview()
    overview.steps(groups_of(frame, now_s))
    shown = overview.view(Router(RouterLimits()), {}, now_s)["groups"]
    recent = [group for group in groups if now_s - group.ended_s <= GROUPS_S - 1e-5]
    assert [tuple(row[2:]) for row in shown][: len(recent)] == [  # type: ignore[attr-defined]
        (group.requests, group.verified, group.accepted) for group in recent
    ]
    for (ago, took, *_), group in zip(shown, recent, strict=False):  # type: ignore[call-overload]
        assert ago == pytest.approx(1e3 * (now_s - group.ended_s), abs=1)
        assert took == pytest.approx(1e3 * group.took_s, abs=0.1)
    json.dumps(shown, allow_nan=False)


@given(st.lists(st.integers(0, WRAP - 1), max_size=60))
def test_whatever_an_engine_says_of_its_steps_is_shown_or_left_out(values: list[int]) -> None:
    overview = Overview()
    for _ in range(MAX_GROUPS):
        overview.steps(groups_of(Groups(tuple(values)), 1e6))
    view = overview.view(Router(RouterLimits()), {}, 1e6)
    assert len(view["groups"]) <= MAX_GROUPS  # type: ignore[arg-type]
    json.dumps(view, allow_nan=False)
