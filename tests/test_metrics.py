import ast
import inspect
from collections import Counter
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from vllm_specedge.engine import driver, learning, ledger, speedup
from vllm_specedge.engine.proposal_tree import Fate
from vllm_specedge.gateway import router
from vllm_specedge.gateway.effects import RequestReport
from vllm_specedge.gateway.known import ROLES, RouterLimits
from vllm_specedge.gateway.metrics import GATEWAY_COUNTERS, RequestHistograms, RouterCollector, report_row
from vllm_specedge.gateway.router import Router
from vllm_specedge.policy.step_cost import KNOTS, StepCost
from vllm_specedge.wire.codec import encode
from vllm_specedge.wire.engine_frames import EngineHello, EngineOpen, Report, Stats, StepTimes
from vllm_specedge.wire.frames import MAX_UINT32, PROTOCOL_VERSION, Hello
from vllm_specedge.wire.telemetry import (
    ENGINE_COUNTERS,
    REQUEST_COUNTERS,
    CountedSince,
    engine_values,
    request_values,
    step_times,
)


def exposed(router: Router) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(RouterCollector(router))
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    assert all(family.documentation.endswith(".") for family in families)
    samples = [sample for family in families for sample in family.samples]
    values = {sample.name: sample.value for sample in samples}
    assert len(values) == len(samples)
    return values


def test_every_metric_is_there_from_the_start_under_its_own_name() -> None:
    values = exposed(Router(RouterLimits()))
    assert values.keys() == {
        "specedge_edges",
        "specedge_max_edges",
        "specedge_engines",
        "specedge_requests",
        *(f"specedge_gateway_{name}_total" for name, _ in GATEWAY_COUNTERS),
        *(f"specedge_engine_{name}_total" for name, _ in ENGINE_COUNTERS),
    }
    assert values.pop("specedge_max_edges") == RouterLimits().max_edges
    assert set(values.values()) == {0.0}


def test_names_are_given_once() -> None:
    for table in (REQUEST_COUNTERS, ENGINE_COUNTERS, GATEWAY_COUNTERS):
        assert len({name for name, _ in table}) == len(table)


def test_what_the_router_and_its_engines_count_is_exposed() -> None:
    router = Router(RouterLimits())
    for number, engine in enumerate((b"a", b"b")):
        router.from_engine(engine, EngineHello(PROTOCOL_VERSION, "toy", "f", 9))
        router.from_engine(engine, EngineOpen(0, 1, 5, ""))
        router.from_engine(engine, Stats(tuple(range(number, number + len(ENGINE_COUNTERS)))))
    router.from_engine(b"silent", EngineHello(PROTOCOL_VERSION, "toy", "f", 9))
    router.edge_hello(1, Hello(PROTOCOL_VERSION, "test", "x", "pool", "f", 4), "s", frozenset(ROLES))
    router.counters["assigned"] = 7
    values = exposed(router)
    assert (values["specedge_edges"], values["specedge_engines"], values["specedge_requests"]) == (1, 3, 2)
    assert values["specedge_gateway_assigned_total"] == 7
    for index, (name, _) in enumerate(ENGINE_COUNTERS):
        assert values[f"specedge_engine_{name}_total"] == 2 * index + 1


def greet(router: Router, *engines: bytes) -> None:
    for engine in engines:
        router.from_engine(engine, EngineHello(PROTOCOL_VERSION, "toy", "f", 9))


def decoding(seconds: float) -> Stats:
    """Report of an engine that has decoded for `seconds`, 1.5 times as fast as without drafts."""
    return Stats(engine_values(Counter({"decode_us": int(seconds * 1e6), "plain_decode_us": int(seconds * 1.5e6)})))


def test_sums_go_on_past_the_wire_s_32_bits_and_when_engines_leave_or_come_back() -> None:
    router = Router(RouterLimits())
    greet(router, b"a", b"b")
    sums = [0.0]
    for minute in range(0, 300):
        for engine in (b"a", b"b"):
            if minute == 200:
                router.engine_left(engine)  # and returns, and counts from there on
                greet(router, engine)
            router.from_engine(engine, decoding(60 * (minute - 200 if minute >= 200 else minute)))
        values = exposed(router)
        sums.append(values["specedge_engine_decode_us_total"])
    router.engine_left(b"a")
    values = exposed(router)
    sums.append(values["specedge_engine_decode_us_total"])
    assert sums == sorted(sums)
    assert sums[-1] == 2 * 60e6 * (199 + 99)
    assert values["specedge_engine_plain_decode_us_total"] / sums[-1] == 1.5


def test_a_gateway_is_told_what_an_engine_has_counted_since_it_knows_it() -> None:
    """The first gateway gets everything: an engine may have started before its gateway."""
    since, counters = CountedSince(), Counter({"steps": 5})
    assert since.values(counters, 1)[0] == 5
    counters["steps"] = 2**32 + 6
    assert since.values(counters, 1)[0] == 6
    counters["steps"] += 1
    assert since.values(counters, 2)[0] == 1, "what the last report did not say"
    counters["steps"] += 2
    assert since.values(counters, 2)[0] == 3
    assert sum(since.values(counters, 2)) == 3


@pytest.mark.parametrize("values", [(), (5,), (5,) * (len(ENGINE_COUNTERS) + 3)])
def test_an_engine_of_another_release_does_not_break_the_page(values: tuple[int, ...]) -> None:
    router = Router(RouterLimits())
    router.from_engine(b"a", EngineHello(PROTOCOL_VERSION, "toy", "f", 9))
    router.from_engine(b"a", Stats(values))
    assert exposed(router)["specedge_engine_steps_total"] == sum(values[:1])


