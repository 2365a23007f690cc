"""deploy/compose.yaml without Docker: each service's own command and health check, as local processes.

Hosts, ports and paths of the containers are given through the file's variables, as compose would; the same three in
Prometheus' configuration are replaced in a copy. Grafana is not run: its dashboard's expressions are evaluated.
"""

import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml
from stack import BIN, START_LIMIT_S, Process

from tests.ports import free_port
from tests.processes.composefile import services

from .compose_stack import COMPOSE, DEPLOY, ask, up, variables_for, wait_until

DASHBOARD = DEPLOY / "grafana" / "dashboards" / "specedge.json"
BY_NAME = "dns_sd_configs: [{names: [engine], type: A, port: 8000}]"
"""How Prometheus finds the servers."""

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="needs Prometheus: apt-get install prometheus (.ci/run does)"
)


@dataclass(frozen=True)
class Stack:
    """The running services by name, and the variables with which the file was read."""

    processes: dict[str, Process]
    variables: dict[str, str]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Prometheus' answer: series with their value."""
        url = f"http://127.0.0.1:{self.variables['PROMETHEUS_PORT']}/api/v1/query"
        answer = httpx.get(url, params={"query": expression}, trust_env=False).json()
        assert answer["status"] == "success", answer
        return list(answer["data"]["result"])

    def value(self, expression: str) -> float:
        """Value of the only series; 0 if there is none."""
        found = self.query(expression)
        assert len(found) <= 1
        return float(found[0]["value"][1]) if found else 0.0


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """`docker compose up`, except Grafana."""
    directory = tmp_path_factory.mktemp("compose")
    variables = variables_for(directory) | {
        "PROMETHEUS_PORT": str(free_port()),
        "PROMETHEUS_CONFIG_DIR": str(directory / "prometheus"),
        "PROMETHEUS_DATA_DIR": str(directory / "data"),
    }
    shutil.copytree(DEPLOY / "prometheus", directory / "prometheus")
    config = directory / "prometheus" / "prometheus.yml"
    text = config.read_text().replace("/run/specedge", variables["SECRETS_DIR"])
    assert BY_NAME in text
    text = text.replace(BY_NAME, f"static_configs: [{{targets: ['127.0.0.1:{variables['SERVER_PORT']}']}}]")
    config.write_text(text.replace("server:8100", f"127.0.0.1:{variables['GATEWAY_PORT']}"))
    found = [each for each in services(COMPOSE.read_text(), "cpu", variables) if each.name != "grafana"]
    with ExitStack() as stopping:
        yield Stack(up(found, directory, stopping), variables)


@pytest.fixture(scope="module")
def asked(stack: Stack) -> Stack:
    """The same after chats that Prometheus has seen, until a draft was accepted; the machine's load may delay that."""

    def is_drafted() -> bool:
        with ThreadPoolExecutor(2) as executor:
            assert all(executor.map(lambda number: ask(stack.variables["SERVER_PORT"], number), range(10, 18)))
        return stack.value("sum(rate(specedge_engine_accepted_tokens_total[1m]))") > 0

    wait_until(is_drafted, "no accepted token of an edge in Prometheus", START_LIMIT_S)
    wait_until(lambda: stack.value("sum(rate(vllm:generation_tokens_total[1m]))") > 0, "no token in Prometheus")
    return stack


def test_edges_draft_and_prometheus_sees_it(asked: Stack) -> None:
    assert asked.processes.keys() == {"server", "edge-draft", "edge-ngram", "prometheus"}
    assert asked.value("specedge_edges") == 2
    assert asked.value("specedge_engines") == 1
    assert asked.value('count(up{job=~"vllm|specedge-gateway"} == 1)') == 2
    # Prometheus scrapes the gateway every few seconds: its latest sample may be older than the last request.
    wait_until(lambda: asked.value("specedge_gateway_assigned_total") >= 8, "eight requests were not assigned")
    assert asked.value("specedge_gateway_task_errors_total") == 0


def test_every_panel_of_the_dashboard_shows_something(asked: Stack) -> None:
    """Each expression has a result, and except for the n-gram lookup's, which may never have run, a number."""
    panels = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]
    unsaid = []
    for panel in panels:
        for target in panel["targets"]:
            series = asked.query(target["expr"].replace("$__rate_interval", "2m"))
            is_number = [not math.isnan(float(each["value"][1])) for each in series]
            if not is_number or not (all(is_number) or "n-gram" in target["legendFormat"]):
                unsaid.append((panel["title"], target["expr"], series))
    assert not unsaid


def test_alerts_are_of_metrics_that_there_are_and_none_is_raised(asked: Stack) -> None:
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
    names = {
        name for rule in rules for name in re.findall(r"\b(?:specedge|process|vllm:|up)\w*\b(?=[{\[ ])", rule["expr"])
    }
    assert len(names) > 12
    assert not [name for name in names if not asked.query(f"count({name})")]
    url = f"http://127.0.0.1:{asked.variables['PROMETHEUS_PORT']}/api/v1/rules"

    def evaluated() -> list[dict[str, Any]]:
        groups = httpx.get(url, trust_env=False).json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"] if rule["health"] != "unknown"]

    wait_until(lambda: len(evaluated()) == len(rules), "rules are not evaluated")
    assert {rule["health"] for rule in evaluated()} == {"ok"}
    assert not [rule["name"] for rule in evaluated() if rule["state"] == "firing"]


def test_no_token_is_in_a_command_an_environment_or_a_log(asked: Stack) -> None:
    edges = Path(asked.variables["SECRETS_DIR"]) / "edges"
    tokens = [path.read_text().strip() for path in edges.iterdir()]
    assert len(tokens) == 2
    for process in asked.processes.values():
        at = Path("/proc") / str(process.popen.pid)
        shown = (at / "cmdline").read_bytes() + (at / "environ").read_bytes() + process.log.read_bytes()
        assert not [token for token in tokens if token.encode() in shown]
    port = asked.variables["GATEWAY_PORT"]
    ca = f"{asked.variables['SECRETS_DIR']}/trust/ca.pem"
    command = ["edge-client", "connect", f"https://127.0.0.1:{port}", "--draft=ngram", "--quiet", "--ca-file", ca]
    refused = subprocess.run([str(BIN / command[0]), *command[1:]], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "asks for a token" in refused.stderr
