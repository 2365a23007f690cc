"""An edge for load: real frames over real HTTP/2 (h2), with no drafter and no tasks, so that one process can run a
thousand of them at a tenth of the edge client's cost per frame."""

import asyncio
import time
from collections.abc import Callable
from typing import cast

import h2.config
import h2.connection
import h2.events

from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.frames import MEDIA_TYPE, PROTOCOL_VERSION, Bye, Greet, Hello, Ping, Pong, Welcome
from vllm_specedge.wire.session import Role, Session, State

AUTHORITY = "localhost"


class LightEdge(asyncio.Protocol):
    """For `loop.create_connection`. `on_frame` receives frames about requests; it must be quick."""

    def __init__(
        self,
        name: str,
        scheme: str,
        on_frame: "Callable[[LightEdge, Frame], None]",
        role: str = "pool",
        max_requests: int = 1,
    ) -> None:
        self.session = ""
        """Session with which a request selects this edge; empty before it is admitted."""
        self.request: int | None = None
        """Number of the request that it drafts for, once it has one."""
        self.known = 0
        """Number of tokens that it knows of the request."""
        self.is_told = asyncio.Event()
        """Set once it knows some."""
        self.is_live = asyncio.Event()
        self.is_closed = asyncio.Event()
        self._hello = Hello(PROTOCOL_VERSION, "bench", name, role, "", max_requests)
        self._scheme = scheme
        self._on_frame = on_frame
        self._session = Session(Role.EDGE)
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self._transport: asyncio.Transport | None = None
        self._down = self._up = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's TLS transport is not a subclass
        self._h2.initiate_connection()
        self._down = self._request("GET", "/edge/v1/down")
        self._flush()

    def data_received(self, data: bytes) -> None:
        for event in self._h2.receive_data(data):
            if isinstance(event, h2.events.DataReceived):
                self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                if event.stream_id == self._down:  # the uplink's response, when that ends, is not a frame
                    for frame in self._session.receive(event.data):
                        self._take(frame)
            elif isinstance(event, h2.events.StreamReset | h2.events.StreamEnded | h2.events.ConnectionTerminated):
                self.close()
        self._flush()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_closed.set()

    def send(self, frame: Frame) -> None:
        """Send a frame immediately; only what the operating system does not accept is queued."""
        if self._session.state is not State.CLOSED:
            self._h2.send_data(self._up, self._session.send(frame))
            self._flush()

    def ping(self) -> None:
        """Send a Ping; call it every heartbeat to keep the connection."""
        self.send(Ping(int(time.monotonic() * 1000) % 2**32))

    def stop_reading(self) -> None:
        """Stop reading from the socket."""
        assert self._transport is not None
        self._transport.pause_reading()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _request(self, method: str, path: str, *more: tuple[str, str]) -> int:
        stream = self._h2.get_next_available_stream_id()
        pseudo = [(":method", method), (":path", path), (":scheme", self._scheme), (":authority", AUTHORITY)]
        self._h2.send_headers(stream, [*pseudo, *more], end_stream=method == "GET")
        return stream

    def _take(self, frame: Frame) -> None:
        match frame:
            case Greet():
                key = ("x-specedge-connection", frame.connection)
                self._up = self._request("POST", "/edge/v1/up", key, ("content-type", MEDIA_TYPE))
                self.send(self._hello)
            case Welcome():
                self.session = frame.session
                self.is_live.set()
            case Ping():
                self.send(Pong(frame.stamp))
            case Pong():
                pass
            case Bye():
                self.close()
            case _:
                self._on_frame(self, frame)

    def _flush(self) -> None:
        if self._transport is not None and (data := self._h2.data_to_send()):
            self._transport.write(data)
