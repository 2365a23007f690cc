"""An edge in one file, written from docs/protocol.md alone: the standard library, `msgpack` and `h2`, no project code.

    pip install h2 msgpack
    python examples/raw_client.py http://127.0.0.1:8100

It drafts without a model: after token A it proposes the token that followed A most often so far. If the target samples,
it proposes the one of A's followers that the target's own noise favours. Ctrl-C ends it. Put an edge token into
SPECEDGE_TOKEN, and for https:// with a private certificate authority, that into SSL_CERT_FILE.
"""

import argparse
import asyncio
import contextlib
import math
import os
import random
import ssl
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import msgpack
from h2.connection import H2Connection
from h2.events import DataReceived, Event, ResponseReceived, StreamEnded, StreamReset
from h2.exceptions import ProtocolError

HELLO, CLOSE, PROPOSE, PING, PONG, BYE = 2, 6, 7, 8, 9, 10  # frames from an edge
LEGAL = ((1, 10), (3, 10), (4, 5, 6, 8, 9, 10))  # frames from a gateway: at first, after Greet, after Welcome
MEDIA_TYPE = b"application/vnd.specedge.frames"
GAP, MAX_FRAME_BYTES, MAX_QUEUED_BYTES = 2, 8192, 1 << 20


class LostError(Exception):
    """This connection is lost; a new one may work."""


