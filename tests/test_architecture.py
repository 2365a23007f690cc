"""Imports point down, the core is pure, and vLLM stays in its folder (docs/design.md)."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("vllm_specedge", "edge_client")
PURE = {
    "vllm_specedge.addresses",
    "vllm_specedge.errors",
    "vllm_specedge.exact_json",
    "vllm_specedge.frames",
    "vllm_specedge.session",
    "vllm_specedge.proposals",
    "vllm_specedge.policy",
    "vllm_specedge.slo",
    "vllm_specedge.book",
    "vllm_specedge.router",
    "vllm_specedge.fingerprint",
    "vllm_specedge.vocabulary",
    "vllm_specedge.vocabulary_store",
    "vllm_specedge.estimates",
    "vllm_specedge.acceptance",
    "vllm_specedge.stepcost",
    "vllm_specedge.lookups",
    "vllm_specedge.request_span",
    "vllm_specedge.rests",
    "vllm_specedge.counters",
    "vllm_specedge.prediction",
    "edge_client.cooling",
    "edge_client.drafttree",
    "edge_client.naming",
    "edge_client.pace",
    "edge_client.speculation",
    "edge_client.drafters",
    "edge_client.drafters.devices",
    "edge_client.drafters.entries",
    "edge_client.drafters.lanes",
}
IMPURE_LIBRARIES = {
    "asyncio",
    "fastapi",
    "llama_cpp",
    "logging",
    "numpy",
    "os",
    "psutil",
    "random",
    "secrets",
    "select",
    "selectors",
    "socket",
    "subprocess",
    "sys",
    "threading",
    "time",
    "torch",
    "vllm",
    "zmq",
}
LEVELS: list[set[str]] = [
    {
        "vllm_specedge",
        "vllm_specedge.acceptance",
        "vllm_specedge.addresses",
        "vllm_specedge.asgi",
        "vllm_specedge.errors",
        "vllm_specedge.estimates",
        "vllm_specedge.exact_json",
        "vllm_specedge.fingerprint",
        "vllm_specedge.prediction",
        "vllm_specedge.log_format",
        "vllm_specedge.proposals",
        "vllm_specedge.request_span",
        "vllm_specedge.rests",
        "vllm_specedge.stepcost",
        "vllm_specedge.vocabulary",
        "edge_client",
        "edge_client.cooling",
        "edge_client.drafters",
        "edge_client.drafters.entries",
        "edge_client.drafters.translated",
    },
    {
        "vllm_specedge.frames",
        "vllm_specedge.lookups",
        "vllm_specedge.policy",
        "vllm_specedge.slo",
        "edge_client.drafters.cores",
        "edge_client.drafters.devices",
        "edge_client.drafters.hub",
        "edge_client.drafters.lanes",
        "edge_client.sensors",
        "edge_client.naming",
        "edge_client.settings",
        "edge_client.drafttree",
        "edge_client.ways",
    },
    {
        "vllm_specedge.config",
        "vllm_specedge.counters",
        "vllm_specedge.session",
        "vllm_specedge.router",
        "vllm_specedge.vocabulary_store",
        "edge_client.pace",
    },
    {
        "vllm_specedge.admission",
        "vllm_specedge.book",
        "vllm_specedge.metrics",
        "vllm_specedge.overview",
        "vllm_specedge.prediction_front",
        "vllm_specedge.tokens",
        "edge_client.speculation",
    },
    {
        "vllm_specedge.engine_socket",
        "vllm_specedge.link",
        "vllm_specedge.supervisor",
        "edge_client.link",
        "edge_client.drafters.ngram",
        "edge_client.drafters.llama_weights",
        "edge_client.drafters.passes",
        "edge_client.drafters.vocabulary",
    },
    {"vllm_specedge.preflight", "edge_client.drafters.gguf", "edge_client.drafters.hf", "edge_client.drafters.llama"},
    {
        "vllm_specedge.gateway",
        "vllm_specedge.adapter",
        "edge_client.client",
        "edge_client.mismatch",
        "edge_client.drafters.load",
        "edge_client.drafters.own_vocabulary",
        "edge_client.serve",
        "edge_client.chat",
        "edge_client.view",
    },
    {"vllm_specedge.web"},
    {"vllm_specedge.simulation_models", "vllm_specedge.simulation_report", "vllm_specedge.simulator"},
    {"edge_client.doctor", "edge_client.forecast"},
    {"vllm_specedge.cli", "edge_client.cli"},
]
"""Lowest first. A module imports from its own level or below; on its own level, no two import each other."""
EDGE_MAY_IMPORT = {
    "vllm_specedge",
    "vllm_specedge.addresses",
    "vllm_specedge.errors",
    "vllm_specedge.estimates",
    "vllm_specedge.exact_json",
    "vllm_specedge.frames",
    "vllm_specedge.fingerprint",
    "vllm_specedge.prediction",
    "vllm_specedge.session",
    "vllm_specedge.vocabulary",
}
MAY_SIMULATE = {"edge_client.forecast"}
"""It asks the simulator whether this machine would help."""
SIMULATOR = {"vllm_specedge.simulation_models", "vllm_specedge.simulation_report", "vllm_specedge.simulator"}
MAY_IMPORT_EDGE = {"vllm_specedge.simulator"}
"""It runs the pure part of a real edge, on virtual time. Nothing else of the server knows the edge's side."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imports_of(module: str) -> Iterator[str]:
    """Every module that `module` imports, anywhere in its text, by full name."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            assert node.module is not None
            full_names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((name if name in MODULES else node.module) for name in full_names)


def top(name: str) -> str:
    return name.partition(".")[0]


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def level_of(module: str) -> int:
    """That of the module, or of the nearest package around it."""
    while module:
        for number, level in enumerate(LEVELS):
            if module in level:
                return number
        module = module.rpartition(".")[0]
    raise AssertionError


def test_the_modules_named_here_exist() -> None:
    named = PURE | EDGE_MAY_IMPORT | MAY_IMPORT_EDGE | MAY_SIMULATE | SIMULATOR | set().union(*LEVELS)
    assert named <= MODULES.keys()


@pytest.mark.parametrize("module", sorted(PURE))
def test_the_core_touches_no_clock_chance_or_outside_world(module: str) -> None:
    assert not {top(name) for name in imports_of(module)} & IMPURE_LIBRARIES
    assert {name for name in imports_of(module) if top(name) in PACKAGES} <= PURE


@pytest.mark.parametrize("module", sorted(MODULES))
def test_vllm_and_torch_stay_in_their_folders(module: str) -> None:
    libraries = {top(name) for name in imports_of(module)}
    is_adapter = is_in(module, "vllm_specedge.adapter")
    assert "vllm" not in libraries or is_adapter
    of_models = {"torch", "transformers", "llama_cpp"}
    assert not libraries & of_models or is_adapter or is_in(module, "edge_client.drafters")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_two_sides_share_the_protocol_and_nothing_else(module: str) -> None:
    imports = set(imports_of(module))
    if is_in(module, "vllm_specedge"):
        of_the_edge = {name for name in imports if is_in(name, "edge_client")}
        assert of_the_edge <= (PURE if module in MAY_IMPORT_EDGE else set())
    else:
        allowed = EDGE_MAY_IMPORT | (SIMULATOR if module in MAY_SIMULATE else set())
        assert {name for name in imports if is_in(name, "vllm_specedge")} <= allowed


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_outside_of_the_adapter_needs_it(module: str) -> None:
    if not is_in(module, "vllm_specedge.adapter") and module != "vllm_specedge.cli":  # `doctor` looks at vLLM
        assert not any(is_in(name, "vllm_specedge.adapter") for name in imports_of(module))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module: str) -> None:
    """Or sideways, but never in a circle."""
    reached, todo = set[str](), [name for name in imports_of(module) if name in MODULES]
    assert all(level_of(name) <= level_of(module) for name in todo)
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += [other for other in imports_of(name) if other in MODULES]
    assert module not in reached


def test_importing_the_packages_loads_nothing_heavy() -> None:
    code = (
        "import sys, vllm_specedge, edge_client, edge_client.cli\n"
        "print(sorted({'torch', 'vllm', 'transformers', 'llama_cpp', 'numpy', 'zmq', 'fastapi'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_wall_clock_decides_nothing_but_when_tokens_and_reports_end(module: str) -> None:
    """It jumps. All else goes by the monotonic clock, or is told the time. (An engine's report of its load is a file,
    with a file's time: a jump makes one of them old, and the next is written within 0.1 s.)"""
    reads = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(MODULES[module].read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.time", "datetime.now", "datetime.utcnow")
    ]
    assert not reads or module in ("vllm_specedge.admission", "vllm_specedge.gateway", "vllm_specedge.cli")
