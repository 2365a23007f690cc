"""Draft models behind one small protocol: `extend` and `truncate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class DraftSequence(Protocol):
    """One request's context inside of a drafter. Used from one thread."""

    def extend(self, tokens: Sequence[int]) -> int | None:
        """Append tokens (one forward pass); returns the draft's next token, None if it has nothing to say."""
        ...

    def truncate(self, length: int) -> None:
        """Forget everything from position `length` on."""
        ...


class Drafter(Protocol):
    """A draft model."""

    fingerprint: str
    """Of its tokenizer's vocabulary; empty if any vocabulary will do."""
    max_context_tokens: int
    description: str
    """What runs where, for the status line."""

    def open(self) -> DraftSequence:
        """A new, empty context."""
        ...


@dataclass(frozen=True, slots=True)
class DrafterOptions:
    """What to draft with: `draft` is `ngram`, or a Hugging Face model by directory or hub name."""

    draft: str
    device: str = "auto"
    threads: int = 0
    draft_vocab: int | None = None
    draft_vocab_file: Path | None = None
