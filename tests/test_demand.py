"""Demand by class, and capacity by the cost model: from an engine's counts to the gateway's metrics."""

import re
from collections import Counter
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from vllm_specedge.gateway.demand import MAX_CLASSES, OTHER, DemandBook
from vllm_specedge.gateway.known import RouterLimits
from vllm_specedge.gateway.metrics import DemandCollector, RequestHistograms, RouterCollector
from vllm_specedge.gateway.router import Router
from vllm_specedge.policy.capacity import EdgeDrafts, EngineLimits, Mix, capacity_tokens_per_s
from vllm_specedge.policy.demand import FIRST_ANSWER_TOKENS, Demand
from vllm_specedge.policy.step_cost import StepCost
from vllm_specedge.wire import engine_frames
from vllm_specedge.wire.telemetry import DEMAND_COUNTERS, capacity_frame, engine_values

DEPLOY = Path(__file__).parent.parent / "deploy"
COST = StepCost({1: 0.02, 64: 0.03, 1024: 0.2})
LIMITS = EngineLimits(slots=64, step_tokens=1024, cache_tokens=1e6)
CHAT = Mix(prompt_tokens=200, answer_tokens=200)

mixes = st.builds(Mix, st.floats(1, 2000), st.floats(1, 500))
limits = st.builds(
    EngineLimits, st.integers(1, 256), st.integers(64, 4096), st.floats(100, 1e6), st.just(inf) | st.floats(0.02, 0.5)
)
drafts = st.builds(
    lambda share, rates: EdgeDrafts(share, sorted(rates, reverse=True)),
    st.floats(0, 1),
    st.lists(st.floats(0, 1), max_size=8),
)


# -- capacity ------------------------------------------------------------------------------------------------------


def test_nothing_is_known_before_a_step_is() -> None:
    assert capacity_tokens_per_s(StepCost(), CHAT, LIMITS) == 0.0


def test_capacity_is_the_tokens_of_a_step_over_its_time() -> None:
    one = replace(LIMITS, slots=1)
    assert capacity_tokens_per_s(COST, Mix(1e-9, 200), one) == pytest.approx(1 / COST(1, 1, 100), rel=0.01)
    assert capacity_tokens_per_s(COST, Mix(1e-9, 200), LIMITS) == pytest.approx(64 / COST(64, 64, 6400), rel=0.01)


def test_a_step_has_no_more_requests_than_the_target_the_slots_the_cache_and_its_tokens_allow() -> None:
    free = capacity_tokens_per_s(COST, CHAT, LIMITS)
    for less in (
        replace(LIMITS, slots=8),
        replace(LIMITS, cache_tokens=3200),
        replace(LIMITS, step_tokens=16),
        replace(LIMITS, step_s=0.0225),
    ):
        assert 1 / COST(1, 2, 300) <= capacity_tokens_per_s(COST, CHAT, less) < 0.6 * free


@given(mixes, limits, drafts)
def test_edges_never_take_capacity_and_a_longer_target_gives_some(
    mix: Mix, limit: EngineLimits, draft: EdgeDrafts
) -> None:
    plain = capacity_tokens_per_s(COST, mix, limit)
    assert 0.0 < plain <= capacity_tokens_per_s(COST, mix, limit, draft) * (1 + 1e-9)
    assert plain <= capacity_tokens_per_s(COST, mix, replace(limit, step_s=2 * limit.step_s)) * (1 + 1e-9)


def test_edges_are_capacity_where_verifying_costs_little() -> None:
    flat = StepCost({1: 0.02, 1024: 0.021})
    good = EdgeDrafts(1.0, (0.8, 0.64, 0.51))
    with_edges = capacity_tokens_per_s(flat, CHAT, LIMITS, good)
    plain = capacity_tokens_per_s(flat, CHAT, LIMITS)
    assert 2.5 * plain < with_edges < 2.95 * plain  # 1 + 0.8 + 0.64 + 0.51
    assert capacity_tokens_per_s(flat, CHAT, LIMITS, replace(good, share=0.5)) == pytest.approx(
        (plain + with_edges) / 2, rel=0.03
    )


