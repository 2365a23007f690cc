"""Giving the target's last hidden states to answers that were written by vLLM."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from draft_model import Draft, fast_numbers
from shards import Pair, Taught, right_padded


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all the prompts share, leaving each at least one of its own."""
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
    """Batches of like lengths (padding is wasted arithmetic), the batches shuffled, the same way every time."""
    ordered = sorted(pairs, key=lambda pair: pair.length)
    batches = [ordered[at : at + size] for at in range(0, len(ordered), size)]
    random.Random(0).shuffle(batches)
    return batches
