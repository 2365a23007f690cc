"""A vLLM that is not installed, read from its wheel: nothing of it is run."""

import ast
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

CACHE = Path(__file__).parents[2] / ".cache" / "wheels"


def downloaded(version: str) -> Path | None:
    """vLLM's own wheel of that version; None where it cannot be had."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(CACHE)]
    subprocess.run([*command, f"vllm=={version}"], check=False, capture_output=True, timeout=600)
    return next(iter(CACHE.glob(f"vllm-{version}-*.whl")), None)


@dataclass
class Wheel:
    """The Python of a wheel, as syntax."""

    path: Path
    _modules: dict[str, tuple[str, ast.Module] | None] = field(default_factory=dict)

    def find(self, path: str) -> tuple[str, ast.AST] | None:
        """Text and node of module:qualified.name, followed through imports and base classes; None: it is not there."""
        module, _, name = path.partition(":")
        return self._within(module, name.split("."))

    def _within(self, module: str, names: list[str]) -> tuple[str, ast.AST] | None:
        read = self._read(module)
        if read is None:
            return None
        text, tree = read
        body: list[ast.stmt] = tree.body
        node: ast.AST = tree
        for number, name in enumerate(names):
            found = next((each for each in _statements(body) if name in _bound(each)), None)
            if found is None and isinstance(node, ast.ClassDef):
                return self._in_bases(module, node, names[number:])
            if isinstance(found, ast.ImportFrom):
                alias = next(each for each in found.names if (each.asname or each.name) == name)
                return self._within(self._imported(module, found), [alias.name, *names[number + 1 :]])
            if found is None:
                return None
            node, body = found, getattr(found, "body", [])
        return ast.get_source_segment(text, node) or "", node

    def _imported(self, module: str, statement: ast.ImportFrom) -> str:
        if not statement.level:
            return statement.module or module
        with zipfile.ZipFile(self.path) as archive:
            is_package = f"{module.replace('.', '/')}/__init__.py" in archive.NameToInfo
        parts = module.split(".")
        parents = parts[: len(parts) - statement.level + is_package]
        return ".".join([*parents, statement.module] if statement.module else parents)

    def _in_bases(self, module: str, node: ast.ClassDef, names: list[str]) -> tuple[str, ast.AST] | None:
        bases = (self._within(module, [*ast.unparse(base).split("."), *names]) for base in node.bases)
        return next((found for found in bases if found is not None), None)

    def _read(self, module: str) -> tuple[str, ast.Module] | None:
        if module not in self._modules:
            stem = module.replace(".", "/")
            with zipfile.ZipFile(self.path) as archive:
                names = [name for name in (f"{stem}.py", f"{stem}/__init__.py") if name in archive.NameToInfo]
                text = archive.read(names[0]).decode() if names else None
            self._modules[module] = (text, ast.parse(text)) if text is not None else None
        return self._modules[module]


def _statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """All of a body, those behind a condition too."""
    found = list(body)
    for each in body:
        if isinstance(each, ast.If | ast.Try):
            found += _statements(each.body) + _statements(each.orelse)
    return found


def _bound(statement: ast.stmt) -> set[str]:
    """The names that a statement defines."""
    match statement:
        case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
            return {statement.name}
        case ast.Assign():
            return {target.id for target in statement.targets if isinstance(target, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
        case ast.ImportFrom():
            return {alias.asname or alias.name for alias in statement.names}
    return set()


def parameters(node: ast.AST) -> set[str] | None:
    """The names that a function or a class takes; None: any."""
    if isinstance(node, ast.ClassDef):
        init = next((each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"), None)
        return parameters(init) if init is not None else _fields(node)
    if not isinstance(node, ast.FunctionDef):
        return None
    return {each.arg for each in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]}


def _fields(node: ast.ClassDef) -> set[str]:
    return {
        each.target.id for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    }
