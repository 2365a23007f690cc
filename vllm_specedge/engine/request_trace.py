"""What a trace says of one request: the steps that gave it tokens, and the drafts they verified. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_GROUPS = 256
"""Steps of a request that are told one by one, its first ones; of the others there are totals only."""


@dataclass(frozen=True, slots=True)
class _Group:
    ended_ms: int
    """After the request began."""
    took_ms: float
    verified: int
    accepted: int
    is_held: bool
    """The request was held for a draft before this step."""


@dataclass(slots=True)
class RequestSpan:
    """One request's part in the engine's steps, of bounded size. Times are of one monotonic clock."""

    began_s: float
    num_tokens: int
    """Decided so far, prompt first."""
    is_held: bool = False
    """Since its last step."""
    _steps: int = 0
    _verified: int = 0
    _accepted: int = 0
    _held: int = 0
    _groups: list[_Group] = field(default_factory=list)

    def step(self, num_tokens: int, num_verified: int, started_s: float, ended_s: float) -> None:
        """A step is done that verified so many draft tokens of the request, which has `num_tokens` now.

        One that gave it none, for it computed a part of the prompt, is left out.
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
        """As OpenTelemetry takes them: totals, and a list of each quantity with one value a step."""
        groups = self._groups
        return {
            "specedge.steps": self._steps,
            "specedge.verified_tokens": self._verified,
            "specedge.accepted_tokens": self._accepted,
            "specedge.held_steps": self._held,
            "specedge.group.ended_ms": [group.ended_ms for group in groups],
            "specedge.group.took_ms": [group.took_ms for group in groups],
            "specedge.group.verified_tokens": [group.verified for group in groups],
            "specedge.group.accepted_tokens": [group.accepted for group in groups],
            "specedge.group.held": [group.is_held for group in groups],
        }
