"""Training data on disk: token ids with the target's final hidden states for the answer positions, in small files.

Small files, written aside and then renamed, so that the trainer can read what is there while more is being made, and so
that a run killed half-way loses a minute's work at most.
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
class Taught:
    """One prompt with its answer; states[i] is what the target held when it chose (or would choose) answer token i."""

    prompt: list[int]
    answer: list[int]
    states: Tensor
    greedy: bool

    @property
    def length(self) -> int:
        """Tokens a forward pass over it takes (the last answer token predicts nothing)."""
        return len(self.prompt) + len(self.answer) - 1


def loop_start(tokens: Sequence[int]) -> int | None:
    """Where the text has begun to repeat itself for good measure (three times over), if it does.

    Small models end many greedy answers in a loop. Its first rounds teach a draft to copy; a hundred more teach nothing
    and would crowd the budget, so both generation and teaching stop there.
    """
    values = torch.tensor(list(tokens))
    best: int | None = None
    for period in range(1, min(LOOP_PERIOD, len(values) // LOOP_REPEATS) + 1):
        same = (values[period:] == values[:-period]).int()
        need = max(period * (LOOP_REPEATS - 1), 12)
        if len(same) < need:
            continue
        runs = torch.nn.functional.conv1d(same.float()[None, None], torch.ones(1, 1, need))[0, 0]
        hits = (runs >= need - 0.5).nonzero()
        if len(hits):
            end = int(hits[0]) + period + need
            best = end if best is None else min(best, end)
    return best


def write_shard(path: Path, items: Sequence[Taught]) -> None:
    """Store a batch of taught answers under a name that appears only when the file is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "tokens": torch.tensor([token for item in items for token in (*item.prompt, *item.answer)], dtype=torch.int32),
        "prompts": torch.tensor([len(item.prompt) for item in items], dtype=torch.int32),
        "answers": torch.tensor([len(item.answer) for item in items], dtype=torch.int32),
        "greedy": torch.tensor([item.greedy for item in items], dtype=torch.uint8),
        "states": torch.cat([item.states for item in items]).half(),
    }
    aside = path.with_suffix(".part")
    save_file(tensors, str(aside))
    aside.rename(path)


def read_shard(path: Path) -> Iterator[Taught]:
    """The taught answers of one file."""
    with safe_open(str(path), framework="pt") as file:
        tokens = file.get_tensor("tokens").tolist()
        prompts, answers = file.get_tensor("prompts").tolist(), file.get_tensor("answers").tolist()
        greedy, states = file.get_tensor("greedy").tolist(), file.get_tensor("states")
    at, state_at = 0, 0
    for prompt, answer, is_greedy in zip(prompts, answers, greedy, strict=True):
        middle, end = at + prompt, at + prompt + answer
        yield Taught(tokens[at:middle], tokens[middle:end], states[state_at : state_at + answer], bool(is_greedy))
        at, state_at = end, state_at + answer


def read_shards(paths: Iterable[Path]) -> list[Taught]:
    """All the taught answers of several files."""
    return [item for path in paths for item in read_shard(path)]
