"""Attacks on a gateway below its protocol: it stays small, and honest clients are served meanwhile."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import h2.config
import h2.connection
import h2.exceptions
import httpx2 as httpx
import psutil
import pytest
from stack import wait_for

from benchmarks.harness.light_edge import LightEdge
from edge_client.client import EdgeClient
from edge_client.drafters.ngram import NgramDrafter
from edge_client.gateway_link import Gateway, Link, LinkError
from tests.processes.gateways import DEADLINE_S, Engine, Running, edge_in_thread, metric, running_gateway
from vllm_specedge.gateway.connection import MAX_QUEUED_BYTES
from vllm_specedge.wire.engine_frames import EngineOpen
from vllm_specedge.wire.frames import (
    MAX_TOKENS_PER_FRAME,
    MAX_UINT32,
    PROTOCOL_VERSION,
    Commit,
    Greet,
    Hello,
)

MAX_GROWTH_BYTES = 24 << 20
NUM_ROUNDS = 40
MIN_ATTACK_BYTES = 400
"""More than the start of a connection."""
DOWN = [(":method", "GET"), (":path", "/edge/v1/down"), (":scheme", "http"), (":authority", "localhost")]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), "--max-edges", "8") as running:
        yield running


@pytest.fixture(scope="module")
def engine(gateway: Running) -> Iterator[Engine]:
    engine = Engine(gateway.endpoint)
    wait_for(gateway.process, f"{gateway.url}/healthz", "engines", 1)
    yield engine
    engine.link.stop()


class Attacker:
    """An HTTP/2 connection that checks nothing of what it sends."""

    num_sent = 0
    """Bytes sent by all attackers."""

    def __init__(self, port: int) -> None:
        config = h2.config.H2Configuration(validate_outbound_headers=False, normalize_outbound_headers=False)
        self.h2 = h2.connection.H2Connection(config)
        self.socket = socket.create_connection(("127.0.0.1", port), DEADLINE_S)
        self.socket.settimeout(DEADLINE_S)
        self.h2.initiate_connection()
        self.flush()

    def flush(self) -> None:
        data = self.h2.data_to_send()
        self.socket.sendall(data)
        Attacker.num_sent += len(data)

    def hear(self) -> None:
        """Read what has arrived, without waiting."""
        self.socket.setblocking(False)
        with suppress(BlockingIOError):
            while data := self.socket.recv(1 << 16):
                self.h2.receive_data(data)
        self.socket.settimeout(DEADLINE_S)


@contextmanager
def attacking(port: int) -> Iterator[Attacker]:
    """An attacker's connection, which the gateway may end at any time."""
    with suppress(OSError, h2.exceptions.H2Error), ExitStack() as stack:
        attacker = Attacker(port)
        stack.callback(attacker.socket.close)
        yield attacker


def reset_streams(port: int) -> None:
    """HTTP/2 rapid reset: reset streams as soon as they are open."""
    with attacking(port) as attacker:
        for _ in range(100):
            stream = attacker.h2.get_next_available_stream_id()
            attacker.h2.send_headers(stream, DOWN, end_stream=True)
            attacker.h2.reset_stream(stream)
            attacker.flush()
        attacker.hear()


def ping(port: int) -> None:
    with attacking(port) as attacker:
        for _ in range(1000):
            attacker.h2.ping(b"12345678")
        attacker.flush()
        attacker.hear()


def change_settings(port: int) -> None:
    with attacking(port) as attacker:
        for number in range(500):
            attacker.h2.update_settings({4: 65535 + number})
        attacker.flush()
        attacker.hear()


def send_long_headers(port: int) -> None:
    """Send a megabyte of headers in one request."""
    with attacking(port) as attacker:
        stream = attacker.h2.get_next_available_stream_id()
        attacker.h2.send_headers(stream, [*DOWN, *((f"x-{number}", "y" * 1000) for number in range(1000))])
        attacker.flush()
        attacker.hear()


def open_many_streams(port: int) -> None:
    """Open as many downlinks as one connection may have."""
    with attacking(port) as attacker:
        attacker.hear()
        for _ in range(90):
            attacker.h2.send_headers(attacker.h2.get_next_available_stream_id(), DOWN, end_stream=True)
        attacker.flush()
        attacker.hear()


