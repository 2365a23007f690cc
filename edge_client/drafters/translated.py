"""A draft whose vocabulary differs slightly from the target's: tokens with different ids are translated."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from edge_client.drafters import Candidate, Drafter, DraftSequence, Part, SharingDrafter


class Translation(NamedTuple):
    """The ids that mean different tokens on both sides; all others mean the same."""

    to_draft: Mapping[int, int]
    to_target: Mapping[int, int | None]
    """None: the target lacks this token, so it is never proposed."""


class TranslatedDrafter:
    """Drafts with `drafter` for a target whose vocabulary has this fingerprint."""

    def __init__(self, drafter: Drafter, translation: Translation, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.max_context_tokens = drafter.max_context_tokens
        self.max_width = drafter.max_width
        self.description = drafter.description
        self._drafter = drafter
        self._translation = translation

    def open(self) -> DraftSequence:
        return _TranslatedSequence(self._drafter.open(), self._translation)


class SharingTranslatedDrafter(TranslatedDrafter):
    """The same for a draft whose contexts share passes."""

    def __init__(self, drafter: SharingDrafter, translation: Translation, fingerprint: str) -> None:
        super().__init__(drafter, translation, fingerprint)
        self.max_shared_rows = drafter.max_shared_rows
        self._together = drafter.branch_together

    def branch_together(self, parts: Sequence[Part]) -> list[list[list[Candidate]]]:
        sequences = [part.sequence for part in parts if isinstance(part.sequence, _TranslatedSequence)]
        own = [sequence.part(part) for sequence, part in zip(sequences, parts, strict=True)]
        said = self._together(own)
        return [[sequences[number].of_target(row) for row in rows] for number, rows in enumerate(said)]


def translated(drafter: Drafter, translation: Translation, fingerprint: str) -> TranslatedDrafter:
    """The wrapped drafter; it shares passes if `drafter` does."""
    if isinstance(drafter, SharingDrafter):
        return SharingTranslatedDrafter(drafter, translation, fingerprint)
    return TranslatedDrafter(drafter, translation, fingerprint)


class _TranslatedSequence:
    def __init__(self, sequence: DraftSequence, translation: Translation) -> None:
        self.keep = sequence.keep
        self._sequence = sequence
        self._to_draft, self._to_target = translation

    def append(self, tokens: Sequence[int], width: int) -> list[Candidate]:
        return self.of_target(self._sequence.append(self._of_draft(tokens), width))

    def branch(self, tokens: Sequence[int], parents: Sequence[int], width: int) -> list[list[Candidate]]:
        return [self.of_target(each) for each in self._sequence.branch(self._of_draft(tokens), parents, width)]

    def part(self, part: Part) -> Part:
        """The part in the draft's tokens and sequence."""
        return part._replace(sequence=self._sequence, tokens=self._of_draft(part.tokens))

    def _of_draft(self, tokens: Sequence[int]) -> list[int]:
        return [self._to_draft.get(token, token) for token in tokens]

    def of_target(self, candidates: list[Candidate]) -> list[Candidate]:
        translated = ((self._to_target.get(token, token), probability) for token, probability in candidates)
        return [Candidate(token, probability) for token, probability in translated if token is not None]
