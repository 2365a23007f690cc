"""Training data on disk: token ids with the target's final hidden states for the answer positions, in small files.

The files are small and written atomically, so that the trainer can read while more are being made, and so that a run
that is killed loses a minute's work at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

LOOP_PERIOD = 48
LOOP_REPEATS = 3


@dataclass
class Pair:
    prompt: list[int]
    answer: list[int]

    @property
    def length(self) -> int:
        """Tokens of a forward pass over it (the last answer token predicts nothing)."""
        return len(self.prompt) + len(self.answer) - 1


@dataclass
class Taught(Pair):
    """A pair with states[i], the target's final hidden state from which it chose (or would choose) answer token i."""

    states: Tensor


def loop_start(tokens: Sequence[int]) -> int | None:
    """Position at which the text has repeated itself three times in a row, if it does.

    Small models end many greedy answers in a loop. Its first rounds teach a draft to copy; a hundred more teach nothing
    and would use up the budget, so both generation and teaching stop there.
    """
    best: int | None = None
    for period in range(1, min(LOOP_PERIOD, len(tokens) // LOOP_REPEATS) + 1):
        need = max(period * (LOOP_REPEATS - 1), 12)
        run = 0
        for at in range(period, len(tokens) if best is None else best):
            run = run + 1 if tokens[at] == tokens[at - period] else 0
            if run == need:
                best = at + 1
                break
    return best


def write_shard(path: Path, items: Sequence[Taught]) -> None:
    """Write a batch of answers with their states to a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "tokens": torch.tensor([token for item in items for token in (*item.prompt, *item.answer)], dtype=torch.int32),
        "prompts": torch.tensor([len(item.prompt) for item in items], dtype=torch.int32),
        "answers": torch.tensor([len(item.answer) for item in items], dtype=torch.int32),
        "states": torch.cat([item.states for item in items]).half(),
    }
    aside = path.with_suffix(".part")
    save_file(tensors, str(aside))
    aside.rename(path)


def read_shard(path: Path) -> Iterator[Taught]:
    with safe_open(str(path), framework="pt") as file:
        tokens = file.get_tensor("tokens").tolist()
        prompts, answers = file.get_tensor("prompts").tolist(), file.get_tensor("answers").tolist()
        states = file.get_tensor("states")
    at, state_at = 0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        middle, end = at + prompt, at + prompt + answer
        yield Taught(tokens[at:middle], tokens[middle:end], states[state_at : state_at + answer])
        at, state_at = end, state_at + answer


def right_padded(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """A batch's tokens [B, T], and the mask of the positions at which its answer tokens are chosen."""
    longest = max(pair.length for pair in pairs)
    tokens = torch.zeros(len(pairs), longest, dtype=torch.long)
    mask = torch.zeros(len(pairs), longest, dtype=torch.bool)
    for row, pair in enumerate(pairs):
        tokens[row, : pair.length] = torch.tensor([*pair.prompt, *pair.answer][:-1])
        mask[row, len(pair.prompt) - 1 : pair.length] = True
    return tokens, mask


def read_shards(paths: Iterable[Path]) -> list[Taught]:
    return [item for path in paths for item in read_shard(path)]