def send_empty_data(port: int) -> None:
    """Send DATA frames without data on an uplink that no downlink belongs to."""
    with attacking(port) as attacker:
        stream = attacker.h2.get_next_available_stream_id()
        headers = [(name, {"GET": "POST", "/edge/v1/down": "/edge/v1/up"}.get(value, value)) for name, value in DOWN]
        attacker.h2.send_headers(stream, headers)
        for _ in range(2000):
            attacker.h2.send_data(stream, b"")
        attacker.flush()
        attacker.hear()


ATTACKS: list[Callable[[int], None]] = [
    reset_streams,
    ping,
    change_settings,
    send_long_headers,
    open_many_streams,
    send_empty_data,
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_whoever_is_honest_is_served_and_nothing_grows(
    gateway: Running, engine: Engine, attack: Callable[[int], None]
) -> None:
    process = psutil.Process(gateway.process.popen.pid)
    with edge_in_thread(EdgeClient(Gateway(gateway.url), NgramDrafter(), "honest")):
        assert engine.generate("before", 20) > 0
        for _ in range(NUM_ROUNDS // 4):
            attack(gateway.port)
        before, sent_before = process.memory_info().rss, Attacker.num_sent
        for _ in range(NUM_ROUNDS):
            attack(gateway.port)
        assert Attacker.num_sent - sent_before > NUM_ROUNDS * MIN_ATTACK_BYTES, "the attack was not made"
        assert engine.generate("after", 20) > 0
        assert process.memory_info().rss - before < MAX_GROWTH_BYTES
        assert engine.driver.num_edges == 1
    assert_nothing_left(gateway, process)


def assert_nothing_left(gateway: Running, process: psutil.Process) -> None:
    """Check that every connection of an attacker is closed within the time limit of a handshake."""
    deadline_s = time.monotonic() + DEADLINE_S
    while sum(c.laddr.port == gateway.port and c.status == "ESTABLISHED" for c in process.net_connections()):
        assert time.monotonic() < deadline_s, process.net_connections()
        with suppress(psutil.TimeoutExpired):
            process.wait(0.1)


def test_those_who_never_finish_their_handshake_are_closed_and_keep_nobody_out(
    gateway: Running, engine: Engine
) -> None:
    """Slow loris: connections that send nothing, or only open a downlink."""
    process = psutil.Process(gateway.process.popen.pid)
    with ExitStack() as stack:
        for number in range(200):
            attacker = stack.enter_context(attacking(gateway.port))
            if number % 2:
                attacker.h2.send_headers(1, DOWN, end_stream=True)
                attacker.flush()
        engine.wait(lambda: engine.driver.num_edges == 0)
        deadline_s = time.monotonic() + 3 * DEADLINE_S
        while True:  # until their time is over; the honest one retries with growing pauses
            try:
                with edge_in_thread(EdgeClient(Gateway(gateway.url), NgramDrafter(), "honest")):
                    assert engine.generate("meanwhile", 20) > 0
                break
            except AssertionError:
                assert time.monotonic() < deadline_s
    assert_nothing_left(gateway, process)


class Replaying(Link):
    """Opens its uplink, and then another with the same key."""

    def __init__(self, gateway: Gateway) -> None:
        hello = Hello(PROTOCOL_VERSION, "test", "test", "pool", "", 1)
        super().__init__(gateway, hello, lambda _: self.is_admitted.set())
        self.is_admitted = asyncio.Event()
        self.status = 0

    async def _uplink(self, client: httpx.AsyncClient, greet: Greet) -> None:
        first = asyncio.create_task(super()._uplink(client, greet))
        await self.is_admitted.wait()
        again = await client.post("/edge/v1/up", headers={"x-specedge-connection": greet.connection})
        self.status = again.status_code
        self.close()
        await first


def test_a_handshake_that_is_replayed_gets_nothing(gateway: Running, engine: Engine) -> None:
    del engine

    async def run() -> int:
        link = Replaying(Gateway(gateway.url))
        async with asyncio.timeout(DEADLINE_S):
            with suppress(LinkError):
                await link.run()
        return link.status

    assert asyncio.run(run()) == 409


@pytest.mark.parametrize("key", ["", "guessed", "x" * 10_000])
def test_a_key_that_was_guessed_gets_nothing(gateway: Running, key: str) -> None:
    with httpx.Client(trust_env=False, http1=False, http2=True) as client:
        answer = client.post(f"{gateway.url}/edge/v1/up", headers={"x-specedge-connection": key})
    assert answer.status_code == 409


@contextmanager
def edge_that_does_not_read(port: int) -> Iterator[LightEdge]:
    """An admitted private edge that sends heartbeats, but no longer reads from its socket."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def connect() -> tuple[LightEdge, "asyncio.Task[None]"]:
        make = lambda: LightEdge("slow", "http", lambda *_: None, "private", max_requests=32)  # noqa: E731
        _, edge = await loop.create_connection(make, "127.0.0.1", port)
        async with asyncio.timeout(DEADLINE_S):
            await edge.is_live.wait()
        edge.stop_reading()
        return edge, asyncio.create_task(beat(edge))

    async def beat(edge: LightEdge) -> None:
        while True:
            edge.ping()
            await asyncio.sleep(1.0)

    async def end(edge: LightEdge, beating: "asyncio.Task[None]") -> None:
        beating.cancel()
        edge.close()
        await edge.is_closed.wait()

    edge, beating = asyncio.run_coroutine_threadsafe(connect(), loop).result(DEADLINE_S)
    try:
        yield edge
    finally:
        asyncio.run_coroutine_threadsafe(end(edge, beating), loop).result(DEADLINE_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(DEADLINE_S)
        loop.close()


def flood(engine: Engine, session: str) -> int:
    """Grow the contexts of requests by 63 MB of commits; honest requests are served meanwhile. Returns the bytes."""
    widest = (MAX_UINT32,) * MAX_TOKENS_PER_FRAME
    numbers, num_commits, batch = range(1 << 20, (1 << 20) + 32), 480, 16
    for request in numbers:
        engine.link.send([EngineOpen(request, 4, 5, session), Commit(request, 0, (1, 2, 3, 4))])
    for at in range(0, num_commits, batch):
        for request in numbers:
            bases = range(4 + at * len(widest), 4 + (at + batch) * len(widest), len(widest))
            engine.link.send([Commit(request, base, widest) for base in bases])
        assert engine.generate(f"meanwhile-{at}", 5) > 0
    return len(numbers) * num_commits * 4 * len(widest)


@contextmanager
def flooded(directory: Path, *, is_read: bool) -> Iterator[tuple[Running, Engine, int, int]]:
    """A gateway, its growth while an edge that does not read was flooded, or none, and the number of bytes."""
    directory.mkdir()
    with running_gateway(directory) as gateway, ExitStack() as stack:
        engine = Engine(gateway.endpoint)
        stack.callback(engine.link.stop)
        wait_for(gateway.process, f"{gateway.url}/healthz", "engines", 1)
        stack.enter_context(edge_in_thread(EdgeClient(Gateway(gateway.url), NgramDrafter(), "honest")))
        slow = stack.enter_context(edge_that_does_not_read(gateway.port))
        assert engine.generate("before", 20) > 0
        process = psutil.Process(gateway.process.popen.pid)
        before = process.memory_info().rss
        num_bytes = flood(engine, "a session of nobody" if is_read else slow.session)
        yield gateway, engine, process.memory_info().rss - before, num_bytes


def test_who_does_not_read_is_closed_and_no_queue_grows(tmp_path: Path) -> None:
    with flooded(tmp_path / "kept", is_read=True) as (gateway, _, kept_bytes, _):
        # Every request's context is kept, whoever drafts for it.
        assert metric(gateway, "specedge_gateway_slow_edges_total") == 0
    with flooded(tmp_path / "queued", is_read=False) as (gateway, engine, grown_bytes, num_bytes):
        engine.wait(lambda: metric(gateway, "specedge_gateway_slow_edges_total") == 1)
        may_be_more = MAX_QUEUED_BYTES + MAX_GROWTH_BYTES
        assert num_bytes > may_be_more, "or nothing would be shown"
        assert grown_bytes < kept_bytes + may_be_more
        engine.wait(lambda: engine.driver.num_edges == 1)
        assert engine.generate("after", 20) > 0
