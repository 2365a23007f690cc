"""Letting the target write: many rows at once, each refilled with the next prompt as soon as its answer ends."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from shards import Taught, loop_start
from target import TargetRows
from torch import Tensor

LOOP_CHECK_EVERY = 16


@dataclass(frozen=True)
class Writing:
    """How answers are written: their length, and how often and how warmly they are sampled rather than greedy."""

    most_tokens: int = 256
    greedy_share: float = 0.5
    temperatures: tuple[float, float] = (0.6, 0.9)
    stop_loops: bool = True


@dataclass
class _Row:
    """One answer in the making."""

    prompt: list[int]
    temperature: float
    answer: list[int] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)


class Writer:
    """Answers a stream of prompts with the target, keeping the state behind every token chosen."""

    def __init__(self, target: TargetRows, stops: set[int], writing: Writing, seed: int) -> None:
        self._target = target
        self._stops = stops
        self._writing = writing
        self._rng = random.Random(seed)
        self._dice = torch.Generator().manual_seed(seed)

    def answers(self, prompts: Iterator[list[int]], progress: Callable[[int], None]) -> Iterator[Taught]:
        """Yield answers as they finish, until the prompts run out; `progress` hears of every batch of tokens."""
        rows: list[_Row | None] = [self._begin(index, prompts) for index in range(self._target.rows)]
        while any(rows):
            live = [index for index, row in enumerate(rows) if row is not None]
            self._step([rows[index] for index in live], live)
            progress(len(live))
            for index in live:
                row = rows[index]
                if row is not None and self._ended(row):
                    yield Taught(row.prompt, row.answer, torch.stack(row.states), row.temperature == 0)
                    rows[index] = self._begin(index, prompts)

    def _begin(self, index: int, prompts: Iterator[list[int]]) -> _Row | None:
        """Read the next prompt into a cache row and choose its first token."""
        prompt = next(prompts, None)
        if prompt is None:
            return None
        warm = self._rng.random() >= self._writing.greedy_share
        row = _Row(prompt, self._rng.uniform(*self._writing.temperatures) if warm else 0.0)
        skip = self._target.prefix
        hidden = self._target.forward(torch.tensor([index]), torch.tensor([prompt[skip:]]), torch.tensor([skip]))
        self._choose([row], hidden[:, -1])
        return row

    def _step(self, rows: list[_Row | None], live: list[int]) -> None:
        """One token more for every live row."""
        present = [row for row in rows if row is not None]
        tokens = torch.tensor([[row.answer[-1]] for row in present])
        start = torch.tensor([len(row.prompt) + len(row.answer) - 1 for row in present])
        hidden = self._target.forward(torch.tensor(live), tokens, start)
        self._choose(present, hidden[:, 0])

    def _choose(self, rows: list[_Row], hidden: Tensor) -> None:
        """Append each row's next token, greedy or sampled, and the state it came from."""
        logits = self._target.logits(hidden)
        chosen = logits.argmax(-1)
        warm = [index for index, row in enumerate(rows) if row.temperature > 0]
        if warm:
            heat = torch.tensor([rows[index].temperature for index in warm])
            probabilities = (logits[warm] / heat[:, None]).softmax(-1)
            chosen[warm] = torch.multinomial(probabilities, 1, generator=self._dice)[:, 0]
        kept = hidden.half()
        for row, token, state in zip(rows, chosen.tolist(), kept, strict=True):
            row.answer.append(token)
            row.states.append(state)

    def _ended(self, row: _Row) -> bool:
        """Whether an answer is finished, full, or going round in circles."""
        length = len(row.answer)
        if row.answer[-1] in self._stops or length >= self._writing.most_tokens:
            return True
        return self._writing.stop_loops and length % LOOP_CHECK_EVERY == 0 and loop_start(row.answer[-160:]) is not None
