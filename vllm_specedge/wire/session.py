"""One connection between an edge and the gateway, without the I/O.

Rule 1: the table below alone decides which frame is legal when; both ends use the same table.
Rule 2: the caller moves bytes; this file decides what they mean. No clock, no sockets.
Unknown request numbers are no violation: a proposal for a request that has just ended is ordinary input, and the router
drops it.
"""

from enum import Enum

from vllm_specedge.errors import LocalProtocolError, RemoteProtocolError
from vllm_specedge.wire.codec import Frame, FrameReader, encode
from vllm_specedge.wire.frames import Bye, Close, Commit, Greet, Hello, Open, Ping, Pong, Propose, Welcome


class Role(Enum):
    EDGE = "edge"
    GATEWAY = "gateway"

    @property
    def peer(self) -> "Role":
        return Role.GATEWAY if self is Role.EDGE else Role.EDGE


class State(Enum):
    START = "start"
    GREETED = "greeted"
    PRESENTED = "presented"
    LIVE = "live"
    CLOSED = "closed"


_BYES: dict[tuple[Role, type[Frame]], State] = {(role, Bye): State.CLOSED for role in Role}
TRANSITIONS: dict[State, dict[tuple[Role, type[Frame]], State]] = {
    State.START: {(Role.GATEWAY, Greet): State.GREETED, **_BYES},
    State.GREETED: {(Role.EDGE, Hello): State.PRESENTED, **_BYES},
    State.PRESENTED: {(Role.GATEWAY, Welcome): State.LIVE, **_BYES},
    State.LIVE: {
        **{(Role.GATEWAY, frame): State.LIVE for frame in (Open, Commit, Close, Ping, Pong)},
        **{(Role.EDGE, frame): State.LIVE for frame in (Propose, Close, Ping, Pong)},
        **_BYES,
    },
    State.CLOSED: {},
}
"""For each state: which role may send which frame, and the next state."""


class Session:
    """The protocol state of one connection, as seen from `role`.

    `send` raises LocalProtocolError (our bug), `receive` RemoteProtocolError (the peer's fault: send Bye with its code
    and close). Any other exception is a bug.
    """

    def __init__(self, role: Role) -> None:
        self.role = role
        self.state = State.START
        self._has_said_bye = False
        self._reader = FrameReader()

    def __repr__(self) -> str:
        return f"Session({self.role.value}, {self.state.value})"

    def send(self, frame: Frame) -> bytes:
        """The bytes of `frame`, if it may be sent now."""
        state = TRANSITIONS[self.state].get((self.role, type(frame)))
        if state is None:
            raise LocalProtocolError(f"{self!r} cannot send {type(frame).__name__}")
        data = encode(frame)
        self.state = state
        self._has_said_bye = state is State.CLOSED
        return data

    def receive(self, data: bytes) -> list[Frame]:
        """The frames completed by `data`, each of them legal; none after this side's own Bye."""
        if self._has_said_bye:
            return []  # sent before the peer knew
        frames = self._reader.feed(data)
        for frame in frames:
            state = TRANSITIONS[self.state].get((self.role.peer, type(frame)))
            if state is None:
                raise RemoteProtocolError(f"{type(frame).__name__} is not legal when {self.state.value}")
            self.state = state
        return frames
