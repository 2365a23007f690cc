"""The effects that the router returns for the gateway to carry out. Pure."""

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
    """The counters of one request, reported when it closed."""

    engine: int
    """Number of the engine, in the order of connection; an engine that reconnects gets a new number."""
    values: tuple[int, ...]
    """Values in the order of telemetry.REQUEST_COUNTERS; an engine of another release may send fewer or more."""


Effect: TypeAlias = ToEdge | ToEngine | RequestReport | Groups
"""What the gateway does: send a frame, or show a request's counters or an engine's last steps. A Bye ends the edge's
connection after it is sent."""
