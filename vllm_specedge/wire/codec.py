"""Frames as bytes: a 16-bit big-endian byte count, then a msgpack array of the frame's code and its fields.

Rule 1: `decode` accepts what `encode` makes, with msgpack numbers of any width; all else is a RemoteProtocolError.
Rule 2: the length in a header is compared with the limit of a frame before memory is allocated.
Invariant: no input makes a reader hold more than `MAX_FRAME_BYTES` or allocate more than a small multiple of it.
"""

import dataclasses
import struct
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Annotated, Any, TypeAlias

import msgspec

from vllm_specedge.errors import RemoteProtocolError
from vllm_specedge.wire.engine_frames import FromEngine, ToEngine
from vllm_specedge.wire.frames import (
    MAX_BRANCHES,
    MAX_DATA_BYTES,
    MAX_FRAME_BYTES,
    MAX_TEXT_BYTES,
    MAX_TOKENS_PER_FRAME,
    MAX_UINT32,
    EdgeFrame,
)

_LENGTH_BYTES = 2
_WORD_BYTES = 4

Frame: TypeAlias = EdgeFrame | FromEngine | ToEngine

_Uint = Annotated[int, msgspec.Meta(ge=0, le=MAX_UINT32)]
_TYPES: dict[object, Any] = {
    int: _Uint,
    str: Annotated[str, msgspec.Meta(max_length=MAX_TEXT_BYTES)],
    bytes: Annotated[bytes, msgspec.Meta(max_length=MAX_DATA_BYTES)],
    tuple[int, ...]: Annotated[tuple[_Uint, ...], msgspec.Meta(max_length=MAX_TOKENS_PER_FRAME)],
    "tokens": Annotated[bytes, msgspec.Meta(max_length=1 + _WORD_BYTES * MAX_TOKENS_PER_FRAME)],
    "branches": Annotated[tuple[_Uint, ...], msgspec.Meta(max_length=2 * MAX_BRANCHES)],
}
"""The wire type of a field, by its name if listed here, else by its Python type. Token ids are packed."""


class _Form:
    """Reader and writer for frames of one kind."""

    def __init__(self, cls: type[Frame]) -> None:
        fields = dataclasses.fields(cls)
        types = [_TYPES.get(field.name) or _TYPES[field.type] for field in fields]
        names = [field.name for field in fields]
        self.cls = cls
        self._packed = names.index("tokens") if "tokens" in names else None
        self._texts = [index for index, field in enumerate(fields) if field.type is str]
        form: Any = tuple.__class_getitem__((int, *types))
        self._read = msgspec.msgpack.Decoder(form).decode
        get = attrgetter(*names)
        self.values: Callable[[Frame], tuple[Any, ...]] = get if len(names) > 1 else lambda frame: (get(frame),)

    def write(self, frame: Frame) -> bytes:
        """The bytes of a frame. Raises ValueError for a field that is out of bounds."""
        values = self.values(frame)
        at = self._packed
        if at is not None:
            tokens = values[at]
            if type(tokens) is not tuple or len(tokens) > MAX_TOKENS_PER_FRAME:
                raise ValueError(f"tokens are a tuple of at most {MAX_TOKENS_PER_FRAME}")
            values = (*values[:at], pack_tokens(tokens), *values[at + 1 :])
        packed = _write((self.cls.CODE, *values))
        self._check(self._read(packed))
        return packed

    def read(self, body: bytes) -> Frame:
        """The frame in these bytes. Raises ValueError if they are not a frame of this kind."""
        values = self._check(self._read(body))
        at = self._packed
        if at is not None:
            tokens = unpack_tokens(values[at])
            if len(tokens) > MAX_TOKENS_PER_FRAME:
                raise ValueError(f"more than {MAX_TOKENS_PER_FRAME} tokens")
            values = (*values[:at], tokens, *values[at + 1 :])
        return self.cls(*values)

    def _check(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """The values without the code, once the texts are checked: msgspec counts characters, the limit is in bytes."""
        for index in self._texts:
            if len(values[index + 1].encode()) > MAX_TEXT_BYTES:
                raise ValueError(f"a text of over {MAX_TEXT_BYTES} bytes")
        return values[1:]


_write = msgspec.msgpack.Encoder().encode
_FORMS: dict[type[Frame], _Form] = {cls: _Form(cls) for cls in Frame.__args__}
_BY_CODE = {cls.CODE: form for cls, form in _FORMS.items()}


def encode(frame: Frame) -> bytes:
    """One frame as bytes, length first. Raises ValueError for a field out of bounds, a bug of the caller."""
    try:
        packed = _FORMS[type(frame)].write(frame)
    except (ValueError, TypeError, OverflowError, struct.error, AttributeError) as error:
        raise ValueError(f"{frame!r:.200} cannot be sent: {error!s:.100}") from error
    return len(packed).to_bytes(_LENGTH_BYTES, "big") + packed


def decode(body: bytes) -> Frame:
    """One frame from its bytes without the length. Raises RemoteProtocolError for what `encode` cannot make."""
    form = _BY_CODE.get(_code(body))
    if form is None:
        raise RemoteProtocolError(f"unknown frame code {_code(body)}")
    try:
        return form.read(body)
    except ValueError as error:  # msgspec's, too
        raise RemoteProtocolError(f"no {form.cls.__name__}: {error!s:.100}") from error


def _code(body: bytes) -> int:
    """A frame's code, with its array's length and the code written in any width."""
    at = 3 if body[:1] == b"\xdc" else 1
    if at == 1 and (not body or body[0] & 0xF0 != 0x90):
        raise RemoteProtocolError("a frame is an array that starts with its code")
    first = body[at] if len(body) > at else 0x80
    width = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}.get(first, 0)
    if width:
        return int.from_bytes(body[at + 1 : at + 1 + width], "big", signed=first >= 0xD0)
    if first >= 0x80:
        raise RemoteProtocolError("a frame's code is a number")
    return first


def is_text(value: object) -> bool:
    """Whether a frame can carry this value as a text."""
    if type(value) is not str:
        return False
    try:
        return len(value.encode()) <= MAX_TEXT_BYTES
    except UnicodeEncodeError:
        return False


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as one byte with the width, and each id in this many bytes, little-endian; no bytes for no ids.

    A vocabulary needs two or three bytes per id, for which msgpack's integers take three or five.
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
    """The token ids in these bytes. Raises RemoteProtocolError for anything that `pack_tokens` does not make."""
    if not data:
        return ()
    width, packed = data[0], data[1:]
    if not 1 <= width <= _WORD_BYTES or not packed or len(packed) % width:
        raise RemoteProtocolError(f"{len(packed)} bytes are not token ids of {width} bytes")
    wide = bytearray(len(packed) // width * _WORD_BYTES)
    for index in range(width):
        wide[index::_WORD_BYTES] = packed[index::width]
    if width > 1 and not any(packed[width - 1 :: width]):
        raise RemoteProtocolError(f"token ids that fit fewer bytes came in {width}")
    return struct.unpack(f"<{len(wide) // _WORD_BYTES}I", wide)


class FrameReader:
    """Bytes in, frames out, for any split of the bytes."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that are complete now. Raises RemoteProtocolError; the reader cannot be used after that."""
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
