"""A TCP relay on loopback that adds delay: the network between an edge and its gateway, for benchmarks and tests.

Every byte is forwarded half a round trip after it arrived, in order and at the rate of arrival, independently in each
direction. The relay counts bytes. It runs in its own thread:

    with Relay(gateway_port, rtt_s=0.02) as relay:
        ...  # connect to relay.url
"""

import asyncio
import selectors
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self

HOST = "127.0.0.1"
READ_BYTES = 16 * 1024
MAX_READS_ON_THE_WAY = 256
"""Most reads in flight of up to READ_BYTES each, in one direction of one connection: 4 MiB; then it stops reading."""
SPIN_S = 0.0003
"""Timers may fire late by about this much, so the relay sleeps that much less and spins its loop for the rest."""
STOP_LIMIT_S = 10.0


class Traffic(NamedTuple):
    """Bytes from the clients of the relay (up), and from the server behind it (down)."""

    up_bytes: int
    down_bytes: int


@dataclass
class Relay:
    """Forwards connections to a local port. `rtt_s` may change at any time; it applies to bytes that arrive later."""

    target_port: int
    rtt_s: float = 0.0
    port: int = 0
    """Port on which the relay listens; 0 before it runs."""
    _up_bytes: int = 0
    _down_bytes: int = 0
    _loop: asyncio.AbstractEventLoop | None = None
    _serving: "asyncio.Task[None] | None" = None
    _thread: threading.Thread | None = None
    _connections: "set[asyncio.Task[None]]" = field(default_factory=set)

    def reset(self) -> None:
        """Reset all connections, like a network that has lost their state."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in self._connections])

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def traffic(self) -> Traffic:
        """Bytes received so far."""
        return Traffic(self._up_bytes, self._down_bytes)

    def __enter__(self) -> Self:
        listener = socket.create_server((HOST, 0))
        self.port = listener.getsockname()[1]
        # select() waits to the microsecond; with epoll, asyncio rounds every delay up to the next millisecond.
        self._loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
        self._serving = self._loop.create_task(self._serve(listener))
        self._thread = threading.Thread(target=self._run, name="relay")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._loop is not None
        assert self._serving is not None
        assert self._thread is not None
        self._loop.call_soon_threadsafe(self._serving.cancel)
        self._thread.join(STOP_LIMIT_S)
        assert not self._thread.is_alive(), "the relay does not stop"

    def _run(self) -> None:
        assert self._loop is not None
        assert self._serving is not None
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(asyncio.wait({self._serving}))
            self._loop.run_until_complete(asyncio.sleep(0))  # aborted transports close in the loop's next turn
        finally:
            self._loop.close()

    async def _serve(self, listener: socket.socket) -> None:
        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._connect(reader, writer))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)
            # Also of one that is cancelled before it has begun.
            task.add_done_callback(lambda _: writer.transport.abort())

        server = await asyncio.start_server(accept, sock=listener, limit=READ_BYTES)
        try:
            await asyncio.Event().wait()
        finally:
            server.close()
            for task in self._connections:
                task.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            target_reader, target_writer = await asyncio.open_connection(HOST, self.target_port, limit=READ_BYTES)
        except OSError:
            return
        up = _Direction(reader, target_writer, self._delay_s, self._count_up)
        down = _Direction(target_reader, writer, self._delay_s, self._count_down)
        try:
            async with asyncio.TaskGroup() as group:
                for direction in (up, down):
                    group.create_task(direction.take())
                    group.create_task(direction.pass_on())
            for end in (writer, target_writer):
                end.close()
                await end.wait_closed()
        except* OSError:
            pass  # one end reset the connection: so does the relay
        finally:
            for end in (writer, target_writer):
                end.transport.abort()

    def _delay_s(self) -> float:
        return self.rtt_s / 2

    def _count_up(self, num_bytes: int) -> None:
        self._up_bytes += num_bytes

    def _count_down(self, num_bytes: int) -> None:
        self._down_bytes += num_bytes


@dataclass
class _Direction:
    """One direction of a connection. asyncio's streams have TCP_NODELAY set, so nothing else adds delay."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    delay_s: Callable[[], float]
    count: Callable[[int], None]
    on_the_way: "asyncio.Queue[tuple[float, bytes]]" = field(
        default_factory=lambda: asyncio.Queue(MAX_READS_ON_THE_WAY)
    )
    """Forwarding time of each read, by the loop's clock, and its bytes; empty bytes mean the end."""

    async def take(self) -> None:
        loop = asyncio.get_running_loop()
        data = b"-"
        while data:
            data = await self.reader.read(READ_BYTES)
            self.count(len(data))
            await self.on_the_way.put((loop.time() + self.delay_s(), data))

    async def pass_on(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due_s, data = await self.on_the_way.get()
            await asyncio.sleep(due_s - SPIN_S - loop.time())
            while loop.time() < due_s:  # noqa: ASYNC110 - the time is not an event
                await asyncio.sleep(0)
            if not data:
                self.writer.write_eof()
                return
            self.writer.write(data)
            await self.writer.drain()
