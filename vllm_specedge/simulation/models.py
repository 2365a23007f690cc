"""The simulator's models: servers, the target, faults, and random numbers. Pure: random numbers follow from seeds."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log
from typing import ClassVar, Protocol

_MASK = (1 << 64) - 1
_STRIDE = 0x9E3779B97F4A7C15
"""SplitMix64's increment, from the golden ratio, so that successive indices of a key are well spread."""


# -- random numbers ------------------------------------------------------------------------------------------------


def mixed(value: int) -> int:
    """64 bits that look random, and are always the same for the same value (SplitMix64)."""
    value &= _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def key_of(*parts: int) -> int:
    """A key for `chance`, different for different parts."""
    key = 0
    for part in parts:
        key = mixed(key ^ mixed(part + _STRIDE))
    return key


def chance(key: int, index: int) -> float:
    """The pseudo-random number in [0, 1) for this index of a key."""
    return mixed(key + index * _STRIDE) / 2.0**64


# -- the target and the draft --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SimulatedTarget:
    """The served model: it has a fixed token for each position of each request, regardless of the context.

    The first NUM_NAMING tokens of a prompt encode the request's number, which a draft model reads from them.
    """

    NUM_NAMING: ClassVar[int] = 2
    seed: int
    vocab_size: int

    def key(self, request: int) -> int:
        return key_of(self.seed, request)

    def token(self, key: int, position: int) -> int:
        return mixed(key + position * _STRIDE) % self.vocab_size

    def prompt(self, request: int, num_tokens: int) -> list[int]:
        """A prompt of `num_tokens` tokens, but at least NUM_NAMING."""
        key = self.key(request)
        rest = range(self.NUM_NAMING, max(self.NUM_NAMING, num_tokens))
        return [*divmod(request, self.vocab_size), *(self.token(key, position) for position in rest)]

    def named(self, tokens: Sequence[int]) -> int:
        """The number of the request whose prompt begins with these tokens."""
        return tokens[0] * self.vocab_size + tokens[1]


# -- servers -------------------------------------------------------------------------------------------------------


class Server(Protocol):
    """The step times of a server."""

    @property
    def draft_step_s(self) -> float:
        """Seconds of a step of the draft model on the server itself, for in-server drafting; 0: not known."""
        ...

    def step_s(self, requests: int, tokens: int, is_verifying: bool = False) -> float:
        """Seconds of a step with `tokens` tokens in all, prompts included; `is_verifying`: with draft tokens."""
        ...


@dataclass(frozen=True, slots=True)
class RooflineServer:
    """A step takes the longer of reading memory and computing, plus a fixed overhead, in seconds."""

    weights_s: float
    request_s: float
    """Reading, added by each request."""
    token_s: float
    """Computing, added by each token."""
    overhead_s: float
    draft_step_s: float = 0.0
    verifying_s: float = 0.0
    """Added by each request if the step verifies something."""

    def step_s(self, requests: int, tokens: int, is_verifying: bool = False) -> float:
        step_s = max(self.weights_s + self.request_s * requests, self.token_s * tokens) + self.overhead_s
        return step_s + self.verifying_s * requests * is_verifying


SERVERS: dict[str, Server] = {
    "a100-14b": RooflineServer(0.022, 20e-6, 0.11e-3, 0.5e-3, 0.004),
    "h100-70b-tp4": RooflineServer(0.020, 20e-6, 0.06e-3, 0.5e-3, 0.003),
    "h100-8b": RooflineServer(0.008, 20e-6, 0.027e-3, 0.5e-3, 0.0015),
    # On a CPU core, computing adds to reading: nothing overlaps.
    "cpu-135m": RooflineServer(0.0, 0.0, 2.3e-3, 0.027, 0.010, 0.2e-3),
}


@dataclass(frozen=True, slots=True)
class FittedServer:
    """Linear interpolation of measurements over tokens, plus a cost per request, higher if the step verifies."""

    knots: Sequence[int]
    """Sizes in tokens, at least one."""
    seconds: Sequence[float]
    slope_s: float
    """Seconds per token after the last knot."""
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
    """Speedup over plain steps if the server runs the same draft model itself: `spec_tokens` draft steps one after the
    other, then a step that verifies them all. None if the server's draft step is not known."""
    if not server.draft_step_s:
        return None
    made = sum(acceptance**depth for depth in range(spec_tokens + 1))
    round_s = spec_tokens * server.draft_step_s + server.step_s(requests, requests * (spec_tokens + 1), True)
    return made * server.step_s(requests, requests) / round_s


# -- faults of edges -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Faults:
    """The times at which an edge works: always, except for `stall_s` every `every_s` on average, or until it dies."""

    key: int
    kind: str
    stall_s: float = 2.0
    every_s: float = 5.0
    _number: int = 0
    _starts_s: float = 0.0
    _ends_s: float = 0.0

    def free_s(self, now_s: float) -> float:
        """The time from which on it works; `inf` if it is dead. `now_s` must never decrease."""
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
