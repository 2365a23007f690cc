"""Random walks of a draft sequence through trees of text; every entry has to predict what its chain predicts alone."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from edge_client.drafters import Candidate, DraftSequence

WIDTH = 3

Alone = Callable[[list[int]], list[Candidate]]
"""Candidates of a fresh context after these tokens."""


@dataclass
class TreeWalk:
    """A sequence, with its entries' tokens and parents."""

    sequence: DraftSequence
    alone: Alone
    text: Sequence[int]
    """Source of tokens."""
    chance: random.Random
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    num_checked: int = 0
    tolerance: float = 1e-3
    """Tolerance of a probability. With quantized activations a last bit that depends on the batch shape can shift it;
    a wrong mask has a larger effect."""

    def path(self, entry: int) -> list[int]:
        """The entries that lead to an entry, including itself."""
        path = []
        while entry >= 0:
            path.append(entry)
            entry = self.parents[entry]
        return path[::-1]

    def check(self, said: list[Candidate], entry: int) -> None:
        alone = self.alone([self.tokens[above] for above in self.path(entry)])
        assert len(said) == WIDTH
        assert said[0].token == alone[0].token or alone[0].probability - alone[1].probability < self.tolerance
        expected = [theirs.probability for theirs in alone]
        assert [ours.probability for ours in said] == pytest.approx(expected, abs=self.tolerance)
        self.num_checked += 1

    def append(self, tokens: Sequence[int]) -> None:
        said = self.sequence.append(tokens, WIDTH)
        self.parents += range(len(self.tokens) - 1, len(self.tokens) + len(tokens) - 1)
        self.tokens += tokens
        self.check(said, len(self.tokens) - 1)

    def branch(self, parents: list[int]) -> None:
        start = len(self.tokens)
        tokens = [self.chance.choice(self.text) for _ in parents]
        said = self.sequence.branch(tokens, parents, WIDTH)
        self.tokens += tokens
        self.parents += parents
        for entry, candidates in enumerate(said, start):
            self.check(candidates, entry)
        assert len(said) == len(tokens)

    def keep(self, length: int, moved: list[int]) -> None:
        self.sequence.keep(length, moved)
        kept = [*range(length), *moved]
        numbers = {-1: -1} | {old: new for new, old in enumerate(kept)}
        self.tokens = [self.tokens[old] for old in kept]
        self.parents = [numbers[self.parents[old]] for old in kept]

    def grow_branches(self, num_passes: int) -> None:
        """Make passes of one to four entries, after entries near the end."""
        for _ in range(num_passes):
            last = len(self.tokens) - 1
            self.branch([self.chance.randint(max(0, last - 6), last) for _ in range(self.chance.randint(1, 4))])

    def decide(self, with_rest: bool) -> None:
        """Commit a branch: keep the entries that lead to it and, `with_rest`, all that follow it."""
        path = self.path(self.chance.randrange(len(self.tokens) - 4, len(self.tokens)))
        length = next((number for number, entry in enumerate(path) if number != entry), len(path))
        moved = path[length:]
        for entry in range(path[-1] + 1, len(self.tokens)):
            if with_rest and self.parents[entry] in (path[-1], *moved):
                moved.append(entry)
        self.keep(length, moved)

    def run(self, num_rounds: int) -> None:
        """Make chains, branches, and commits, some of which leave branches."""
        self.append(list(self.text[:12]))
        for _ in range(num_rounds):
            self.grow_branches(2)
            self.decide(with_rest=True)
            self.grow_branches(1)
            self.decide(with_rest=False)
            self.append([self.chance.choice(self.text) for _ in range(self.chance.randint(1, 3))])
