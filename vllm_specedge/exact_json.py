"""JSON that is written with its numbers exactly as read: floats cannot hold 1e400, nor doubles 12345678901234567890."""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Number:
    """A number as written in the JSON text."""

    text: str


def read(data: str | bytes) -> Any:
    """Parse JSON. Raises ValueError if it is not valid, RecursionError if it is nested too deeply."""
    return json.loads(data, parse_float=Number, parse_int=Number)


def write(value: Any) -> str:
    """Write a result of `read`, or plain values, as JSON. Raises RecursionError if nested too deeply."""
    match value:
        case Number():
            return value.text
        case dict():
            return "{" + ", ".join(f"{json.dumps(name)}: {write(each)}" for name, each in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(write, value)) + "]"
        case _:
            return json.dumps(value)
