"""A draft of another tokenizer: the target's tokens become the draft's by their bytes, and the draft's theirs.

A token that both have is one here and there; of the rest, the longest pieces that the other side has. Nothing is
decoded or tokenized anew as a text grows, so a context is byte for byte the target's and costs as little as one of the
same vocabulary (token-level intersection: Timor et al. 2025, "Accelerating LLM inference with lossless speculative
decoding algorithms for heterogeneous vocabularies"). What a draft's tokenizer would have split otherwise, the draft
sees split as it rarely was when it was trained: that costs some acceptance.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from edge_client.drafters import Candidate, Drafter, DraftSequence, Part, SharingDrafter

MORE_CANDIDATES = 8
"""Of the draft's: some are no tokens of the target, and some become the same."""
CONTEXT_PART = 0.75
"""Of the draft's context that is counted on: its tokens may be more than the target's."""


@dataclass(frozen=True, slots=True)
class Retokenization:
    """Which tokens of one vocabulary stand for a token of the other."""

    to_draft: Mapping[int, tuple[int, ...]]
    """One at least."""
    to_target: Mapping[int, int]
    """The first, of those that have the bytes of a draft's token; none where the target has none."""
    coverage: float
    """The part of the target's tokens that are one token of the draft's."""


class RetokenizedDrafter:
    """Drafts as `drafter` does, for a target of another vocabulary, which has this fingerprint."""

    def __init__(self, drafter: Drafter, tokens: Retokenization, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.max_context_tokens = int(drafter.max_context_tokens * CONTEXT_PART)
        self.max_width = drafter.max_width
        self.description = f"{drafter.description}, retokenized"
        self._drafter = drafter
        self._tokens = tokens

    def open(self) -> DraftSequence:
        return _RetokenizedSequence(self._drafter.open(), self._tokens)


class SharingRetokenizedDrafter(RetokenizedDrafter):
    """The same of a draft whose contexts share passes."""

    def __init__(self, drafter: SharingDrafter, tokens: Retokenization, fingerprint: str) -> None:
        super().__init__(drafter, tokens, fingerprint)
        self.max_shared_rows = drafter.max_shared_rows
        self._together = drafter.branch_together

    def branch_together(self, parts: Sequence[Part]) -> list[list[list[Candidate]]]:
        growths = [_Growth(part.sequence, part) for part in parts if isinstance(part.sequence, _RetokenizedSequence)]
        for growth in growths:
            if growth.num_rows > self.max_shared_rows // len(parts):  # a chain of tokens that are many pieces each
                growth.append()
        while left := [growth for growth in growths if not growth.is_done]:
            said = self._together([growth.next_part() for growth in left])
            for growth, rows in zip(left, said, strict=True):
                growth.take(rows)
        return [growth.candidates for growth in growths]


def retokenized(drafter: Drafter, tokens: Retokenization, fingerprint: str) -> RetokenizedDrafter:
    """One that shares passes if `drafter` does."""
    if isinstance(drafter, SharingDrafter):
        return SharingRetokenizedDrafter(drafter, tokens, fingerprint)
    return RetokenizedDrafter(drafter, tokens, fingerprint)


class _RetokenizedSequence:
    def __init__(self, sequence: DraftSequence, tokens: Retokenization) -> None:
        self.of_draft = sequence
        self._tokens = tokens
        self._entries: list[list[int]] = []
        """The draft's entries of each entry."""
        self._num_of_draft = 0
        self._num_in_turn = 0
        """So many of the first entries have the draft's first ones, in turn: nearly all of a context."""

    def keep(self, length: int, moved: Sequence[int] = ()) -> None:
        if not 0 <= length <= len(self._entries) or any(not length <= each < len(self._entries) for each in moved):
            raise ValueError(f"{length} entries and {list(moved)} to be kept of {len(self._entries)}")
        self._num_in_turn = min(self._num_in_turn, length)
        first = self._entries[self._num_in_turn - 1][-1] + 1 if self._num_in_turn else 0
        kept = [*self._entries[self._num_in_turn : length], *(self._entries[entry] for entry in moved)]
        of_draft = sorted(entry for entries in kept for entry in entries)
        num_first = next(
            (place for place, entry in enumerate(of_draft, first) if place != entry), first + len(of_draft)
        )
        self.of_draft.keep(num_first, of_draft[num_first - first :])
        number = {old: new for new, old in enumerate(of_draft, first)}
        self._num_of_draft = first + len(of_draft)
        del self._entries[self._num_in_turn :]
        self.add([[number[entry] for entry in entries] for entries in kept])

    def append(self, tokens: Sequence[int], width: int) -> list[Candidate]:
        growth = _Growth(self, Part(self, tokens, (), width))
        growth.append()
        return growth.candidates[0]

    def branch(self, tokens: Sequence[int], parents: Sequence[int], width: int) -> list[list[Candidate]]:
        growth = _Growth(self, Part(self, tokens, parents, width))
        while not growth.is_done:
            _, pieces, behind, wide = growth.next_part()
            growth.take(self.of_draft.branch(pieces, behind, wide))
        return growth.candidates

    def last_of(self, entry: int) -> int:
        """The draft's entry that what follows an entry is behind."""
        return self._entries[entry][-1]

    def add(self, entries: Sequence[Sequence[int]]) -> None:
        """Entries more, each with the draft's."""
        for of_draft in entries:
            follows = self._entries[-1][-1] + 1 if self._entries else 0
            is_in_turn = self._num_in_turn == len(self._entries) and of_draft[0] == follows
            self._num_in_turn += is_in_turn and of_draft[-1] - of_draft[0] == len(of_draft) - 1
            self._entries.append(list(of_draft))

    def pieces(self, token: int) -> tuple[int, ...]:
        return self._tokens.to_draft.get(token, (0,))

    def new(self, number: int) -> list[int]:
        """The next entries of the draft's."""
        start = self._num_of_draft
        self._num_of_draft += number
        return list(range(start, start + number))

    def of_target(self, candidates: Sequence[Candidate], width: int) -> list[Candidate]:
        """What the target could say first of what the draft would say, as probable as all that begins with it."""
        probability: dict[int, float] = defaultdict(float)
        for each in candidates:
            token = self._tokens.to_target.get(each.token)
            if token is not None:
                probability[token] += each.probability
        best = sorted(probability, key=lambda token: -probability[token])
        return [Candidate(token, probability[token]) for token in best[:width]]


class _Growth:
    """New entries of a context: of a tree a pass for all first pieces, one for all second ones, and so on, for most
    tokens are one piece; of a chain one pass."""

    def __init__(self, sequence: _RetokenizedSequence, part: Part) -> None:
        self.candidates: list[list[Candidate]] = []
        """Of the target's tokens, once it is done."""
        self._sequence, self._part = sequence, part
        self._left = dict(enumerate(map(sequence.pieces, part.tokens)))
        """Pieces of each token that are still to be run."""
        self._behind = [sequence.last_of(parent) for parent in part.parents]
        self._grown: list[list[int]] = [[] for _ in part.tokens]
        self._said: list[list[Candidate]] = [[] for _ in part.tokens]

    @property
    def is_done(self) -> bool:
        return not self._left

    @property
    def num_rows(self) -> int:
        """Of a chain, which is one pass; 0 of a tree, whose passes have no more rows than tokens."""
        return 0 if self._part.parents else sum(map(len, self._left.values()))

    def append(self) -> None:
        """Run a chain in a pass of its own."""
        sequence, pieces, _, width = self.next_part()
        self.take([sequence.append(pieces, width)])

    def next_part(self) -> Part:
        """What the draft is to run next."""
        part = self._part._replace(sequence=self._sequence.of_draft, width=self._part.width + MORE_CANDIDATES)
        if not self._part.parents:
            return part._replace(tokens=[piece for pieces in self._left.values() for piece in pieces])
        firsts = [pieces[0] for pieces in self._left.values()]
        return part._replace(tokens=firsts, parents=[self._behind[place] for place in self._left])

    def take(self, said: Sequence[list[Candidate]]) -> None:
        """What the draft said to that."""
        if not self._part.parents:
            self._grown = [self._sequence.new(len(pieces)) for pieces in self._left.values()]
            self._said, self._left = [*said], {}
        else:
            entries = self._sequence.new(len(self._left))
            for place, entry, candidates in zip(self._left, entries, said, strict=True):
                self._grown[place].append(entry)
                self._behind[place], self._said[place] = entry, candidates
            self._left = {place: pieces[1:] for place, pieces in self._left.items() if len(pieces) > 1}
        if self.is_done:
            self._sequence.add(self._grown)
            self.candidates = [self._sequence.of_target(each, self._part.width) for each in self._said]


def retokenization(target: Mapping[str, int], draft: Mapping[str, int]) -> Retokenization:
    """From two vocabularies as in a tokenizer.json: byte-level BPE, or SentencePiece with bytes as `<0x0A>`."""
    bytes_of_target, bytes_of_draft = _bytes_of(target), _bytes_of(draft)
    ids_of_target = {spelled: id_ for id_, spelled in bytes_of_target.items()}
    ids_of_draft = {spelled: id_ for id_, spelled in bytes_of_draft.items()}
    longest = max(map(len, (*ids_of_target, *ids_of_draft)), default=0)
    space = ids_of_draft.get(b" ", 0)
    to_draft = {id_: _pieces(spelled, ids_of_draft, longest) or (space,) for id_, spelled in bytes_of_target.items()}
    firsts = {id_: _pieces(spelled, ids_of_target, longest, limit=1) for id_, spelled in bytes_of_draft.items()}
    num_same = sum(spelled in ids_of_draft for spelled in ids_of_target)
    return Retokenization(
        to_draft, {id_: pieces[0] for id_, pieces in firsts.items() if pieces}, num_same / max(1, len(ids_of_target))
    )


def _pieces(spelled: bytes, ids: Mapping[bytes, int], longest: int, limit: int = 1 << 16) -> tuple[int, ...]:
    """Of the longest pieces that are there, from the left; bytes that are in none are left out."""
    found: list[int] = []
    at = 0
    while at < len(spelled) and len(found) < limit:
        for end in range(min(len(spelled), at + longest), at, -1):
            if (id_ := ids.get(spelled[at:end])) is not None:
                found.append(id_)
                at = end
                break
        else:
            at += 1
    return tuple(found)


def _bytes_of(vocabulary: Mapping[str, int]) -> dict[int, bytes]:
    """The bytes of each token, by id; tokens that say nothing are left out."""
    is_of_bytes = any(token.startswith("Ġ") for token in vocabulary)
    spell = _of_byte_level if is_of_bytes else _of_sentencepiece
    return {id_: spelled for token, id_ in vocabulary.items() if (spelled := spell(token))}


def _of_byte_level(token: str) -> bytes:
    """A letter stands for a byte; special tokens are what they say."""
    try:
        return bytes(_BYTE_OF_LETTER[letter] for letter in token)
    except KeyError:
        return token.encode()


def _of_sentencepiece(token: str) -> bytes:
    if len(token) == len("<0x00>") and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace("▁", " ").encode()


def _byte_letters() -> dict[str, int]:
    """Of GPT-2's byte-level BPE: a byte that Latin-1 prints stands for itself, others for letters from U+0100 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = count(0x100)
    return {chr(byte if byte in printed else next(others)): byte for byte in range(0x100)}


_BYTE_OF_LETTER = _byte_letters()
