"""The wire vocabulary: what edge, gateway and engine say to each other, and nothing else (docs/protocol.md).

Rule 1: a frame states facts (which tokens, at which position); whatever follows from them is computed by who needs it.
Rule 2: on the wire a frame is a 16-bit big-endian byte count, then a msgpack array of its code and its fields.
Rule 3: `decode` takes what `encode` makes, whatever width msgpack's numbers have; all else is a RemoteProtocolError.
Invariant: no input makes a reader hold more than `MAX_FRAME_BYTES` or allocate more than a small multiple of it.
"""

import dataclasses
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, TypeAlias

import msgpack

from vllm_specedge.errors import RemoteProtocolError

PROTOCOL_VERSION = 1
MEDIA_TYPE = "application/vnd.specedge.frames"

MAX_TOKENS_PER_FRAME = 1024
"""A longer run of tokens (a prompt) travels as several Commit frames, so that no frame holds up those behind it."""
MAX_FRAME_BYTES = 8192
"""Holds MAX_TOKENS_PER_FRAME numbers of 5 bytes and every other field at its largest."""
MAX_BRANCHES = 64
MAX_TEXT_BYTES = 512
MAX_DATA_BYTES = 4096
MAX_UINT32 = 2**32 - 1
_LENGTH_BYTES = 2
_WORD_BYTES = 4


@dataclass(frozen=True, slots=True)
class Greet:
    """Gateway to edge, first: the key that ties the uplink to this downlink, and the gateway's protocol version."""

    CODE: ClassVar[int] = 1
    connection: str
    version: int


@dataclass(frozen=True, slots=True)
class Hello:
    """Edge to gateway, first: who it is and what it can draft for."""

    CODE: ClassVar[int] = 2
    version: int
    client: str
    name: str
    role: str
    fingerprint: str
    """Of the draft's tokenizer (`fingerprint.py`); empty for a drafter that needs none, such as n-grams."""
    max_requests: int


@dataclass(frozen=True, slots=True)
class Welcome:
    """Gateway to edge: admitted. `session` is what a request names to be drafted for by this edge alone."""

    CODE: ClassVar[int] = 3
    session: str
    model: str
    vocab_size: int
    heartbeat_ms: int


@dataclass(frozen=True, slots=True)
class Open:
    """A request begins (engine to gateway) or is yours to draft for (gateway to edge).

    Its first `num_tokens` token ids follow as Commits from position 0. At most `max_draft` draft tokens are verified
    at once; a proposal may end at most `credit` tokens past the last commit. `session` is empty for a pooled request.
    """

    CODE: ClassVar[int] = 4
    request: int
    num_tokens: int
    max_draft: int
    credit: int
    session: str


@dataclass(frozen=True, slots=True)
class Commit:
    """The tokens at positions base, base + 1, ... are decided: prompt, or chosen by the target."""

    CODE: ClassVar[int] = 5
    request: int
    base: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Close:
    """No more about this request, in either direction. `reason` is a CloseReason."""

    CODE: ClassVar[int] = 6
    request: int
    reason: int


class CloseReason:
    """Values of `Close.reason`; a receiver treats those it does not know as FINISHED."""

    FINISHED = 0
    DECLINED = 1
    GAP = 2
    MOVED = 3


