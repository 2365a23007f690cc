"""The attention bias for passes over branches, and the candidates from a pass's logits."""

import torch
from torch import Tensor
from torch.nn import functional

from edge_client.drafters import Candidate
from edge_client.drafters.entries import Entries


def tree_bias(entries: Entries, start: int, dtype: torch.dtype) -> Tensor | None:
    """The bias to add to the attention scores of the entries from `start` on: [new entries, all entries].

    An entry only attends to the trunk, its ancestors and itself. None if there is nothing to hide.
    """
    if entries.is_chain and start == len(entries) - 1:
        return None
    seen = torch.tensor([entries.seen(entry) for entry in range(start, len(entries))])
    bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    return functional.pad(bias, (entries.trunk, 0))


def candidates(logits: Tensor, width: int, kept: Tensor | None) -> list[list[Candidate]]:
    """The `width` most probable next tokens (all if fewer) for each row of logits [rows, head's rows].

    `kept` [head's rows]: the token ids of a reduced head's rows.
    """
    best, ids = logits.topk(min(width, logits.shape[-1]))
    probabilities = (best - logits.logsumexp(dim=-1, keepdim=True)).exp_()
    if kept is not None:
        ids = kept[ids]
    rows = zip(ids.tolist(), probabilities.tolist(), strict=True)
    return [[Candidate(*pair) for pair in zip(*row, strict=True)] for row in rows]
