"""A Hugging Face model's tokenizer: its tokens and its fingerprint. Loads no torch."""

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from vllm_specedge.errors import UserError
from vllm_specedge.wire.fingerprint import vocabulary_fingerprint


def no_model(name: str, error: Exception) -> UserError:
    """The error for a model that cannot be loaded."""
    is_directory = Path(name).is_dir()
    where = (
        "has no model that transformers can load" if is_directory else "is not a model directory and cannot be fetched"
    )
    detail = str(error).strip().partition("\n")[0]
    return UserError(f"'{name}' {where} ({detail:.120}): give a model directory or 'ngram'.")


def tokenizer_fingerprint(name: str) -> tuple[str, int]:
    """A tokenizer's fingerprint and the model's vocabulary size, by directory or hub name. Raises UserError."""
    try:
        return vocabulary_fingerprint(tokenizer_vocabulary(name)), int(AutoConfig.from_pretrained(name).vocab_size)
    except (OSError, ValueError) as error:
        raise no_model(name, error) from None


def tokenizer_vocabulary(name: str) -> dict[str, int]:
    """A tokenizer's tokens and their ids, by directory or hub name. Raises UserError."""
    try:
        vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(name).get_vocab()
    except (OSError, ValueError) as error:
        raise no_model(name, error) from None
    return vocabulary
