"""Draft models behind one small protocol: `extend` and `truncate`."""

from collections.abc import Sequence
from typing import Protocol

from vllm_specedge.errors import UserError


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


def load_drafter(name: str, device: str, threads: int) -> Drafter:
    """`ngram`, or a Hugging Face model by directory or hub name. Raises UserError."""
    if name == "ngram":
        from edge_client.drafters.ngram import NgramDrafter  # noqa: PLC0415

        return NgramDrafter()
    try:
        from edge_client.drafters.hf import load_hf_drafter  # noqa: PLC0415 - loads torch
    except ImportError as error:
        raise UserError(
            f"A model as the draft needs {error.name}: pip install 'vllm-specedge[hf]', or draft with 'ngram'."
        ) from None
    return load_hf_drafter(name, device, threads)
