import re
from hashlib import sha256
from pathlib import Path
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from vllm_specedge.wire.fingerprint import vocabulary_fingerprint, vocabulary_lines

DOCUMENT = (Path(__file__).parent.parent / "docs" / "protocol.md").read_text()
VOCABULARY = {"<s>": 0, "Ġthe": 1, "é": 2, "\t": 3, "extra": 3}


def test_the_digest_is_the_one_that_other_implementations_must_get() -> None:
    assert vocabulary_fingerprint(VOCABULARY) == "ef7f93cb73c04d3345df8d431a7b96779bc6cf4f426fccdf7c475ff1fca9390e"


def test_the_digest_is_over_what_the_protocol_document_says() -> None:
    text = "0\t<s>\n1\tĠthe\n2\té\n3\t\t\n3\textra\n"
    assert vocabulary_fingerprint(VOCABULARY) == sha256(text.encode()).hexdigest()


vocabularies = st.dictionaries(st.text(max_size=4), st.integers(0, 20), max_size=6)


@given(vocabularies, st.randoms(use_true_random=False))
def test_the_order_of_entries_does_not_matter(vocabulary: dict[str, int], random: Random) -> None:
    entries = list(vocabulary.items())
    random.shuffle(entries)
    assert vocabulary_fingerprint(dict(entries)) == vocabulary_fingerprint(vocabulary)


@given(vocabularies, st.text(max_size=4), st.integers(0, 20))
def test_any_change_changes_it(vocabulary: dict[str, int], token: str, id_: int) -> None:
    changed = {**vocabulary, token: id_}
    assert (vocabulary_fingerprint(changed) == vocabulary_fingerprint(vocabulary)) == (changed == vocabulary)


def test_fillers_do_not_count_and_what_only_looks_like_one_does() -> None:
    with_fillers = {**VOCABULARY, "[PAD4]": 4, "[PAD10]": 10}
    assert vocabulary_fingerprint(with_fillers) == vocabulary_fingerprint(VOCABULARY)
    for token, id_ in {"[PAD4]": 5, "[PAD04]": 4, "[PAD]": 4, "[pad4]": 4, "[PAD4] ": 4}.items():
        assert vocabulary_fingerprint({**VOCABULARY, token: id_}) != vocabulary_fingerprint(VOCABULARY)


def test_the_document_s_examples_are_what_comes_out() -> None:
    rows = re.findall(r"^\| (`.+: \d+) \| `([0-9a-f]+)` \| `([0-9a-f]{64})` \|$", DOCUMENT, re.MULTILINE)
    assert len(rows) == 3
    for entries, text, fingerprint in rows:
        vocabulary = {token: int(id_) for token, id_ in re.findall(r"`(.+?)`(?: \(U\+\w+\))?: (\d+)", entries)}
        assert b"".join(line + b"\n" for line in vocabulary_lines(vocabulary)).hex() == text
        assert sha256(bytes.fromhex(text)).hexdigest() == fingerprint == vocabulary_fingerprint(vocabulary)


def test_a_token_that_is_no_unicode_has_a_place_too() -> None:
    assert vocabulary_fingerprint({"\ud800": 0}) != vocabulary_fingerprint({"\ud801": 0})
