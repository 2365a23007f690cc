"""A compose file as read by `docker compose`, for the features that ours uses: interpolation, profiles, order. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Any

import yaml

_VARIABLE = re.compile(r"\$(\$|\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\})")


def interpolate(value: Any, variables: Mapping[str, str]) -> Any:
    """Resolve `${NAME:-default}`, `${NAME}` and `$$` in all strings of a YAML value. Raises KeyError if undefined."""
    if isinstance(value, dict):
        return {key: interpolate(each, variables) for key, each in value.items()}
    if isinstance(value, list):
        return [interpolate(each, variables) for each in value]
    if not isinstance(value, str):
        return value
    return _VARIABLE.sub(lambda match: "$" if match[1] == "$" else _variable(match, variables), value)


def _variable(match: re.Match[str], variables: Mapping[str, str]) -> str:
    return variables.get(match["name"]) or (match["default"] if match["default"] is not None else _missing(match))


def _missing(match: re.Match[str]) -> str:
    raise KeyError(match["name"])


@dataclass(frozen=True)
class Service:
    """One service: its command, and its other entries in the file."""

    name: str
    entries: dict[str, Any]

    @property
    def command(self) -> list[str]:
        """The full command with its entry point; an image's own entry point is not known here."""
        return [*self.entries.get("entrypoint", ()), *self.entries.get("command", ())]

    @property
    def environment(self) -> dict[str, str]:
        return dict(self.entries.get("environment", {}))

    @property
    def health(self) -> list[str]:
        """The health check's command; empty if there is none."""
        kind, *command = self.entries.get("healthcheck", {}).get("test", ("NONE",))
        assert kind in ("CMD", "NONE"), f"{self.name}: a health check is a list, not a shell's line"
        return command

    @property
    def waits_for(self) -> dict[str, dict[str, Any]]:
        return dict(self.entries.get("depends_on", {}))


def services(text: str, profile: str, variables: Mapping[str, str]) -> list[Service]:
    """The services that a profile starts, in the order of their dependencies."""
    every = interpolate(yaml.safe_load(text), variables)["services"]
    active = {name: Service(name, each) for name, each in every.items() if profile in each.get("profiles", (profile,))}
    order = TopologicalSorter({name: set(each.waits_for) for name, each in active.items()}).static_order()
    return [active[name] for name in order if name in active]
