"""The trace attributes of one request: the steps that gave it tokens, and the drafts they verified. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

MAX_GROUPS = 256
"""Maximum steps of a request that are listed, its first ones; the others only count in the totals."""


class _Group(NamedTuple):
    """A step; the field names are those of the trace's attributes."""

    ended_ms: int
    """Milliseconds since the request began."""
    took_ms: float
    verified_tokens: int
    accepted_tokens: int
    held: bool
    """Whether the request was held for a draft before this step."""


@dataclass(slots=True)
class RequestSpan:
    """One request's steps, in bounded size. Times are on one monotonic clock."""

    began_s: float
    num_tokens: int
    """Tokens decided so far, the prompt included."""
    is_held: bool = False
    """Whether it was held since its last step."""
    _steps: int = 0
    _verified: int = 0
    _accepted: int = 0
    _held: int = 0
    _groups: list[_Group] = field(default_factory=list)

    def step(self, num_tokens: int, num_verified: int, started_s: float, ended_s: float) -> None:
        """Record a step that verified `num_verified` draft tokens of the request, which has `num_tokens` now.

        A step that gave it no token, as it prefilled a part of the prompt, is left out.
        """
        new = num_tokens - self.num_tokens
        if new <= 0:
            return
        accepted = min(new - 1, num_verified)
        self.num_tokens = num_tokens
        self._steps += 1
        self._verified += num_verified
        self._accepted += accepted
        self._held += self.is_held
        if len(self._groups) < MAX_GROUPS:
            ended_ms, took_ms = round((ended_s - self.began_s) * 1e3), round((ended_s - started_s) * 1e3, 1)
            self._groups.append(_Group(ended_ms, took_ms, num_verified, accepted, self.is_held))
        self.is_held = False

    def attributes(self) -> Mapping[str, object]:
        """Attributes for OpenTelemetry: totals, and for each quantity a list with one value per step."""
        return {
            "specedge.steps": self._steps,
            "specedge.verified_tokens": self._verified,
            "specedge.accepted_tokens": self._accepted,
            "specedge.held_steps": self._held,
            **{f"specedge.group.{name}": [getattr(each, name) for each in self._groups] for name in _Group._fields},
        }
