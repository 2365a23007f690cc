"""One short string for a tokenizer's vocabulary: two models can draft for each other only if it is the same."""

import hashlib
from collections.abc import Mapping


def without_fillers(vocabulary: Mapping[str, int]) -> dict[str, int]:
    """The tokens that stand for something.

    A GGUF file has a name for each row of the model's embedding, and those that no token needs are called `[PAD` and
    their own id; whatever is made from such a file may have them as tokens of its own.
    """
    return {token: id_ for token, id_ in vocabulary.items() if token != f"[PAD{id_}]"}


def vocabulary_lines(vocabulary: Mapping[str, int]) -> list[bytes]:
    """`id TAB token` in UTF-8 for every entry but fillers, ordered by id, then token: what the fingerprint is over."""
    entries = sorted(without_fillers(vocabulary).items(), key=lambda item: (item[1], item[0]))
    return [f"{id_}\t{token}".encode("utf-8", "surrogatepass") for token, id_ in entries]


def vocabulary_fingerprint(vocabulary: Mapping[str, int]) -> str:
    """SHA-256, in hex, over every entry's line, each with an LF behind it; added tokens too, but no fillers.

    `vocabulary` maps a token as the tokenizer spells it (in tokenizer.json) to its id. docs/protocol.md is normative.
    """
    return hashlib.sha256(b"".join(line + b"\n" for line in vocabulary_lines(vocabulary))).hexdigest()
