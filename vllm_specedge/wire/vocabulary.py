"""A whole vocabulary: as bytes that travel, taken in again, and held against another one.

The bytes are those that the fingerprint is over, so whoever gets them can tell whether they are what they should be.
One thing is written otherwise: an LF inside of a token is the byte FF, which UTF-8 never has: a line ends at its LF.
"""

import hashlib
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from vllm_specedge.errors import RemoteProtocolError
from vllm_specedge.wire.fingerprint import vocabulary_lines, without_fillers

MAX_PACKED_BYTES = 4 << 20
"""The largest vocabularies there are, 262,144 tokens, take 2 MB."""
MAX_TEXT_BYTES = 32 << 20
_LF_INSIDE = b"\xff"
_GZIP = 31
"""What zlib calls that format."""


def pack_vocabulary(vocabulary: Mapping[str, int]) -> bytes:
    """The entries, without fillers, in gzip; the same bytes for the same vocabulary and library."""
    lines = vocabulary_lines(vocabulary)
    return zlib.compress(b"".join(line.replace(b"\n", _LF_INSIDE) + b"\n" for line in lines), wbits=_GZIP)


class PackedReader:
    """Takes a packed vocabulary in, however it is cut, and tells whether it is the one of a fingerprint."""

    def __init__(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint
        self._unzip = zlib.decompressobj(_GZIP)
        self._digest = hashlib.sha256()
        self.packed = bytearray()
        self._num_text_bytes = 0

    @property
    def is_whole(self) -> bool:
        return self._unzip.eof

    def feed(self, piece: bytes) -> bytes:
        """The text in this piece. Raises RemoteProtocolError for what is no vocabulary, is not this one or too large;
        the reader is of no use after that."""
        self.packed += piece
        try:
            text = self._unzip.decompress(piece, MAX_TEXT_BYTES + 1 - self._num_text_bytes)
        except zlib.error as error:
            raise RemoteProtocolError(f"a vocabulary is not packed as it should be: {error!s:.100}") from None
        self._num_text_bytes += len(text)
        if len(self.packed) > MAX_PACKED_BYTES or self._num_text_bytes > MAX_TEXT_BYTES:
            raise RemoteProtocolError(f"a vocabulary has over {MAX_PACKED_BYTES} bytes, or {MAX_TEXT_BYTES} unpacked")
        self._digest.update(text.replace(_LF_INSIDE, b"\n"))
        if self._unzip.unused_data or (self.is_whole and self._digest.hexdigest() != self._fingerprint):
            raise RemoteProtocolError("a vocabulary is not the one of its fingerprint")
        return text


def unpack_vocabulary(packed: bytes, fingerprint: str) -> dict[str, int]:
    """What `pack_vocabulary` has packed. Raises RemoteProtocolError for all else."""
    reader = PackedReader(fingerprint)
    text = reader.feed(packed)
    if not reader.is_whole:
        raise RemoteProtocolError("a vocabulary ends too soon")
    vocabulary = {}
    try:
        for line in text.split(b"\n")[:-1]:
            id_, _, token = line.partition(b"\t")
            vocabulary[token.replace(_LF_INSIDE, b"\n").decode("utf-8", "surrogatepass")] = int(id_)
    except ValueError:  # of an id, or no UTF-8
        raise RemoteProtocolError("a vocabulary has a line that is no id and token") from None
    return vocabulary


class Difference(NamedTuple):
    """A token that does not have the same id on both sides; None where a side does not have it at all."""

    token: str
    target_id: int | None
    draft_id: int | None


def differences(target: Mapping[str, int], draft: Mapping[str, int]) -> list[Difference]:
    """Every token that differs, fillers aside, by its id (the target's, if it has one)."""
    ours, theirs = without_fillers(draft), without_fillers(target)
    found = [Difference(token, id_, ours.get(token)) for token, id_ in theirs.items() if ours.get(token) != id_]
    found += [Difference(token, None, id_) for token, id_ in ours.items() if token not in theirs]

    def place(each: Difference) -> tuple[int, str]:
        id_ = each.draft_id if each.target_id is None else each.target_id
        assert id_ is not None
        return id_, each.token

    return sorted(found, key=place)
