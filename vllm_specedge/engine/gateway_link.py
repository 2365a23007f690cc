"""The engine's end of the link to the gateway: one thread that encodes, sends, receives, decodes, appends and wakes; no
decisions.

Other threads call `send` and `wake_at`, one at a time, and read `inbox`. All else runs in the link's own thread, so
that it runs while the scheduler's thread waits for the workers.
"""

import contextlib
import logging
import math
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from enum import Enum

import zmq

from vllm_specedge.errors import ByeCode, RemoteProtocolError
from vllm_specedge.wire.codec import Frame, FrameReader, encode
from vllm_specedge.wire.engine_frames import EngineHello, EngineWelcome, VocabularyPart, WantVocabulary
from vllm_specedge.wire.frames import MAX_DATA_BYTES, Bye, Ping, Pong

logger = logging.getLogger("vllm_specedge.engine.gateway_link")

_BEAT_S = 1.0
_LOST_S = 15.0
"""Silence after which a gateway counts as lost, as it hangs or gets no time to run. A dead one shows at its socket."""
_UNANSWERED_S = 60.0
_MAX_RECEIVED = 256
_MAX_INBOX = 65_536
"""Maximum frames waiting for the scheduler, which takes all at each step; more are dropped, oldest first."""
_MAX_OUTBOX = 4_096
"""Maximum sends waiting for this thread, one per step; more are dropped, oldest first."""


class _Order(Enum):
    SEND = b"s"
    WAKE_AT = b"w"
    STOP = b"x"


