import ast
import inspect
from collections import Counter
from types import ModuleType

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from vllm_specedge import book, router
from vllm_specedge.frames import MAX_UINT32, PROTOCOL_VERSION, EngineHello, Hello, Open, Stats, encode
from vllm_specedge.metrics import ENGINE_COUNTERS, GATEWAY_COUNTERS, RouterCollector, engine_values
from vllm_specedge.proposals import Fate
from vllm_specedge.router import ROLES, Router, RouterLimits


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
        "specedge_engines",
        "specedge_requests",
        *(f"specedge_gateway_{name}_total" for name, _ in GATEWAY_COUNTERS),
        *(f"specedge_engine_{name}_total" for name, _ in ENGINE_COUNTERS),
    }
    assert set(values.values()) == {0.0}


def test_names_are_given_once() -> None:
    for table in (ENGINE_COUNTERS, GATEWAY_COUNTERS):
        assert len({name for name, _ in table}) == len(table)


def test_what_the_router_and_its_engines_count_is_exposed() -> None:
    router = Router(RouterLimits())
    for number, engine in enumerate((b"a", b"b")):
        router.from_engine(engine, EngineHello(PROTOCOL_VERSION, "toy", "f", 9))
        router.from_engine(engine, Open(0, 1, 5, 5, ""))
        router.from_engine(engine, Stats(tuple(range(number, number + len(ENGINE_COUNTERS)))))
    router.from_engine(b"silent", EngineHello(PROTOCOL_VERSION, "toy", "f", 9))
    router.edge_hello(1, Hello(PROTOCOL_VERSION, "test", "x", "pool", "f", 4), "s", frozenset(ROLES))
    router.counters["assigned"] = 7
    values = exposed(router)
    assert (values["specedge_edges"], values["specedge_engines"], values["specedge_requests"]) == (1, 3, 2)
    assert values["specedge_gateway_assigned_total"] == 7
    for index, (name, _) in enumerate(ENGINE_COUNTERS):
        assert values[f"specedge_engine_{name}_total"] == 2 * index + 1


@pytest.mark.parametrize("values", [(), (5,), (5,) * (len(ENGINE_COUNTERS) + 3)])
def test_an_engine_of_another_release_does_not_break_the_page(values: tuple[int, ...]) -> None:
    router = Router(RouterLimits())
    router.from_engine(b"a", EngineHello(PROTOCOL_VERSION, "toy", "f", 9))
    router.from_engine(b"a", Stats(values))
    assert exposed(router)["specedge_engine_steps_total"] == sum(values[:1])


def test_engine_values_fit_a_frame_and_keep_the_table_s_order() -> None:
    counters = Counter({"steps": MAX_UINT32 + 3, ENGINE_COUNTERS[-1][0]: 4})
    values = engine_values(counters)
    encode(Stats(values))
    assert (values[0], values[-1], len(values)) == (2, 4, len(ENGINE_COUNTERS))


def counted_in(module: ModuleType) -> set[str]:
    """The literal names in `counters[...]` of a module."""
    subscripts = (node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Subscript))
    return {
        node.slice.value
        for node in subscripts
        if isinstance(node.value, ast.Attribute)
        and node.value.attr == "counters"
        and isinstance(node.slice, ast.Constant)
        and isinstance(node.slice.value, str)
    }


def test_every_counter_of_the_core_has_a_name_and_a_meaning() -> None:
    """A counter that is in no table is counted for nobody."""
    assert counted_in(router) <= {name for name, _ in GATEWAY_COUNTERS}
    fates = {f"proposals_{fate.value}" for fate in Fate}
    assert counted_in(book) | fates <= {name for name, _ in ENGINE_COUNTERS}
