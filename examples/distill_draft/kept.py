"""Which rows of the target's head the draft keeps: the tokens the target is likeliest to say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from shards import Taught
from torch import Tensor

SAMPLE = 24_000


@torch.inference_mode()
def choose_kept(items: Sequence[Taught], head: Tensor, count: int, always: Sequence[int]) -> Tensor:
    """The `count` most frequent token ids, most frequent first.

    Counts of a few hundred thousand tokens run out before the rarer ids that are worth keeping, so what the target
    thought it might have said (its probabilities at a sample of positions) is added to what it said.
    """
    scores = torch.zeros(len(head))
    for item in items:
        tokens = torch.tensor(item.answer)
        scores.index_add_(0, tokens, torch.ones(len(tokens)))
    states = torch.cat([item.states for item in items])
    picked = states[torch.randperm(len(states), generator=torch.Generator().manual_seed(0))[:SAMPLE]].float()
    expected = torch.zeros(len(head))
    for chunk in torch.split(picked, 256):
        expected += (chunk @ head.T).softmax(-1).sum(0)
    scores += expected * (len(states) / len(picked))
    scores[list(always)] = float("inf")
    return scores.topk(count).indices
