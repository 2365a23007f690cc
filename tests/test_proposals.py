from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vllm_specedge.proposals import Fate, ProposalTree, _Node

TOKENS = st.integers(0, 2)  # few, so that drafts and decisions often agree
RUNS = st.lists(TOKENS, max_size=6)


def real_count(tree: ProposalTree) -> int:
    def below(node: _Node) -> int:
        return sum(1 + below(child) for child in node.children.values())

    return below(tree._root)


class NaiveTree:
    """All draft sequences as plain tuples that start after the committed tokens, every prefix among them."""

    def __init__(self, max_nodes: int, max_depth: int) -> None:
        self.paths: list[tuple[int, ...]] = []
        self.trunk: tuple[int, ...] = ()
        self._max_nodes = max_nodes
        self._max_depth = max_depth

    def insert(self, committed: list[int], base: int, tokens: list[int], branch: bool) -> Fate:
        if base < len(committed):
            known = committed[base:]
            if len(tokens) <= len(known):
                return Fate.LATE
            if tokens[: len(known)] != known:
                return Fate.MISMATCH
            base, tokens = len(committed), tokens[len(known) :]
        depth = base - len(committed)
        if depth > len(self.trunk):
            return Fate.GAP
        path, fate = self.trunk[:depth], Fate.KEPT
        for token in tokens:
            longer = (*path, token)
            if longer not in self.paths:
                if len(self.paths) >= self._max_nodes or len(longer) > self._max_depth:
                    fate = Fate.FULL
                    break
                self.paths.append(longer)
            path = longer
        if not branch:
            self.trunk = path
        return fate

    def advance(self, tokens: tuple[int, ...]) -> int:
        num_held = max(n for n in range(len(tokens) + 1) if n == 0 or tokens[:n] in self.paths)
        self.paths = [path[len(tokens) :] for path in self.paths if path[: len(tokens)] == tokens and path != tokens]
        is_on_trunk = self.trunk[: len(tokens)] == tokens
        self.trunk = self.trunk[len(tokens) :] if is_on_trunk else ()
        return num_held


class Proposals(RuleBasedStateMachine):
    @initialize(committed=st.lists(TOKENS, max_size=3), max_nodes=st.integers(1, 12), max_depth=st.integers(1, 6))
    def begin(self, committed: list[int], max_nodes: int, max_depth: int) -> None:
        self.committed = committed
        self.max_nodes = max_nodes
        self.max_depth = max_depth
        self.tree = ProposalTree(len(committed), max_nodes, max_depth)
        self.naive = NaiveTree(max_nodes, max_depth)

    def propose(self, base: int, tokens: list[int], branch: bool) -> None:
        fate = self.tree.insert(base, tokens, self.committed, branch)
        assert fate is self.naive.insert(self.committed, base, tokens, branch)

    @rule(offset=st.integers(-4, 8), tokens=RUNS, branch=st.booleans(), times=st.integers(1, 2))
    def propose_anything(self, offset: int, tokens: list[int], branch: bool, times: int) -> None:
        for _ in range(times):
            self.propose(max(0, len(self.committed) + offset), tokens, branch)

    @rule(back=st.integers(0, 4), tokens=RUNS)
    def propose_late_but_right(self, back: int, tokens: list[int]) -> None:
        base = max(0, len(self.committed) - back)
        self.propose(base, self.committed[base:] + tokens, False)

    @rule(tokens=RUNS)
    def propose_further(self, tokens: list[int]) -> None:
        self.propose(len(self.committed) + len(self.naive.trunk), tokens, False)

    @rule(tokens=RUNS)
    def decide(self, tokens: list[int]) -> None:
        self.committed = self.committed + tokens
        assert self.tree.advance(tokens) == self.naive.advance(tuple(tokens))

    @rule(limit=st.integers(0, 6), more=RUNS)
    def decide_as_drafted(self, limit: int, more: list[int]) -> None:
        draft = self.tree.chain(limit)
        self.committed = self.committed + draft + more
        assert self.tree.advance(draft + more) == self.naive.advance((*draft, *more)) >= len(draft)

    @invariant()
    def counts_are_right_and_bounded(self) -> None:
        assert self.tree.length == len(self.committed)
        assert self.tree.num_nodes == real_count(self.tree) == len(self.naive.paths) <= self.max_nodes
        assert all(len(path) <= self.max_depth for path in self.naive.paths)

    @invariant()
    def a_chain_is_the_trunk_or_at_least_something_that_was_proposed(self) -> None:
        for limit in range(self.max_depth + 2):
            chain = tuple(self.tree.chain(limit))
            assert len(chain) <= limit
            assert not chain or chain in self.naive.paths
            assert chain[: len(self.naive.trunk)] == self.naive.trunk[:limit]
            # It stops early only where nothing goes on.
            assert len(chain) == limit or not any(path[:-1] == chain for path in self.naive.paths)


Proposals.TestCase.settings = settings(max_examples=60, stateful_step_count=25)
TestProposals: Any = Proposals.TestCase


def test_a_late_draft_is_still_good_in_its_tail() -> None:
    tree = ProposalTree(3)
    assert tree.advance([1, 2]) == 0
    assert tree.insert(3, [1, 2, 3, 4], [0, 0, 0, 1, 2]) is Fate.KEPT
    assert tree.chain(9) == [3, 4]


def test_a_branch_is_there_after_the_trunk_was_rejected() -> None:
    tree = ProposalTree(0)
    tree.insert(0, [1, 2, 3], [])
    tree.insert(1, [7, 8], [], branch=True)
    assert tree.chain(9) == [1, 2, 3]
    assert tree.advance([1, 7]) == 2
    assert tree.chain(9) == [8]


def test_a_new_trunk_replaces_the_old_one_from_its_base_on() -> None:
    tree = ProposalTree(0)
    tree.insert(0, [1, 2, 3], [])
    tree.insert(1, [5], [])
    assert tree.chain(9) == [1, 5]
    assert tree.insert(3, [6], []) is Fate.GAP


def test_a_full_tree_has_room_again_after_a_commit() -> None:
    tree = ProposalTree(0, max_nodes=4)
    assert tree.insert(0, [1, 2, 3, 4, 5], []) is Fate.FULL
    assert tree.chain(9) == [1, 2, 3, 4]
    tree.advance([1, 2])
    assert tree.insert(4, [5, 6], []) is Fate.KEPT
    assert tree.chain(9) == [3, 4, 5, 6]


def test_a_tree_says_what_it_holds() -> None:
    tree = ProposalTree(4)
    tree.insert(4, [1, 2], [0, 0, 0, 0])
    assert repr(tree) == "ProposalTree(length=4, nodes=2, trunk=[1, 2])"
