"""Contexts in a cache of slots: the inputs of their passes, alone or shared, for any runtime."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np

from edge_client.drafters import Candidate, Part
from edge_client.drafters.slots import Numbers, SlotEntries, Slots, Truths

CHUNK = 256
"""Maximum entries of a pass while a context is prefilled."""


class Rows(NamedTuple):
    """The inputs of a forward pass: one row for each new entry."""

    tokens: Numbers
    """[rows]."""
    positions: Numbers
    """[rows]."""
    slots: Numbers
    """[rows]: slots that keys and values are written to."""
    seen: Truths
    """[rows, extent]: whether a row attends to a slot."""
    is_chain: bool
    """Whether all rows are of one context and each follows the one before."""


class Passes(Protocol):
    """A model and its cache."""

    slots: Slots

    def run(self, rows: Rows, asked: Sequence[int], width: int) -> list[list[Candidate]]:
        """Run a pass and write keys and values to the cache. Returns the candidates behind the rows `asked` for."""
        ...


class SlotSequence:
    """One request's context."""

    def __init__(self, passes: Passes) -> None:
        self.entries = SlotEntries(passes.slots)
        self._passes = passes

    def keep(self, length: int, moved: Sequence[int] = ()) -> None:
        self.entries.keep(length, moved)

    def append(self, tokens: Sequence[int], width: int) -> list[Candidate]:
        said: list[list[Candidate]] = []
        for at in range(0, len(tokens), CHUNK):
            said = branch_together(self._passes, [Part(self, tokens[at : at + CHUNK], [], width)])[0]
        return said[0]

    def branch(self, tokens: Sequence[int], parents: Sequence[int], width: int) -> list[list[Candidate]]:
        return branch_together(self._passes, [Part(self, tokens, parents, width)])[0]

    def grow(self, part: Part) -> int:
        """Add entries, which the caller must run. Returns the number of the first."""
        start = len(self.entries)
        if part.parents:
            self.entries.branch(part.parents)
        else:
            self.entries.append(len(part.tokens))
        return start


def branch_together(passes: Passes, parts: Sequence[Part]) -> list[list[list[Candidate]]]:
    """Implements SharingDrafter.branch_together for SlotSequences."""
    grown = [
        (part.sequence.entries, part.sequence.grow(part)) for part in parts if isinstance(part.sequence, SlotSequence)
    ]
    slots = np.array([slot for entries, start in grown for slot in entries.slots(start)])
    positions = np.array([each for entries, start in grown for each in entries.positions(start)])
    passes.slots.note(slots, positions)
    rows = Rows(
        np.array([token for part in parts for token in part.tokens]),
        positions,
        slots,
        np.concatenate([entries.seen(start) for entries, start in grown]),
        is_chain=len(parts) == 1 and not parts[0].parents,
    )
    asked = [
        range(end - (len(part.tokens) if part.parents else 1), end)
        for part, end in zip(parts, accumulate(len(part.tokens) for part in parts), strict=True)
    ]
    said = iter(passes.run(rows, [row for of_part in asked for row in of_part], max(part.width for part in parts)))
    return [[next(said)[: part.width] for _ in of_part] for part, of_part in zip(parts, asked, strict=True)]
