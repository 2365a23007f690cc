"""Why a draft was refused: a real gateway process serves its engines' vocabularies, real edges compare theirs."""

import asyncio
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2 as httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stack import wait_for

from edge_client import mismatch
from edge_client.client import EdgeClient
from edge_client.doctor import Asked, Check, diagnose
from edge_client.drafters import Candidate, DrafterOptions
from edge_client.drafters.gguf import gguf_vocabulary
from edge_client.drafters.ngram import NgramDrafter, NgramSequence
from edge_client.drafters.retokenized import Retokenization
from edge_client.drafters.translated import TranslatedDrafter, Translation
from edge_client.gateway_link import Gateway
from edge_client.mismatch import Mismatch
from tests.models.test_gguf_drafter import GGUF
from tests.processes.gateways import DEADLINE_S, Engine, Running, edge_in_thread, failing, running_gateway
from vllm_specedge.engine.gateway_link import EngineLink
from vllm_specedge.errors import UserError
from vllm_specedge.gateway.credentials import TokenFile
from vllm_specedge.gateway.pages import MAX_PART_BYTES
from vllm_specedge.wire.engine_frames import EngineHello
from vllm_specedge.wire.fingerprint import vocabulary_fingerprint, without_fillers
from vllm_specedge.wire.frames import PROTOCOL_VERSION
from vllm_specedge.wire.vocabulary import Difference, pack_vocabulary, unpack_vocabulary

OF_THE_DRAFT = gguf_vocabulary(GGUF)
NEARLY = {("A<br>\nnew" if token == "Ġthe" else token): id_ for token, id_ in OF_THE_DRAFT.items()} | {"[NEW]": 49152}
"""The draft's vocabulary, except for one token with another text, and one additional token."""
APART = {(token if id_ % 50 else f"A<br>\n{token}"): id_ for token, id_ in OF_THE_DRAFT.items()}
"""The draft's vocabulary with one of fifty tokens replaced."""
FAR = {f"{id_ * 7919 % 20011:x}": id_ for id_ in range(20011)}
PATH = "/edge/v1/vocabularies"


def url_of(gateway: Running, vocabulary: dict[str, int]) -> str:
    return f"{gateway.url}{PATH}/{vocabulary_fingerprint(vocabulary)}"


def get(url: str, token: str = "") -> httpx.Response:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return httpx.get(url, headers=headers, trust_env=False, timeout=DEADLINE_S)


@contextmanager
def engine(gateway: Running, model: str, vocabulary: dict[str, int], packed: bytes | None = None) -> Iterator[None]:
    """An engine's link; `packed`: what it sends in place of its vocabulary."""
    hello = EngineHello(PROTOCOL_VERSION, model, vocabulary_fingerprint(vocabulary), 50000)
    sent = pack_vocabulary(vocabulary) if packed is None else packed
    link = EngineLink(gateway.endpoint, hello, lambda: None, lambda: (), sent)
    link.start()
    try:
        yield
    finally:
        link.stop()