# -- counts --------------------------------------------------------------------------------------------------------

events = st.lists(
    st.tuples(st.sampled_from(["default", "gold"]), st.sampled_from(["admit", "refuse", "end"]), st.integers(1, 50)),
    max_size=40,
)


@given(events)
def test_what_is_offered_is_what_is_admitted_and_refused(happened: list[tuple[str, str, int]]) -> None:
    demand, number = Demand(["default", "gold"]), Counter[str]()
    for class_, what, size in happened:
        if what == "admit":
            demand.admitted(class_, size)
            number[class_] += 1
        elif what == "refuse":
            demand.refused(class_, size)
            number[class_] += size
        else:
            demand.ended(class_, size)
    for class_, counters in demand.counters.items():
        assert counters["offered_requests"] == number[class_]
        for unit in ("requests", "tokens"):
            assert counters[f"offered_{unit}"] == counters[f"admitted_{unit}"] + counters[f"refused_{unit}"]


def test_an_answer_is_taken_for_as_long_as_those_of_its_class() -> None:
    demand = Demand(["default", "gold"])
    demand.admitted("gold", 10)
    assert demand.counters["gold"]["admitted_tokens"] == FIRST_ANSWER_TOKENS
    demand.ended("default", 40)
    demand.admitted("gold", 10)
    assert demand.counters["gold"]["admitted_tokens"] == FIRST_ANSWER_TOKENS + 40
    demand.ended("gold", 300)
    demand.refused("gold", 2)
    assert demand.counters["gold"]["refused_tokens"] == 600
    demand.admitted("default", 10)
    assert demand.counters["default"]["admitted_tokens"] == 40


def test_prompts_are_known_before_any_answer_has_ended() -> None:
    """Or a new engine would take a surge whose prompts it has no time for."""
    demand = Demand(["default"])
    demand.admitted("default", 256)
    assert demand.mix == Mix(256, FIRST_ANSWER_TOKENS)
    demand.ended("default", 64)
    assert demand.mix == Mix(256, 64)


# -- the gateway ---------------------------------------------------------------------------------------------------


def said(name: str, **counters: int) -> engine_frames.Demand:
    return engine_frames.Demand(name, engine_values(Counter(counters), DEMAND_COUNTERS))


def exposed(book: DemandBook) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(DemandCollector(book))
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    assert all(family.documentation.endswith(".") for family in families)
    return {f"{each.name}{sorted(each.labels.items())}": each.value for family in families for each in family.samples}


def test_classes_are_summed_over_engines_and_capacity_is_each_engine_s() -> None:
    book = DemandBook()
    for number, engine in enumerate((b"a", b"b")):
        book.take(engine, number, said("gold", offered_requests=3, refused_requests=1))
        book.take(engine, number, capacity_frame(300.0 + number, 200.0, 61.5))
    values = exposed(book)
    assert values["specedge_offered_requests_total[('class', 'gold')]"] == 6
    assert values["specedge_refused_requests_total[('class', 'gold')]"] == 2
    assert values["specedge_capacity_tokens_per_second[('engine', '1')]"] == 301.0
    assert values["specedge_capacity_without_edges_tokens_per_second[('engine', '0')]"] == 200.0
    assert values["specedge_engine_start_seconds[('engine', '0')]"] == 61.5
    book.keep([b"b"])
    values = exposed(book)
    assert values["specedge_offered_requests_total[('class', 'gold')]"] == 6
    assert "specedge_capacity_tokens_per_second[('engine', '0')]" not in values


def test_sums_go_on_when_an_engine_comes_back_and_past_32_bits() -> None:
    book = DemandBook()
    book.take(b"a", 0, said("gold", offered_tokens=2**32 - 1))
    book.take(b"a", 0, said("gold", offered_tokens=2**32 + 4))
    book.take(b"a", 1, said("gold", offered_tokens=10))
    assert exposed(book)["specedge_offered_tokens_total[('class', 'gold')]"] == 2**32 + 14


