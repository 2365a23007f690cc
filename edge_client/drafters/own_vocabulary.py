"""A draft's own vocabulary, by what the draft is called: asked for when there is something to say about it.

A drafter holds its fingerprint and no more: 150,000 tokens take 20 MB, and drafting has no use for them.
"""

from pathlib import Path

from edge_client.drafters import DrafterOptions
from edge_client.drafters.choose import GGUF_SUFFIX, fetched


def own_vocabulary(options: DrafterOptions) -> dict[str, int]:
    """Each token with its id; none for prompt lookup. Raises UserError, and ImportError as loading the draft would."""
    if options.draft == "ngram":
        return {}
    draft = fetched(options, is_quiet=True).draft
    if draft.lower().endswith(GGUF_SUFFIX):
        from edge_client.drafters.gguf import gguf_vocabulary  # noqa: PLC0415 - loads llama.cpp

        return gguf_vocabulary(Path(draft))
    from edge_client.drafters.hf import tokenizer_vocabulary  # noqa: PLC0415 - loads torch

    return tokenizer_vocabulary(draft)
