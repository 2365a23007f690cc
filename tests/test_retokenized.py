"""Drafts with another tokenizer: contexts are byte for byte the target's, and candidates are the target's tokens."""

from collections.abc import Sequence
from math import isnan
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.drafters import Candidate
from edge_client.drafters.ngram import NgramDrafter
from edge_client.drafters.retokenized import MORE_CANDIDATES, RetokenizedDrafter, retokenization
from tests.helpers import ListSequence

DRAFT = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "Ġ": 5, "Ġa": 6, "<|end|>": 7}
TARGET = {"c": 0, "b": 1, "a": 2, "bc": 3, "ca": 4, "abca": 5, "Ġ": 6, "Ġabc": 7, "<|end|>": 8, "é": 9}
OF_DRAFT, OF_TARGET = ({id_: token for token, id_ in each.items()} for each in (DRAFT, TARGET))
TOKENS = retokenization(TARGET, DRAFT)
WIDTH = 3


def guess(past: Sequence[int]) -> list[Candidate]:
    """Any order of the draft's tokens, the same for the same past."""
    chance = Random(repr(list(past)))
    shares = sorted((chance.random() for _ in DRAFT), reverse=True)
    order = chance.sample(sorted(OF_DRAFT), len(OF_DRAFT))
    return [Candidate(token, share / sum(shares)) for token, share in zip(order, shares, strict=True)]


def of_target(past: Sequence[int]) -> list[Candidate]:
    """The target's tokens that the draft's predictions after its own tokens may begin with."""
    shares: dict[int, float] = {}
    for token, share in guess(past)[: WIDTH + MORE_CANDIDATES]:
        spelled = OF_DRAFT[token]
        for end in range(len(spelled), 0, -1):
            if spelled[:end] in TARGET:
                first = TARGET[spelled[:end]]
                shares[first] = shares.get(first, 0.0) + share
                break
    best = sorted(shares, key=lambda token: -shares[token])
    return [Candidate(token, shares[token]) for token in best[:WIDTH]]


def test_tokens_become_the_longest_pieces_of_the_other_side() -> None:
    pieces = {OF_TARGET[id_]: [OF_DRAFT[piece] for piece in own] for id_, own in TOKENS.to_draft.items()}
    assert pieces == {
        "c": ["c"],
        "b": ["b"],
        "a": ["a"],
        "bc": ["b", "c"],
        "ca": ["c", "a"],
        "abca": ["abc", "a"],
        "Ġ": ["Ġ"],
        "Ġabc": ["Ġa", "b", "c"],
        "<|end|>": ["<|end|>"],
        "é": ["Ġ"],
    }, "what has no bytes there is read as a space"
    firsts = {OF_DRAFT[id_]: OF_TARGET[first] for id_, first in TOKENS.to_target.items()}
    assert firsts == {token: token for token in ("a", "b", "c", "Ġ", "<|end|>")} | {"ab": "a", "abc": "a", "Ġa": "Ġ"}
    assert TOKENS.coverage == pytest.approx(5 / 10)


def test_a_token_whose_bytes_the_target_has_not_is_not_proposed() -> None:
    assert 0 not in retokenization({"x": 5}, {"é": 0, "x": 1}).to_target


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"Ġhello": 3, "Ċ": 4}, {"▁hello": 7, "<0x0A>": 8}),
        ({"ĠÃ¼ber": 3, "â": 4, "Ġ": 5}, {"▁über": 7, "<0xE2>": 8, "▁": 9}),
    ],
)
def test_bytes_are_bytes_however_a_vocabulary_spells_them(one: dict[str, int], other: dict[str, int]) -> None:
    for target, draft in ((one, other), (other, one)):
        tokens = retokenization(target, draft)
        assert tokens.coverage == 1.0
        assert tokens.to_draft == {a: (b,) for a, b in zip(target.values(), draft.values(), strict=True)}
        assert tokens.to_target == dict(zip(draft.values(), target.values(), strict=True))


