import dataclasses
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.helpers import FRAME_TYPES, any_frame, example_of, frames_of, refused
from vllm_specedge.errors import RemoteProtocolError
from vllm_specedge.wire.codec import Frame, FrameReader, decode, encode, pack_tokens, unpack_tokens
from vllm_specedge.wire.frames import (
    MAX_BRANCHES,
    MAX_DATA_BYTES,
    MAX_FRAME_BYTES,
    MAX_TEXT_BYTES,
    MAX_TOKENS_PER_FRAME,
    MAX_UINT32,
    Bye,
    Commit,
    Propose,
    bye,
    commits,
)

LARGEST: dict[object, object] = {
    int: MAX_UINT32,
    str: "x" * MAX_TEXT_BYTES,
    bytes: b"x" * MAX_DATA_BYTES,
    tuple[int, ...]: (MAX_UINT32,) * MAX_TOKENS_PER_FRAME,
    "branches": (MAX_UINT32,) * (2 * MAX_BRANCHES),
}
"""Largest values by a field's type, or by its name if that is more specific."""
OUT_OF_BOUNDS: dict[object, list[object]] = {
    int: [-1, MAX_UINT32 + 1, 1.0, True, None, "1", b"1", (1,)],
    str: ["x" * (MAX_TEXT_BYTES + 1), "é" * (MAX_TEXT_BYTES // 2 + 1), b"x", 1, None, ("x",)],
    bytes: [b"x" * (MAX_DATA_BYTES + 1), "x", 1, None, (1,)],
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
    "branches": [(0,) * (2 * MAX_BRANCHES + 1)],
}
NO_PACKED_TOKENS: list[object] = [
    (),
    None,
    (1, 2),
    "\1\2",
    b"\1",
    b"\0",
    b"\0\1",
    b"\5\1\1\1\1\1",
    b"\2\1\1\1",
    b"\2\1\0",
    b"\4\1\1\1\0\2\2\2\0",
    b"\1" + bytes(MAX_TOKENS_PER_FRAME + 1),
    b"\4" + b"\1" * 4 * (MAX_TOKENS_PER_FRAME + 1),
]
FIELDS = [(cls, field) for cls in FRAME_TYPES for field in dataclasses.fields(cls)]
UINTS = st.integers(0, 32).flatmap(lambda num_bits: st.integers(0, 2**num_bits - 1))


def wire_values(frame: Frame) -> list[Any]:
    """The values in a frame's body."""
    fields = [(field.name, getattr(frame, field.name)) for field in dataclasses.fields(frame)]
    return [frame.CODE, *(pack_tokens(value) if name == "tokens" else value for name, value in fields)]


def decoded(body: bytes) -> Frame | None:
    """The frame that these bytes consist of; None if they are not a frame."""
    try:
        frame = decode(body)
    except RemoteProtocolError:
        return None
    # msgpack allows several widths for a number or a length; in the shortest form these are the same bytes.
    assert encode(frame)[2:] == msgpack.packb(msgpack.unpackb(body))
    assert len(encode(frame)[2:]) <= len(body)
    assert decode(encode(frame)[2:]) == frame
    return frame


@settings(max_examples=20)
@given(st.data())
def test_every_frame_comes_back_as_it_was(data: st.DataObject) -> None:
    for cls in FRAME_TYPES:
        frame = data.draw(frames_of(cls))
        assert FrameReader().feed(encode(frame)) == [frame]


@pytest.mark.parametrize("cls", FRAME_TYPES)
def test_a_frame_with_every_field_at_its_largest_fits(cls: type[Frame]) -> None:
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    largest = [LARGEST.get(field.name) or LARGEST[field.type] for field in fields]
    if cls is Propose:  # branches that add up
        largest[-1] = (MAX_UINT32, 8) * MAX_BRANCHES
    frame = cls(*largest)
    data = encode(frame)
    assert len(data) <= 2 + MAX_FRAME_BYTES
    assert FrameReader().feed(data) == [frame]


def test_frame_codes_are_all_different() -> None:
    assert len({cls.CODE for cls in FRAME_TYPES}) == len(FRAME_TYPES)


def test_eight_proposed_tokens_stay_small() -> None:
    assert len(encode(Propose(70000, 70000, tuple(range(40000, 40008))))) <= 34


@given(st.lists(UINTS, max_size=60))
@example([0])
@example([MAX_UINT32])
def test_packed_tokens_come_back_and_take_no_more_bytes_than_the_largest_needs(tokens: list[int]) -> None:
    packed = pack_tokens(tokens)
    assert unpack_tokens(packed) == tuple(tokens)
    num_bytes = next(num for num in range(1, 5) if max(tokens, default=0) < 256**num)
    assert len(packed) == (1 + num_bytes * len(tokens) if tokens else 0)


@given(st.binary(max_size=20) | st.builds(lambda width, rest: bytes([width]) + rest, st.integers(0, 5), st.binary()))
def test_tokens_are_packed_in_one_way_only(data: bytes) -> None:
    try:
        tokens = unpack_tokens(data)
    except RemoteProtocolError:
        return
    assert pack_tokens(tokens) == data


def test_tokens_that_are_packed_in_another_way_are_refused() -> None:
    for value in NO_PACKED_TOKENS:
        refused(lambda value=value: decode(msgpack.packb([Commit.CODE, 1, 1, value])))  # type: ignore[misc]


@given(UINTS, st.lists(UINTS, min_size=1, max_size=9), st.data())
def test_branches_are_split_from_the_trunk_as_they_were_joined(
    base: int, trunk: list[int], data: st.DataObject
) -> None:
    end = base + len(trunk)
    branches = data.draw(st.lists(st.tuples(st.integers(0, min(end, 20)), st.lists(UINTS, max_size=4)), max_size=5))
    tokens = [*trunk, *(token for _, own in branches for token in own)]
    proposal = Propose(1, base, tuple(tokens), tuple(n for back, own in branches for n in (back, len(own))))
    assert decode(encode(proposal)[2:]) == proposal
    assert proposal.runs == [(base, tuple(trunk)), *((end - back, tuple(own)) for back, own in branches)]


small = st.integers(0, 6) | UINTS


@given(small, st.lists(small, max_size=8), st.lists(small, max_size=7))
@example(0, [1], [1, 1])
@example(0, [1, 2], [0])
@example(0, [1], [2, 0])
@example(0, [], [0, 0])
@example(5, [1, 2], [MAX_UINT32, MAX_UINT32])
def test_branches_add_up_or_are_refused(base: int, tokens: list[int], branches: list[int]) -> None:
    """Each token belongs to one run, the first to the trunk, and no branch leaves before the first position."""
    num_trunk = len(tokens) - sum(branches[1::2])
    end = base + num_trunk
    if len(branches) % 2 or num_trunk < bool(branches) or max(branches[::2], default=0) > end:
        with pytest.raises(ValueError, match="a proposal"):
            Propose(1, base, tuple(tokens), tuple(branches))
        refused(lambda: decode(msgpack.packb([Propose.CODE, 1, base, pack_tokens(tokens), branches])))
        return
    proposal = Propose(1, base, tuple(tokens), tuple(branches))
    assert [token for _, run in proposal.runs for token in run] == tokens
    assert [end - start for start, _ in proposal.runs[1:]] == branches[::2]
    assert [len(run) for _, run in proposal.runs] == [num_trunk, *branches[1::2]]


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
@example(b"\x92\x08\xcb\x3f\xf0\x00\x00\x00\x00\x00\x00")
@example(b"\x94\x05\x01\x01\xc4\x05\x02\x01\x00\x00\x00")
@example(b"")
def test_bytes_are_refused_or_say_what_their_frame_says(body: bytes) -> None:
    decoded(body)


@given(any_frame(), st.data())
def test_mutated_frames_are_refused_or_are_another_frame(frame: Frame, data: st.DataObject) -> None:
    body = bytearray(encode(frame)[2:])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at : at + data.draw(st.integers(0, 1))] = data.draw(st.binary(max_size=2))
        body = body or bytearray(b"\0")
    decoded(bytes(body))


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**64 - 1) | st.floats() | st.text(max_size=3) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=1), inner, max_size=2),
    max_leaves=4,
)