@dataclass(frozen=True, slots=True)
class Propose:
    """Draft tokens for positions base, base + 1, ...; no tokens: nothing to say for `base`, do not wait.

    `tokens` is a run of the trunk, and behind it the tokens of branches. `branches` holds two numbers for each branch:
    how many positions before the end of the run it leaves the trunk, and how many of the tokens are its own.
    """

    CODE: ClassVar[int] = 7
    request: int
    base: int
    tokens: tuple[int, ...]
    branches: tuple[int, ...] = ()

    @property
    def runs(self) -> list[tuple[int, tuple[int, ...]]]:
        """Base and tokens of the trunk's run and of each branch. Raises RemoteProtocolError if they do not add up."""
        num_trunk = len(self.tokens) - sum(self.branches[1::2])
        end = self.base + num_trunk
        if num_trunk < 0 or len(self.branches) % 2 or any(back > end for back in self.branches[::2]):
            raise RemoteProtocolError("a proposal's branches do not add up to its tokens")
        if self.branches and not num_trunk:
            raise RemoteProtocolError("a proposal of branches has a token of their trunk in front")
        runs, at = [(self.base, self.tokens[:num_trunk])], num_trunk
        for back, length in zip(self.branches[::2], self.branches[1::2], strict=True):
            runs.append((end - back, self.tokens[at : at + length]))
            at += length
        return runs


@dataclass(frozen=True, slots=True)
class Ping:
    """Either side, any time once live: answer with a Pong of the same stamp."""

    CODE: ClassVar[int] = 8
    stamp: int


@dataclass(frozen=True, slots=True)
class Pong:
    """The answer to a Ping."""

    CODE: ClassVar[int] = 9
    stamp: int


@dataclass(frozen=True, slots=True)
class Bye:
    """The last frame of a connection: why (an errors.ByeCode), and a sentence for a person."""

    CODE: ClassVar[int] = 10
    code: int
    text: str


@dataclass(frozen=True, slots=True)
class EngineHello:
    """Engine to gateway, first and after every Bye: the model it serves."""

    CODE: ClassVar[int] = 32
    version: int
    model: str
    fingerprint: str
    vocab_size: int


@dataclass(frozen=True, slots=True)
class EngineWelcome:
    """Gateway to engine: known now; open your requests (again) when there are edges."""

    CODE: ClassVar[int] = 33
    version: int


@dataclass(frozen=True, slots=True)
class Edges:
    """Gateway to engine: so many edges could draft for you. At 0 nothing need be published."""

    CODE: ClassVar[int] = 34
    num_edges: int


@dataclass(frozen=True, slots=True)
class Assign:
    """Gateway to engine: the edge of this number, from 1 on, drafts for this request; 0: none does any more."""

    CODE: ClassVar[int] = 35
    request: int
    edge: int


@dataclass(frozen=True, slots=True)
class Stats:
    """Engine to gateway, now and then: its counters since it started, in the order of counters.ENGINE_COUNTERS."""

    CODE: ClassVar[int] = 36
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Engine to gateway: a request that is about to close; its own counters, in the order of counters.REQUEST_COUNTERS.

    A counter that no longer fits says MAX_UINT32.
    """

    CODE: ClassVar[int] = 37
    request: int
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Engine to gateway, with Stats: what it has learnt its steps to take.

    `curve_us`: microseconds of a step of each number of tokens in stepcost.KNOTS, but for what the others add.
    """

    CODE: ClassVar[int] = 38
    curve_us: tuple[int, ...]
    request_ns: int
    """For each request in the step."""
    context_ns: int
    """For each 1,024 tokens of these requests' contexts."""
    verifying_ns: int
    """For each request in a step that verifies something."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Engine to gateway, with Stats: its last steps, for people to look at.

    `values`: five numbers a step: microseconds from its end to now, and that it took; its requests; their draft tokens
    that were verified, and accepted.
    """

    CODE: ClassVar[int] = 39
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WantVocabulary:
    """Gateway to engine: send the part of your packed vocabulary that begins here (`vocabulary.pack_vocabulary`)."""

    CODE: ClassVar[int] = 40
    offset: int


@dataclass(frozen=True, slots=True)
class VocabularyPart:
    """Engine to gateway, when asked: as much of its packed vocabulary as a frame takes; nothing where there is none."""

    CODE: ClassVar[int] = 41
    offset: int
    data: bytes


Frame: TypeAlias = (
    Greet
    | Hello
    | Welcome
    | Open
    | Commit
    | Close
    | Propose
    | Ping
    | Pong
    | Bye
    | EngineHello
    | EngineWelcome
    | Edges
    | Assign
    | Stats
    | Report
    | StepTimes
    | Groups
    | WantVocabulary
    | VocabularyPart
)


