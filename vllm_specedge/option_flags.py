"""Options of a pydantic model as flags of a command, and as a table: the model is their only source."""

import inspect
import json
from collections.abc import Callable
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo


def with_flags(model: type[BaseModel]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the model's fields as flags. It gets their values, by name, as its first argument, unchecked."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command).parameters.values())[1:]

        def called(**values: Any) -> None:
            named = {name: values.pop(name) for name in model.model_fields}
            command(named, **values)

        parameters = [_parameter(name, field) for name, field in model.model_fields.items()]
        by_name = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
        called.__signature__ = inspect.Signature([*by_name, *parameters])  # type: ignore[attr-defined]
        called.__annotations__ = {each.name: each.annotation for each in (*by_name, *parameters)}
        called.__name__, called.__doc__ = command.__name__, command.__doc__
        return called

    return decorate


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    flags = [f"--{name.replace('_', '-')}"] if field.annotation is bool else []
    annotation: Any = Annotated.__class_getitem__((field.annotation, typer.Option(*flags, help=_sentence(field))))  # type: ignore[attr-defined]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)


def _sentence(field: FieldInfo) -> str:
    """The first one of what is said of it."""
    first, dot, _ = " ".join((field.description or "").split()).partition(". ")
    return f"{first}{dot.strip()}"


def as_table(model: type[BaseModel]) -> str:
    """Options, defaults and meanings, in Markdown."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = f"`{json.dumps(default)}`" if default or default is False or default == 0 else "none"
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        rows.append(f"| `{name}` | {shown} | {meaning} |")
    return "\n".join(rows) + "\n"
