import dataclasses
import tracemalloc

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.helpers import FRAME_TYPES, any_frame, example_of, frames_of, refused
from vllm_specedge.errors import RemoteProtocolError
from vllm_specedge.frames import (
    MAX_FRAME_BYTES,
    MAX_TEXT_BYTES,
    MAX_TOKENS_PER_FRAME,
    MAX_UINT32,
    Bye,
    Commit,
    Frame,
    FrameReader,
    Propose,
    bye,
    commits,
    decode,
    encode,
)

LARGEST = {
    int: MAX_UINT32,
    str: "x" * MAX_TEXT_BYTES,
    bool: True,
    tuple[int, ...]: (MAX_UINT32,) * MAX_TOKENS_PER_FRAME,
}
OUT_OF_BOUNDS: dict[object, list[object]] = {
    int: [-1, MAX_UINT32 + 1, 1.0, True, None, "1", b"1", (1,)],
    str: ["x" * (MAX_TEXT_BYTES + 1), "é" * (MAX_TEXT_BYTES // 2 + 1), b"x", 1, None, ("x",)],
    bool: [0, 1, None, "true", (True,)],
    tuple[int, ...]: [
        (0,) * (MAX_TOKENS_PER_FRAME + 1),
        (-1,),
        (MAX_UINT32 + 1,),
        (True,),
        (1.0,),
        ("1",),
        (None,),
        ((1,),),
        "x",
        1,
        None,
    ],
}
FIELDS = [(cls, field) for cls in FRAME_TYPES for field in dataclasses.fields(cls)]


@settings(max_examples=20)
@given(st.data())
def test_every_frame_comes_back_as_it_was(data: st.DataObject) -> None:
    for cls in FRAME_TYPES:
        frame = data.draw(frames_of(cls))
        assert FrameReader().feed(encode(frame)) == [frame]


@pytest.mark.parametrize("cls", FRAME_TYPES)
def test_a_frame_with_every_field_at_its_largest_fits(cls: type[Frame]) -> None:
    frame = cls(*(LARGEST[field.type] for field in dataclasses.fields(cls)))  # type: ignore[arg-type, index]
    data = encode(frame)
    assert len(data) <= 2 + MAX_FRAME_BYTES
    assert FrameReader().feed(data) == [frame]


def test_frame_codes_are_all_different() -> None:
    assert len({cls.CODE for cls in FRAME_TYPES}) == len(FRAME_TYPES)


def test_eight_proposed_tokens_stay_small() -> None:
    assert len(encode(Propose(70000, 70000, tuple(range(40000, 40008))))) <= 42


@given(st.lists(any_frame(), min_size=1, max_size=3))
def test_frames_survive_being_cut_at_every_byte_and_merged(frames: list[Frame]) -> None:
    data = b"".join(map(encode, frames))
    assert FrameReader().feed(data) == frames
    bytewise = FrameReader()
    assert [frame for i in range(len(data)) for frame in bytewise.feed(data[i : i + 1])] == frames
    for cut in range(len(data) + 1):
        reader = FrameReader()
        assert reader.feed(data[:cut]) + reader.feed(data[cut:]) == frames


@given(st.binary(max_size=300))
@example(b"\x81\xc0\xc0")
@example(b"\x91\x80")
@example(b"\x92\x08\xc7\x00\xff")
@example(b"\x92\x08\xd4\xff\x00")
@example(b"\x91\xa1\xff")
@example(b"\x90")
@example(b"\xdc\x00")
@example(b"\xdd\xff\xff\xff\xff")
@example(b"")
def test_random_bytes_are_refused_or_are_a_frame(body: bytes) -> None:
    try:
        frame = decode(body)
    except RemoteProtocolError:
        return
    assert decode(encode(frame)[2:]) == frame


@given(any_frame(), st.data())
def test_mutated_frames_are_refused_or_are_another_frame(frame: Frame, data: st.DataObject) -> None:
    body = bytearray(encode(frame)[2:])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at : at + data.draw(st.integers(0, 1))] = data.draw(st.binary(max_size=2))
        body = body or bytearray(b"\0")
    try:
        other = decode(bytes(body))
    except RemoteProtocolError:
        return
    assert decode(encode(other)[2:]) == other


@given(any_frame())
def test_a_frame_that_is_cut_short_or_followed_by_more_is_refused(frame: Frame) -> None:
    body = encode(frame)[2:]
    for end in range(len(body)):
        refused(lambda end=end: decode(body[:end]))  # type: ignore[misc]
    refused(lambda: decode(body + b"\0"))


def test_a_length_over_the_limit_is_refused_before_the_bytes_arrive() -> None:
    reader = FrameReader()
    assert reader.feed(MAX_FRAME_BYTES.to_bytes(2, "big")) == []
    for num_bytes in (MAX_FRAME_BYTES + 1, 0xFFFF):
        refused(lambda n=num_bytes: FrameReader().feed(n.to_bytes(2, "big")))  # type: ignore[misc]


def test_a_whole_body_over_the_limit_is_refused() -> None:
    refused(lambda: decode(b"\x92\x08" + b"\0" * MAX_FRAME_BYTES))


@pytest.mark.parametrize(
    "body",
    [
        b"\xdc\x04\x00" * 2700,
        b"\xdd\xff\xff\xff\xff" * 1600,
        b"\x94\x05\x01\x02" + b"\xdc\x04\x00" * 2700,
        b"\x92\x18\x24\xdc\xff\xff" + b"\x01" * 8000,
        b"\x92\x08\xdb\xff\xff\xff\xff",
        b"\x92\x08" + b"\xdf\xff\xff\xff\xff" * 1000,
        b"\x92\x08" + b"\xc9\xff\xff\xff\xff\x01" * 1000,
    ],
)
def test_lengths_that_a_few_bytes_claim_are_not_believed(body: bytes) -> None:
    tracemalloc.start()
    try:
        refused(lambda: decode(body))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 16 * MAX_FRAME_BYTES


def test_a_reader_holds_no_more_than_one_unfinished_frame() -> None:
    reader = FrameReader()
    data = encode(Commit(1, 0, (MAX_UINT32,) * MAX_TOKENS_PER_FRAME))
    tracemalloc.start()
    try:
        for _ in range(200):
            reader.feed(data[:1000])
            reader.feed(data[1000:])
        held_bytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held_bytes < 4 * MAX_FRAME_BYTES


@pytest.mark.parametrize(("cls", "field"), FIELDS)
def test_a_field_out_of_bounds_is_refused_by_both_sides(cls: type[Frame], field: "dataclasses.Field[object]") -> None:
    good = example_of(cls)
    for bad in OUT_OF_BOUNDS[field.type]:
        broken = dataclasses.replace(good, **{field.name: bad})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"{cls.__name__}.{field.name}"):
            encode(broken)
        values = [cls.CODE, *(getattr(broken, item.name) for item in dataclasses.fields(cls))]
        refused(lambda values=values: decode(msgpack.packb(values)))  # type: ignore[misc]


