"""Whole vocabularies: packed for the wire, unpacked, and compared.

The packed text is the input of the fingerprint, so the receiver can check it. There is one difference: an LF inside of
a token is written as the byte FF, which never occurs in UTF-8, so that each line ends at its LF.
"""

import hashlib
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from vllm_specedge.errors import RemoteProtocolError
from vllm_specedge.wire.fingerprint import vocabulary_lines, without_fillers

MAX_PACKED_BYTES = 4 << 20
"""The largest known vocabularies, of 262,144 tokens, take 2 MB."""
MAX_TEXT_BYTES = 32 << 20
_LF_INSIDE = b"\xff"
_GZIP = 31
"""zlib's number for the gzip format."""


def pack_vocabulary(vocabulary: Mapping[str, int]) -> bytes:
    """The entries without fillers, compressed with gzip; the same bytes for the same vocabulary and library."""
    lines = vocabulary_lines(vocabulary)
    return zlib.compress(b"".join(line.replace(b"\n", _LF_INSIDE) + b"\n" for line in lines), wbits=_GZIP)


class PackedReader:
    """Reads a packed vocabulary in pieces of any size, and checks it against a fingerprint."""

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
        """The text in this piece. Raises RemoteProtocolError if the data is not a vocabulary, not this one, or too
        large; the reader cannot be used after that."""
        self.packed += piece
        try:
            text = self._unzip.decompress(piece, MAX_TEXT_BYTES + 1 - self._num_text_bytes)
        except zlib.error as error:
            raise RemoteProtocolError(f"a vocabulary is not packed correctly: {error!s:.100}") from None
        self._num_text_bytes += len(text)
        if len(self.packed) > MAX_PACKED_BYTES or self._num_text_bytes > MAX_TEXT_BYTES:
            raise RemoteProtocolError(f"a vocabulary has over {MAX_PACKED_BYTES} bytes, or {MAX_TEXT_BYTES} unpacked")
        self._digest.update(text.replace(_LF_INSIDE, b"\n"))
        if self._unzip.unused_data or (self.is_whole and self._digest.hexdigest() != self._fingerprint):
            raise RemoteProtocolError("a vocabulary does not match its fingerprint")
        return text


def unpack_vocabulary(packed: bytes, fingerprint: str) -> dict[str, int]:
    """The vocabulary that `pack_vocabulary` has packed. Raises RemoteProtocolError for anything else."""
    reader = PackedReader(fingerprint)
    text = reader.feed(packed)
    if not reader.is_whole:
        raise RemoteProtocolError("a vocabulary ends too soon")
    vocabulary = {}
    try:
        for line in text.split(b"\n")[:-1]:
            id_, _, token = line.partition(b"\t")
            vocabulary[token.replace(_LF_INSIDE, b"\n").decode("utf-8", "surrogatepass")] = int(id_)
    except ValueError:  # a wrong id, or not UTF-8
        raise RemoteProtocolError("a vocabulary has a line without an id and a token") from None
    return vocabulary


class Difference(NamedTuple):
    """A token whose ids differ between the two sides; None if a side lacks the token."""

    token: str
    target_id: int | None
    draft_id: int | None


def differences(target: Mapping[str, int], draft: Mapping[str, int]) -> list[Difference]:
    """All tokens that differ, without fillers, ordered by id (the target's, if it has one)."""
    ours, theirs = without_fillers(draft), without_fillers(target)
    found = [Difference(token, id_, ours.get(token)) for token, id_ in theirs.items() if ours.get(token) != id_]
    found += [Difference(token, None, id_) for token, id_ in ours.items() if token not in theirs]

    def place(each: Difference) -> tuple[int, str]:
        id_ = each.draft_id if each.target_id is None else each.target_id
        assert id_ is not None
        return id_, each.token

    return sorted(found, key=place)
