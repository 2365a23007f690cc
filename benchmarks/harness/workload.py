"""The questions of `make evidence`, by kind, as input for vLLM's benchmark (workload.toml)."""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, cycle, islice
from pathlib import Path
from random import Random
from typing import Any

FILE = Path(__file__).parents[1] / "workload.toml"
REFERENCE = re.compile(r"\{(text|program) (\d+)\}")
MIXED = "mixed"
"""All kinds in turn."""
SPREAD = 0.75
"""With several requests at a time, an answer's most tokens are up to this share below or above the mean. Answers of
equal length would end together on plain vLLM and share their prompts' steps, while drafts would separate them."""


@dataclass(frozen=True, eq=False)
class Question:
    """One conversation; its last turn is to be answered."""

    kind: str
    messages: tuple[Mapping[str, str], ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the request's body other than its messages."""

    @property
    def body(self) -> dict[str, Any]:
        return {**self.fields, "messages": list(map(dict, self.messages))}


@cache
def questions(file: Path = FILE) -> dict[str, list[Question]]:
    """All questions by kind."""
    values = tomllib.loads(file.read_text())
    found: dict[str, list[Question]] = {}
    for group in values["question"]:
        turns = [[asked] for asked in group.get("asked", ())] + group.get("turns", [])
        fields = _fields(group)
        found.setdefault(group["kind"], []).extend(
            Question(group["kind"], tuple(_messages(each, values)), fields) for each in turns
        )
    return found


def _fields(group: Mapping[str, Any]) -> dict[str, Any]:
    if "schema" not in group:
        return {}
    schema = {"name": "answer", "schema": json.loads(group["schema"])}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _messages(turns: Sequence[str], values: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    roles = cycle(("user", "assistant"))
    for role, text in zip(roles, turns, strict=False):
        yield {"role": role, "content": REFERENCE.sub(lambda at: values[f"{at[1]}s"]["all"][int(at[2])], text)}


def chosen(by_kind: Mapping[str, Sequence[Question]], kind: str, number: int, first: int = 0) -> list[Question]:
    """`number` questions of a kind, starting at `first`; MIXED: of all kinds in turn. They wrap around."""
    in_turn = list(chain.from_iterable(zip(*by_kind.values(), strict=True))) if kind == MIXED else by_kind[kind]
    return list(islice(cycle(in_turn), first % len(in_turn), first % len(in_turn) + number))


def varied(mean_tokens: int, number: int) -> int:
    """Most tokens of the answer to the request of this number, among several at a time."""
    return round(mean_tokens * Random(number).uniform(1 - SPREAD, 1 + SPREAD))
