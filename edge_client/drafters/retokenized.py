"""A draft model with another tokenizer: the tokens of target and draft are converted into each other by their bytes.

A token that both vocabularies have maps to one token; any other maps to the longest pieces that the other side has.
Nothing is decoded or tokenized again as a text grows, so the draft's context is byte for byte the target's and costs as
little as with the same vocabulary (token-level intersection: Timor et al. 2025, "Accelerating LLM inference with
lossless speculative decoding algorithms for heterogeneous vocabularies"). Where the draft's own tokenizer would split
the text differently, the draft sees a split that was rare in its training, which costs some acceptance.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from edge_client.drafters import Candidate, Drafter, DraftSequence, Part, SharingDrafter

MORE_CANDIDATES = 8
"""Extra candidates to ask the draft for: some are no tokens of the target, and some convert to the same token."""
CONTEXT_PART = 0.75
"""Usable share of the draft's context: a text may have more tokens in the draft's vocabulary than in the target's."""


@dataclass(frozen=True, slots=True)
class Retokenization:
    """The tokens of one vocabulary that stand for each token of the other."""

    to_draft: Mapping[int, tuple[int, ...]]
    """For each target token, at least one draft token."""
    to_target: Mapping[int, int]
    """For each draft token, the first of the target tokens with its bytes; missing if the target has none."""
    coverage: float
    """Share of the target's tokens that are each one token of the draft."""


class RetokenizedDrafter:
    """Drafts with `drafter` for a target with another vocabulary, whose fingerprint this is."""

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
    """The same for a draft whose contexts share passes."""

    def __init__(self, drafter: SharingDrafter, tokens: Retokenization, fingerprint: str) -> None:
        super().__init__(drafter, tokens, fingerprint)
        self.max_shared_rows = drafter.max_shared_rows
        self._together = drafter.branch_together

    def branch_together(self, parts: Sequence[Part]) -> list[list[list[Candidate]]]:
        growths = [_Growth(part.sequence, part) for part in parts if isinstance(part.sequence, _RetokenizedSequence)]
        for growth in growths:
            if growth.num_rows > self.max_shared_rows // len(parts):  # a chain of tokens with many pieces each
                growth.append()
        while left := [growth for growth in growths if not growth.is_done]:
            said = self._together([growth.next_part() for growth in left])
            for growth, rows in zip(left, said, strict=True):
                growth.take(rows)
        return [growth.candidates for growth in growths]


def retokenized(drafter: Drafter, tokens: Retokenization, fingerprint: str) -> RetokenizedDrafter:
    """The wrapped drafter; it shares passes if `drafter` does."""
    if isinstance(drafter, SharingDrafter):
        return SharingRetokenizedDrafter(drafter, tokens, fingerprint)
    return RetokenizedDrafter(drafter, tokens, fingerprint)


class _RetokenizedSequence:
    def __init__(self, sequence: DraftSequence, tokens: Retokenization) -> None:
        self.of_draft = sequence
        self._tokens = tokens
        self._entries: list[list[int]] = []
        """For each entry, the draft's entries."""
        self._num_of_draft = 0
        self._num_in_turn = 0
        """Number of first entries that have the draft's first entries, in order: nearly all of a context."""

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
        """The last of the draft's entries for this entry; its followers go behind it."""
        return self._entries[entry][-1]

    def add(self, entries: Sequence[Sequence[int]]) -> None:
        """Add entries, given the draft's entries of each."""
        for of_draft in entries:
            follows = self._entries[-1][-1] + 1 if self._entries else 0
            is_in_turn = self._num_in_turn == len(self._entries) and of_draft[0] == follows
            self._num_in_turn += is_in_turn and of_draft[-1] - of_draft[0] == len(of_draft) - 1
            self._entries.append(list(of_draft))

    def pieces(self, token: int) -> tuple[int, ...]:
        return self._tokens.to_draft.get(token, (0,))

    def new(self, number: int) -> list[int]:
        """The draft's next `number` entries."""
        start = self._num_of_draft
        self._num_of_draft += number
        return list(range(start, start + number))

    def of_target(self, candidates: Sequence[Candidate], width: int) -> list[Candidate]:
        """The target's tokens with which the draft's candidates begin; probabilities of equal tokens are added up."""
        probability: dict[int, float] = defaultdict(float)
        for each in candidates:
            token = self._tokens.to_target.get(each.token)
            if token is not None:
                probability[token] += each.probability
        best = sorted(probability, key=lambda token: -probability[token])
        return [Candidate(token, probability[token]) for token in best[:width]]


class _Growth:
    """New entries of a context. A chain takes one pass. A tree takes one pass for the first pieces of all tokens, one
    for the second pieces, and so on; most tokens are one piece."""

    def __init__(self, sequence: _RetokenizedSequence, part: Part) -> None:
        self.candidates: list[list[Candidate]] = []
        """Candidates in the target's tokens, set once it is done."""
        self._sequence, self._part = sequence, part
        self._left = dict(enumerate(map(sequence.pieces, part.tokens)))
        """Pieces of each token that have not run yet."""
        self._behind = [sequence.last_of(parent) for parent in part.parents]
        self._grown: list[list[int]] = [[] for _ in part.tokens]
        self._said: list[list[Candidate]] = [[] for _ in part.tokens]

    @property
    def is_done(self) -> bool:
        return not self._left

    @property
    def num_rows(self) -> int:
        """Rows of a chain, which is one pass; 0 for a tree, whose passes have no more rows than tokens."""
        return 0 if self._part.parents else sum(map(len, self._left.values()))

    def append(self) -> None:
        """Run a chain in its own pass."""
        sequence, pieces, _, width = self.next_part()
        self.take([sequence.append(pieces, width)])

    def next_part(self) -> Part:
        """The part for the draft to run next."""
        part = self._part._replace(sequence=self._sequence.of_draft, width=self._part.width + MORE_CANDIDATES)
        if not self._part.parents:
            return part._replace(tokens=[piece for pieces in self._left.values() for piece in pieces])
        firsts = [pieces[0] for pieces in self._left.values()]
        return part._replace(tokens=firsts, parents=[self._behind[place] for place in self._left])

    def take(self, said: Sequence[list[Candidate]]) -> None:
        """Process the draft's candidates for `next_part`."""
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
    """The retokenization between two vocabularies as in a tokenizer.json: byte-level BPE, or SentencePiece with bytes
    as `<0x0A>`."""
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
    """The longest known pieces, from the left; bytes that no piece has are left out."""
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
    """The bytes of each token, by id; tokens without any are left out."""
    is_of_bytes = any(token.startswith("Ġ") for token in vocabulary)
    spell = _of_byte_level if is_of_bytes else _of_sentencepiece
    return {id_: spelled for token, id_ in vocabulary.items() if (spelled := spell(token))}


def _of_byte_level(token: str) -> bytes:
    """Each letter stands for a byte; special tokens stand for their own text."""
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
    """GPT-2's byte-level BPE letters: printable Latin-1 bytes stand for themselves, others for letters from U+0100."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = count(0x100)
    return {chr(byte if byte in printed else next(others)): byte for byte in range(0x100)}


_BYTE_OF_LETTER = _byte_letters()
