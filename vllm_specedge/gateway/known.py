"""The router's view of engines, edges and requests, and which edge may draft for which request. Pure."""

from array import array
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TypeAlias

from vllm_specedge.config import GatewayOptions
from vllm_specedge.errors import ByeCode
from vllm_specedge.wire.engine_frames import EngineHello, EngineOpen, StepTimes
from vllm_specedge.wire.frames import PROTOCOL_VERSION, Bye, Hello, bye
from vllm_specedge.wire.telemetry import ENGINE_COUNTERS

POOL, PRIVATE = "pool", "private"
ROLES = (POOL, PRIVATE)
MAX_UNREAD_TOKENS = 1 << 16
_OPTIONS = GatewayOptions()
Key: TypeAlias = tuple[bytes, int]
"""An engine's connection, and the engine's number for a request."""


@dataclass(frozen=True, slots=True)
class RouterLimits:
    """The limits of one gateway."""

    max_edges: int = _OPTIONS.max_edges
    max_requests_per_edge: int = _OPTIONS.max_requests_per_edge
    max_requests: int = 4096
    max_context_tokens: int = 1 << 19
    max_total_tokens: int = 1 << 25
    """Tokens of all contexts together, at 4 bytes each."""
    credit_tokens: int = _OPTIONS.credit_tokens
    """How many tokens past the last commit an edge may propose."""
    heartbeat_ms: int = 2000


@dataclass(slots=True)
class KnownEngine:
    hello: EngineHello
    number: int
    counters: list[int] = field(default_factory=lambda: [0] * len(ENGINE_COUNTERS))
    """Last reported values; 0 when the engine connects."""
    step_times: StepTimes | None = None


@dataclass(slots=True)
class EdgeInfo:
    """One connected edge."""

    hello: Hello
    session: str
    max_requests: int
    requests: dict[int, Key] = field(default_factory=dict)
    """Its requests, by the numbers that this edge uses."""
    unread_tokens: int = 0
    """Tokens of contexts sent since the last Ping that it answered, so that a slow edge is not flooded with prompts."""
    num_pings: int = 0
    next_number: int = 0
    num_proposed_tokens: int = 0
    num_committed_tokens: int = 0
    """Tokens of its requests that were committed while it drafted for them."""
    num_verified_tokens: int = 0
    num_accepted_tokens: int = 0
    """Accepted tokens as reported by engines when a request ends; they count for the edge that has it then."""

    @property
    def has_room(self) -> bool:
        return len(self.requests) < self.max_requests and self.unread_tokens < MAX_UNREAD_TOKENS


@dataclass(slots=True)
class RoutedRequest:
    opening: EngineOpen
    tokens: "array[int]"
    edge: int | None = None
    number: int = 0
    """Its number at its edge."""
    declined: set[int] = field(default_factory=set)
    num_gaps: int = 0
    has_report: bool = False

    @property
    def is_known(self) -> bool:
        """Whether its whole prompt has arrived."""
        return len(self.tokens) >= self.opening.num_tokens


def suits(edge: Hello, engine: EngineHello) -> bool:
    return edge.fingerprint in ("", engine.fingerprint)


def may_draft(edge: EdgeInfo, request: RoutedRequest) -> bool:
    if request.opening.session:
        return request.opening.session == edge.session
    return edge.hello.role == POOL


def refusal(
    hello: Hello, roles: frozenset[str], num_edges: int, max_edges: int, engines: Collection[EngineHello]
) -> Bye | None:
    """The Bye for an edge that is not admitted; None if it is. `roles`: those that its token allows."""
    if hello.version != PROTOCOL_VERSION:
        versions = f"{PROTOCOL_VERSION}, this edge {hello.version}"
        text = f"This gateway speaks protocol version {versions}: update the older of the two."
        return bye(ByeCode.VERSION, text)
    if hello.role not in roles:
        text = f"This token does not allow the role {hello.role[:20]!r}: ask for one that does."
        return bye(ByeCode.ROLE, text)
    if num_edges >= max_edges:
        return bye(ByeCode.FULL, f"The gateway already has {max_edges} edges, its maximum: try again later.")
    models = sorted({engine.model for engine in engines})
    if not models:
        return bye(ByeCode.NO_ENGINE, "No vLLM engine is connected to this gateway yet.")
    if not any(suits(hello, engine) for engine in engines):
        text = (
            f"The draft model's tokenizer is not that of {', '.join(models):.200}: choose a draft of the same family."
        )
        return bye(ByeCode.TOKENIZER, text)
    return None
