"""Shared parts of the command lines: fields of models and dataclasses as flags or a table, --version, user errors."""

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from operator import getitem
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_type_hints

import typer

from vllm_specedge import __version__
from vllm_specedge.errors import USER_ERROR_STATUS, UserError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Turn a command's parameters that are dataclasses or models into flags, one per field; it gets them unchecked."""
    own = inspect.signature(command).parameters.values()
    groups = {name: hint for name, hint in get_type_hints(command).items() if _fields(hint)}

    def called(**values: Any) -> None:
        for name, group in groups.items():
            made = {each.name: values.pop(each.name) for each in _fields(group)}
            values[name] = getattr(group, "model_construct", group)(**made)
        command(**values)

    parameters = [flag for each in own for flag in (_fields(groups[each.name]) if each.name in groups else [each])]
    by_name = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    called.__signature__ = inspect.Signature(by_name)  # type: ignore[attr-defined]
    called.__annotations__ = {each.name: each.annotation for each in by_name}
    called.__name__, called.__doc__ = command.__name__, command.__doc__
    return called


def _fields(group: Any) -> list[inspect.Parameter]:
    """The fields of a dataclass with typer annotations, or of a model; empty for any other type."""
    if is_dataclass(group):
        return list(inspect.signature(group).parameters.values())  # type: ignore[arg-type]
    return [_parameter(name, field) for name, field in getattr(group, "model_fields", {}).items()]


def _parameter(name: str, field: "FieldInfo") -> inspect.Parameter:
    flags = [f"--{name.replace('_', '-')}"] if field.annotation is bool else []
    annotation: Any = getitem(Annotated, (field.annotation, typer.Option(*flags, help=_sentence(field))))
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)


def _sentence(field: "FieldInfo") -> str:
    """The first sentence of a field's description."""
    first, dot, _ = " ".join((field.description or "").split()).partition(". ")
    return f"{first}{dot.strip()}"


def as_table(model: "type[BaseModel]") -> str:
    """A Markdown table of options, defaults and meanings."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = f"`{json.dumps(default)}`" if default or default is False or default == 0 else "none"
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        rows.append(f"| `{name}` | {shown} | {meaning} |")
    return "\n".join(rows) + "\n"


def command_line(about: str) -> typer.Typer:
    """A command line with --version."""
    app = typer.Typer(help=about, no_args_is_help=True, pretty_exceptions_enable=False)
    app.callback()(_versioned)
    return app


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


def _versioned(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def run(app: typer.Typer, name: str) -> NoReturn:
    """Run the command line and exit. A UserError is printed as one sentence, with status USER_ERROR_STATUS."""
    try:
        app()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(USER_ERROR_STATUS)
    sys.exit(0)