def until(condition: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(int(DEADLINE_S / 0.05)):
        if condition():
            return
        waiting.wait(0.05)
    raise AssertionError("waited too long")


def listed(gateway: Running) -> list[dict[str, object]]:
    return list(get(f"{gateway.url}{PATH}").json()["vocabularies"])


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A gateway with an engine whose vocabulary is mostly, but not entirely, the draft's."""
    with running_gateway(tmp_path_factory.mktemp("gateway")) as running, engine(running, "near", APART):
        until(lambda: len(listed(running)) == 1)
        yield running


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A gateway with an engine whose vocabulary has hardly any of the draft's tokens."""
    with running_gateway(tmp_path_factory.mktemp("far")) as running, engine(running, "far", FAR):
        until(lambda: len(listed(running)) == 1)
        yield running


def vocabulary_check(gateway: Running) -> Check:
    """Doctor's check of the draft's vocabulary."""
    options = DrafterOptions(str(GGUF), device="cpu", threads=1)
    found = diagnose(Asked(Gateway(gateway.url), options, "pool", "test", 0, 5, None))
    [check] = [check for check in found.checks if check.name == "vocabulary"]
    return check


def test_an_engines_vocabulary_is_there_for_edges(gateway: Running) -> None:
    fingerprint = vocabulary_fingerprint(APART)
    expected = pack_vocabulary(APART)
    assert listed(gateway) == [{"fingerprint": fingerprint, "bytes": len(expected), "models": ["near"]}]
    packed = b""
    while len(packed) < len(expected):
        answer = get(f"{url_of(gateway, APART)}?offset={len(packed)}")
        assert answer.headers["content-type"] == "application/vnd.specedge.vocabulary"
        packed += answer.content
    assert packed == expected
    assert unpack_vocabulary(packed, fingerprint) == APART
    assert get(url_of(gateway, FAR)).status_code == 404


def test_no_answer_has_more_than_a_window_of_it(gateway: Running) -> None:
    """A gateway would have to keep a copy of the unread rest for each reader."""
    packed = pack_vocabulary(APART)
    for offset in (0, 1, MAX_PART_BYTES, len(packed) - 5, len(packed), 1 << 70):
        assert get(f"{url_of(gateway, APART)}?offset={offset}").content == packed[offset : offset + MAX_PART_BYTES]
    assert len(packed) > 4 * MAX_PART_BYTES
    assert MAX_PART_BYTES < 65_535
    for wrong in ("-1", "x", ""):
        assert get(f"{url_of(gateway, APART)}?offset={wrong}").status_code == 422


def test_two_engines_of_a_family_have_one_and_one_of_another_its_own(tmp_path: Path) -> None:
    with running_gateway(tmp_path) as gateway:
        with engine(gateway, "b", FAR), engine(gateway, "a", FAR):
            until(lambda: [each["models"] for each in listed(gateway)] == [["a", "b"]])
            with engine(gateway, "near", APART):
                until(lambda: len(listed(gateway)) == 2)
                assert get(url_of(gateway, APART)).status_code == get(url_of(gateway, FAR)).status_code == 200
                # A draft is compared with the most similar one.
                assert "not that of near: 1,968 of" in vocabulary_check(gateway).text
        until(lambda: listed(gateway) == [])
        assert get(url_of(gateway, FAR)).status_code == 404


def test_it_is_for_those_who_may_connect(tmp_path: Path) -> None:
    tokens = TokenFile(tmp_path / "tokens.json")
    token, revoked = tokens.issue("edge", "private"), tokens.issue("revoked", "pool")
    tokens.revoke("revoked")
    with running_gateway(tmp_path, "--tokens-file", str(tokens.path)) as gateway, engine(gateway, "toy", FAR):
        until(lambda: get(url_of(gateway, FAR), token).status_code == 200)
        for wrong in ("", "se-wrong", revoked):
            for url in (url_of(gateway, FAR), url_of(gateway, APART), f"{gateway.url}{PATH}"):
                answer = get(url, wrong)
                assert answer.status_code == 401
                assert answer.json().keys() == {"detail"}
        page = get(f"{gateway.url}/metrics").text
    assert "specedge_gateway_unauthorized_total 0.0" not in page


@pytest.mark.parametrize("sent", [b"", b"no gzip", pack_vocabulary(FAR)[:-9], pack_vocabulary({"another": 0})])
def test_an_engine_that_sends_none_or_another_is_an_engine_all_the_same(tmp_path: Path, sent: bytes) -> None:
    with running_gateway(tmp_path) as gateway, engine(gateway, "toy", FAR, sent):
        wait_for(gateway.process, f"{gateway.url}/healthz", "engines", 1)
        until(lambda: "The vocabulary of 'toy' is not served to edges" in gateway.process.log.read_text())
        assert listed(gateway) == []
        said = failing("edge-client", "connect", gateway.url, "--draft", str(GGUF), "--device", "cpu")
        assert "The draft model's tokenizer is not that of toy" in said
        assert get(f"{gateway.url}/healthz").json()["engines"] == 1
        with engine(gateway, "toy", FAR):  # and another one brings it
            until(lambda: get(url_of(gateway, FAR)).status_code == 200)


SENTENCE = (
    r"The draft's vocabulary is not that of far: [\d,]+ of [\d,]+ tokens differ, such as '.+' \(.+\), '.+' \(.+\), "
    r"'.+' \(.+\): choose a draft of the same family, or draft with 'ngram'\."
)


@pytest.mark.parametrize("command", ["connect", "serve", "chat"])
def test_an_edge_of_another_vocabulary_is_told_what_differs(far: Running, command: str) -> None:
    words = ["edge-client", command, far.url, "--draft", str(GGUF), "--device", "cpu"]
    if command != "connect":
        words += ["--server", "http://127.0.0.1:1/v1"]
    if command == "serve":
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        words += ["--port", str(port)]
    assert re.fullmatch(f"edge-client: {SENTENCE}", failing(*words))


def test_doctor_says_it_too(far: Running) -> None:
    check = vocabulary_check(far)
    assert not check.is_good
    assert re.fullmatch(SENTENCE, check.text)


def test_doctor_says_that_a_draft_of_another_tokenizer_is_translated(gateway: Running) -> None:
    check = vocabulary_check(gateway)
    assert check.is_good
    assert check.text == (
        "The draft's vocabulary is not that of near: 1,968 of 50,136 tokens differ, such as "
        "'<|endoftext|>' (none there, id 0 here), 'A<br>?<|endoftext|>' (id 0 there, none here), 'A<br>?B' (id 50 "
        "there, none here): its tokens are translated, and fewer are accepted than with a draft of the same family."
    )


@dataclass
class Own(NgramDrafter):
    """A prompt-lookup draft that, like a model, knows only ids of its vocabulary."""

    vocabulary: dict[str, int]

    def __post_init__(self) -> None:
        self.fingerprint = vocabulary_fingerprint(self.vocabulary)

    def open(self) -> NgramSequence:
        return OwnSequence(set(self.vocabulary.values()))


class OwnSequence(NgramSequence):
    def __init__(self, ids: set[int]) -> None:
        super().__init__()
        self.ids = ids

    def append(self, tokens: Sequence[int], width: int) -> list[Candidate]:
        assert self.ids.issuperset(tokens)
        return super().append(tokens, width)


TARGET = {f"t{id_}": id_ for id_ in range(100)}
"""The vocabulary of the engine, which repeats the first ten tokens."""
WITHOUT_ONE = {token: id_ for token, id_ in TARGET.items() if token != "t9"}
MOVED = TARGET | {"t3": 5, "t5": 3, "t8": 120, "new": 8}
RENAMED = {("tnine" if token == "t9" else token): id_ for token, id_ in TARGET.items()}
WITH_MORE = TARGET | {f"more{id_}": id_ for id_ in range(100, 200)}


@pytest.mark.parametrize(
    ("own", "share", "said"),
    [
        (WITHOUT_ONE, 0.5, "1 of 100 tokens differs, namely 't9' (id 9 there, none here)"),
        (RENAMED, 0.5, "2 of 101 tokens differ, namely 't9' (id 9 there, none here), 'tnine' (none there, id 9 here)"),
        (MOVED, 0.9, "4 of 101 tokens differ, such as 't3' (id 3 there, 5 here), 't5' (id 5 there, 3 here)"),
        (WITH_MORE, 0.9, "100 of 200 tokens differ, such as 'more100' (none there, id 100 here)"),
    ],
    ids=["one token less", "one is called otherwise", "some have other ids", "many more"],
)
def test_a_draft_that_lacks_hardly_anything_drafts_and_says_what_differs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, own: dict[str, int], share: float, said: str
) -> None:
    with running_gateway(tmp_path) as gateway:
        engine = Engine(gateway.endpoint, vocabulary=TARGET)
        try:
            until(lambda: len(listed(gateway)) == 1)
            client = EdgeClient(Gateway(gateway.url), Own(own), "edge", own_vocabulary=lambda: own)
            with edge_in_thread(client):
                # Each answer of the engine has one token more than it accepted from the draft.
                assert engine.generate("one", 100) >= share * 100 * 0.5
            assert client.speculation.stats.num_requests == 1
        finally:
            engine.link.stop()
    assert said in caplog.text
    assert "it drafts anyway" in caplog.text
    assert "Traceback" not in caplog.text


