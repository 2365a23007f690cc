"""Rooms import only what they may, the core is pure, and vLLM stays in its folder (docs/design.md, "Rooms")."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("vllm_specedge", "edge_client")
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
LEAVES = {f"vllm_specedge.{name}" for name in ("addresses", "backoff", "errors", "estimators", "exact_json")} | {
    "vllm_specedge",  # nothing but the version; rooms in it are named one by one
}
WIRE, POLICY, CONFIG = "vllm_specedge.wire", "vllm_specedge.policy", "vllm_specedge.config"
ENGINE, GATEWAY, FRONTEND = "vllm_specedge.engine", "vllm_specedge.gateway", "vllm_specedge.frontend"
SIMULATION, ADAPTER = "vllm_specedge.simulation", "vllm_specedge.adapter"
OPTION_FLAGS = "vllm_specedge.option_flags"
DRAFTERS, DRAFTING = "edge_client.drafters", "edge_client.drafting"
ROOMS: dict[str, set[str]] = {
    **dict.fromkeys(LEAVES, LEAVES),
    WIRE: LEAVES,
    POLICY: LEAVES,
    CONFIG: LEAVES | {POLICY},
    ENGINE: LEAVES | {WIRE, POLICY, CONFIG},
    GATEWAY: LEAVES | {WIRE, POLICY, CONFIG},
    FRONTEND: LEAVES | {WIRE, POLICY, ENGINE},
    ADAPTER: LEAVES | {WIRE, POLICY, CONFIG, ENGINE, GATEWAY, FRONTEND},
    # It runs the pure part of a real edge. Nothing else of the server knows the edge's side.
    SIMULATION: LEAVES | {WIRE, POLICY, ENGINE, GATEWAY, DRAFTERS, DRAFTING},
    "vllm_specedge.admission": {FRONTEND},
    "vllm_specedge.prediction_front": {FRONTEND},
    OPTION_FLAGS: LEAVES,
    "vllm_specedge.cli": LEAVES | {OPTION_FLAGS, WIRE, POLICY, CONFIG, ENGINE, GATEWAY, ADAPTER, SIMULATION},
    DRAFTERS: LEAVES | {WIRE},
    DRAFTING: LEAVES | {WIRE, DRAFTERS},
    "edge_client": LEAVES | {WIRE, OPTION_FLAGS, DRAFTERS, DRAFTING, "edge_client.forecast"},
    # It predicts by simulation whether this machine would help.
    "edge_client.forecast": LEAVES | {SIMULATION},
}
"""Each room, by its package or module, and the rooms that it may import. A module belongs to the innermost room."""
PURE = {WIRE, POLICY, ENGINE, DRAFTING} | LEAVES
"""Modules that decide: no clock, no randomness, no outside world."""
AT_THE_EDGE_OF_THE_CORE = {f"{ENGINE}.gateway_link", f"{ENGINE}.gateway_process"}
"""Modules that connect the engine to its gateway; the pure part of its room does not import them."""


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


def room_of(module: str) -> str:
    around = [room for room in ROOMS if is_in(module, room) and (module == room or room not in LEAVES)]
    return max(around, key=len)


def is_pure(module: str) -> bool:
    return module == DRAFTERS or (room_of(module) in PURE and module not in AT_THE_EDGE_OF_THE_CORE)


def test_every_room_named_here_exists() -> None:
    assert {name for rooms in ROOMS.values() for name in rooms} | ROOMS.keys() <= MODULES.keys()


@pytest.mark.parametrize("module", sorted(filter(is_pure, MODULES)))
def test_the_core_touches_no_clock_chance_or_outside_world(module: str) -> None:
    assert not {top(name) for name in imports_of(module)} & IMPURE_LIBRARIES
    assert all(is_pure(name) for name in imports_of(module) if name in MODULES)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_room_imports_the_rooms_it_may(module: str) -> None:
    room = room_of(module)
    reached = {room_of(name) for name in imports_of(module) if name in MODULES}
    assert reached <= ROOMS[room] | {room}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_vllm_and_torch_stay_in_their_folders(module: str) -> None:
    libraries = {top(name) for name in imports_of(module)}
    is_adapter = is_in(module, ADAPTER)
    assert "vllm" not in libraries or is_adapter
    of_models = {"torch", "transformers", "llama_cpp"}
    assert not libraries & of_models or is_adapter or is_in(module, DRAFTERS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_import_leads_back(module: str) -> None:
    reached, todo = set[str](), [name for name in imports_of(module) if name in MODULES]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += [other for other in imports_of(name) if other in MODULES]
    assert module not in reached


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_is_long_and_no_class_has_many_methods(module: str) -> None:
    """A class may have more where its docstring says why."""
    text = MODULES[module].read_text()
    assert is_in(module, ADAPTER) or text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            num_methods = sum(isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) for each in node.body)
            assert num_methods <= 20 or "One class" in (ast.get_docstring(node) or ""), node.name


def test_importing_the_packages_loads_nothing_heavy() -> None:
    code = (
        "import sys, vllm_specedge, edge_client, edge_client.cli\n"
        "print(sorted({'torch', 'vllm', 'transformers', 'llama_cpp', 'numpy', 'zmq', 'fastapi'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_wall_clock_decides_nothing_but_when_tokens_end(module: str) -> None:
    """It can jump. All other code uses the monotonic clock, or gets the time as an argument."""
    reads = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(MODULES[module].read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.time", "datetime.now", "datetime.utcnow")
    ]
    assert not reads or module in (
        "vllm_specedge.gateway.connections",
        "vllm_specedge.cli",
    )