def _is_uint(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_UINT32


def is_text(value: object) -> bool:
    """Whether a frame can carry it."""
    if type(value) is not str:
        return False
    try:
        return len(value.encode()) <= MAX_TEXT_BYTES
    except UnicodeEncodeError:
        return False


def _is_uints(value: object) -> bool:
    if type(value) is not tuple or len(value) > MAX_TOKENS_PER_FRAME:
        return False
    return not value or (set(map(type, value)) == {int} and min(value) >= 0 and max(value) <= MAX_UINT32)


def _is_data(value: object) -> bool:
    return type(value) is bytes and len(value) <= MAX_DATA_BYTES


def _is_tokens(value: object) -> bool:
    """The same, by another name: token ids travel packed."""
    return _is_uints(value)


def _is_branches(value: object) -> bool:
    return _is_uints(value) and len(value) <= 2 * MAX_BRANCHES  # type: ignore[arg-type]


_CHECKS: dict[object, Callable[[object], bool]] = {
    int: _is_uint,
    str: is_text,
    bytes: _is_data,
    tuple[int, ...]: _is_uints,
}
_BY_NAME: dict[str, Callable[[object], bool]] = {"tokens": _is_tokens, "branches": _is_branches}
_BY_CODE: dict[int, type[Frame]] = {cls.CODE: cls for cls in Frame.__args__}
_FIELDS: dict[type[Frame], list[tuple[str, Callable[[object], bool]]]] = {
    cls: [(field.name, _BY_NAME.get(field.name) or _CHECKS[field.type]) for field in dataclasses.fields(cls)]
    for cls in _BY_CODE.values()
}


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as one byte that says how many bytes each takes, and each in so many, little-endian; nothing for none.

    A vocabulary needs two or three bytes an id, for which msgpack's integers take three or five.
    """
    if not tokens:
        return b""
    width = (max(tokens).bit_length() + 7) // 8 or 1
    wide = struct.pack(f"<{len(tokens)}I", *tokens)
    packed = bytearray(len(tokens) * width)
    for index in range(width):
        packed[index::width] = wide[index::_WORD_BYTES]
    return bytes((width,)) + packed


def unpack_tokens(data: bytes) -> tuple[int, ...]:
    """Raises RemoteProtocolError for what `pack_tokens` does not make."""
    if not data:
        return ()
    width, packed = data[0], data[1:]
    if not 1 <= width <= _WORD_BYTES or not packed or len(packed) % width:
        raise RemoteProtocolError(f"{len(packed)} bytes are no token ids of {width} bytes")
    wide = bytearray(len(packed) // width * _WORD_BYTES)
    for index in range(width):
        wide[index::_WORD_BYTES] = packed[index::width]
    if width > 1 and not any(packed[width - 1 :: width]):
        raise RemoteProtocolError(f"token ids that fit fewer bytes came in {width}")
    return struct.unpack(f"<{len(wide) // _WORD_BYTES}I", wide)


def encode(frame: Frame) -> bytes:
    """One frame as bytes, length first. Raises ValueError for a field out of bounds: a bug of the caller's."""
    fields = _FIELDS[type(frame)]
    body: list[object] = [frame.CODE]
    for name, is_valid in fields:
        value = getattr(frame, name)
        if not is_valid(value):
            raise ValueError(f"{type(frame).__name__}.{name} cannot be {value!r:.100}")
        body.append(pack_tokens(value) if is_valid is _is_tokens else value)
    packed: bytes = msgpack.packb(body, unicode_errors="strict")
    return len(packed).to_bytes(_LENGTH_BYTES, "big") + packed


def decode(body: bytes) -> Frame:
    """One frame from its bytes without the length. Raises RemoteProtocolError for all that `encode` cannot make."""
    try:
        return _Body(body).frame()
    except (ValueError, msgpack.UnpackException) as error:
        raise RemoteProtocolError(f"not a msgpack frame: {error!s:.100}") from error


class _Body:
    """Reads one frame's values in turn. Arrays are read here, for msgpack makes room for as many elements as a header
    claims, and a few bytes of nested headers claim a million."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._unpacker = msgpack.Unpacker(
            max_buffer_size=MAX_FRAME_BYTES,
            max_str_len=MAX_TEXT_BYTES,
            max_array_len=0,
            max_bin_len=1 + _WORD_BYTES * MAX_TOKENS_PER_FRAME,
            max_map_len=0,
            max_ext_len=0,
        )
        self._unpacker.feed(body)

    def frame(self) -> Frame:
        num_fields = self._array() - 1
        code = self._unpacker.unpack()
        cls = _BY_CODE.get(code) if type(code) is int else None
        if cls is None:
            raise RemoteProtocolError(f"unknown frame code {code!r:.100}")
        fields = _FIELDS[cls]
        if num_fields != len(fields):
            raise RemoteProtocolError(f"{cls.__name__} has {len(fields)} fields, not {num_fields}")
        values: list[Any] = []
        for name, is_valid in fields:
            value = self._value(is_valid)
            if not is_valid(value):
                raise RemoteProtocolError(f"{cls.__name__}.{name} is out of bounds or of the wrong type")
            values.append(value)
        if self._unpacker.tell() != len(self._body):
            raise RemoteProtocolError("bytes follow the frame's last field")
        return cls(*values)

    def _value(self, is_valid: Callable[[object], bool]) -> object:
        if is_valid in (_is_uints, _is_branches):
            return self._uints()
        value = self._unpacker.unpack()
        if is_valid is _is_tokens:
            return unpack_tokens(value) if type(value) is bytes else None
        return value

    def _array(self) -> int:
        """The length in an array's header, which is passed over."""
        header: bytes = self._unpacker.read_bytes(1)
        if header and header[0] & 0xF0 == 0x90:
            return header[0] & 0x0F
        if header == b"\xdc":
            length: bytes = self._unpacker.read_bytes(2)
            if len(length) == 2:
                return int.from_bytes(length, "big")
        raise RemoteProtocolError("a frame is an array that starts with its code; so is a list of numbers")

    def _uints(self) -> tuple[object, ...]:
        num_values = self._array()
        values = tuple(islice(self._unpacker, num_values))
        if len(values) != num_values:
            raise RemoteProtocolError("a frame ends within its numbers")
        return values


class FrameReader:
    """Bytes in, frames out, however the bytes are cut."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that are whole now. Raises RemoteProtocolError; the reader is of no use after that."""
        self._buffer += data
        frames: list[Frame] = []
        start = 0
        while len(self._buffer) - start >= _LENGTH_BYTES:
            num_bytes = int.from_bytes(self._buffer[start : start + _LENGTH_BYTES], "big")
            if num_bytes > MAX_FRAME_BYTES:
                raise RemoteProtocolError(f"a frame of {num_bytes} bytes is over the limit of {MAX_FRAME_BYTES}")
            end = start + _LENGTH_BYTES + num_bytes
            if len(self._buffer) < end:
                break
            frames.append(decode(bytes(self._buffer[start + _LENGTH_BYTES : end])))
            start = end
        del self._buffer[:start]
        return frames


def bye(code: int, text: str) -> Bye:
    """A Bye whose text fits, however long the names in it are."""
    return Bye(code, text.encode()[:MAX_TEXT_BYTES].decode(errors="ignore"))


def commits(request: int, base: int, tokens: Sequence[int]) -> Iterator[Commit]:
    """A run of tokens of any length as Commits that each fit a frame."""
    for start in range(0, len(tokens), MAX_TOKENS_PER_FRAME):
        yield Commit(request, base + start, tuple(tokens[start : start + MAX_TOKENS_PER_FRAME]))
