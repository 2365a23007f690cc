"""What the router asks of the gateway. Pure."""

from dataclasses import dataclass
from typing import TypeAlias

from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.engine_frames import Groups


@dataclass(frozen=True, slots=True)
class ToEdge:
    edge: int
    frame: Frame


@dataclass(frozen=True, slots=True)
class ToEngine:
    engine: bytes
    frame: Frame


@dataclass(frozen=True, slots=True)
class RequestReport:
    """What one request came to, when it closed."""

    engine: int
    """Engines are numbered as they come; one that comes back has a new number."""
    values: tuple[int, ...]
    """In the order of telemetry.REQUEST_COUNTERS; of an engine of another release, fewer or more."""


Effect: TypeAlias = ToEdge | ToEngine | RequestReport | Groups
"""What the gateway is to do: send, or show (what a request came to, and an engine's last steps). A Bye to an edge ends
that edge's connection after it is sent."""
