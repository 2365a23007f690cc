"""A reduced draft vocabulary: the few thousand tokens that a target generates most, instead of the whole output head.

On an edge the output head is most of a small model's cost, and the draft would rarely get a token outside of the list
right.
"""

import json
from pathlib import Path

from vllm_specedge.errors import UserError

FILE_NAME = "draft_vocab.json"
"""File next to a draft's weights: a JSON array of token ids, most frequent first."""


def draft_vocabulary(model: str, count: int | None, file: Path | None, vocab_size: int) -> list[int] | None:
    """The token ids to keep in the head, in ascending order; None: all. Raises UserError.

    Without `count` the whole list next to the model is used, if there is one; 0 keeps the full head.
    """
    path = file or Path(model) / FILE_NAME
    if count == 0 or (count is None and not path.exists()):
        return None
    try:
        ranked = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        text = f"The draft vocabulary {path} cannot be read ({error!s:.100}): name one with --draft-vocab-file."
        raise UserError(text) from None
    if not isinstance(ranked, list) or not all(type(id_) is int and 0 <= id_ < vocab_size for id_ in ranked):
        raise UserError(f"{path} is not a JSON array of token ids below {vocab_size}.")
    if count is not None and count > len(ranked):
        raise UserError(f"{path} has {len(ranked)} token ids: --draft-vocab can be at most that.")
    return sorted(set(ranked[:count]))
