"""Vocabularies as bytes on the wire, and their comparison."""

import re
import zlib
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.helpers import refused
from vllm_specedge.errors import RemoteProtocolError
from vllm_specedge.wire import vocabulary as module
from vllm_specedge.wire.fingerprint import vocabulary_fingerprint, without_fillers
from vllm_specedge.wire.vocabulary import Difference, PackedReader, differences, pack_vocabulary, unpack_vocabulary

DOCUMENT = (Path(__file__).parent.parent / "docs" / "protocol.md").read_text()
FILLERS = st.integers(0, 20).map(lambda id_: (f"[PAD{id_}]", id_))
"""Fillers; one with another id than in its name is not a filler: `tokens` makes those."""
tokens = st.one_of(st.text(max_size=4), st.sampled_from(["[PAD7]", "[PAD]", "\n", "\n5\tx\n", "\ud800", "ÿ"]))
vocabularies = st.builds(
    lambda entries, fillers: {**entries, **dict(fillers)},
    st.dictionaries(tokens, st.integers(0, 20), max_size=8),
    st.lists(FILLERS, max_size=3),
)


def zipped(text: bytes) -> bytes:
    return zlib.compress(text, wbits=31)


@given(vocabularies)
@example({"\n5\tx": 4, "x": 5})
def test_what_is_packed_comes_back_without_fillers(vocabulary: dict[str, int]) -> None:
    packed = pack_vocabulary(vocabulary)
    assert unpack_vocabulary(packed, vocabulary_fingerprint(vocabulary)) == without_fillers(vocabulary)
    text = zlib.decompress(packed, wbits=31)
    assert len(text.splitlines()) >= text.count(b"\n") == len(without_fillers(vocabulary))
    assert sha256(text.replace(b"\xff", b"\n")).hexdigest() == vocabulary_fingerprint(vocabulary)


def test_the_document_s_example() -> None:
    packed = pack_vocabulary({"a": 0, "\n": 1, "é": 2})
    [unpacked, hashed] = re.findall(r"`((?:[0-9a-f]{2}\s){11,}[0-9a-f]{2})`", DOCUMENT.partition("## 16.")[2])
    assert zlib.decompress(packed, wbits=31) == bytes.fromhex(unpacked)
    assert unpack_vocabulary(packed, sha256(bytes.fromhex(hashed)).hexdigest()) == {"a": 0, "\n": 1, "é": 2}


@given(vocabularies, st.integers(1, 7))
def test_it_may_come_in_pieces(vocabulary: dict[str, int], size: int) -> None:
    packed = pack_vocabulary(vocabulary)
    reader, text = PackedReader(vocabulary_fingerprint(vocabulary)), b""
    for start in range(0, len(packed), size):
        assert not reader.is_whole
        text += reader.feed(packed[start : start + size])
    assert reader.is_whole
    assert text == zlib.decompress(packed, wbits=31)


@settings(max_examples=200)
@given(vocabularies, st.data())
def test_what_is_damaged_is_refused_or_says_the_same(vocabulary: dict[str, int], data: st.DataObject) -> None:
    packed, fingerprint = pack_vocabulary(vocabulary), vocabulary_fingerprint(vocabulary)
    place = data.draw(st.integers(10, len(packed) - 9))  # after gzip's header, whose date is irrelevant
    flipped = bytearray(packed)
    flipped[place] ^= data.draw(st.integers(1, 255))
    refused(lambda: unpack_vocabulary(packed[:place], fingerprint))
    refused(lambda: unpack_vocabulary(packed + b"x", fingerprint))
    refused(lambda: unpack_vocabulary(packed, "0" * 64))
    with suppress(RemoteProtocolError):  # some bits mean nothing
        assert unpack_vocabulary(bytes(flipped), fingerprint) == without_fillers(vocabulary)


@pytest.mark.parametrize("text", [b"no id\n", b"1\t\xff\xfe\n", b"\n", b"\ta\n"])
def test_a_line_that_is_no_entry_is_refused_with_the_right_sum_too(text: bytes) -> None:
    fingerprint = sha256(text.replace(b"\xff", b"\n")).hexdigest()
    assert "line without an id and a token" in str(refused(lambda: unpack_vocabulary(zipped(text), fingerprint)))


def test_it_is_never_larger_than_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decompression of a few bytes that unpack to very many is stopped early."""
    bomb = zipped(bytes(200 << 20))
    assert len(bomb) < module.MAX_PACKED_BYTES
    reader = PackedReader("")
    assert "has over" in str(refused(lambda: reader.feed(bomb)))
    assert reader._num_text_bytes == module.MAX_TEXT_BYTES + 1
    monkeypatch.setattr(module, "MAX_PACKED_BYTES", 100)
    vocabulary = {f"token {id_}": id_ for id_ in range(100)}
    packed = pack_vocabulary(vocabulary)
    assert "has over" in str(refused(lambda: unpack_vocabulary(packed, vocabulary_fingerprint(vocabulary))))


def merged(target: dict[str, int], found: list[Difference]) -> dict[str, int]:
    """The target's vocabulary, changed as the differences say."""
    changed = {token: id_ for token, id_ in target.items() if token not in {each.token for each in found}}
    return changed | {each.token: each.draft_id for each in found if each.draft_id is not None}


@given(vocabularies, vocabularies)
@example({"a": 1}, {"a": 1, "[PAD2]": 2})
@example({"[PAD2]": 3}, {"[PAD2]": 2})
def test_the_differences_make_of_one_the_other(target: dict[str, int], draft: dict[str, int]) -> None:
    found = differences(target, draft)
    assert (not found) == (vocabulary_fingerprint(target) == vocabulary_fingerprint(draft))
    assert merged(without_fillers(target), found) == without_fillers(draft)
    assert all(each.target_id != each.draft_id for each in found)
    assert len({each.token for each in found}) == len(found)
    back = {Difference(token, there, here) for token, here, there in differences(draft, target)}
    assert back == set(found)


def test_each_kind_of_difference_and_their_order() -> None:
    target = {"same": 0, "moved": 5, "theirs": 3, "[PAD9]": 9}
    draft = {"same": 0, "moved": 1, "ours": 4, "[PAD8]": 8}
    assert differences(target, draft) == [("theirs", 3, None), ("ours", None, 4), ("moved", 5, 1)]