def test_demand_is_the_rate_of_what_is_offered_and_falls_when_nobody_asks() -> None:
    book = DemandBook()
    for second in range(200):
        book.take(b"a", 0, said("gold", offered_tokens=50 * second))
        book.sample(float(second))
    assert book.offered_tokens_per_s == pytest.approx(50, rel=0.01)
    for second in range(200, 320):
        book.sample(float(second))
    assert exposed(book)["specedge_demand_tokens_per_second[('class', 'gold')]"] < 1.0


def told(book: DemandBook, capacity: float, start_s: float) -> None:
    for number, engine in enumerate((b"a", b"b")):
        book.take(engine, number, capacity_frame(capacity, capacity / 2, start_s))


def test_engines_needed_are_those_for_the_demand_when_a_new_one_is_there() -> None:
    book, tokens = DemandBook(), 0
    assert exposed(book)["specedge_engines_needed[]"] == 0
    told(book, 100.0, 120.0)
    for second in range(600):
        tokens += 200
        book.take(b"a", 0, said("gold", offered_tokens=tokens))
        book.sample(float(second))
    assert book.horizon_s == 120.0
    assert exposed(book)["specedge_foreseen_demand_tokens_per_second[]"] == pytest.approx(200, rel=0.05)
    assert exposed(book)["specedge_engines_needed[]"] == 3  # 1.2 times 200, of 100 each
    needed = [3]
    for second in range(600, 900):
        tokens += 200 + (second - 600)
        book.take(b"a", 0, said("gold", offered_tokens=tokens))
        book.sample(float(second))
        needed.append(book.engines_needed)
    assert needed[-1] > 1.2 * 500 / 100  # of what is asked for now
    assert needed == sorted(needed)


def test_the_page_shows_each_engine_s_capacity() -> None:
    book = DemandBook()
    assert book.view() == {"demand": 0.0, "foreseen": 0.0, "engines_needed": 0, "engines": []}
    told(book, 100.5, 60.0)
    assert book.view()["engines"] == [
        {"number": number, "with_edges": 100.5, "without_edges": 50.25} for number in range(2)
    ]
    assert book.view()["engines_needed"] == 1


def test_the_slowest_start_says_how_far_ahead_and_an_unknown_one_is_a_minute() -> None:
    book = DemandBook()
    assert book.horizon_s == 60.0
    told(book, 100.0, 90.0)
    book.take(b"c", 2, capacity_frame(100.0, 100.0, 300.0))
    assert book.horizon_s == 300.0


def test_whatever_engines_call_their_classes_there_are_few_labels() -> None:
    book = DemandBook()
    for engine in range(10):
        for number in range(3 * MAX_CLASSES):
            book.take(b"%d" % engine, engine, said(f"{engine}-{number}", offered_requests=1))
    assert len(book.classes) <= MAX_CLASSES + 1
    total = sum(totals.counters[0] for totals in book.classes.values())
    assert total == 10 * MAX_CLASSES
    assert book.classes[OTHER].counters[0] == 9 * MAX_CLASSES


def test_what_alerts_and_dashboard_ask_for_is_there() -> None:
    """Each of our metrics that they name exists in a gateway."""
    asked = "".join(path.read_text() for path in DEPLOY.rglob("*") if path.suffix in (".json", ".yml"))
    router = Router(RouterLimits())
    registry = CollectorRegistry()
    for collector in (RouterCollector(router), DemandCollector(DemandBook())):
        registry.register(collector)
    RequestHistograms(registry)
    known = {name for family in registry.collect() for name in names_of(family)}
    known |= {"specedge_gateway_connections", "specedge_gateway_tasks"}  # the running gateway's own
    named = set(re.findall(r"\b(specedge_[a-z0-9_]+[a-z0-9])\b", asked))
    assert named <= known, named - known


def names_of(family: Metric) -> set[str]:
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}.get(family.type, [""])
    return {family.name + suffix for suffix in suffixes}
