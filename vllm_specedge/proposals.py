"""The draft tokens that edges proposed for one request, keyed by position and content.

Rule 1: a proposal is advice. One that is late, doubled, overlapping, contradicting or ahead of what is known is
ordinary input: keep what can still come true, say why the rest cannot, and never raise.
Rule 2: the tree starts after the last committed token. `advance` moves its root; what no longer matches is gone.
Invariant: at most `max_nodes` nodes, none deeper than `max_depth`; work is constant per token proposed.
"""

from collections.abc import Sequence
from enum import Enum


class Fate(Enum):
    """What became of a proposal as a whole; also the `reason` label of a metric."""

    KEPT = "kept"
    LATE = "late"
    MISMATCH = "mismatch"
    GAP = "gap"
    FULL = "full"


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

    def insert(self, base: int, tokens: Sequence[int], committed: Sequence[int], branch: bool = False) -> Fate:
        """Add `tokens` for positions base, base + 1, ...

        `committed` is the request so far: `length` token ids. Tokens that overlap it must equal it, or the rest cannot
        come true. A trunk replaces the trunk from `base` on, a branch leaves it there.
        """
        if base < self.length:
            overlap = self.length - base
            if len(tokens) <= overlap:
                return Fate.LATE
            if any(committed[base + i] != tokens[i] for i in range(overlap)):
                return Fate.MISMATCH
            base, tokens = self.length, tokens[overlap:]
        depth = base - self.length
        if depth > len(self._trunk_tokens):
            return Fate.GAP
        return self._attach(depth, tokens, branch)

    def _attach(self, depth: int, tokens: Sequence[int], branch: bool) -> Fate:
        trunk = self._trunk[: depth + 1]
        trunk_tokens = self._trunk_tokens[:depth]
        node, fate = trunk[depth], Fate.KEPT
        for token in tokens:
            child = node.children.get(token)
            if child is None:
                if self.num_nodes >= self._max_nodes or len(trunk_tokens) >= self._max_depth:
                    fate = Fate.FULL
                    break
                child = node.children[token] = _Node()
                self.num_nodes += 1
            node = child
            trunk.append(node)
            trunk_tokens.append(token)
        if not branch:
            self._trunk, self._trunk_tokens = trunk, trunk_tokens
        return fate

    def advance(self, tokens: Sequence[int]) -> int:
        """The request grew by `tokens`. Returns how many of them, from the first, the tree held."""
        num_held, node = 0, self._root
        for token in tokens:
            child = node.children.pop(token, None)
            self.num_nodes -= node.count()  # the child's siblings go: each node is counted once in its life
            if child is None:
                node = _Node()
                break
            self.num_nodes -= 1  # the child becomes the root
            node = child
            num_held += 1
        self.length += len(tokens)
        is_on_trunk = list(tokens) == self._trunk_tokens[: len(tokens)]
        self._root = node
        self._trunk = self._trunk[len(tokens) :] if is_on_trunk else [node]
        self._trunk_tokens = self._trunk_tokens[len(tokens) :] if is_on_trunk else []
        return num_held

    def chain(self, limit: int) -> list[int]:
        """The draft to verify next, at most `limit` tokens: the trunk, or what came first where it has nothing."""
        tokens = self._trunk_tokens[:limit]
        node = self._trunk[len(tokens)]
        while len(tokens) < limit and node.children:
            token, node = next(iter(node.children.items()))
            tokens.append(token)
        return tokens
