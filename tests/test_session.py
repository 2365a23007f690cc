import re
from ast import literal_eval
from contextlib import suppress
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import FRAME_TYPES, ConnectionPair, any_frame, example_of, refused
from vllm_specedge.engine.proposal_tree import ProposalTree
from vllm_specedge.errors import ByeCode, LocalProtocolError, RemoteProtocolError
from vllm_specedge.wire.codec import Frame, FrameReader, encode
from vllm_specedge.wire.frames import Bye, Close, Commit, Greet, Hello, Open, Ping, Pong, Propose, Welcome
from vllm_specedge.wire.session import TRANSITIONS, Role, Session, State

TO_LIVE: list[tuple[Role, type[Frame]]] = [(Role.GATEWAY, Greet), (Role.EDGE, Hello), (Role.GATEWAY, Welcome)]
PATHS: dict[State, list[tuple[Role, type[Frame]]]] = {
    State.START: TO_LIVE[:0],
    State.GREETED: TO_LIVE[:1],
    State.PRESENTED: TO_LIVE[:2],
    State.LIVE: TO_LIVE,
    State.CLOSED: [(Role.EDGE, Bye)],
}

DOCUMENT = (Path(__file__).parent.parent / "docs" / "protocol.md").read_text()
_SENDERS = {"E": Role.EDGE, "G": Role.GATEWAY}
_EXAMPLE = re.compile(r"^    ([EG])  (\w+)\((.*?)\)(?:    .*)?\n {7}([0-9a-f ]+)$", re.MULTILINE)


def examples_in(text: str) -> list[tuple[Role, Frame, bytes]]:
    """Sender, frame and bytes of all examples in the protocol document like `E  Ping(1)`."""
    by_name = {cls.__name__: cls for cls in FRAME_TYPES}
    examples = []
    for sender, name, values, data in _EXAMPLE.findall(text):
        fields = (tuple(value) if isinstance(value, list) else value for value in literal_eval(f"({values},)"))
        examples.append((_SENDERS[sender], by_name[name](*fields), bytes.fromhex(data)))
    return examples


def pair_in(state: State) -> ConnectionPair:
    pair = ConnectionPair()
    for role, cls in PATHS[state]:
        pair.send(role, example_of(cls))
    assert pair.state is state
    return pair


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("sender", Role)
def test_every_frame_is_legal_by_the_table_or_refused_on_both_ends(sender: Role, state: State) -> None:
    for cls in FRAME_TYPES:
        frame = example_of(cls)
        pair = pair_in(state)
        after = TRANSITIONS[state].get((sender, cls))
        if after is not None:
            assert pair.send(sender, frame) is after
            continue
        with pytest.raises(LocalProtocolError):
            pair.ends[sender].send(frame)
        if state is State.CLOSED and sender is Role.GATEWAY:
            assert pair.ends[Role.EDGE].receive(encode(frame)) == []  # it has sent Bye; the peer may not know yet
            continue
        error = refused(lambda pair=pair, frame=frame: pair.ends[sender.peer].receive(encode(frame)))  # type: ignore[misc]
        assert error.code is ByeCode.PROTOCOL
        assert pair.state is state  # a refused frame changes nothing


def test_the_table_says_what_the_protocol_document_says() -> None:
    both = {Ping, Pong, Close, Bye}
    legal = {
        (State.START, Role.GATEWAY): {Greet, Bye},
        (State.START, Role.EDGE): {Bye},
        (State.GREETED, Role.GATEWAY): {Bye},
        (State.GREETED, Role.EDGE): {Hello, Bye},
        (State.PRESENTED, Role.GATEWAY): {Welcome, Bye},
        (State.PRESENTED, Role.EDGE): {Bye},
        (State.LIVE, Role.GATEWAY): {Open, Commit} | both,
        (State.LIVE, Role.EDGE): {Propose} | both,
        (State.CLOSED, Role.GATEWAY): set(),
        (State.CLOSED, Role.EDGE): set(),
    }
    for state, role in product(State, Role):
        assert {cls for sender, cls in TRANSITIONS[state] if sender is role} == legal[state, role]


