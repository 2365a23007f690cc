"""A gateway's store of its engines' vocabularies, whatever they send."""

import pytest

from tests.helpers import refused
from vllm_specedge.gateway.vocabulary_store import MAX_VOCABULARIES, VocabularyStore
from vllm_specedge.wire.engine_frames import VocabularyPart, WantVocabulary
from vllm_specedge.wire.fingerprint import vocabulary_fingerprint
from vllm_specedge.wire.frames import MAX_DATA_BYTES
from vllm_specedge.wire.vocabulary import MAX_PACKED_BYTES, pack_vocabulary

VOCABULARY = {f"{id_ * 7919 % 20011:x}": id_ for id_ in range(20011)}
PACKED, FINGERPRINT = pack_vocabulary(VOCABULARY), vocabulary_fingerprint(VOCABULARY)


def part(want: WantVocabulary, packed: bytes = PACKED) -> VocabularyPart:
    """The answer of an engine's link."""
    return VocabularyPart(want.offset, packed[want.offset : want.offset + MAX_DATA_BYTES])


def bring(store: VocabularyStore, engine: bytes, fingerprint: str = FINGERPRINT, packed: bytes = PACKED) -> int:
    """Send everything that the store requests from this engine; returns the number of requests."""
    want, num_asked = store.ask(engine, fingerprint), 0
    while want is not None:
        num_asked += 1
        want = store.take(engine, fingerprint, part(want, packed))
    return num_asked


def test_it_is_asked_for_piece_by_piece_and_of_one_engine() -> None:
    assert len(PACKED) > 3 * MAX_DATA_BYTES
    store = VocabularyStore()
    first = store.ask(b"a", FINGERPRINT)
    assert first == WantVocabulary(0)
    assert store.ask(b"b", FINGERPRINT) is None
    assert store.take(b"b", FINGERPRINT, part(first)) is None, "nobody asked it"
    second = store.take(b"a", FINGERPRINT, part(first))
    assert second == WantVocabulary(MAX_DATA_BYTES)
    assert store.packed == {}
    assert store.take(b"a", FINGERPRINT, part(first)) is None, "it came before"
    assert store.ask(b"a", FINGERPRINT) == second, "what was lost is asked for again"
    assert bring(store, b"a") > 2
    assert store.packed == {FINGERPRINT: PACKED}
    assert store.ask(b"a", FINGERPRINT) is store.ask(b"b", FINGERPRINT) is None


def test_one_copy_stays_as_long_as_an_engine_has_it() -> None:
    store = VocabularyStore()
    bring(store, b"a")
    store.keep({b"a": FINGERPRINT, b"b": FINGERPRINT})
    store.keep({b"b": FINGERPRINT})
    assert store.packed == {FINGERPRINT: PACKED}
    store.keep({})
    assert store.packed == {}


@pytest.mark.parametrize("engines", [{}, {b"a": "another"}, {b"b": FINGERPRINT}])
def test_another_engine_brings_what_one_has_begun(engines: dict[bytes, str]) -> None:
    store = VocabularyStore()
    want = store.ask(b"a", FINGERPRINT)
    assert want is not None
    store.take(b"a", FINGERPRINT, part(want))
    store.keep(engines)
    assert store.ask(b"b", FINGERPRINT) == WantVocabulary(0)
    bring(store, b"b")
    assert store.packed == {FINGERPRINT: PACKED}


@pytest.mark.parametrize(
    "packed",
    [b"", PACKED[:-1], PACKED + b"x", b"no gzip", pack_vocabulary({"another": 1}), pack_vocabulary({})],
)
def test_an_engine_that_sends_what_is_not_its_own_is_asked_once(packed: bytes) -> None:
    store = VocabularyStore()
    refused(lambda: bring(store, b"a", packed=packed))
    assert store.ask(b"a", FINGERPRINT) is None
    bring(store, b"b")
    assert store.packed == {FINGERPRINT: PACKED}
    store.keep({})
    assert store.ask(b"a", FINGERPRINT) == WantVocabulary(0), "it came anew"


def test_whatever_engines_send_it_holds_no_more_than_it_may() -> None:
    store = VocabularyStore()
    gzip_header, stored_block = b"\x1f\x8b\x08" + bytes(7), b"\0\xfb\x0f\x04\xf0" + bytes(4091)

    def endless() -> None:
        want = store.ask(b"a", FINGERPRINT)
        while want is not None:
            data = stored_block if want.offset else gzip_header
            want = store.take(b"a", FINGERPRINT, VocabularyPart(want.offset, data))

    assert "has over" in str(refused(endless))
    for number in range(MAX_VOCABULARIES):
        assert store.ask(b"%d" % number, f"{number}") is not None
    assert store.ask(b"one more", "one more") is None
    held = sum(len(reader.packed) for _, reader in store._arriving.values())
    assert held + sum(map(len, store.packed.values())) <= MAX_VOCABULARIES * MAX_PACKED_BYTES


def test_an_engine_without_a_tokenizer_is_not_asked() -> None:
    assert VocabularyStore().ask(b"a", "") is None
