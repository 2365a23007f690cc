"""deploy/compose.yaml without Docker: each service's own command and health check, as local processes.

Hosts, ports and paths of the containers are given through the file's variables, as compose would; the same three in
Prometheus' configuration are replaced in a copy. Grafana is not run: its dashboard's expressions are evaluated.
"""

import json
import math
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml
from openai import OpenAI
from stack import BIN, SERVER_CORE, START_LIMIT_S, Process, start

from tests.ports import free_port
from tests.processes.composefile import Service, services

from .conftest import CACHE, ROOT

DEPLOY = ROOT / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "specedge.json"
PAUSE_S = 0.5
HEALTH_PAUSE_S = 2.0
"""Each check starts an interpreter."""
DEADLINE_S = 90.0
QUESTION = "Repeat this list three times: red, green, blue, yellow, black, white, orange, purple."

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


def wait_until(is_so: Callable[[], bool], what: str, limit_s: float = DEADLINE_S, pause_s: float = PAUSE_S) -> None:
    pause, end_s = threading.Event(), time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < end_s, what
        pause.wait(pause_s)


def wait_healthy(service: Service, process: Process, env: dict[str, str]) -> None:
    """Run the health check's command repeatedly, like compose."""

    def is_healthy() -> bool:
        if process.popen.poll() is not None:
            raise process.fail(f"{service.name} ended with status {process.popen.returncode}")
        checked = subprocess.run(service.health, cwd=ROOT, env={**os.environ, **env}, capture_output=True, check=False)
        return checked.returncode == 0

    try:
        wait_until(is_healthy, "it did not become healthy", START_LIMIT_S, HEALTH_PAUSE_S)
    except AssertionError as error:
        raise process.fail(f"{service.name}: {error}") from None


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """`docker compose up`, except Grafana."""
    assert (CACHE / "smollm2-draft" / "config.json").exists(), "make the models first: make model"
    directory = tmp_path_factory.mktemp("compose")
    variables = {
        "SERVER_HOST": "127.0.0.1",
        "SERVER_PORT": str(free_port()),
        "GATEWAY_PORT": str(free_port()),
        "PROMETHEUS_PORT": str(free_port()),
        "SECRETS_DIR": str(directory / "specedge"),
        "MODELS_DIR": str(CACHE),
        "PROMETHEUS_CONFIG_DIR": str(directory / "prometheus"),
        "PROMETHEUS_DATA_DIR": str(directory / "data"),
        "KV_CACHE_GIB": "1",
        "SERVER_CORES": str(SERVER_CORE),
    }
    shutil.copytree(DEPLOY / "prometheus", directory / "prometheus")
    config = directory / "prometheus" / "prometheus.yml"
    text = config.read_text().replace("/run/specedge", variables["SECRETS_DIR"])
    for port, name in (("8000", "SERVER_PORT"), ("8100", "GATEWAY_PORT")):
        text = text.replace(f"server:{port}", f"127.0.0.1:{variables[name]}")
    config.write_text(text)
    # The images have no compiler.
    shared = {"PATH": f"{BIN}:{os.environ['PATH']}", "CC": "/bin/false", "CXX": "/bin/false"}
    found = services((DEPLOY / "compose.yaml").read_text(), "cpu", variables)
    to_end = {name for each in found for name, wait in each.waits_for.items() if "completed" in wait["condition"]}
    with ExitStack() as stopping:
        processes: dict[str, Process] = {}
        for service in found:
            if service.name == "grafana":
                continue
            env = {**shared, **service.environment}
            program = shutil.which(service.command[0], path=shared["PATH"]) or str(ROOT / service.command[0])
            process = start([program, *service.command[1:]], directory / f"{service.name}.log", env, cwd=ROOT)
            stopping.callback(process.stop)
            if service.name in to_end:
                if process.popen.wait(DEADLINE_S):
                    raise process.fail(f"{service.name} failed")
                continue
            processes[service.name] = process
            wait_healthy(service, process, env)
        yield Stack(processes, variables)


def ask(stack: Stack, number: int) -> str:
    client = OpenAI(base_url=f"http://127.0.0.1:{stack.variables['SERVER_PORT']}/v1", api_key="none")
    content = f"{QUESTION} And then count to {number}."
    answer = client.chat.completions.create(
        model="smollm2", messages=[{"role": "user", "content": content}], temperature=0, max_tokens=96
    )
    return answer.choices[0].message.content or ""


@pytest.fixture(scope="module")
def asked(stack: Stack) -> Stack:
    """The same after chats that Prometheus has seen, until a draft was accepted; the machine's load may delay that."""

    def is_drafted() -> bool:
        with ThreadPoolExecutor(2) as executor:
            assert all(executor.map(lambda number: ask(stack, number), range(10, 18)))
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
