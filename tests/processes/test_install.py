"""The wheel in an empty environment: an edge that drafts without a model, on Windows too, and no torch."""

import ast
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import packages_distributions
from pathlib import Path

import httpx2 as httpx
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_architecture import MODULES, ROOT, top

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOWHERE = "http://127.0.0.1:1"
REFUSED = (
    f"edge-client: The gateway at {NOWHERE} cannot be used: nothing listens there; start the server with "
    "--speculative-config edge, or correct the port.\n"
)
START_LIMIT_S = 60
OTHER_PYTHONS = [
    found.group(1)
    for each in PROJECT["classifiers"]
    if (found := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", each))
    and found.group(1) != "{}.{}".format(*sys.version_info)
]
"""Supported Python versions other than this one."""
ONLY_ON_POSIX = ("uvloop", "granian", "zmq")
COMMANDS = ("edge_client.cli", "edge_client.serve", "edge_client.chat", "edge_client.doctor", "vllm_specedge.cli")
"""Modules of the light client's commands, which import nothing that needs an extra."""


def modules_at_import(name: str) -> Iterator[str]:
    """Modules imported at the import of `name`, without imports in functions."""
    left: list[ast.AST] = [ast.parse(MODULES[name].read_text())]
    while left:
        node = left.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            full_names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (full if full in MODULES else str(node.module) for full in full_names)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            left += ast.iter_child_nodes(node)


def others_imported(start: str) -> set[str]:
    """The third-party packages that are imported by importing a module of ours."""
    found, left, seen = set(), [start], set()
    while left:
        name = left.pop()
        if name in MODULES and name not in seen:
            seen.add(name)
            left += modules_at_import(name)
        elif name not in MODULES:
            found.add(top(name))
    return found - sys.stdlib_module_names


def base_requirements(platform: str) -> set[str]:
    requirements = [Requirement(line) for line in PROJECT["dependencies"]]
    chosen = [each for each in requirements if not each.marker or each.marker.evaluate({"sys_platform": platform})]
    return {canonicalize_name(each.name) for each in chosen}


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("module", COMMANDS)
def test_what_is_imported_is_required(module: str, platform: str) -> None:
    provided = base_requirements(platform)
    distributions = packages_distributions()
    for package in others_imported(module):
        assert {canonicalize_name(name) for name in distributions[package]} & provided, f"{package} is not required"


def test_what_windows_lacks_is_not_asked_of_it() -> None:
    assert {"uvloop", "granian"} <= base_requirements("linux")
    assert not {"uvloop", "granian"} & base_requirements("win32")


def test_an_extra_that_is_named_is_there() -> None:
    """In sentences of the code and in units; tests/test_documents.py reads the documents."""
    texts = [path.read_text() for path in (*MODULES.values(), *ROOT.glob("deploy/*")) if path.is_file()]
    named = {extra for text in texts for extra in re.findall(r"vllm-specedge\[(\w+)\]", text)}
    assert named
    assert named <= PROJECT["optional-dependencies"].keys()


# -- for real ---------------------------------------------------------------------------------------------------------


PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    """The wheel; skips the test if its requirements are not available."""
    command = [*PIP, "download", "--no-deps", "--dest", dist.with_name("hatchling"), "hatchling"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no package index can be reached")
    (path,) = dist.glob("*.whl")
    return path


def install(wheel: Path, venv: Path, python: str | Path = sys.executable) -> Path:
    """Make an environment with only the wheel and what pip brings along; returns its folder of programs."""
    subprocess.run([python, "-m", "venv", "--without-pip", venv], check=True)
    installed = subprocess.run([*PIP, "--python", venv, "install", wheel], capture_output=True, text=True, check=False)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    return venv / "bin"


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("plain") / "venv")


@pytest.fixture(params=["all", "without what Windows lacks"])
def env(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """An environment in which everything can be imported, or all except packages without a Windows wheel."""
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if request.param == "all":
        return ours
    for name in ONLY_ON_POSIX:
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name!r}', name={name!r})\n")
    return {**ours, "PYTHONPATH": str(tmp_path)}


def run(command: Path, *arguments: str, env: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run([command, *arguments], env=env, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done


def other_python(version: str) -> Path:
    """An interpreter of that version, on the path or from pyenv; skips the test if there is none."""
    of_pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    found = of_pyenv[-1] if of_pyenv else shutil.which(f"python{version}")
    if found is None:
        pytest.skip(f"there is no Python {version} here")
    return Path(found)


@pytest.mark.parametrize("version", OTHER_PYTHONS)
def test_other_pythons_run_it(wheel: Path, tmp_path: Path, version: str) -> None:
    python = other_python(version)
    programs, ours = install(wheel, tmp_path / "venv", python), dict(os.environ)
    assert run(programs / "edge-client", "connect", "--help", env=ours).returncode == 0
    assert run(programs / "edge-client", "doctor", NOWHERE, env=ours).returncode == 1
    assert run(programs / "vllm-specedge", "gateway", "--help", env=ours).returncode == 0
    assert run(programs / "vllm-specedge", "simulate", "--requests", "1", env=ours).returncode == 0


def test_it_is_light(bin_folder: Path) -> None:
    (packages,) = bin_folder.parent.glob("lib/python*/site-packages")
    found = {path.name for path in packages.iterdir()}
    assert {"edge_client", "vllm_specedge", "httpx2"} <= found
    assert not found & {"torch", "transformers", "vllm", "llama_cpp", "numpy"}


def test_help_lists_the_commands(bin_folder: Path, env: dict[str, str]) -> None:
    done = run(bin_folder / "edge-client", "--help", env=env)
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("connect", "serve", "chat", "doctor"))


def test_the_operators_commands_need_no_vllm(bin_folder: Path, env: dict[str, str]) -> None:
    """Nor a web server, except for `gateway`."""
    done = run(bin_folder / "vllm-specedge", "doctor", env=env)
    assert done.returncode == 2
    assert done.stderr.startswith("vllm-specedge: There is no vLLM in this Python environment")


def test_connect_tries_to_connect(bin_folder: Path, env: dict[str, str]) -> None:
    done = run(bin_folder / "edge-client", "connect", NOWHERE, "--draft", "ngram", "--quiet", env=env)
    assert (done.returncode, done.stderr) == (2, REFUSED)


def test_doctor_examines(bin_folder: Path, env: dict[str, str]) -> None:
    done = run(bin_folder / "edge-client", "doctor", NOWHERE, env=env)
    assert done.returncode == 1
    assert "cannot be used: nothing listens there" in " ".join(done.stdout.split())
    assert "This machine cannot be judged: fix what failed above first." in done.stdout


@pytest.mark.parametrize(
    ("draft", "extra"),
    [("some/model", "hf"), (".", "hf"), ("pyproject.toml.gguf", "gguf")],
    ids=["hub", "folder", "GGUF"],
)
def test_a_model_needs_an_extra(bin_folder: Path, env: dict[str, str], draft: str, extra: str) -> None:
    done = run(bin_folder / "edge-client", "connect", NOWHERE, "--draft", draft, env=env)
    assert done.returncode == 2
    assert f"pip install 'vllm-specedge[{extra}]'" in done.stderr


@contextmanager
def running(command: list[str | Path], env: dict[str, str], until: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that has printed a line with `until` in it."""
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                if until in line:
                    break
            else:
                pytest.fail("".join(said))
            yield process
        finally:
            process.kill()


def test_serve_serves_while_it_tries_to_connect(bin_folder: Path, env: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ["serve", NOWHERE, "--server", "http://127.0.0.1:1/v1", "--port", str(port), "--wait", "600"]
    with running([bin_folder / "edge-client", *arguments], env, "Not connected") as process:
        answer = httpx.get(f"http://127.0.0.1:{port}/v1/models", trust_env=False, timeout=START_LIMIT_S)
        assert answer.status_code == 502
        assert answer.json()["error"]["message"]
        process.terminate()
        assert process.wait(START_LIMIT_S) == 0


SIGNALS_AS_ON_WINDOWS = """
import asyncio, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background commands ignore it
def add_signal_handler(*arguments): raise NotImplementedError
asyncio.SelectorEventLoop.add_signal_handler = add_signal_handler
from edge_client.cli import main
main()
"""


def test_ctrl_c_ends_it_where_loops_take_no_signals() -> None:
    command = [sys.executable, "-c", SIGNALS_AS_ON_WINDOWS, "connect", NOWHERE, "--draft", "ngram", "--wait", "600"]
    with running(command, dict(os.environ), "Not connected") as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(START_LIMIT_S) == 0
        assert process.stderr is not None
        said = process.stderr.read()
    assert "Drafted for 0 requests" in said
    assert "Traceback" not in said


# -- deploy/install ----------------------------------------------------------------------------------------------------


def test_an_install_that_fails_says_why_and_where_to_read_on(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    env = {
        **os.environ,
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "",
        "PYTHON": sys.executable,
    }
    done = subprocess.run(
        [ROOT / "deploy" / "install", venv, "cpu,demo"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    said = done.stderr.splitlines()
    assert said[-1].startswith("deploy/install: this failed after ")
    assert f"{venv}/install.log has all of it." in said[-1]
    assert any("No matching distribution found for" in line for line in said)
    assert len(done.stdout.splitlines()) < 6
    assert not (venv / ".install-seconds").exists()
