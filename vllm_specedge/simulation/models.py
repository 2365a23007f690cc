"""What the simulator takes for given: servers, the target, faults, and chance. Pure: chance follows from seeds."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log
from typing import ClassVar, Protocol

_MASK = (1 << 64) - 1
_STRIDE = 0x9E3779B97F4A7C15
"""As SplitMix64 has it: the golden ratio, so that what is counted from a key on is well spread."""


# -- chance --------------------------------------------------------------------------------------------------------


def mixed(value: int) -> int:
    """64 bits that look like chance, and are always the same for the same value (SplitMix64)."""
    value &= _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def key_of(*parts: int) -> int:
    """A key for `chance`: different for different parts."""
    key = 0
    for part in parts:
        key = mixed(key ^ mixed(part + _STRIDE))
    return key


def chance(key: int, index: int) -> float:
    """The number in [0, 1) that belongs to this index of a key."""
    return mixed(key + index * _STRIDE) / 2.0**64


# -- the target and the draft --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SimulatedTarget:
    """What the served model says: a token for each position of each request, whatever came before.

    The first NUM_NAMING tokens of a prompt are the request's number, so that a draft model can know it from them.
    """

    NUM_NAMING: ClassVar[int] = 2
    seed: int
    vocab_size: int

    def key(self, request: int) -> int:
        return key_of(self.seed, request)

    def token(self, key: int, position: int) -> int:
        return mixed(key + position * _STRIDE) % self.vocab_size

    def prompt(self, request: int, num_tokens: int) -> list[int]:
        """At least NUM_NAMING tokens."""
        key = self.key(request)
        rest = range(self.NUM_NAMING, max(self.NUM_NAMING, num_tokens))
        return [*divmod(request, self.vocab_size), *(self.token(key, position) for position in rest)]

    def named(self, tokens: Sequence[int]) -> int:
        """The number of the request whose prompt begins so."""
        return tokens[0] * self.vocab_size + tokens[1]


# -- servers -------------------------------------------------------------------------------------------------------


class Server(Protocol):
    """How long a server's steps take."""

    @property
    def draft_step_s(self) -> float:
        """A step of the draft model on the server itself, for drafting there; 0: not known."""
        ...

    def step_s(self, requests: int, tokens: int, is_verifying: bool = False) -> float:
        """Seconds of a step with so many tokens in all, prompts included; `is_verifying`: draft tokens as well."""
        ...


@dataclass(frozen=True, slots=True)
class RooflineServer:
    """The longer of reading the weights and computing, and what each step costs beside, in seconds."""

    weights_s: float
    request_s: float
    """While the weights are read."""
    token_s: float
    """Of computing."""
    overhead_s: float
    draft_step_s: float = 0.0
    verifying_s: float = 0.0
    """For each request in a step that verifies something."""

    def step_s(self, requests: int, tokens: int, is_verifying: bool = False) -> float:
        step_s = max(self.weights_s + self.request_s * requests, self.token_s * tokens) + self.overhead_s
        return step_s + self.verifying_s * requests * is_verifying


SERVERS: dict[str, Server] = {
    "a100-14b": RooflineServer(0.022, 20e-6, 0.11e-3, 0.5e-3, 0.004),
    "h100-70b-tp4": RooflineServer(0.020, 20e-6, 0.06e-3, 0.5e-3, 0.003),
    "h100-8b": RooflineServer(0.008, 20e-6, 0.027e-3, 0.5e-3, 0.0015),
    # On a CPU core computing adds to reading: nothing overlaps.
    "cpu-135m": RooflineServer(0.0, 0.0, 2.3e-3, 0.027, 0.010, 0.2e-3),
}


@dataclass(frozen=True, slots=True)
class FittedServer:
    """Straight lines over tokens through what was measured, and so much for each request, more where it verifies."""

    knots: Sequence[int]
    """Tokens; one at least."""
    seconds: Sequence[float]
    slope_s: float
    """Of the last line, which goes on."""
    request_s: float
    verifying_s: float = 0.0
    draft_step_s: float = 0.0

    def step_s(self, requests: int, tokens: int, is_verifying: bool = False) -> float:
        index = max(0, bisect_right(self.knots, tokens) - 1)
        if index + 1 < len(self.knots):
            rise = (self.seconds[index + 1] - self.seconds[index]) / (self.knots[index + 1] - self.knots[index])
        else:
            rise = self.slope_s
        each_s = self.request_s + self.verifying_s * is_verifying
        return self.seconds[index] + rise * (tokens - self.knots[index]) + each_s * requests


def in_server_gain(server: Server, requests: int, spec_tokens: int, acceptance: float) -> float | None:
    """Tokens per second against plain steps, where the server runs the same draft model itself: `spec_tokens` draft
    steps one after the other, then a step that verifies them all. None if the server does not say what those take."""
    if not server.draft_step_s:
        return None
    made = sum(acceptance**depth for depth in range(spec_tokens + 1))
    round_s = spec_tokens * server.draft_step_s + server.step_s(requests, requests * (spec_tokens + 1), True)
    return made * server.step_s(requests, requests) / round_s


# -- faults of edges -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Faults:
    """When an edge is at work: always, or but for `stall_s` every `every_s` on average, or until it dies."""

    key: int
    kind: str
    stall_s: float = 2.0
    every_s: float = 5.0
    _number: int = 0
    _starts_s: float = 0.0
    _ends_s: float = 0.0

    def free_s(self, now_s: float) -> float:
        """From when on it is at work; `inf` if it is dead. Times asked for never go back."""
        if not self.kind:
            return now_s
        if self.kind == "dead":
            return inf if now_s >= 0.25 + 0.5 * chance(self.key, 0) else now_s
        while now_s >= self._ends_s:
            pause_s = (self.stall_s - self.every_s) * log(1.0 - chance(self.key, self._number))
            self._starts_s = self._ends_s + pause_s
            self._ends_s = self._starts_s + self.stall_s
            self._number += 1
        return self._ends_s if now_s >= self._starts_s else now_s