def test_the_bytes_in_the_protocol_document_are_the_frames_that_it_says() -> None:
    examples = examples_in(DOCUMENT)
    assert len(examples) == len(re.findall(r"^    [EG]  \w", DOCUMENT, re.MULTILINE))
    assert {type(frame) for _, frame, _ in examples} >= {Commit, Propose}
    assert any(isinstance(frame, Propose) and frame.branches for _, frame, _ in examples)
    for _, frame, data in examples:
        assert encode(frame) == data
        assert FrameReader().feed(data) == [frame]


def test_the_connection_in_the_protocol_document_is_legal_and_drafts_what_it_says() -> None:
    pair, tree = ConnectionPair(), ProposalTree(0)
    committed: list[int] = []
    drafts = []
    for role, frame, _ in examples_in(DOCUMENT[DOCUMENT.index("\n## 14. Example") :]):
        pair.send(role, frame)
        if isinstance(frame, Commit):
            assert frame.base == len(committed)
            committed += frame.tokens
            tree.advance(frame.tokens)
        elif isinstance(frame, Propose) and frame.tokens:
            assert {done.discarded for done in tree.insert(frame.runs, committed)} == {0}
        else:
            continue
        drafts.append(tree.chain(5))
    assert pair.state is State.CLOSED
    assert drafts == [[], [100, 7, 100, 7], [9], [9, 20], [], []]


def test_only_bye_closes_and_bye_always_does() -> None:
    for table in TRANSITIONS.values():
        for (_, cls), after in table.items():
            assert (after is State.CLOSED) == (cls is Bye)


def test_every_state_is_reached() -> None:
    reached = {State.START} | {after for table in TRANSITIONS.values() for after in table.values()}
    assert reached == set(State)


@given(st.lists(st.tuples(st.sampled_from(Role), any_frame()), max_size=12), st.booleans())
def test_both_ends_agree_whatever_is_tried(tries: list[tuple[Role, Frame]], starts_live: bool) -> None:
    pair = pair_in(State.LIVE if starts_live else State.START)
    for role, frame in tries:
        before = pair.state
        try:
            after = pair.send(role, frame)
        except LocalProtocolError:
            assert (role, type(frame)) not in TRANSITIONS[before]
            after = before
        assert pair.state is after


@given(st.sampled_from(State), st.sampled_from(Role), st.binary(max_size=100))
def test_garbage_raises_nothing_but_a_remote_protocol_error(state: State, role: Role, data: bytes) -> None:
    with suppress(RemoteProtocolError):
        pair_in(state).ends[role].receive(data)


def test_frames_that_arrive_in_one_piece_are_judged_one_after_the_other() -> None:
    edge = Session(Role.EDGE)
    assert edge.receive(encode(Greet("k", 1))) == [Greet("k", 1)]
    edge.send(example_of(Hello))
    frames = [example_of(Welcome), Open(1, 1, 5, 5, ""), Commit(1, 0, (7,)), Bye(0, "")]
    assert edge.receive(b"".join(map(encode, frames))) == frames
    assert edge.state is State.CLOSED
    refused(lambda: edge.receive(encode(Ping(1))))


@given(st.binary(max_size=50))
def test_whoever_has_said_bye_hears_nothing_more(data: bytes) -> None:
    for role in Role:
        session = Session(role)
        session.send(Bye(0, ""))
        assert session.receive(data) == []
        assert session.state is State.CLOSED


def test_a_frame_that_cannot_be_encoded_changes_no_state() -> None:
    gateway = Session(Role.GATEWAY)
    with pytest.raises(ValueError, match="version"):
        gateway.send(Greet("k", -1))
    assert gateway.state is State.START


def test_a_session_says_who_and_where_it_is() -> None:
    assert repr(Session(Role.EDGE)) == "Session(edge, start)"
