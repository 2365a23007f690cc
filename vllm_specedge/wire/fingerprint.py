"""A fingerprint of a tokenizer's vocabulary: two models can draft for each other directly only if it is the same."""

import hashlib
from collections.abc import Mapping


def without_fillers(vocabulary: Mapping[str, int]) -> dict[str, int]:
    """The vocabulary without filler tokens.

    A GGUF file has a name for each row of the model's embedding. Rows without a token are called `[PAD` plus their own
    id, and files converted from it may have these as tokens.
    """
    return {token: id_ for token, id_ in vocabulary.items() if token != f"[PAD{id_}]"}


def vocabulary_lines(vocabulary: Mapping[str, int]) -> list[bytes]:
    """The input of the fingerprint: `id TAB token` in UTF-8 for every entry but fillers, ordered by id, then token."""
    entries = sorted(without_fillers(vocabulary).items(), key=lambda item: (item[1], item[0]))
    return [f"{id_}\t{token}".encode("utf-8", "surrogatepass") for token, id_ in entries]


def vocabulary_fingerprint(vocabulary: Mapping[str, int]) -> str:
    """SHA-256, in hex, of all entries' lines, each followed by an LF; added tokens included, fillers excluded.

    `vocabulary` maps each token, spelled as in tokenizer.json, to its id. docs/protocol.md is normative.
    """
    return hashlib.sha256(b"".join(line + b"\n" for line in vocabulary_lines(vocabulary))).hexdigest()
