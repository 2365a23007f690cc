"""One outgoing HTTP/2 connection to a gateway: endless GET down, endless POST up (docs/protocol.md)."""

import asyncio
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx2 as httpx

from edge_client.link_faults import BROKEN, what_is_wrong
from edge_client.ways import checked_gateway_url, client_for, trusted
from vllm_specedge.addresses import is_loopback
from vllm_specedge.errors import ByeCode, RemoteProtocolError, UserError
from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.frames import MEDIA_TYPE, Bye, Greet, Hello, Ping, Pong, Welcome
from vllm_specedge.wire.session import Role, Session, State

CONNECT_TIMEOUT_S = 10.0
SILENCE_HEARTBEATS = 3
FIRST_SILENCE_S = 15.0
MAX_QUEUED_BYTES = 1 << 20
HELD_BACK = "a proxy in between may hold streams back, or refuse the upward one (see docs/proxies.md)"


class LinkError(Exception):
    """The connection ended; a new one may succeed."""


class OtherVocabularyError(UserError):
    """None of the gateway's engines has the draft model's vocabulary."""


@dataclass(slots=True)
class Gateway:
    """Where to connect, and the credentials to use there."""

    url: str
    token: str = ""
    ca_file: str = ""
    insecure: bool = False
    """Send the token to other machines without TLS."""
    cert_file: str = ""
    """This edge's own certificate and key (PEM), for gateways that require one."""
    has_proxy: bool = True
    """Use the proxy that is set in the environment, if any."""

    def __post_init__(self) -> None:
        """Raises UserError if the URL is not valid."""
        checked_gateway_url(self.url)

    def client(self) -> httpx.AsyncClient:
        parts = urlsplit(self.url)
        if self.token and parts.scheme == "http" and not is_loopback(parts.hostname) and not self.insecure:
            raise UserError("A token is not sent over plain http:// to another machine: use https://, or --insecure.")
        headers = {"authorization": f"Bearer {self.token}"} if self.token else {}
        context = trusted(self.ca_file, is_alone=True)
        try:
            if self.cert_file:
                context.load_cert_chain(self.cert_file)
        except (OSError, ssl.SSLError) as error:
            raise UserError(f"The certificate {self.cert_file} cannot be used: {error}.") from None
        return client_for(
            self.url,
            self.has_proxy,
            headers=headers,
            http1=False,
            http2=True,
            verify=context,
            timeout=httpx.Timeout(CONNECT_TIMEOUT_S, read=FIRST_SILENCE_S, pool=None),
            limits=httpx.Limits(max_connections=1),
        )


