"""JSON that is written again with its numbers as they were read: 1e400 is no float, 12345678901234567890 no double."""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Number:
    """A number as it is written."""

    text: str


def read(data: str | bytes) -> Any:
    """Raises ValueError for what is no JSON, RecursionError for what is nested too deeply."""
    return json.loads(data, parse_float=Number, parse_int=Number)


def write(value: Any) -> str:
    """What `read` gives, or plain values, as JSON. Raises RecursionError for what is nested too deeply."""
    match value:
        case Number():
            return value.text
        case dict():
            return "{" + ", ".join(f"{json.dumps(name)}: {write(each)}" for name, each in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(write, value)) + "]"
        case _:
            return json.dumps(value)