def pack(tokens: list[int]) -> bytes:
    """Token ids on the wire: one byte with the width in bytes, then each token id in that width."""
    width = max(1, (max(tokens, default=0).bit_length() + 7) // 8)
    return bytes([width, *b"".join(token.to_bytes(width, "little") for token in tokens)]) if tokens else b""


def unpack(data: bytes) -> list[int]:
    width = data[0] if data else 1
    tokens = [int.from_bytes(data[at : at + width], "little") for at in range(1, len(data), width)]
    if width > 4 or pack(tokens) != data:
        raise ValueError("token ids are not packed as the protocol requires")
    return tokens


def twisted(seed: int) -> Iterator[int]:
    """MT19937: 32-bit random numbers."""
    x = [seed]
    for i in range(1, 624):
        x.append(1812433253 * (x[-1] ^ x[-1] >> 30) + i & 2**32 - 1)
    while True:
        for i in range(624):
            y = x[i] & 2**31 | x[(i + 1) % 624] & 2**31 - 1
            x[i] = x[(i + 397) % 624] ^ y >> 1 ^ (y & 1) * 0x9908B0DF
        for z in x:
            y = z ^ z >> 11
            y = y ^ y << 7 & 0x9D2C5680
            y = y ^ y << 15 & 0xEFC60000
            yield y ^ y >> 18


class Noise:
    """The noise that the target adds to its logits when it samples (docs/protocol.md, "Sampling")."""

    def __init__(self, kind: int, first: int, seed_high: int, seed_low: int) -> None:
        self.kind, self.first, self.words, self.row_seeds = kind, first, twisted(seed_low), list[int]()
        self.seed = self.add(self.add(0, seed_low), seed_high)

    def at(self, position: int) -> Callable[[int], float]:
        """The noise of token ids at a position."""
        if self.kind == 2:
            key = self.add(self.seed, position - 1)
            return lambda token: self.murmur(key, token)
        while len(self.row_seeds) <= position - self.first:
            self.row_seeds.append((next(self.words), next(self.words) % 2**31)[1])
        row = self.mix(self.row_seeds[position - self.first])
        return lambda token: self.splitmix(row, token)

    def splitmix(self, row: int, token: int) -> float:
        z = self.mix((row + (token + 1) * 0x9E3779B97F4A7C15) % 2**64)
        return -math.log(-math.log(((z >> 11) + 0.5) / 2**53))

    def mix(self, z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    def murmur(self, key: int, token: int) -> float:
        h = self.add(key, token) ^ 16
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        return -math.log(-math.log1p(-((h ^ h >> 16) + 0.5) / 2**32))

    def add(self, h: int, w: int) -> int:
        w = self.rotated(w * 0xCC9E2D51 % 2**32, 15) * 0x1B873593 % 2**32
        return (self.rotated(h ^ w, 13) * 5 + 0xE6546B64) % 2**32

    def rotated(self, number: int, bits: int) -> int:
        return (number << bits | number >> 32 - bits) % 2**32


class Sampling:
    """How the target samples; greedily if Open does not say."""

    def __init__(self, fields: list[int]) -> None:
        is_told = len(fields) == 7 and fields[0] in (1, 2) and fields[1] > 0
        kind, heat, self.top_k, part, first, high, low = fields if is_told else [0, 1, 0, 1000, 0, 0, 0]
        self.temperature, self.top_p = heat / 1000, part / 1000
        self.noise = Noise(kind, first, high, low) if is_told else None

    def best(self, counts: Counter[int], position: int) -> int:
        """The most probable next token of the target, given how often each followed the previous token."""
        ordered = counts.most_common(self.top_k or None)
        if self.noise is None or position < self.noise.first:
            return ordered[0][0]
        weights = {token: math.log(count) / self.temperature for token, count in ordered}
        total, reached, gumbel = sum(map(math.exp, weights.values())), 0.0, self.noise.at(position)
        left = dict[int, float]()
        for token, weight in weights.items():
            left[token] = weight + gumbel(token)
            reached += math.exp(weight)
            if reached >= self.top_p * total:
                break
        return max(left, key=left.__getitem__)


@dataclass
class Request:
    num_tokens: int  # of the prompt, from Open
    credit: int
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    followers: dict[int, Counter[int]] = field(default_factory=dict)
    draft: list[int] = field(default_factory=list)


class Edge:
    def __init__(self, url: str, stop_after: int) -> None:
        self.url, self.stop_after = urlsplit(url), stop_after
        self.num_closed = self.num_proposed = self.num_accepted = self.num_failures = 0

    async def connect(self) -> None:
        """Run one connection. Raises LostError, SystemExit if a new one cannot work, CancelledError when done."""
        self.h2, self.inbox, self.outbox, self.requests = H2Connection(), bytearray(), bytearray(), dict[int, Request]()
        self.up, self.state, self.heartbeat_s, self.ping_at_s = 0, 0, 5.0, 0.0
        self.heard_s = self.live_s = time.monotonic()
        context = ssl.create_default_context() if self.url.scheme == "https" else None
        if context is not None:
            context.set_alpn_protocols(["h2"])
        port = self.url.port or (443 if context else 80)
        opening = asyncio.open_connection(self.url.hostname, port, ssl=context)
        reader, self.writer = await asyncio.wait_for(opening, 10)
        try:
            self.h2.initiate_connection()
            self.down = self.request("GET", "/edge/v1/down")
            while (now_s := time.monotonic()) < self.heard_s + 3 * self.heartbeat_s:
                if now_s >= self.ping_at_s:
                    self.ping_at_s = now_s + self.heartbeat_s
                    if self.state == 2:
                        self.send(PING, int(now_s * 1e6) % 2**32)
                self.flush()
                with contextlib.suppress(TimeoutError):
                    data = await asyncio.wait_for(reader.read(65536), self.ping_at_s - now_s)
                    for event in self.h2.receive_data(data):
                        self.take_event(event)
                    if not data:
                        raise LostError("the gateway closed the connection")
            raise LostError("the gateway is silent")
        except asyncio.CancelledError:  # Ctrl-C, or --requests reached
            self.send(BYE, 0, "the edge is stopping")
            raise
        except (ProtocolError, ValueError) as error:
            self.send(BYE, 10, "the gateway broke the protocol")
            raise LostError(f"the gateway broke the protocol: {error}") from error
        finally:
            with contextlib.suppress(ProtocolError):
                self.flush()
            self.writer.close()

    def request(self, method: str, path: str, *headers: tuple[str, str]) -> int:
        stream = self.h2.get_next_available_stream_id()
        token = os.environ.get("SPECEDGE_TOKEN", "")
        authorization = [("authorization", f"Bearer {token}")] if token else []
        target = [(":method", method), (":path", path), (":scheme", self.url.scheme), (":authority", self.url.netloc)]
        self.h2.send_headers(stream, [*target, *authorization, *headers], end_stream=method == "GET")
        return stream

    def send(self, *frame: object) -> None:
        if self.up and len(self.outbox) < MAX_QUEUED_BYTES:  # a draft that waits behind this much is useless
            body = msgpack.packb(frame)
            self.outbox += len(body).to_bytes(2, "big") + body

    def flush(self) -> None:
        """Write as much of the outbox as the gateway's flow-control window allows, and HTTP/2's own frames."""
        while self.outbox and (room := self.h2.local_flow_control_window(self.up)) > 0:
            size = min(room, self.h2.max_outbound_frame_size, len(self.outbox))
            self.h2.send_data(self.up, bytes(self.outbox[:size]))
            del self.outbox[:size]
        self.writer.write(self.h2.data_to_send())

    def take_event(self, event: Event) -> None:
        if isinstance(event, ResponseReceived) and event.stream_id == self.down:
            headers = dict(event.headers)
            if headers[b":status"] == b"429" or headers[b":status"][:1] == b"5":
                raise LostError(f"HTTP status {headers[b':status'].decode()}")
            if headers[b":status"] != b"200" or headers.get(b"content-type") != MEDIA_TYPE:
                sys.exit(f"This is not a gateway, or the token is wrong: HTTP status {headers[b':status'].decode()}")
        elif isinstance(event, DataReceived) and event.stream_id == self.down:
            self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            self.heard_s = time.monotonic()
            self.inbox += event.data
            while 2 <= len(self.inbox) >= (end := 2 + int.from_bytes(self.inbox[:2], "big")):
                if end > 2 + MAX_FRAME_BYTES:
                    raise ValueError("a frame is over the limit")
                self.take(msgpack.unpackb(self.inbox[2:end]))
                del self.inbox[:end]
        elif isinstance(event, StreamEnded | StreamReset):
            if event.stream_id == self.down:
                raise LostError("the downlink ended")
            self.up = 0  # the Bye with the reason comes on the downlink
            self.outbox.clear()

    def take(self, frame: object) -> None:
        if not isinstance(frame, list) or not frame or frame[0] not in LEGAL[self.state]:
            raise ValueError("a frame is not legal now")
        match frame:
            case [10, int(code), str(text)]:
                text = "".join(filter(str.isprintable, text))
                raise SystemExit(text) if code >= 10 else LostError(text)
            case [1, str(key), int()]:
                self.state, self.up = 1, self.request("POST", "/edge/v1/up", ("x-specedge-connection", key))
                self.send(HELLO, 1, "raw_client", "raw", "pool", "", 8)
            case [3, str(), str(), int(), int(heartbeat_ms)]:
                self.state, self.heartbeat_s, self.live_s = 2, max(1, heartbeat_ms) / 1000, time.monotonic()
                self.ping_at_s = 0.0
            case [4, int(number), int(num_tokens), int(), int(credit), str(), list(sampling)]:
                self.requests[number] = Request(num_tokens, credit, Sampling(sampling))
            case [5, int(number), int(base), bytes(tokens)]:
                if number in self.requests:
                    self.commit(number, self.requests[number], base, unpack(tokens))
            case [6, int(number), int()]:
                self.num_closed += self.requests.pop(number, None) is not None
                if 0 < self.stop_after <= self.num_closed:
                    raise asyncio.CancelledError
            case [8, int(stamp)]:
                self.send(PONG, stamp)
            case [code, *fields] if code != 9 or len(fields) != 1:
                raise ValueError("a frame cannot be read")

    def commit(self, number: int, request: Request, base: int, tokens: list[int]) -> None:
        if base > len(request.tokens):
            del self.requests[number]
            self.send(CLOSE, number, GAP)
            return
        for token in tokens[len(request.tokens) - base :]:
            is_hit = request.draft[:1] == [token]
            self.num_accepted += is_hit
            request.draft = request.draft[1:] if is_hit else []
            if request.tokens:
                request.followers.setdefault(request.tokens[-1], Counter())[token] += 1
            request.tokens.append(token)
        if len(request.tokens) < max(1, request.num_tokens):
            return
        num_proposed_before, request.draft, token = len(request.draft), [], request.tokens[-1]
        while len(request.draft) < request.credit and token in request.followers:
            position = len(request.tokens) + len(request.draft)
            token = request.sampling.best(request.followers[token], position)
            request.draft.append(token)
        self.num_proposed += max(0, len(request.draft) - num_proposed_before)
        if request.draft:  # the last committed token comes first and shows which text the draft continues
            draft = pack([request.tokens[-1], *request.draft])
            self.send(PROPOSE, number, len(request.tokens) - 1, draft, [])
        else:
            self.send(PROPOSE, number, len(request.tokens), pack([]), [])


async def run(edge: Edge) -> None:
    """Connect, and reconnect after a pause, until cancelled."""
    try:
        while True:
            try:
                await edge.connect()
            except (LostError, OSError) as error:
                print(f"raw_client: {error}", file=sys.stderr)
            edge.num_failures = 1 if time.monotonic() - edge.live_s > 60 else edge.num_failures + 1
            await asyncio.sleep(random.uniform(0, min(30, 2 ** min(edge.num_failures, 6) / 2)))
    except asyncio.CancelledError:  # how asyncio delivers Ctrl-C
        print(f"{edge.num_closed} requests, {edge.num_proposed} tokens proposed, {edge.num_accepted} accepted")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A minimal edge.")
    parser.add_argument("url", help="the gateway, such as http://127.0.0.1:8100")
    parser.add_argument("--requests", type=int, default=0, help="stop after this many closed requests")
    options = parser.parse_args()
    asyncio.run(run(Edge(options.url, options.requests)))
