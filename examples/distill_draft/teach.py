"""The target's last hidden states for answers that vLLM wrote, and the rows of its head that a draft keeps."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from draft_model import Draft, fast_numbers
from shards import Pair, Taught, right_padded
from torch import Tensor

SAMPLE = 24_000


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all prompts share, leaving at least one token of each."""
    first, last = min(map(list, prompts)), max(map(list, prompts))
    limit = min(len(prompt) for prompt in prompts) - 1
    shared = 0
    while shared < limit and first[shared] == last[shared]:
        shared += 1
    return shared


@torch.inference_mode()
def teach_batch(target: Draft, pairs: Sequence[Pair]) -> list[Taught]:
    tokens, mask = right_padded(pairs)
    with fast_numbers():
        states = target(tokens)[mask].half()
    parts = states.split([len(pair.answer) for pair in pairs])
    return [Taught(pair.prompt, pair.answer, part) for pair, part in zip(pairs, parts, strict=True)]


def batches_by_length(pairs: Sequence[Pair], size: int) -> list[list[Pair]]:
    """Batches of similar lengths, to save padding; the batches are shuffled, the same way every time."""
    ordered = sorted(pairs, key=lambda pair: pair.length)
    batches = [ordered[at : at + size] for at in range(0, len(ordered), size)]
    random.Random(0).shuffle(batches)
    return batches


@torch.inference_mode()
def choose_kept(items: Sequence[Taught], head: Tensor, count: int, always: Sequence[int]) -> Tensor:
    """The `count` most frequent token ids, most frequent first.

    A few hundred thousand tokens do not contain all of the rarer ids that are worth keeping, so the target's
    probabilities at a sample of positions are added to the counts.
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