class Both:
    """A retokenized context, and the target's tokens on the way to each entry."""

    def __init__(self) -> None:
        self.inner = ListSequence(guess)

        class Drafter(NgramDrafter):
            max_width = 8

            def open(inner_self) -> ListSequence:  # type: ignore[override]
                return self.inner

        self.sequence = RetokenizedDrafter(Drafter(), TOKENS, "f").open()
        self.parents: list[int] = []
        self.tokens: list[int] = []

    def past(self, entry: int) -> list[int]:
        tokens = []
        while entry >= 0:
            tokens.append(self.tokens[entry])
            entry = self.parents[entry]
        return tokens[::-1]

    def of_draft(self, entry: int) -> list[int]:
        return [piece for token in self.past(entry) for piece in TOKENS.to_draft[token]]

    def append(self, tokens: Sequence[int]) -> None:
        self.parents += range(len(self.tokens) - 1, len(self.tokens) - 1 + len(tokens))
        self.tokens += tokens
        said = self.sequence.append(tokens, WIDTH)
        assert said == of_target(self.of_draft(len(self.tokens) - 1))

    def branch(self, tokens: Sequence[int], parents: Sequence[int]) -> None:
        start = len(self.tokens)
        self.parents += parents
        self.tokens += tokens
        for place, said in enumerate(self.sequence.branch(tokens, parents, WIDTH)):
            assert said == of_target(self.of_draft(start + place))

    def keep(self, length: int, moved: Sequence[int]) -> None:
        kept = [*range(length), *moved]
        number = {-1: -1} | {old: new for new, old in enumerate(kept)}
        self.parents, self.tokens = [number[self.parents[old]] for old in kept], [self.tokens[old] for old in kept]
        self.sequence.keep(length, moved)
        assert len(self.inner.entries) == sum(len(TOKENS.to_draft[token]) for token in self.tokens)

    @property
    def is_chain(self) -> bool:
        return self.parents == list(range(-1, len(self.parents) - 1))


@given(st.integers(0, 10**6))
def test_contexts_are_byte_for_byte_the_target_s(seed: int) -> None:
    chance, both = Random(seed), Both()
    some = lambda number: [chance.choice(sorted(TOKENS.to_draft)) for _ in range(number)]  # noqa: E731
    both.append(some(chance.randint(1, 6)))
    for _ in range(12):
        size = len(both.tokens)
        act = chance.choice(["append", "branch", "branch", "keep"])
        if act == "append" and both.is_chain:
            both.append(some(chance.randint(1, 3)))
        elif act == "branch":
            number = chance.randint(1, 4)
            both.branch(some(number), [chance.randrange(size) for _ in range(number)])
        else:
            length = chance.randint(1, size)
            moved = list[int]()
            for entry in range(length, size):
                if (both.parents[entry] < length or both.parents[entry] in moved) and chance.random() < 0.5:
                    moved.append(entry)
            if all(both.parents[entry] < entry for entry in range(length)):
                both.keep(length, moved)


@pytest.mark.parametrize(("length", "moved"), [(4, ()), (1, (0,)), (1, (9,)), (-1, ())])
def test_what_is_not_there_cannot_be_kept(length: int, moved: Sequence[int]) -> None:
    both = Both()
    both.append([1, 5, 7])
    with pytest.raises(ValueError, match="to be kept of 3"):
        both.sequence.keep(length, moved)


def test_what_is_no_probability_is_passed_on_for_the_pass_to_refuse() -> None:
    inner = ListSequence(lambda past: [Candidate(DRAFT["a"], float("nan"))])

    class Drafter(NgramDrafter):
        def open(self) -> ListSequence:  # type: ignore[override]
            return inner

    [said] = RetokenizedDrafter(Drafter(), TOKENS, "f").open().append([1], WIDTH)
    assert isnan(said.probability)