@dataclass(slots=True)
class Link:
    """One connection, from Hello to Bye.

    `on_frame` receives every frame but the heartbeats, `on_pong` each measured round trip in seconds.
    """

    gateway: Gateway
    hello: Hello
    on_frame: Callable[[Frame], None]
    on_pong: Callable[[float], None] = lambda rtt_s: None
    rtt_s: float | None = None
    session: Session = field(default_factory=lambda: Session(Role.EDGE))
    _outbox: deque[bytes] = field(default_factory=deque)
    _queued_bytes: int = 0
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _heartbeat_s: float = FIRST_SILENCE_S / SILENCE_HEARTBEATS
    _was_admitted: bool = False

    def send(self, frame: Frame) -> int:
        """Queue a frame. Returns its size in bytes, 0 if it was dropped.

        A frame is dropped if the queue is full (it would arrive too late), or if the connection has ended (a forward
        pass may still be running when the gateway sends Bye).
        """
        if self._queued_bytes > MAX_QUEUED_BYTES or self.session.state is State.CLOSED:
            return 0
        data = self.session.send(frame)
        self._outbox.append(data)
        self._queued_bytes += len(data)
        self._wake.set()
        return len(data)

    async def run(self) -> None:
        """Stay connected. Raises LinkError when the connection ends, UserError when a retry cannot help."""
        is_answered = False
        try:
            async with self.gateway.client() as client, client.stream("GET", "/edge/v1/down") as response:
                is_answered = True
                await self._check(response)
                await self._talk(client, response)
        except RemoteProtocolError as error:
            raise LinkError(f"the gateway broke the protocol: {error}") from error
        except (TimeoutError, httpx.ReadTimeout) as error:
            raise LinkError(self._silent("the gateway sent nothing for too long")) from error
        except BROKEN as error:
            raise LinkError(what_is_wrong(error, is_answered)) from error
        raise LinkError("the gateway ended the connection")

    async def _check(self, response: httpx.Response) -> None:
        if response.status_code in (401, 403):
            fault = "refused this token" if self.gateway.token else "asks for a token"
            raise UserError(f"The gateway {fault}: get one from its operator, and name its file with --token-file.")
        if response.status_code == 429 or response.status_code >= 500:
            raise LinkError(f"the gateway is busy or not ready (status {response.status_code})")
        if response.status_code != 200 or response.headers.get("content-type") != MEDIA_TYPE:
            raise UserError(f"There is no edge gateway at {self.gateway.url} (it answered {response.status_code}).")

    async def _talk(self, client: httpx.AsyncClient, response: httpx.Response) -> None:
        tasks: list[asyncio.Task[None]] = [asyncio.create_task(self._ping())]
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(FIRST_SILENCE_S) as silence:
                async for chunk in response.aiter_raw():
                    for frame in self.session.receive(chunk):
                        if isinstance(frame, Greet):
                            tasks.append(asyncio.create_task(self._uplink(client, frame)))
                        else:
                            self._take(frame)
                    silence.reschedule(loop.time() + SILENCE_HEARTBEATS * self._heartbeat_s)
        finally:
            # httpx does not detect a dead peer on the uplink.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _uplink(self, client: httpx.AsyncClient, greet: Greet) -> None:
        self.send(self.hello)
        headers = {"x-specedge-connection": greet.connection, "content-type": MEDIA_TYPE}
        await client.post("/edge/v1/up", content=self._body(), headers=headers)

    async def _body(self) -> AsyncIterator[bytes]:
        while True:
            while self._outbox:
                data = b"".join(self._outbox)
                self._outbox.clear()
                self._queued_bytes = 0
                yield data
            if self.session.state is State.CLOSED:
                return
            self._wake.clear()
            await self._wake.wait()

    def _take(self, frame: Frame) -> None:
        match frame:
            case Bye():
                text = "".join(letter if letter.isprintable() else "?" for letter in frame.text)
                if frame.code == ByeCode.TOKENIZER:
                    raise OtherVocabularyError(text)
                if frame.code >= ByeCode.PROTOCOL:  # from there on a retry cannot help
                    raise UserError(text)
                raise LinkError(self._silent(text) if frame.code == ByeCode.SILENT else text)
            case Pong():
                self.rtt_s = (_stamp_us() - frame.stamp) % 2**32 / 1e6
                self.on_pong(self.rtt_s)
            case Ping():
                self.send(Pong(frame.stamp))
            case Welcome():
                self._was_admitted = True
                self._heartbeat_s = frame.heartbeat_ms / 1000
                self.ping()  # at once: the round-trip time decides how to draft
                self.on_frame(frame)
            case _:
                self.on_frame(frame)

    def _silent(self, text: str) -> str:
        """The message for a silent gateway. Silence from the start is probably not the network but a proxy."""
        return text if self._was_admitted else f"{text}; {HELD_BACK}"

    async def _ping(self) -> None:
        """Ping at every heartbeat. The gateway answers, so both sides know that the other is alive."""
        while True:
            if self.session.state is State.LIVE:
                self.ping()
            await asyncio.sleep(self._heartbeat_s)

    def ping(self) -> None:
        """Send a Ping; its Pong sets `rtt_s`."""
        self.send(Ping(_stamp_us()))

    def close(self) -> None:
        """Send Bye, so that the gateway gives this edge's requests to others at once."""
        if self.session.state is not State.CLOSED:
            self.send(Bye(ByeCode.GOING_AWAY, "the edge is stopping"))


def _stamp_us() -> int:
    return int(time.monotonic() * 1e6) % 2**32