def test_text_that_is_no_unicode_is_refused_by_both_sides() -> None:
    with pytest.raises(ValueError, match=r"Bye\.text"):
        encode(Bye(1, "\ud800"))
    refused(lambda: decode(b"\x93\x0a\x01\xa2\xff\xff"))


@pytest.mark.parametrize("cls", FRAME_TYPES)
def test_a_field_too_many_or_too_few_is_refused(cls: type[Frame]) -> None:
    values = msgpack.unpackb(encode(example_of(cls))[2:])
    refused(lambda: decode(msgpack.packb([*values, 0])))
    refused(lambda: decode(msgpack.packb(values[:-1])))


def test_unknown_codes_are_refused() -> None:
    known = {cls.CODE for cls in FRAME_TYPES}
    for code in [*range(-1, 300), True, 8.0, "8", None]:
        if code not in known or type(code) is not int:
            error = refused(lambda code=code: decode(msgpack.packb([code, 1])))  # type: ignore[misc]
            assert "code" in str(error)


@given(st.integers(0, 10_000), st.lists(st.integers(0, MAX_UINT32), max_size=50), st.integers(0, 3))
def test_a_long_run_is_split_into_commits_that_join_again(base: int, tokens: list[int], times: int) -> None:
    run = (tokens * 60 * times)[: 3 * MAX_TOKENS_PER_FRAME + 1]
    joined: list[int] = []
    for commit in commits(9, base, run):
        assert commit.request == 9
        assert commit.base == base + len(joined)
        assert 0 < len(commit.tokens) <= MAX_TOKENS_PER_FRAME
        encode(commit)
        joined += commit.tokens
    assert joined == run


@given(st.text(max_size=600))
def test_a_bye_of_any_length_fits(text: str) -> None:
    frame = bye(3, text)
    assert FrameReader().feed(encode(frame)) == [frame]
    assert text.startswith(frame.text)
    assert frame.text == text or len(frame.text.encode()) > MAX_TEXT_BYTES - 4
