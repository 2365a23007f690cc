"""One short string for a tokenizer's vocabulary: two models can draft for each other only if it is the same."""

import hashlib
from collections.abc import Mapping


def vocabulary_fingerprint(vocabulary: Mapping[str, int]) -> str:
    """SHA-256, in hex, over `id TAB token LF` in UTF-8 for every entry, added tokens too, ordered by id, then token.

    `vocabulary` maps a token as the tokenizer spells it (in tokenizer.json) to its id. docs/protocol.md is normative.
    """
    digest = hashlib.sha256()
    for token, id_ in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{id_}\t{token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
