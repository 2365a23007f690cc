"""Draft models behind one small protocol: a cache of entries that grows by a forward pass and is cut back."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable


class Candidate(NamedTuple):
    """A token that may come next, and how probable the draft says it is (0 to 1)."""

    token: int
    probability: float


class CacheFullError(Exception):
    """A drafter's cache has no room for a pass; what the context holds afterwards is not defined."""


class DraftSequence(Protocol):
    """One request's context inside of a drafter: entries 0, 1, ..., each a token and its keys and values.

    Most of the time the entries are a chain, each following the one before. While branches are drafted they are a tree:
    an entry attends to its ancestors only, and its position is one more than its parent's. Used from one thread.
    """

    def keep(self, length: int, moved: Sequence[int] = ()) -> None:
        """Forget all entries but the first `length` and those in `moved`, which become entries length, length + 1, ...

        `moved` holds entries at or behind `length`, in ascending order; the parent of each is kept too. Afterwards the
        entries keep their parents, under the new numbers. Raises ValueError for what is not there.
        """
        ...

    def append(self, tokens: Sequence[int], width: int) -> list[Candidate]:
        """Append a chain behind the last entry, in one forward pass. All entries so far must be a chain.

        Returns at most `width` candidates for what follows the last token, most probable first; none if the drafter
        has nothing to say.
        """
        ...

    def branch(self, tokens: Sequence[int], parents: Sequence[int], width: int) -> list[list[Candidate]]:
        """Append an entry for each token, behind entry `parents[i]` (0 or more, there before), in one forward pass.

        The new entries do not see each other. Returns each one's candidates, as `append` does for the last.
        """
        ...


class Drafter(Protocol):
    """A draft model."""

    fingerprint: str
    """Of its tokenizer's vocabulary; empty if any vocabulary will do."""
    max_context_tokens: int
    max_width: int
    """How many entries `branch` takes in one pass at most; 1: chains only, `branch` is never called."""
    description: str
    """What runs where, for the status line."""

    def open(self) -> DraftSequence:
        """A new, empty context."""
        ...


class Part(NamedTuple):
    """What one context adds to a forward pass that several share, in the terms of DraftSequence: as `branch`, or, where
    there are no parents, as `append` behind a chain of one entry at least."""

    sequence: DraftSequence
    tokens: Sequence[int]
    parents: Sequence[int]
    width: int


@runtime_checkable
class SharingDrafter(Drafter, Protocol):
    """A draft model whose contexts can share a forward pass."""

    max_shared_rows: int
    """How many entries `branch_together` takes in one pass at most, of all contexts."""

    def branch_together(self, parts: Sequence[Part]) -> list[list[list[Candidate]]]:
        """Each part's sequence grown in one forward pass, each once: the candidates behind each entry, of a chain
        behind the last."""
        ...


@dataclass(frozen=True, slots=True)
class DrafterOptions:
    """What to draft with: `draft` is `ngram`, a GGUF file, or a Hugging Face model by directory or hub name."""

    draft: str
    device: str = "auto"
    threads: int = 0
    draft_vocab: int | None = None
    draft_vocab_file: Path | None = None
    runtime: str = "auto"
    """`auto`: the fastest that can run it here."""
