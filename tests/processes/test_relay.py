"""The relay that adds delay: benchmarks/harness/relay.py."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from random import Random

from benchmarks.harness.relay import MAX_READS_ON_THE_WAY, READ_BYTES, Relay, Traffic

HOST = "127.0.0.1"
LIMIT_S = 30.0


@contextmanager
def listening(serve: "type[Echo] | type[Deaf]") -> "Iterator[int]":
    """A server for one connection, in a thread. Yields its port."""
    with socket.create_server((HOST, 0)) as listener:
        listener.settimeout(LIMIT_S)
        server = serve(listener)
        server.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.is_over.set()
            server.join(LIMIT_S)
            assert not server.is_alive()


class Echo(threading.Thread):
    """Sends back what it receives, then the end."""

    def __init__(self, listener: socket.socket) -> None:
        super().__init__()
        self.listener = listener
        self.is_over = threading.Event()

    def run(self) -> None:
        connection, _ = self.listener.accept()
        with connection:
            while data := connection.recv(1 << 16):
                connection.sendall(data)


class Deaf(Echo):
    """Never reads."""

    def run(self) -> None:
        connection, _ = self.listener.accept()
        with connection:
            self.is_over.wait(LIMIT_S)


def connect(relay: Relay) -> socket.socket:
    return socket.create_connection((HOST, relay.port), timeout=LIMIT_S)


def receive(connection: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes and (more := connection.recv(1 << 16)):
        data += more
    return data


def round_trip_s(connection: socket.socket) -> float:
    started_s = time.monotonic()
    connection.sendall(b"x")
    assert receive(connection, 1) == b"x"
    return time.monotonic() - started_s


def is_over(connection: socket.socket) -> bool:
    """Whether the other end closes or resets the connection without sending anything."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def test_a_round_trip_takes_no_less_than_its_time_and_the_time_can_be_changed() -> None:
    with listening(Echo) as port, Relay(port) as relay, connect(relay) as connection:
        for rtt_s in (0.0, 0.005, 0.02, 0.08, 0.005):
            relay.rtt_s = rtt_s
            assert min(round_trip_s(connection) for _ in range(3)) >= rtt_s


def test_all_bytes_come_once_in_order_and_are_counted() -> None:
    data = Random(0).randbytes(3_000_000)
    with listening(Echo) as port, Relay(port, rtt_s=0.01) as relay, connect(relay) as connection:
        sending = threading.Thread(target=connection.sendall, args=(data,))
        sending.start()
        assert receive(connection, len(data)) == data
        sending.join()
        assert relay.traffic == Traffic(len(data), len(data))


def test_what_came_first_goes_first_when_the_delay_falls() -> None:
    with listening(Echo) as port, Relay(port, rtt_s=0.2) as relay, connect(relay) as connection:
        round_trip_s(connection)
        connection.sendall(b"slow")
        while relay.traffic.up_bytes < 5:
            time.sleep(0.001)
        relay.rtt_s = 0.0
        connection.sendall(b"fast")
        assert receive(connection, 8) == b"slowfast"


def test_the_end_is_passed_on_behind_the_last_byte() -> None:
    with listening(Echo) as port, Relay(port, rtt_s=0.05) as relay, connect(relay) as connection:
        connection.sendall(b"last words")
        connection.shutdown(socket.SHUT_WR)
        assert receive(connection, 1000) == b"last words"
        assert connection.recv(1) == b""


def test_a_sender_is_held_back_when_nobody_reads() -> None:
    """In addition to the relay's own bound there are the kernel's buffers, of a few MiB each."""
    limit = READ_BYTES * MAX_READS_ON_THE_WAY + (64 << 20)
    with listening(Deaf) as port, Relay(port) as relay, connect(relay) as connection:
        connection.settimeout(1.0)
        num_sent = 0
        with suppress(TimeoutError):
            while num_sent <= limit:
                num_sent += connection.send(bytes(1 << 16))
        assert num_sent <= limit


def test_a_port_where_nobody_listens() -> None:
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    with Relay(port) as relay, connect(relay) as connection:
        assert is_over(connection)


def test_it_stops_while_bytes_are_on_the_way() -> None:
    with listening(Echo) as port:
        with Relay(port, rtt_s=60.0) as relay:
            connection = connect(relay)
            connection.sendall(b"never")
            while not relay.traffic.up_bytes:
                time.sleep(0.001)
        with connection:
            assert is_over(connection)


def wait_for_bytes(relay: Relay, up_bytes: int) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while relay.traffic.up_bytes < up_bytes:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def test_a_reset_ends_connections_on_both_sides_and_new_ones_are_taken() -> None:
    with listening(Deaf) as port, Relay(port) as relay, connect(relay) as connection:
        connection.sendall(b"x" * 100)
        wait_for_bytes(relay, 100)
        relay.reset()
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""
        with connect(relay) as another:
            another.sendall(b"x")
            wait_for_bytes(relay, 101)
