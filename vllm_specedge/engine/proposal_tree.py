"""The draft tokens that edges proposed for one request, keyed by position and content.

Rule 1: a proposal is advice. One that is late, doubled, overlapping, contradicting or ahead of what is known is
ordinary input: keep what can still come true, report why the rest cannot, and never raise.
Rule 2: the tree starts after the last committed token. `advance` moves its root and drops what no longer matches.
Rule 3: a proposal starts with a known token, committed or of the trunk, which shows what past it was drafted for.
Invariant: at most `max_nodes` nodes, none deeper than `max_depth`; work is constant per token proposed.
"""

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple


class Fate(Enum):
    """The outcome of a whole proposal; also the `reason` label of a metric."""

    KEPT = "kept"
    LATE = "late"
    MISMATCH = "mismatch"
    GAP = "gap"
    FULL = "full"


class Insertion(NamedTuple):
    """The outcomes of a proposal's tokens: new in the tree, already there, already decided, or discarded."""

    fate: Fate
    new: int = 0
    repeated: int = 0
    late: int = 0
    discarded: int = 0
    """Tokens discarded because of `fate`."""


class Advance(NamedTuple):
    """The effect of a commit on a tree."""

    held: int
    """Number of its tokens, from the first on, that the tree held."""
    pruned: int
    """Draft tokens that cannot come true any more."""
    is_on_trunk: bool
    """Whether the trunk had all of them; also False if there was no trunk."""
    is_hit: bool
    """Whether it had not, but the tree has a draft after the commit anyway."""


class _Node:
    __slots__ = ("children",)

    def __init__(self) -> None:
        self.children: dict[int, _Node] = {}

    def count(self) -> int:
        num_nodes, stack = 0, [self]
        while stack:
            children = stack.pop().children.values()
            num_nodes += len(children)
            stack.extend(children)
        return num_nodes


class ProposalTree:
    """Draft tokens that may follow the first `length` tokens of a request."""

    def __init__(self, length: int, max_nodes: int = 256, max_depth: int = 64) -> None:
        self.length = length
        self.num_nodes = 0
        self._max_nodes = max_nodes
        self._max_depth = max_depth
        self._root = _Node()
        self._trunk: list[_Node] = [self._root]
        """The nodes of the chain proposed last; the one at index i stands before position length + i."""
        self._trunk_tokens: list[int] = []

    def __repr__(self) -> str:
        return f"ProposalTree(length={self.length}, nodes={self.num_nodes}, trunk={self._trunk_tokens})"

    @property
    def num_ahead(self) -> int:
        """Number of tokens of the trunk."""
        return len(self._trunk_tokens)

    def insert(self, runs: Sequence[tuple[int, Sequence[int]]], committed: Sequence[int]) -> list[Insertion]:
        """Add a proposal: a run of the trunk, then branches, each with its base, the position of its first token.

        `committed` is the request so far: `length` token ids. Tokens that overlap it must equal it, or the rest cannot
        come true. The run replaces the trunk from its base on; the branches leave it there.
        """
        (start, trunk), *branches = runs
        done = [self._insert(start, trunk, committed, is_branch=False)]
        has_trunk = done[0].fate in (Fate.KEPT, Fate.FULL)
        decided = range(start, min(start + len(trunk), self.length))
        wrong = next((at for at in decided if trunk[at - start] != committed[at]), None)
        for base, tokens in branches:
            if wrong is not None and base > wrong:  # drafted after a token that the target did not choose
                done.append(Insertion(Fate.MISMATCH, discarded=len(tokens)))
            elif has_trunk or base < self.length:
                done.append(self._insert(base, tokens, committed, is_branch=True))
            else:
                done.append(Insertion(done[0].fate, discarded=len(tokens)))
        self._lengthen()
        return done

    def _insert(self, base: int, tokens: Sequence[int], committed: Sequence[int], is_branch: bool) -> Insertion:
        late = max(0, self.length - base)
        if late and late >= len(tokens):
            return Insertion(Fate.LATE, late=len(tokens))
        if any(committed[base + i] != tokens[i] for i in range(late)):
            return Insertion(Fate.MISMATCH, discarded=len(tokens))
        depth, tokens = base + late - self.length, tokens[late:]
        is_chained = late or is_branch or self._trunk_tokens[depth : depth + 1] == list(tokens[:1]) != []
        if depth > len(self._trunk_tokens) or not is_chained:
            return Insertion(Fate.GAP, discarded=len(tokens))
        return self._attach(depth, tokens, is_branch, late)

    def _attach(self, depth: int, tokens: Sequence[int], is_branch: bool, late: int) -> Insertion:
        trunk = self._trunk[: depth + 1]
        trunk_tokens = self._trunk_tokens[:depth]
        node, num_new, num_done = trunk[depth], 0, 0
        for token in tokens:
            child = node.children.get(token)
            if child is None:
                if self.num_nodes >= self._max_nodes or len(trunk_tokens) >= self._max_depth:
                    break
                child = node.children[token] = _Node()
                self.num_nodes += 1
                num_new += 1
            node = child
            num_done += 1
            trunk.append(node)
            trunk_tokens.append(token)
        # A trunk that only repeats the beginning of the one there leaves the rest of that in place.
        if not is_branch and trunk_tokens != self._trunk_tokens[: len(trunk_tokens)]:
            self._trunk, self._trunk_tokens = trunk, trunk_tokens
        fate = Fate.KEPT if num_done == len(tokens) else Fate.FULL
        return Insertion(fate, num_new, num_done - num_new, late, len(tokens) - num_done)

    def clear(self) -> None:
        """Drop all nodes."""
        self.num_nodes = 0
        self._root = _Node()
        self._trunk, self._trunk_tokens = [self._root], []

    def skip(self, num_tokens: int) -> None:
        """Advance by this many decided tokens a tree without nodes."""
        assert not self.num_nodes
        self.length += num_tokens

    def advance(self, tokens: Sequence[int]) -> Advance:
        num_before, num_held, node = self.num_nodes, 0, self._root
        for token in tokens:
            child = node.children.pop(token, None)
            if node.children:  # the child's siblings go: each node is counted once in its life
                self.num_nodes -= node.count()
            if child is None:
                node = _Node()
                break
            self.num_nodes -= 1  # the child becomes the root
            node = child
            num_held += 1
        self.length += len(tokens)
        self._root = node
        is_on_trunk = list(tokens) == self._trunk_tokens[: len(tokens)]
        if is_on_trunk:
            self._trunk, self._trunk_tokens = self._trunk[len(tokens) :], self._trunk_tokens[len(tokens) :]
        if not (is_on_trunk and self._trunk_tokens):
            self._trunk, self._trunk_tokens = [self._root], []  # the first proposal behind the root becomes the trunk
            self._lengthen()
        return Advance(
            num_held, num_before - self.num_nodes - num_held, is_on_trunk, not is_on_trunk and bool(node.children)
        )

    def _lengthen(self) -> None:
        """Extend the trunk by a branch that starts at its end, so that a proposal after that leaves no gap."""
        while self._trunk[-1].children:
            token, node = next(iter(self._trunk[-1].children.items()))
            self._trunk.append(node)
            self._trunk_tokens.append(token)

    def chain(self, limit: int) -> list[int]:
        """The draft to verify next: the first tokens of the trunk, at most `limit`."""
        return self._trunk_tokens[:limit]