def test_what_engines_learned_of_their_steps_is_exposed_by_engine_and_size() -> None:
    router = Router(RouterLimits())
    for engine in (b"a", b"silent", b"b"):
        router.from_engine(engine, EngineHello(PROTOCOL_VERSION, "toy", "f", 9))
    router.from_engine(b"a", step_times(*StepCost().parts_s))  # it has not measured anything yet
    router.from_engine(b"b", StepTimes(tuple(range(1000, 1000 + len(KNOTS) + 3)), 4, 5, 6))
    registry = CollectorRegistry()
    registry.register(RouterCollector(router))
    curve = {
        int(sample.labels["tokens"]): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "specedge_engine_step_seconds" and sample.labels["engine"] == "2"
    }
    assert curve == {size: pytest.approx((1000 + index) / 1e6) for index, size in enumerate(KNOTS)}
    assert registry.get_sample_value("specedge_engine_step_seconds", {"engine": "0", "tokens": "1"}) is None
    for what, value in (("request", 4e-9), ("context", 5e-9), ("verifying", 6e-9)):
        name = f"specedge_engine_step_{what}_seconds"
        assert registry.get_sample_value(name, {"engine": "2"}) == pytest.approx(value)
        assert registry.get_sample_value(name, {"engine": "0"}) == 0.0


@given(st.dictionaries(st.sampled_from(KNOTS), st.floats(1e-5, 1e9), min_size=1))
def test_whatever_steps_take_fits_a_frame(profile: dict[int, float]) -> None:
    cost = StepCost(profile)
    times = step_times(*cost.parts_s)
    encode(times)
    for size, time_us in zip(KNOTS, times.curve_us, strict=True):
        assert time_us == pytest.approx(min(cost(0, size, 0) * 1e6, MAX_UINT32), abs=1.5)


def test_engine_values_fit_a_frame_and_keep_the_table_s_order() -> None:
    counters = Counter({"steps": MAX_UINT32 + 3, ENGINE_COUNTERS[-1][0]: 4})
    values = engine_values(counters)
    encode(Stats(values))
    assert (values[0], values[-1], len(values)) == (2, 4, len(ENGINE_COUNTERS))


def test_request_values_fit_a_frame_and_keep_the_table_s_order() -> None:
    counters = Counter({"steps": MAX_UINT32 + 3, "ahead_tokens": 4, "of another table": 5})
    values = request_values(counters)
    encode(Report(0, values))
    assert (values[0], values[-1], len(values)) == (MAX_UINT32, 4, len(REQUEST_COUNTERS))
    assert sum(values[1:-1]) == 0


@pytest.mark.parametrize("values", [(), (5, 6), tuple(range(5, len(REQUEST_COUNTERS) + 30))])
def test_a_report_of_another_release_is_padded_and_cut(values: tuple[int, ...]) -> None:
    row = report_row(RequestReport(3, values))
    assert list(row) == ["engine", *(name for name, _ in REQUEST_COUNTERS)]
    assert list(row.values()) == [3, *[*values, *[0] * 99][: len(REQUEST_COUNTERS)]]
    RequestHistograms(CollectorRegistry()).observe(RequestReport(3, values))


def test_histograms_are_of_finished_requests_and_have_no_labels_of_ours() -> None:
    registry = CollectorRegistry()
    histograms = RequestHistograms(registry)
    before = {sample.name + str(sample.labels) for family in registry.collect() for sample in family.samples}
    for steps, committed, verified, accepted in ((10, 25, 20, 16), (4, 4, 0, 0), (0, 0, 0, 0), (0, 9, 3, MAX_UINT32)):
        counters = {
            "steps": steps,
            "committed_tokens": committed,
            "verified_tokens": verified,
            "accepted_tokens": accepted,
        }
        histograms.observe(RequestReport(0, request_values(Counter(counters))))
    samples = [sample for family in registry.collect() for sample in family.samples]
    assert {sample.name + str(sample.labels) for sample in samples} == before
    assert {label for sample in samples for label in sample.labels} == {"le"}
    for name, num_requests in (("acceptance_ratio", 2), ("tokens_per_step", 2)):
        assert registry.get_sample_value(f"specedge_request_{name}_count") == num_requests
    assert [
        registry.get_sample_value("specedge_request_acceptance_ratio_bucket", {"le": bound})
        for bound in ("0.7", "0.8", "+Inf")
    ] == [0, 1, 2]
    assert registry.get_sample_value("specedge_request_tokens_per_step_sum") == 3.5


def counted_in(module: ModuleType) -> tuple[set[str], set[str]]:
    """The literal names in `counters[...]` or `totals[...]` of a module, and those in `request.count(...)`."""
    in_total, of_requests = set[str](), set[str]()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        match node:
            case ast.Subscript(
                value=ast.Attribute(attr="counters" | "_counters" | "totals"), slice=ast.Constant(value=str(name))
            ):
                in_total.add(name)
            case ast.Call(func=ast.Attribute(attr="count"), args=[ast.Constant(value=str(name)), _]):
                of_requests.add(name)
    return in_total, of_requests


def test_every_counter_of_the_core_has_a_name_and_a_meaning() -> None:
    """A counter that is in no table would be useless."""
    assert counted_in(router)[0] <= {name for name, _ in GATEWAY_COUNTERS}
    counted = [counted_in(module) for module in (driver, learning, ledger, speedup)]
    in_total, of_requests = (set().union(*names) for names in zip(*counted, strict=True))
    assert in_total
    assert of_requests
    fates = {f"proposals_{fate.value}" for fate in Fate}
    assert in_total | fates <= {name for name, _ in ENGINE_COUNTERS}
    assert of_requests | set(ledger._DISCARDED.values()) <= {name for name, _ in REQUEST_COUNTERS}