def test_an_edge_that_fitted_one_server_fits_the_next(tmp_path: Path) -> None:
    """Gateway and engine are replaced by others: with the draft's own vocabulary, and with one that is nearly it."""
    client = EdgeClient(Gateway("http://127.0.0.1:1"), Own(MOVED), "edge", own_vocabulary=lambda: MOVED)
    with ExitStack() as edges:
        for vocabulary in (TARGET, MOVED, RENAMED):
            directory = tmp_path / vocabulary_fingerprint(vocabulary)[:8]
            directory.mkdir()
            with running_gateway(directory) as gateway:
                engine = Engine(gateway.endpoint, vocabulary=vocabulary)
                try:
                    until(lambda at=gateway: len(listed(at)) == 1)  # type: ignore[misc]
                    client.gateway = Gateway(gateway.url)
                    if vocabulary is TARGET:
                        edges.enter_context(edge_in_thread(client))
                    assert engine.generate("one", 20) > 0
                finally:
                    engine.link.stop()


OTHER_TOKENIZER = {token: id_ for id_, token in enumerate([*"9876543210t", *(f"t{number}" for number in range(10))])}
"""It has the ten tokens that the engine repeats, under other ids, and the letters of the others."""


def test_a_draft_of_another_tokenizer_drafts_and_says_that_it_is_translated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = OTHER_TOKENIZER
    with running_gateway(tmp_path) as gateway:
        engine = Engine(gateway.endpoint, vocabulary=TARGET)
        try:
            until(lambda: len(listed(gateway)) == 1)
            client = EdgeClient(Gateway(gateway.url), Own(own), "edge", own_vocabulary=lambda: own)
            with edge_in_thread(client):
                assert engine.generate("one", 100) >= 40, "as many steps as a draft of its own vocabulary saves"
            assert "retokenized" in client.drafter.description
        finally:
            engine.link.stop()
    assert "its tokens are translated, and fewer are accepted" in caplog.text


