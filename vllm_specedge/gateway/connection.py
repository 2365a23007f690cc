"""One edge's connection: its two streams, its send queue, and its rate limits."""

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_specedge.gateway.credentials import TokenRecord
from vllm_specedge.gateway.known import ROLES
from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.session import Role, Session

MAX_QUEUED_BYTES = 8 << 20
"""Limit of an edge's send queue; above it the edge is closed. The longest context fits, at 5 bytes per token."""
CHUNK_BYTES = 64 << 10
MAX_FRAMES_PER_S = 2000
"""An edge that sends more is closed. 32 requests at 30 steps per second need half of it."""
MAX_BYTES_PER_S = 1 << 20
"""An edge that sends more is closed, too. A proposal has some 40 bytes."""


@dataclass(eq=False)
class Refused(Exception):
    """An HTTP request is refused with this status and a sentence for the client."""

    status: int
    text: str
    headers: Mapping[str, str] = field(default_factory=dict)


class TokenBucket:
    """A rate limit that allows bursts of one second's worth."""

    def __init__(self, per_s: float, now_s: float) -> None:
        self._per_s = self._left = per_s
        self._seen_s = now_s

    def take(self, amount: float, now_s: float) -> bool:
        """Whether this amount is allowed now. Only an allowed amount counts."""
        self._left = min(self._per_s, self._left + (now_s - self._seen_s) * self._per_s)
        self._seen_s = now_s
        if amount > self._left:
            return False
        self._left -= amount
        return True


@dataclass(slots=True)
class Connection:
    """One edge's two streams."""

    id: int
    key: str
    token: TokenRecord | None
    """The token it connected with; None if the gateway requires none."""
    connected_s: float
    heard_s: float = field(init=False)
    may_send_frames: TokenBucket = field(init=False)
    may_send_bytes: TokenBucket = field(init=False)
    session: Session = field(default_factory=lambda: Session(Role.GATEWAY))
    outbox: deque[bytes] = field(default_factory=deque)
    queued_bytes: int = 0
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    has_uplink: bool = False
    downlink: "asyncio.Task[object] | None" = None
    uplink: "asyncio.Task[object] | None" = None
    closed_s: float | None = None
    rtt_s: float | None = None

    def __post_init__(self) -> None:
        self.heard_s = self.connected_s
        self.may_send_frames = TokenBucket(MAX_FRAMES_PER_S, self.connected_s)
        self.may_send_bytes = TokenBucket(MAX_BYTES_PER_S, self.connected_s)

    @property
    def is_open(self) -> bool:
        return self.closed_s is None

    @property
    def roles(self) -> frozenset[str]:
        """The roles that its token allows."""
        return self.token.roles if self.token is not None else frozenset(ROLES)

    def send(self, frame: Frame) -> None:
        data = self.session.send(frame)
        self.outbox.append(data)
        self.queued_bytes += len(data)
        self.wake.set()

    def next_chunk(self) -> bytes:
        """The next queued frames, about CHUNK_BYTES. More stay queued here, as the web server's buffer is out of our
        control."""
        frames: list[bytes] = []
        num_bytes = 0
        while self.outbox and num_bytes < CHUNK_BYTES:
            frames.append(self.outbox.popleft())
            num_bytes += len(frames[-1])
        self.queued_bytes -= num_bytes
        return b"".join(frames)