class EngineLink(threading.Thread):
    """Connects and reconnects to the gateway at `endpoint`, and introduces this engine with `hello`.

    `inbox` holds received frames with the time.monotonic() of arrival; a Bye in it means that the gateway was lost.
    `wake` is called from this thread after something was appended, and at the time given to `wake_at`. The frames that
    `stats` returns are sent every second, and the parts of the packed `vocabulary` that the gateway requests.
    """

    def __init__(
        self,
        endpoint: str,
        hello: EngineHello,
        wake: Callable[[], None],
        stats: Callable[[], Iterable[Frame]],
        vocabulary: bytes = b"",
    ) -> None:
        super().__init__(name="specedge-link", daemon=True)
        self.inbox: deque[tuple[float, Frame]] = deque(maxlen=_MAX_INBOX)
        self._outbox: deque[tuple[Frame, ...]] = deque(maxlen=_MAX_OUTBOX)
        self._hello = hello
        self._wake = wake
        self._stats = stats
        self._vocabulary = vocabulary
        # The process-wide context: dropping a context of our own would block while a socket is open.
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._gateway = context.socket(zmq.DEALER)
        self._gateway.setsockopt(zmq.LINGER, 0)
        # Nothing is queued for a gateway that is away: it gets everything anew when it is back.
        self._gateway.setsockopt(zmq.IMMEDIATE, 1)
        self._events = self._gateway.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._gateway.connect(endpoint)
        self._orders = context.socket(zmq.PAIR)
        self._orders.bind(f"inproc://specedge-{id(self)}")
        self._remote = context.socket(zmq.PAIR)
        self._remote.setsockopt(zmq.LINGER, 0)
        self._remote.connect(f"inproc://specedge-{id(self)}")
        self.num_welcomes = 0
        """Welcomes so far, by the same gateway after an interruption or by another one."""
        self._is_welcome = False
        self._endpoint = endpoint
        self._unanswered_s = time.monotonic() + _UNANSWERED_S
        """Time at which a missing gateway is logged, once."""
        self._refusal = ""
        self._heard_s = time.monotonic()
        self._wake_at_s: float | None = None

    # -- called by others ------------------------------------------------------------------------------------------

    def send(self, frames: Iterable[Frame]) -> None:
        """Send frames soon. Never blocks; frames that cannot be sent are dropped (the gateway notices the gap).

        `wake` may also call this, in the link's thread.
        """
        batch = tuple(frames)
        if not batch:
            return
        self._outbox.append(batch)
        if threading.current_thread() is not self:
            self._order(_Order.SEND, b"")

    def wake_at(self, at_s: float) -> bool:
        """Call `wake` at time.monotonic() `at_s`, instead of any earlier request. False: it will not be called."""
        return self.is_alive() and self._order(_Order.WAKE_AT, struct.pack("d", at_s))

    def stop(self) -> None:
        if self._remote.closed:
            return
        self._order(_Order.STOP, b"")
        self.join(2.0)
        self._remote.close()

    def _order(self, order: _Order, data: bytes) -> bool:
        try:
            self._remote.send_multipart([order.value, data], zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    # -- this thread -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            self._loop()
        except Exception:
            logger.exception("The link to the gateway failed: drafts are off")
            self._lost()
        finally:
            self._gateway.disable_monitor()
            for socket in (self._events, self._gateway, self._orders):
                socket.close()

    def _loop(self) -> None:
        poller = zmq.Poller()
        poller.register(self._gateway, zmq.POLLIN)
        poller.register(self._orders, zmq.POLLIN)
        poller.register(self._events, zmq.POLLIN)
        next_beat_s = 0.0
        while True:
            now_s = time.monotonic()
            if now_s >= next_beat_s:
                self._beat(now_s)
                next_beat_s = now_s + _BEAT_S
            until_s = next_beat_s if self._wake_at_s is None else min(next_beat_s, self._wake_at_s)
            ready = dict(poller.poll(math.ceil(max(0.0, until_s - now_s) * 1000)))
            if self._wake_at_s is not None and time.monotonic() >= self._wake_at_s:
                self._wake_at_s = None
                self._tell()
            if self._orders in ready and not self._obey():
                return
            if self._gateway in ready:
                self._receive()
            if self._events in ready:
                self._events.recv_multipart()
                self._lost()

    def _beat(self, now_s: float) -> None:
        if self._is_welcome and now_s - self._heard_s > _LOST_S:
            self._lost()
        if self._is_welcome:
            self._post(b"".join(map(encode, (Ping(int(now_s * 1000) % 2**32), *self._stats()))))
        else:
            self._post(encode(self._hello))
            if now_s > self._unanswered_s:
                self._unanswered_s = math.inf
                text = "No gateway answers at %s: no edge drafts for this engine until one does"
                logger.warning(text, self._endpoint)

    def _obey(self) -> bool:
        while True:
            try:
                order, data = self._orders.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return True
            if order == _Order.STOP.value:
                return False
            if order == _Order.WAKE_AT.value:
                self._wake_at_s = struct.unpack("d", data)[0]
            else:
                self._send_all()

    def _send_all(self) -> None:
        while self._outbox:
            batch = self._outbox.popleft()
            if self._is_welcome:
                self._post(b"".join(map(encode, batch)))

    def _post(self, data: bytes) -> None:
        with contextlib.suppress(zmq.Again):
            self._gateway.send(data, zmq.NOBLOCK)

    def _receive(self) -> None:
        for _ in range(_MAX_RECEIVED):  # bounded, so that orders and the timer get their turn
            try:
                data = self._gateway.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            now_s = time.monotonic()
            self._heard_s = now_s
            try:
                for frame in FrameReader().feed(data):
                    self._take(frame, now_s)
            except RemoteProtocolError as error:
                logger.warning("The gateway sent an invalid frame (%s)", error)
        if self.inbox:
            self._tell()

    def _take(self, frame: Frame, now_s: float) -> None:
        match frame:
            case Pong():
                pass
            case WantVocabulary():
                part = self._vocabulary[frame.offset : frame.offset + MAX_DATA_BYTES]
                self._post(encode(VocabularyPart(frame.offset, part)))
            case EngineWelcome():
                self._is_welcome, self._unanswered_s = True, math.inf
                self.num_welcomes += 1
                self.inbox.append((now_s, frame))
            case Bye():
                if frame.code != ByeCode.GOING_AWAY and frame.text != self._refusal:
                    self._refusal = frame.text
                    logger.warning("The gateway refused this engine: %s", frame.text)
                self._lost()  # the next beat sends hello again
            case _:
                self.inbox.append((now_s, frame))

    def _lost(self) -> None:
        self._is_welcome = False
        self.inbox.append((time.monotonic(), Bye(ByeCode.GOING_AWAY, "the gateway is away")))
        self._tell()

    def _tell(self) -> None:
        """Call `wake`, which may send something from this thread."""
        self._wake()
        self._send_all()
