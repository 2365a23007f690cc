"""Predicted gain from a machine, from measurements."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from edge_client.forecast import (
    Measured,
    Speeds,
    _accepted,
    acceptance_of,
    forecast,
    knowledge,
    verdict,
    would_help,
)
from vllm_specedge.gateway.known import RouterLimits
from vllm_specedge.gateway.metrics import RouterCollector
from vllm_specedge.gateway.router import Router
from vllm_specedge.policy.step_cost import KNOTS
from vllm_specedge.simulation.models import FittedServer
from vllm_specedge.wire.engine_frames import EngineHello, Stats, StepTimes
from vllm_specedge.wire.frames import PROTOCOL_VERSION
from vllm_specedge.wire.telemetry import ENGINE_COUNTERS

GPU = FittedServer((1, 256, 512), (0.025, 0.026, 0.050), 1e-4, 20e-6)
"""Flat until its compute is full."""


def measured(**changes: float) -> Measured:
    values = {"pass_s": 0.004, "wide_pass_s": 0.006, "rows": 8, "max_width": 8, "rtt_s": 0.01}
    return Measured(**{**values, "server": GPU, "acceptance": 0.75, "spec_tokens": 5, **changes})  # type: ignore[arg-type]


def page(*times: StepTimes, stats: tuple[int, ...] = ()) -> str:
    """A gateway's /metrics."""
    router, registry = Router(RouterLimits()), CollectorRegistry()
    for number, each in enumerate(times):
        engine = bytes([number])
        router.from_engine(engine, EngineHello(PROTOCOL_VERSION, "toy", "f", 9))
        router.from_engine(engine, each)
        router.from_engine(engine, Stats(stats))
    registry.register(RouterCollector(router))
    return generate_latest(registry).decode()


def test_a_gateways_page_says_what_steps_take() -> None:
    curve_us = tuple(1000 * (10 + index) for index in range(len(KNOTS)))
    server = knowledge(page(StepTimes((), 0, 0, 0), StepTimes(curve_us, 2_000_000, 7, 3_000_000))).server
    assert server is not None, "the first engine has not measured anything yet, the second has"
    assert server.step_s(0, 1) == pytest.approx(0.010)
    assert server.step_s(0, 8) == pytest.approx(0.010 + 0.001 * KNOTS.index(8))
    assert server.step_s(2, 1) == pytest.approx(0.010 + 2 * 0.002)
    assert server.step_s(2, 1, is_verifying=True) == pytest.approx(0.010 + 2 * 0.005)


def test_a_server_that_has_said_nothing_is_not_known() -> None:
    assert knowledge(page()) == (None, None)
    assert knowledge("").server is None


def test_what_the_server_counted_is_the_acceptance() -> None:
    counted = {"verified_drafts": 100, "verified_tokens": 500, "accepted_tokens": 200}
    stats = tuple(counted.get(name, 0) for name, _ in ENGINE_COUNTERS)
    acceptance = knowledge(page(StepTimes((), 0, 0, 0), stats=stats)).acceptance
    assert acceptance is not None
    assert 100 * sum(acceptance**depth for depth in range(1, 6)) == pytest.approx(200)


@pytest.mark.parametrize("acceptance", [0.0, 0.2, 0.6, 0.99, 1.0])
@pytest.mark.parametrize("length", [1.0, 2.5, 5.0])
def test_acceptance_is_that_of_each_token(acceptance: float, length: float) -> None:
    found = acceptance_of(1000, 1000 * length, 1000 * _accepted(acceptance, length))
    assert found == pytest.approx(acceptance, abs=1e-6)
    assert acceptance_of(49, 49 * length, 0) is None, "too few to say"


def test_a_good_edge_near_a_gpu_would_help() -> None:
    speeds = forecast(measured(), loads=(1,))
    assert speeds[0].plain == pytest.approx(1 / GPU.step_s(1, 1), rel=0.05)
    assert speeds[0].ratio > 1.5
    assert would_help(speeds)
    assert verdict(measured(), speeds) == f"would help: about {speeds[0].ratio:.1f} times at 1 request"


def test_a_draft_that_is_never_right_would_not() -> None:
    speeds = forecast(measured(acceptance=0.02), loads=(1,))
    assert not would_help(speeds)
    assert "would not help" in verdict(measured(acceptance=0.02), speeds)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pass_s": 0.02}, "a forward pass takes 20.0 ms here and a step of the server 25.0 ms"),
        ({"server": FittedServer((1,), (0.025,), 0.01, 0.0)}, "verifies 5 tokens takes the server 75.0 ms"),
        ({"rtt_s": 0.2}, "the round trip takes 200.0 ms"),
        ({"acceptance": 0.1}, "an acceptance rate of 10%"),
    ],
)
def test_it_says_what_is_in_the_way(changes: dict[str, float], reason: str) -> None:
    assert reason in verdict(measured(**changes), [Speeds(1, 40.0, 39.0), Speeds(4, 100.0, 99.0)])


def test_where_only_more_requests_gain_it_says_so() -> None:
    assert verdict(measured(), [Speeds(1, 40.0, 40.0), Speeds(4, 100.0, 130.0)]) == (
        "would help: about 1.3 times at 4 requests"
    )
    assert verdict(measured(), [Speeds(1, 100.0, 103.0)]) == "would help: about 1.03 times at 1 request"


def test_requests_that_it_does_not_take_are_served_without_it() -> None:
    one, all_ = (forecast(measured(max_requests=number, max_shared_rows=16), loads=(4,))[0] for number in (1, 4))
    assert one.plain == all_.plain
    assert one.plain < one.edge < all_.edge