tokens = st.text(max_size=3) | st.sampled_from(["Ġ", "▁▁", "  ", "[PAD7]"])


@given(*[st.lists(tokens, min_size=1, max_size=12, unique=True).flatmap(st.permutations)] * 2)
def test_what_both_have_is_translated_there_and_back(target_tokens: list[str], draft_tokens: list[str]) -> None:
    target, draft = ({token: id_ for id_, token in enumerate(each)} for each in (target_tokens, draft_tokens))
    packed, fingerprint = pack_vocabulary(target), vocabulary_fingerprint(target)
    translation = mismatch._compared("toy", fingerprint, packed, without_fillers(draft)).translation
    if isinstance(translation, Retokenization):
        assert {piece for pieces in translation.to_draft.values() for piece in pieces} <= {*draft.values(), 0}
        assert set(translation.to_target.values()) <= set(target.values())
        return
    to_draft, to_target = translation
    for token in without_fillers(target).keys() & without_fillers(draft).keys():
        assert to_draft.get(target[token], target[token]) == draft[token]
        assert to_target.get(draft[token], draft[token]) == target[token]
    known = set(without_fillers(draft).values()) | {0}
    assert {to_draft.get(id_, id_) for id_ in without_fillers(target).values()} <= known


def test_branches_are_translated_too() -> None:
    asked: list[object] = []

    class Forked(NgramSequence):
        def branch(self, tokens: Sequence[int], parents: Sequence[int], width: int) -> list[list[Candidate]]:
            asked.append((tokens, parents, width))
            return [[Candidate(7, 0.5), Candidate(8, 0.3)], [Candidate(1, 0.2)]]

    class Forking(NgramDrafter):
        def open(self) -> NgramSequence:
            return Forked()

    drafter = TranslatedDrafter(Forking(), Translation({1: 7, 3: 4}, {7: 1, 8: None}), "f")
    assert drafter.fingerprint == "f"
    found = drafter.open().branch([1, 2, 3], [0, 0, 1], 2)
    assert asked == [([7, 2, 4], [0, 0, 1], 2)]
    assert found == [[Candidate(1, 0.5)], [Candidate(1, 0.2)]]


