"""Profile `engines` of deploy/compose.yaml with two engines: a gateway of their own, and a real HAProxy."""

import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import httpx2 as httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from stack import Process

from tests.ports import free_port
from tests.processes.composefile import services
from tests.processes.proxies import needs

from .compose_stack import COMPOSE, DEPLOY, ask, up, variables_for, wait_until

TEMPLATE = "    server-template engine 16 engine:8000 check inter 2s resolvers docker init-addr none\n"
ENGINES = ("engine", "engine-2")
NOT_NEEDED = ("prometheus", "grafana")

pytestmark = needs("haproxy")


@dataclass(frozen=True)
class Stack:
    """The running services by name, the ports of the engines and of the load balancer, and the gateway's metrics."""

    processes: dict[str, Process]
    ports: dict[str, str]
    balancer_port: str
    gateway_metrics: str
    ca_file: Path

    def of_gateway(self, name: str) -> float:
        trusted = ssl.create_default_context(cafile=self.ca_file)
        return total(httpx.get(self.gateway_metrics, verify=trusted, trust_env=False).text, name)

    def of_engine(self, engine: str, name: str) -> float:
        return total(httpx.get(f"http://127.0.0.1:{self.ports[engine]}/metrics", trust_env=False).text, name)


def total(page: str, name: str) -> float:
    """Sum of a metric's series."""
    found = [
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name
    ]
    assert found, name
    return sum(found)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """`docker compose --profile engines up --scale engine=2`, without Prometheus and Grafana."""
    directory = tmp_path_factory.mktemp("engines")
    (directory / "sockets").mkdir()
    variables = variables_for(directory) | {
        "ENGINES_DIR": str(directory / "sockets"),
        "HAPROXY_CONFIG_DIR": str(directory),
        "BALANCER_PORT": str(free_port()),
    }
    ports = dict(zip(ENGINES, (variables["SERVER_PORT"], str(free_port())), strict=True))
    found = []
    for service in services(COMPOSE.read_text(), "engines", variables):
        if service.name == "engine":
            for name, port in ports.items():
                of_port = services(COMPOSE.read_text(), "engines", variables | {"SERVER_PORT": port})
                found.append(replace(next(each for each in of_port if each.name == "engine"), name=name))
        elif service.name not in NOT_NEEDED:
            found.append(service)
    text = (DEPLOY / "haproxy" / "haproxy.cfg").read_text()
    assert TEMPLATE in text
    listed = [f"    server {name} 127.0.0.1:{port} check inter 2s\n" for name, port in ports.items()]
    text = text.replace(TEMPLATE, "".join(listed)).replace("bind :8000", f"bind 127.0.0.1:{variables['BALANCER_PORT']}")
    (directory / "haproxy.cfg").write_text(text)
    with ExitStack() as stopping:
        yield Stack(
            up(found, directory, stopping),
            ports,
            variables["BALANCER_PORT"],
            f"https://127.0.0.1:{variables['GATEWAY_PORT']}/metrics",
            Path(variables["SECRETS_DIR"]) / "trust" / "ca.pem",
        )


def ask_many(stack: Stack, first: int) -> None:
    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(lambda number: ask(stack.balancer_port, number), range(first, first + 4)))


def test_two_engines_share_the_requests_and_the_edges(stack: Stack) -> None:
    assert stack.of_gateway("specedge_engines") == 2
    assert stack.of_gateway("specedge_edges") == 2
    asked = iter(range(10, 1000, 4))

    def both_are_drafted_for() -> bool:
        ask_many(stack, next(asked))
        return all(stack.of_engine(engine, "vllm:spec_decode_num_accepted_tokens_total") > 0 for engine in ENGINES)

    wait_until(both_are_drafted_for, "an engine had no accepted draft")
    wait_until(lambda: stack.of_gateway("specedge_engines_needed") >= 1, "no engine is needed")


def test_the_others_answer_when_an_engine_is_removed(stack: Stack) -> None:
    stack.processes["engine-2"].stop()
    wait_until(lambda: stack.of_gateway("specedge_engines") == 1, "the engine is still listed")
    ask_many(stack, 1000)
    assert stack.processes["balancer"].popen.poll() is None