@given(any_frame(), st.data())
def test_a_frame_with_other_values_is_refused_or_is_another_frame(frame: Frame, data: st.DataObject) -> None:
    body = wire_values(frame)
    for _ in range(data.draw(st.integers(1, 2))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(values)
    decoded(msgpack.packb(body))


UNSIGNED = [(0xCC, 1, 2**8), (0xCD, 2, 2**16), (0xCE, 4, 2**32), (0xCF, 8, 2**64)]
SIGNED = [(0xD0, 1, 2**7), (0xD1, 2, 2**15), (0xD2, 4, 2**31), (0xD3, 8, 2**63)]
FORMS: dict[type, list[tuple[int, int, int]]] = {
    int: [*UNSIGNED, *SIGNED],
    str: [(0xD9, 1, 2**8), (0xDA, 2, 2**16), (0xDB, 4, 2**32)],
    bytes: [(0xC4, 1, 2**8), (0xC5, 2, 2**16), (0xC6, 4, 2**32)],
    tuple: [(0xDC, 2, 2**16)],
}
"""msgpack's longer forms of each type: the code, the width of the number or length in bytes, and its upper bound."""


@st.composite
def wide(draw: st.DrawFn, value: Any) -> bytes:
    """A value in one of msgpack's longer forms for it."""
    content = value.encode() if type(value) is str else value
    number = content if type(value) is int else len(content)
    code, num_bytes, _ = draw(st.sampled_from([form for form in FORMS[type(value)] if number < form[2]]))
    header = bytes([code]) + number.to_bytes(num_bytes, "big")
    if type(value) is tuple:
        return header + b"".join(draw(wide(item)) for item in value)
    return header + (b"" if type(value) is int else content)


@given(any_frame(), st.data())
def test_a_receiver_takes_numbers_and_lengths_of_any_width(frame: Frame, data: st.DataObject) -> None:
    """Packers in other languages choose other widths."""
    values = wire_values(frame)
    parts = [msgpack.packb(value) if type(value) is bool else data.draw(wide(value)) for value in values]
    assert decoded(bytes([0x90 + len(values)]) + b"".join(parts)) == frame
    assert decoded(b"\xdc" + len(values).to_bytes(2, "big") + b"".join(parts)) == frame
    refused(lambda: decode(b"\xdd" + len(values).to_bytes(4, "big") + b"".join(parts)))


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
        b"\x94\x05\x01\x02\xc6\xff\xff\xff\xff" + b"\1" * 8000,
        b"\x94\x05\x01\x02\xc5\x10\x02\x01" + b"\1" * 4097,
        b"\x94\x05\x01\x02\xc5\x10\x01\x01" + b"\1" * 4096,
        b"\x95\x07\x01\x02\xc4\x00\xdc\xff\xff" + b"\1" * 8000,
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
    for bad in [*OUT_OF_BOUNDS[field.type], *OUT_OF_BOUNDS.get(field.name, [])]:
        if field.name == "tokens" and bad == (True,):
            continue  # encoded as 1
        with pytest.raises((ValueError, TypeError)):
            encode(dataclasses.replace(good, **{field.name: bad}))  # type: ignore[arg-type]
        values = [cls.CODE, *(bad if item is field else getattr(good, item.name) for item in dataclasses.fields(cls))]
        refused(lambda values=values: decode(msgpack.packb(values)))  # type: ignore[misc]


def test_text_that_is_no_unicode_is_refused_by_both_sides() -> None:
    with pytest.raises(ValueError, match="cannot be sent"):
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
