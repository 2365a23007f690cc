"""The gateway's link to its engines: no message stays unread, whatever is sent meanwhile."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop
import zmq

from vllm_specedge.gateway.engine_socket import MAX_RECEIVED, EngineSocket

DEADLINE_S = 20.0
NUM_MESSAGES = 20 * MAX_RECEIVED
NUM_ENGINES = 3


class Echo:
    """Answers every message with the same number of bytes immediately, and sometimes with more later."""

    def __init__(self, endpoint: str) -> None:
        self.num_heard = 0
        self.is_done = asyncio.Event()
        self.socket = EngineSocket(endpoint, self._heard)
        self.socket.start()

    def _heard(self, engine: bytes, data: bytes) -> None:
        self.num_heard += 1
        self.socket.send(engine, data)
        if self.num_heard == NUM_ENGINES * NUM_MESSAGES:
            self.is_done.set()


def talk(endpoint: str, name: bytes, got: dict[bytes, bytes]) -> None:
    """An engine: sends all numbers, and receives all of them in order, in any number of messages."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.IDENTITY, name)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, int(DEADLINE_S * 1000))
        socket.connect(endpoint)
        said = b"".join(number.to_bytes(2, "big") for number in range(NUM_MESSAGES))
        for number in range(NUM_MESSAGES):
            socket.send(said[2 * number : 2 * number + 2])
            if number % 100 == 0:
                got[name] = got.get(name, b"") + socket.recv()  # so that both sides sometimes wait for each other
        while len(got[name]) < len(said):
            got[name] += socket.recv()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_all_that_is_said_is_heard_and_answered_in_order(tmp_path: Path, run: Callable[..., Any]) -> None:
    endpoint, got = f"ipc://{tmp_path}/engines", dict[bytes, bytes]()
    names = [bytes([65 + number]) for number in range(NUM_ENGINES)]

    async def serve() -> None:
        echo = Echo(endpoint)
        threads = [threading.Thread(target=talk, args=(endpoint, name, got)) for name in names]
        for thread in threads:
            thread.start()
        async with asyncio.timeout(DEADLINE_S):
            await echo.is_done.wait()
            await asyncio.gather(*(asyncio.to_thread(thread.join, DEADLINE_S) for thread in threads))
        echo.socket.close()

    run(serve())
    said = b"".join(number.to_bytes(2, "big") for number in range(NUM_MESSAGES))
    assert got == dict.fromkeys(names, said)


def test_a_message_of_a_wrong_shape_and_an_engine_that_is_gone_stop_nothing(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/engines"

    async def serve() -> bytes:
        heard: asyncio.Queue[tuple[bytes, bytes]] = asyncio.Queue()
        socket = EngineSocket(endpoint, lambda engine, data: heard.put_nowait((engine, data)))
        socket.start()
        socket.send(b"nobody", b"lost")
        with zmq.Context() as context, context.socket(zmq.DEALER) as engine:
            engine.setsockopt(zmq.LINGER, 0)
            engine.connect(endpoint)
            engine.send_multipart([b"two", b"parts"])
            engine.send(b"one")
            async with asyncio.timeout(DEADLINE_S):
                _, data = await heard.get()
        socket.close()
        return data

    assert asyncio.run(serve()) == b"one"


def test_a_bad_endpoint_is_refused() -> None:
    with pytest.raises(zmq.ZMQError):
        EngineSocket("ipc:///nowhere/at/all", lambda engine, data: None)