def test_spaces_that_are_written_otherwise_are_no_difference(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in GGUF files of Gemma, which have runs of spaces in place of runs of `▁`."""
    target = TARGET | {"▁" * number: 100 + number for number in range(2, 32)}
    own = TARGET | {" " * number: 100 + number for number in range(2, 32)}
    with running_gateway(tmp_path) as gateway, engine(gateway, "gemma", target):
        until(lambda: len(listed(gateway)) == 1)
        client = EdgeClient(Gateway(gateway.url), Own(own), "edge", own_vocabulary=lambda: own)
        with edge_in_thread(client):
            assert client.model == "gemma"
    assert "differ" not in caplog.text


def test_doctor_says_that_a_draft_fits_though_something_differs(tmp_path: Path) -> None:
    with running_gateway(tmp_path) as gateway, engine(gateway, "near", NEARLY):
        until(lambda: len(listed(gateway)) == 1)
        options = DrafterOptions(str(GGUF), device="cpu", threads=1)
        found = diagnose(Asked(Gateway(gateway.url), options, "pool", "test", 0, 5, None))
    [check] = [check for check in found.checks if check.name == "vocabulary"]
    assert check.is_good
    assert check.text == (
        "The draft's vocabulary is not quite that of near: 3 of 49,154 tokens differ, namely "
        "'A<br>?new' (id 260 there, none here), 'Ġthe' (none there, id 260 here), '[NEW]' (id 49152 there, none here): "
        "it drafts anyway, and is wrong where the target generates a token that it lacks."
    )


REFUSED_WITHIN_S = 120.0
"""An edge that is not refused stays connected forever."""


class Other(NgramDrafter):
    """A draft whose vocabulary no engine has."""

    fingerprint = "0" * 64


def refusal(url: str, own: Callable[[], dict[str, int]]) -> str:
    client = EdgeClient(Gateway(url), Other(), "edge", own_vocabulary=own)
    with pytest.raises(UserError) as caught:
        asyncio.run(asyncio.wait_for(client.run(0.0), REFUSED_WITHIN_S))
    return str(caught.value)


def test_what_cannot_be_explained_is_refused_as_before(gateway: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    before = "The draft model's tokenizer is not that of near: choose a draft of the same family."

    def fail() -> dict[str, int]:
        raise UserError("it is gone")

    assert refusal(gateway.url, fail) == before
    assert refusal(gateway.url, dict) == before, "it is not known"
    monkeypatch.setattr(mismatch, "PATH", "/edge/v1/none")  # a gateway of another release
    assert refusal(gateway.url, lambda: FAR) == before
    monkeypatch.setattr(mismatch, "PATH", "/healthz")  # an answer of another kind
    assert refusal(gateway.url, lambda: FAR) == before
    monkeypatch.undo()
    monkeypatch.setattr(mismatch, "MAX_PACKED_BYTES", 1000)  # it is larger than allowed
    assert refusal(gateway.url, lambda: FAR) == before


def test_the_sentence() -> None:
    found = [
        Difference("foo", 17, 20),
        Difference("bar", 18, None),
        Difference("x" * 30, None, 3),
        *[Difference("y", 1, 2)] * 1000,
        *[Difference("z", 1, None)] * 1515,
    ]
    assert str(Mismatch("a\x1b[31mmodel", found[:-2], 151665)) == (
        "The draft's vocabulary is not quite that of a?[31mmodel: 2,516 of 151,665 tokens differ, such as "
        "'foo' (id 17 there, 20 here), 'bar' (id 18 there, none here), 'xxxxxxxxxxxxxxxxxxxxxxxx...' (none there, id 3 "
        "here): it drafts anyway, and is wrong where the target generates a token that it lacks."
    )
    found += [Difference("more than one of a hundred", 1, None)]
    assert str(Mismatch("a\x1b[31mmodel", found, 151665)) == (
        "The draft's vocabulary is not that of a?[31mmodel: 2,519 of 151,665 tokens differ, such as "
        "'foo' (id 17 there, 20 here), 'bar' (id 18 there, none here), 'xxxxxxxxxxxxxxxxxxxxxxxx...' (none there, id 3 "
        "here): choose a draft of the same family, or draft with 'ngram'."
    )


@pytest.mark.parametrize(
    "listing",
    [
        b"",
        b"[]",
        b"{}",
        b"[" * 20000,
        b'{"vocabularies": 1}',
        b'{"vocabularies": [1]}',
        b'{"vocabularies": [{}]}',
        b'{"vocabularies": [{"fingerprint": "../up", "models": [], "bytes": 1}]}',
        b'{"vocabularies": [{"fingerprint": "%b", "models": 1, "bytes": 1}]}' % (b"0" * 64),
        b'{"vocabularies": [{"fingerprint": "%b", "models": [], "bytes": 5000000}]}' % (b"0" * 64),
        b'{"vocabularies": [{"fingerprint": "%b", "models": [], "bytes": 1e3}]}' % (b"0" * 64),
    ],
)
def test_a_list_that_is_none_is_refused(listing: bytes) -> None:
    with pytest.raises(mismatch.RemoteProtocolError):
        mismatch._listed(listing)
