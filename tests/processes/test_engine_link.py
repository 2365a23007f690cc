"""The engine's end of the link to its gateway, with a socket that the test answers at."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from vllm_specedge.engine.gateway_link import EngineLink
from vllm_specedge.errors import ByeCode
from vllm_specedge.wire.codec import Frame, FrameReader, encode
from vllm_specedge.wire.engine_frames import EngineHello, EngineWelcome
from vllm_specedge.wire.frames import PROTOCOL_VERSION, Bye, Commit, Ping

DEADLINE_S = 20.0
MAX_PINGS = 3
"""One comes each second, whatever else is sent."""
FIRST, SECOND = Commit(1, 0, (5,)), Commit(2, 0, (6,))


class Peer:
    """A gateway's end, and a link whose `wake` sends what is in `replies`, one frame each time."""

    def __init__(self, directory: Path) -> None:
        endpoint = f"ipc://{directory}/engines"
        self.socket = zmq.Context.instance().socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, int(1000 * DEADLINE_S))
        self.socket.bind(endpoint)
        self.replies: deque[Frame] = deque()
        self.woken = threading.Event()
        self.link = EngineLink(endpoint, EngineHello(PROTOCOL_VERSION, "toy", "f", 9), self._wake, lambda: ())
        self.link.start()

    def _wake(self) -> None:
        if self.replies:
            self.link.send([self.replies.popleft()])
        self.woken.set()

    def received(self) -> list[Frame]:
        """The frames of the next message."""
        self._engine, data = self.socket.recv_multipart()
        return list(FrameReader().feed(data))

    def receives(self, frame: Frame) -> bool:
        """Whether it is what comes next, but for pings."""
        for _ in range(MAX_PINGS):
            received = [one for one in self.received() if not isinstance(one, Ping)]
            if received:
                return received == [frame]
        return False

    def says(self, frame: Frame) -> None:
        """Send a frame to the engine, and wait until it is processed."""
        self.woken.clear()
        self.socket.send_multipart([self._engine, encode(frame)])
        assert self.woken.wait(DEADLINE_S)

    def welcome(self) -> None:
        while not any(isinstance(frame, EngineHello) for frame in self.received()):
            pass
        self.says(EngineWelcome(PROTOCOL_VERSION))


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    made = Peer(tmp_path)
    yield made
    made.link.stop()
    made.socket.close()


def test_what_the_link_s_thread_sends_at_a_frame_leaves_at_once(peer: Peer) -> None:
    peer.welcome()
    peer.replies.append(FIRST)
    peer.says(Commit(3, 0, (7,)))
    assert peer.receives(FIRST)


def test_what_the_link_s_thread_sends_at_its_timer_leaves_at_once(peer: Peer) -> None:
    peer.welcome()
    peer.replies.append(FIRST)
    assert peer.link.wake_at(time.monotonic())
    assert peer.receives(FIRST)


def test_what_was_meant_for_a_gateway_that_is_gone_is_not_sent_to_the_next(peer: Peer) -> None:
    peer.welcome()
    peer.replies.append(FIRST)
    peer.says(Bye(ByeCode.GOING_AWAY, ""))
    peer.welcome()
    peer.replies.append(SECOND)
    assert peer.link.wake_at(time.monotonic())
    assert peer.receives(SECOND)
