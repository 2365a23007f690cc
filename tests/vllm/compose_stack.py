"""The services of deploy/compose.yaml as local processes, with their own commands and health checks, without Docker."""

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from openai import OpenAI
from stack import BIN, SERVER_CORE, START_LIMIT_S, Process, start

from tests.ports import free_port
from tests.processes.composefile import Service

from .conftest import CACHE, ROOT

DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose.yaml"
PAUSE_S = 0.5
HEALTH_PAUSE_S = 2.0
"""Each check starts an interpreter."""
DEADLINE_S = 90.0
QUESTION = "Repeat this list three times: red, green, blue, yellow, black, white, orange, purple."
SHARED = {"PATH": f"{BIN}:{os.environ['PATH']}", "CC": "/bin/false", "CXX": "/bin/false"}
"""The environment of all services: their images have no compiler."""


def variables_for(directory: Path) -> dict[str, str]:
    """The file's variables for this machine: hosts, ports and paths of the containers, as compose would give them."""
    assert (CACHE / "smollm2-draft" / "config.json").exists(), "make the models first: make model"
    return {
        "SERVER_HOST": "127.0.0.1",
        "SERVER_PORT": str(free_port()),
        "GATEWAY_PORT": str(free_port()),
        "SECRETS_DIR": str(directory / "specedge"),
        "MODELS_DIR": str(CACHE),
        "KV_CACHE_GIB": "1",
        "SERVER_CORES": str(SERVER_CORE),
    }


def up(found: Sequence[Service], directory: Path, stopping: ExitStack) -> dict[str, Process]:
    """Start services in this order, each when the ones before are healthy or have ended. Returns those that run."""
    to_end = {name for each in found for name, wait in each.waits_for.items() if "completed" in wait["condition"]}
    processes: dict[str, Process] = {}
    for service in found:
        env = {**SHARED, **service.environment}
        program = shutil.which(service.command[0], path=env["PATH"]) or str(ROOT / service.command[0])
        process = start([program, *service.command[1:]], directory / f"{service.name}.log", env, cwd=ROOT)
        stopping.callback(process.stop)
        if service.name in to_end:
            if process.popen.wait(DEADLINE_S):
                raise process.fail(f"{service.name} failed")
            continue
        processes[service.name] = process
        wait_healthy(service, process, env)
    return processes


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


def ask(port: str, number: int) -> str:
    """Text of an answer from the server or load balancer at a port. `number` makes it a request of its own."""
    with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
        content = f"{QUESTION} And then count to {number}."
        answer = client.chat.completions.create(
            model="smollm2", messages=[{"role": "user", "content": content}], temperature=0, max_tokens=96
        )
    return answer.choices[0].message.content or ""
