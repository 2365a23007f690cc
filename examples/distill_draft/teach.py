"""Giving the target's last hidden states to answers that were written elsewhere (by vLLM, say)."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from shards import Taught
from target import TargetRows

Pair = tuple[list[int], list[int]]

GREEDY_SHARE = 0.97
PROBE = 64


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all the prompts share, leaving each at least one of its own."""
    first, last = min(map(list, prompts)), max(map(list, prompts))
    limit = min(len(prompt) for prompt in prompts) - 1
    shared = 0
    while shared < limit and first[shared] == last[shared]:
        shared += 1
    return shared


def teach_batch(target: TargetRows, pairs: Sequence[Pair]) -> list[Taught]:
    """One pass over a batch of (prompt, answer)."""
    skip = target.prefix
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs) - 1 - skip
    tokens = torch.zeros(len(pairs), longest, dtype=torch.long)
    for row, (prompt, answer) in enumerate(pairs):
        own = [*prompt, *answer][skip:-1]
        tokens[row, : len(own)] = torch.tensor(own)
    hidden = target.forward(torch.arange(len(pairs)), tokens, torch.full((len(pairs),), skip))
    taught = []
    for row, (prompt, answer) in enumerate(pairs):
        first = len(prompt) - 1 - skip
        states = hidden[row, first : first + len(answer)]
        chosen = target.logits(states[:PROBE]).argmax(-1)
        share = (chosen == torch.tensor(answer[:PROBE])).float().mean().item()
        taught.append(Taught(prompt, answer, states.half(), share >= GREEDY_SHARE))
    return taught


def batches_by_length(pairs: Sequence[Pair], size: int) -> list[list[Pair]]:
    """Batches of like lengths (padding is wasted arithmetic), the batches shuffled, the same way every time."""
    ordered = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
    batches = [ordered[at : at + size] for at in range(0, len(ordered), size)]
    random.Random(0).shuffle(batches)
    return batches
