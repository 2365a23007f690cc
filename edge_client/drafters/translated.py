"""A draft whose vocabulary is not quite the target's: ids of tokens that both have elsewhere are translated."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from edge_client.drafters import Candidate, Drafter, DraftSequence


class Translation(NamedTuple):
    """Ids that do not mean the same on both sides; all others do."""

    to_draft: Mapping[int, int]
    to_target: Mapping[int, int | None]
    """None: the target has no such token, so it is never proposed."""


class TranslatedDrafter:
    """Drafts as `drafter` does, for a target whose vocabulary has this fingerprint."""

    def __init__(self, drafter: Drafter, translation: Translation, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.max_context_tokens = drafter.max_context_tokens
        self.max_width = drafter.max_width
        self.description = drafter.description
        self._drafter = drafter
        self._translation = translation

    def open(self) -> DraftSequence:
        return _TranslatedSequence(self._drafter.open(), self._translation)


class _TranslatedSequence:
    def __init__(self, sequence: DraftSequence, translation: Translation) -> None:
        self.keep = sequence.keep
        self._sequence = sequence
        self._to_draft, self._to_target = translation

    def append(self, tokens: Sequence[int], width: int) -> list[Candidate]:
        return self._of_target(self._sequence.append(self._of_draft(tokens), width))

    def branch(self, tokens: Sequence[int], parents: Sequence[int], width: int) -> list[list[Candidate]]:
        return [self._of_target(each) for each in self._sequence.branch(self._of_draft(tokens), parents, width)]

    def _of_draft(self, tokens: Sequence[int]) -> list[int]:
        return [self._to_draft.get(token, token) for token in tokens]

    def _of_target(self, candidates: list[Candidate]) -> list[Candidate]:
        translated = ((self._to_target.get(token, token), probability) for token, probability in candidates)
        return [Candidate(token, probability) for token, probability in translated if token is not None]
