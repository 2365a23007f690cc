"""The tree against a drafter that keeps a plain list, and against a dictionary from pasts to the draft's candidates."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edge_client.drafters import Candidate
from edge_client.drafting.draft_tree import DraftTree, Node
from tests.helpers import ListSequence

TOKENS = st.integers(0, 3)
CLAIMS = st.floats(0.05, 1.0)
SAID = st.lists(st.builds(Candidate, TOKENS, CLAIMS), min_size=1, max_size=3, unique_by=lambda item: item.token)


def calibrate(claimed: float) -> float:
    """Not the identity, and not monotonic, as measurements may be."""
    return 1.0 - claimed / 2 if claimed < 0.5 else claimed


def path_of(tree: DraftTree, node: Node) -> list[int]:
    """All tokens up to a node's own: those committed, then those of the tree."""
    tokens: list[int] = []
    while node is not tree.root:
        tokens.append(node.token)
        assert node.parent is not None
        assert node in node.parent.children
        node = node.parent
    return [*tree.tokens, *reversed(tokens)]


def expanded(tree: DraftTree, said: Sequence[tuple[int, float]]) -> None:
    tree.expand(tree.root, [Candidate(*candidate) for candidate in said], calibrate)


class Drafting(RuleBasedStateMachine):
    """The calls of speculation._job and speculation.drafted, with any nodes and any commits in between."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = DraftTree()
        self.sequence = ListSequence(lambda past: [])
        self.committed: list[int] = []
        self.said: dict[tuple[int, ...], list[Candidate]] = {}
        """Candidates by the whole past."""
        self.running: list[Node] | None = None
        self.seen: set[Node] = set()

    @initialize(data=st.data(), tokens=st.lists(TOKENS, min_size=1, max_size=4))
    def begin(self, data: st.DataObject, tokens: list[int]) -> None:
        self.committed += tokens
        self.tree.advance(tokens)
        self.draft(data, 4)

    def runnable(self) -> list[Node]:
        return [node for node in self.tree.root.below() if node.entry is None]

    @rule(data=st.data(), num_foreseen=st.integers(0, 4), others=st.just([]) | st.lists(TOKENS, max_size=3))
    def commit(self, data: st.DataObject, num_foreseen: int, others: list[int]) -> None:
        node, tokens = self.tree.root, list[int]()
        while len(tokens) < num_foreseen and node.children:
            node = data.draw(st.sampled_from(node.children), "foreseen")
            tokens.append(node.token)
        tokens = [*tokens, *others] or [0]
        expected, past = 0, list(self.committed)
        while expected < len(tokens) and tokens[expected] in [item.token for item in self.said.get(tuple(past), ())]:
            past.append(tokens[expected])
            expected += 1
        foreseen = self.tree.advance(tokens)
        self.committed += tokens
        assert [node.token for node in foreseen] == tokens[:expected]
        assert all(one.children.count(other) for one, other in pairwise(foreseen))

    @precondition(lambda self: self.committed and self.running is None)
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        if not self.tree.is_caught_up:
            self.start_committed(data.draw(st.integers(1, 5), "limit"))
        elif self.runnable():
            self.start_nodes(data)

    def start_committed(self, limit: int) -> None:
        num_entered = self.tree.num_entered
        self.keep()
        tokens = self.tree.enter_committed(limit)
        assert tokens == self.committed[num_entered : num_entered + limit]
        self.sequence.append(tokens, 1)
        self.running = []

    def start_nodes(self, data: st.DataObject) -> None:
        runnable = [node for node in self.runnable() if node.parent and node.parent.is_expanded]
        nodes = data.draw(st.lists(st.sampled_from(runnable), min_size=1, max_size=3, unique=True), "nodes")
        self.keep()
        is_chain = len(nodes) == 1 and len(self.sequence.entries) == nodes[0].position
        parents = self.tree.enter(nodes)
        tokens = [node.token for node in nodes]
        if parents:
            self.sequence.branch(tokens, parents, 3)
        else:
            self.sequence.append(tokens, 1)
        assert bool(parents) != is_chain
        self.running = nodes

    def keep(self) -> None:
        live = [node for node in self.tree.root.below() if node.entry is not None]
        num_entered = self.tree.num_entered
        self.sequence.keep(*self.tree.compact())
        assert self.tree.num_entered == self.tree.num_prefix == num_entered
        assert len(self.sequence.entries) == num_entered + len(live), "something else is kept"
        assert [self.sequence.past(entry) for entry in range(num_entered)] == [
            self.committed[: entry + 1] for entry in range(num_entered)
        ]

    @precondition(lambda self: self.committed)
    @rule(data=st.data(), num_passes=st.integers(1, 4))
    def draft(self, data: st.DataObject, num_passes: int) -> None:
        for _ in range(num_passes):
            self.done(data)
            self.start(data)
        self.done(data)

    @rule(data=st.data())
    def done(self, data: st.DataObject) -> None:
        nodes, self.running = self.running, None
        if nodes is None or not (nodes or self.tree.is_caught_up):
            return
        for node in nodes or [self.tree.root]:
            if self.tree.contains(node):
                said = data.draw(SAID, "said") if data.draw(st.integers(0, 9), "nothing") else []
                self.said[tuple(path_of(self.tree, node))] = said
                self.tree.expand(node, said, calibrate)
                assert [(child.token, child.claimed) for child in node.children] == said

    @precondition(lambda self: self.running is None and len(self.committed) > 12)
    @rule(data=st.data(), others=st.lists(TOKENS, min_size=1, max_size=3))
    def go_on_from_it_with_another_request(self, data: st.DataObject, others: list[int]) -> None:
        num_shared = data.draw(st.integers(0, self.tree.num_prefix), "shared")
        self.committed = [*self.committed[:num_shared], *others]
        self.tree, self.said, self.seen = DraftTree(), {}, set()
        self.tree.advance(self.committed)
        self.tree.adopt(num_shared)

    @invariant()
    def the_root_is_the_last_committed_token(self) -> None:
        assert self.tree.tokens == self.committed
        if self.committed:
            root = self.tree.root
            assert (root.token, root.position, root.survival) == (self.committed[-1], len(self.committed) - 1, 1.0)
        assert self.tree.root.parent is None, "decided nodes are kept alive"

    @invariant()
    def the_tree_is_all_that_the_draft_said_and_that_can_come_true(self) -> None:
        pasts = {tuple(path_of(self.tree, node)): node for node in (self.tree.root, *self.tree.root.below())}
        assert len(self.tree) == len(pasts) - 1
        for past, node in pasts.items():
            assert node.position == len(past) - 1 or not self.committed
            assert [child.token for child in node.children] == [item.token for item in self.said.get(past, ())]
            assert node.is_expanded == (past in self.said)
        self.seen.update(pasts.values())
        assert {node for node in self.seen if self.tree.contains(node)} == set(pasts.values())

    @invariant()
    def an_entry_s_past_is_that_of_its_node(self) -> None:
        if self.tree.root.entry is not None:
            assert self.sequence.past(self.tree.root.entry) == self.committed
        for node in self.tree.root.below():
            if node.entry is not None:
                assert self.sequence.past(node.entry) == path_of(self.tree, node)
                assert node.parent is not None
                assert node.parent.entry is not None or node.parent is self.tree.root
            assert not node.is_expanded or node.entry is not None

    @invariant()
    def so_many_committed_tokens_are_held(self) -> None:
        held = {tuple(self.sequence.past(entry)) for entry in range(len(self.sequence.entries))}
        assert 0 <= self.tree.num_prefix <= self.tree.num_entered <= len(self.committed)
        for length in range(1, self.tree.num_entered + 1):
            assert tuple(self.committed[:length]) in held
        assert self.tree.is_caught_up == (self.tree.num_entered == len(self.committed))
        assert self.tree.is_caught_up or not self.tree.root.children

    @invariant()
    def survival_is_the_product_of_what_was_said_along_the_path(self) -> None:
        for node in self.tree.root.below():
            product, below = 1.0, node
            while below is not self.tree.root:
                assert below.parent is not None
                product *= calibrate(below.claimed)
                below = below.parent
            assert node.survival == pytest.approx(product, rel=1e-6)

    @invariant()
    def the_trunk_follows_first_children(self) -> None:
        node = self.tree.root
        for following in self.tree.trunk():
            assert following is node.children[0]
            node = following
        assert not node.children


TestDrafting = Drafting.TestCase
TestDrafting.settings = settings(max_examples=40, stateful_step_count=25)


def test_a_new_tree_is_empty() -> None:
    tree = DraftTree()
    assert (len(tree), tree.trunk(), tree.num_entered, tree.is_caught_up) == (0, [], 0, True)
    assert tree.compact() == (0, ())


def test_what_a_commit_foresaw_is_held_and_what_it_did_not_is_dropped_with_the_next_pass() -> None:
    tree = DraftTree()
    tree.advance([5, 6])
    assert tree.compact() == (0, ())
    assert tree.enter_committed(10) == [5, 6]
    expanded(tree, [(7, 0.6), (8, 0.3)])
    first, second = tree.root.children
    assert tree.enter([first, second]) == [1, 1]
    for node in (first, second):
        tree.expand(node, [Candidate(9, 0.9)], calibrate)
    assert tree.enter([second.children[0]]) == [3]
    assert tree.advance([8]) == [second]
    assert (tree.num_entered, tree.root, tree.root.survival) == (3, second, 1.0)
    assert tree.compact() == (2, (3, 4))
    assert tree.root.entry == 2
    assert second.children[0].entry == 3
    tree.expand(second.children[0], [Candidate(7, 0.9)], calibrate)
    assert tree.enter([second.children[0].children[0]]) == []  # a chain again
    assert not tree.contains(first)


def test_a_token_that_was_said_to_be_impossible_can_still_be_committed() -> None:
    tree = DraftTree()
    tree.advance([5])
    tree.enter_committed(1)
    expanded(tree, [(7, 1.0), (8, 0.0)])
    tree.root.children[1].survival = 0.0
    tree.advance([8])
    assert (tree.root.token, tree.root.survival, len(tree)) == (8, 1.0, 0)


def test_entries_in_place_are_not_moved() -> None:
    tree = DraftTree()
    tree.advance([5])
    tree.enter_committed(1)
    expanded(tree, [(7, 0.9)])
    tree.enter([tree.root.children[0]])
    tree.expand(tree.root.children[0], [Candidate(8, 0.9)], calibrate)
    assert tree.compact() == (2, ())
    tree.advance([7])
    assert tree.compact() == (2, ())
    tree.advance([1])
    assert tree.compact() == (2, ())
    assert tree.enter_committed(10) == [1]
