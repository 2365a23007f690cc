"""The protocol of draft models: a cache of entries that grows by forward passes and is cut back."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable


class Candidate(NamedTuple):
    """A possible next token and its probability (0 to 1) according to the draft."""

    token: int
    probability: float


class CacheFullError(Exception):
    """A drafter's cache has no room for a pass. The content of the context is undefined afterwards."""


class DraftSequence(Protocol):
    """One request's context in a drafter: entries 0, 1, ..., each a token and its keys and values.

    Most of the time the entries are a chain, each following the one before. While branches are drafted they are a tree:
    an entry attends to its ancestors only, and its position is one more than its parent's. Used from one thread.
    """

    def keep(self, length: int, moved: Sequence[int] = ()) -> None:
        """Forget all entries but the first `length` and those in `moved`, which become entries length, length + 1, ...

        `moved` holds entries at or behind `length`, in ascending order; the parent of each is kept too. Afterwards the
        entries keep their parents, under the new numbers. Raises ValueError for entries that do not exist.
        """
        ...

    def append(self, tokens: Sequence[int], width: int) -> list[Candidate]:
        """Append a chain behind the last entry, in one forward pass. All entries so far must be a chain.

        Returns at most `width` candidates for the token after the last one, most probable first; none if the drafter
        has none.
        """
        ...

    def branch(self, tokens: Sequence[int], parents: Sequence[int], width: int) -> list[list[Candidate]]:
        """Append an entry for each token behind the existing entry `parents[i]` (0 or more), in one forward pass.

        The new entries do not attend to each other. Returns each one's candidates, as `append` does for the last.
        """
        ...


class Drafter(Protocol):
    """A draft model."""

    fingerprint: str
    """Fingerprint of its tokenizer's vocabulary; empty if it works with any vocabulary."""
    max_context_tokens: int
    max_width: int
    """Maximum entries of one `branch` call; 1: chains only, `branch` is never called."""
    description: str
    """The model, device and runtime, for the status line."""

    def open(self) -> DraftSequence:
        """A new, empty context."""
        ...


class Part(NamedTuple):
    """What one context adds to a shared forward pass, in the terms of DraftSequence: a `branch` or, without parents, an
    `append` behind a chain of at least one entry."""

    sequence: DraftSequence
    tokens: Sequence[int]
    parents: Sequence[int]
    width: int


@runtime_checkable
class SharingDrafter(Drafter, Protocol):
    """A draft model whose contexts can share a forward pass."""

    max_shared_rows: int
    """Maximum entries of one `branch_together` call, over all contexts."""

    def branch_together(self, parts: Sequence[Part]) -> list[list[list[Candidate]]]:
        """Grow the sequences of all parts, each at most once, in one forward pass. Returns for each part the candidates
        behind each new entry; for a chain, behind the last only."""
        ...


@dataclass(frozen=True, slots=True)
class DrafterOptions:
    """The draft model and how to run it: `draft` is `ngram`, a GGUF file, or a Hugging Face directory or hub name."""

    draft: str
    device: str = "auto"
    threads: int = 0
    draft_vocab: int | None = None
    draft_vocab_file: Path | None = None
    runtime: str = "auto"
    """`auto`: the fastest one that can run the model here."""
