from collections.abc import Sequence
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vllm_specedge.engine.proposal_tree import Advance, Fate, Insertion, ProposalTree, _Node
from vllm_specedge.wire.frames import MAX_UINT32

TOKENS = st.integers(0, 2)  # few, so that drafts and decisions often agree
RUNS = st.lists(TOKENS, max_size=6)
Run = tuple[int, Sequence[int]]


def real_count(tree: ProposalTree) -> int:
    def below(node: _Node) -> int:
        return sum(1 + below(child) for child in node.children.values())

    return below(tree._root)


class NaiveTree:
    """All draft sequences as plain tuples that start after the committed tokens, in order of arrival."""

    def __init__(self, max_nodes: int, max_depth: int) -> None:
        self.paths: list[tuple[int, ...]] = []
        self.trunk: tuple[int, ...] = ()
        self._max_nodes = max_nodes
        self._max_depth = max_depth

    def insert(self, runs: Sequence[Run], committed: list[int]) -> list[Insertion]:
        (base, tokens), *branches = runs
        done = [self._insert(base, list(tokens), committed, False)]
        start, trunk = runs[0]
        for base, tokens in branches:
            if any(
                trunk[at - start] != said
                for at, said in enumerate(committed[:base])
                if start <= at < start + len(trunk)
            ):
                done.append(Insertion(Fate.MISMATCH, discarded=len(tokens)))
            elif base >= len(committed) and done[0].fate not in (Fate.KEPT, Fate.FULL):
                done.append(Insertion(done[0].fate, discarded=len(tokens)))
            else:
                done.append(self._insert(base, list(tokens), committed, True))
        self._always_have_a_trunk()
        return done

    def _insert(self, base: int, tokens: list[int], committed: list[int], is_branch: bool) -> Insertion:
        known = committed[base:]
        if known and len(tokens) <= len(known):
            return Insertion(Fate.LATE, late=len(tokens))
        if tokens[: len(known)] != known:
            return Insertion(Fate.MISMATCH, discarded=len(tokens))
        depth = max(0, base - len(committed))
        is_on_trunk = bool(tokens) and self.trunk[depth:][:1] == tuple(tokens[:1])
        if depth > len(self.trunk) or not (known or is_branch or is_on_trunk):
            return Insertion(Fate.GAP, discarded=len(tokens))
        rest, path, num_new = tokens[len(known) :], self.trunk[:depth], 0
        for index, token in enumerate(rest):
            longer = (*path, token)
            if longer not in self.paths:
                if len(self.paths) >= self._max_nodes or len(longer) > self._max_depth:
                    done = Insertion(Fate.FULL, num_new, index - num_new, len(known), len(rest) - index)
                    break
                self.paths.append(longer)
                num_new += 1
            path = longer
        else:
            done = Insertion(Fate.KEPT, num_new, len(rest) - num_new, len(known))
        if not is_branch and self.trunk[: len(path)] != path:
            self.trunk = path
        return done

    def _first_behind(self, path: tuple[int, ...], limit: int) -> tuple[int, ...]:
        while len(path) < limit and (longer := [other for other in self.paths if other[:-1] == path]):
            path = longer[0]
        return path

    def _always_have_a_trunk(self) -> None:
        self.trunk = self._first_behind(self.trunk, self._max_depth)

    def chain(self, limit: int) -> tuple[int, ...]:
        return self._first_behind(self.trunk[:limit], limit)

    def advance(self, tokens: tuple[int, ...]) -> Advance:
        num_before = len(self.paths)
        num_held = max(n for n in range(len(tokens) + 1) if n == 0 or tokens[:n] in self.paths)
        self.paths = [path[len(tokens) :] for path in self.paths if path[: len(tokens)] == tokens and path != tokens]
        is_on_trunk = self.trunk[: len(tokens)] == tokens
        self.trunk = self.trunk[len(tokens) :] if is_on_trunk else ()
        self._always_have_a_trunk()
        num_pruned = num_before - num_held - len(self.paths)
        return Advance(num_held, num_pruned, is_on_trunk, not is_on_trunk and bool(self.paths))


class Proposals(RuleBasedStateMachine):
    @initialize(committed=st.lists(TOKENS, max_size=3), max_nodes=st.integers(1, 12), max_depth=st.integers(1, 6))
    def begin(self, committed: list[int], max_nodes: int, max_depth: int) -> None:
        self.committed = committed
        self.max_nodes = max_nodes
        self.max_depth = max_depth
        self.tree = ProposalTree(len(committed), max_nodes, max_depth)
        self.naive = NaiveTree(max_nodes, max_depth)
        self.num_new = self.num_gone = 0

    @property
    def known(self) -> list[int]:
        """Committed tokens and those of the trunk."""
        return [*self.committed, *self.naive.trunk]

    def propose(self, *runs: Run) -> None:
        known = self.known
        done = self.tree.insert(runs, self.committed)
        assert done == self.naive.insert(runs, self.committed)
        for (base, tokens), each in zip(runs, done, strict=True):
            assert each.new + each.repeated + each.late + each.discarded == len(tokens)
            assert not each.discarded or each.fate is not Fate.KEPT
            self.num_new += each.new
            if each is done[0] and each.new:
                assert tokens[0] == known[base]

    def decide(self, tokens: list[int]) -> Advance:
        self.committed = self.committed + tokens
        done = self.tree.advance(tokens)
        assert done == self.naive.advance(tuple(tokens))
        self.num_gone += done.held + done.pruned
        return done

    @rule(
        offset=st.integers(-4, 8) | st.just(MAX_UINT32),
        tokens=RUNS,
        branches=st.lists(st.tuples(st.integers(-4, 8) | st.just(MAX_UINT32), RUNS), max_size=3),
        times=st.integers(1, 2),
    )
    def propose_anything(
        self, offset: int, tokens: list[int], branches: list[tuple[int, list[int]]], times: int
    ) -> None:
        """With any bases: `Propose.runs` accepts more than an honest edge sends."""
        runs = [(max(0, len(self.committed) + back), run) for back, run in [(offset, tokens), *branches]]
        for _ in range(times):
            self.propose(*runs)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), num_more=st.integers(0, 4), tokens=RUNS, num_branches=st.integers(0, 3))
    def propose_as_an_edge_does(self, data: st.DataObject, num_more: int, tokens: list[int], num_branches: int) -> None:
        """From a known token on: some tokens after it again, new ones, and branches anywhere."""
        base = data.draw(st.integers(max(0, len(self.committed) - 4), len(self.known) - 1))
        run = [*self.known[base : base + 1 + num_more], *tokens]
        end = base + len(run)
        backs = data.draw(st.lists(st.integers(0, min(6, end)), min_size=num_branches, max_size=num_branches))
        self.propose((base, run), *((end - back, data.draw(RUNS)) for back in backs))

    @rule(tokens=RUNS)
    def decide_anything(self, tokens: list[int]) -> None:
        self.decide(tokens)

    @rule(limit=st.integers(0, 6), more=st.just([]) | RUNS)
    def decide_as_drafted(self, limit: int, more: list[int]) -> None:
        draft = self.tree.chain(limit)
        assert self.decide([*draft, *more]).held >= len(draft)

    @precondition(lambda self: self.naive.paths)
    @rule(data=st.data())
    def decide_along_any_path(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(self.naive.paths))
        assert self.decide(list(path)).held == len(path)

    @invariant()
    def counts_are_right_and_bounded(self) -> None:
        assert self.tree.length == len(self.committed)
        assert self.tree.num_nodes == real_count(self.tree) == len(self.naive.paths) <= self.max_nodes
        assert self.tree.num_nodes == self.num_new - self.num_gone
        assert all(len(path) <= self.max_depth for path in self.naive.paths)

    @invariant()
    def there_is_a_trunk_where_there_is_a_draft(self) -> None:
        assert self.tree.num_ahead == len(self.naive.trunk)
        assert bool(self.tree.num_ahead) == bool(self.tree.num_nodes)

    @invariant()
    def a_chain_is_the_trunk_and_then_what_came_first(self) -> None:
        for limit in range(self.max_depth + 2):
            chain = tuple(self.tree.chain(limit))
            assert chain == self.naive.chain(limit)
            assert not chain or chain in self.naive.paths


Proposals.TestCase.settings = settings(max_examples=80, stateful_step_count=25)
TestProposals: Any = Proposals.TestCase


def test_a_late_draft_is_still_good_in_its_tail() -> None:
    tree = ProposalTree(3)
    assert tree.advance([1, 2]) == Advance(0, 0, False, False)
    assert tree.insert([(2, [0, 1, 2, 3, 4])], [0, 0, 0, 1, 2]) == [Insertion(Fate.KEPT, new=2, late=3)]
    assert tree.chain(9) == [3, 4]


def test_a_draft_for_another_past_than_the_request_s_is_a_gap_or_a_mismatch() -> None:
    """An edge that does not know yet that its trunk was rejected continues it."""
    tree = ProposalTree(1)
    tree.insert([(0, [0, 1, 2])], [0])
    assert tree.insert([(2, [9, 3])], [0]) == [Insertion(Fate.GAP, discarded=2)]
    tree.advance([7])
    assert tree.insert([(2, [2, 3])], [0, 7]) == [Insertion(Fate.GAP, discarded=2)]
    assert tree.insert([(1, [1, 2, 3])], [0, 7]) == [Insertion(Fate.MISMATCH, discarded=3)]
    assert tree.chain(9) == []


def test_a_branch_is_there_after_the_trunk_was_rejected_and_is_the_trunk_then() -> None:
    tree = ProposalTree(1)
    tree.insert([(0, [0, 1, 2, 3]), (2, [7, 8]), (2, [6, 5])], [0])
    assert tree.chain(9) == [1, 2, 3]
    assert tree.advance([1, 7]) == Advance(held=2, pruned=4, is_on_trunk=False, is_hit=True)
    assert tree.insert([(3, [8, 9])], [0, 1, 7]) == [Insertion(Fate.KEPT, new=1, repeated=1)]
    assert tree.chain(9) == [8, 9]


def test_a_branch_that_was_taken_before_it_arrived_can_be_gone_on_from() -> None:
    tree = ProposalTree(1)
    tree.advance([7])
    [run, branch] = tree.insert([(0, [0, 1, 2]), (1, [7, 8])], [0, 7])
    assert (run.fate, branch) == (Fate.MISMATCH, Insertion(Fate.KEPT, new=1, late=1))
    assert tree.num_ahead == 1
    assert tree.insert([(2, [8, 9])], [0, 7]) == [Insertion(Fate.KEPT, new=1, repeated=1)]
    assert tree.chain(9) == [8, 9]


def test_a_new_trunk_replaces_the_old_one_from_where_they_part() -> None:
    tree = ProposalTree(1)
    tree.insert([(0, [0, 1, 2, 3])], [0])
    tree.insert([(0, [0, 1])], [0])
    assert tree.chain(9) == [1, 2, 3]
    tree.insert([(1, [1, 5])], [0])
    assert tree.chain(9) == [1, 5]
    assert tree.insert([(3, [3, 6])], [0])[0].fate is Fate.GAP


def test_a_branch_behind_the_end_of_the_trunk_can_be_gone_on_from() -> None:
    """An edge sends second candidates before the first; if it continues one, nothing is missing here."""
    tree = ProposalTree(1)
    tree.insert([(0, [0, 1, 2]), (3, [5, 6])], [0])
    assert tree.chain(9) == [1, 2, 5, 6]
    assert tree.insert([(4, [6, 7])], [0]) == [Insertion(Fate.KEPT, new=1, repeated=1)]
    assert tree.chain(9) == [1, 2, 5, 6, 7]


def test_a_full_tree_has_room_again_after_a_commit() -> None:
    tree = ProposalTree(1, max_nodes=4)
    assert tree.insert([(0, [0, 1, 2, 3, 4, 5, 6])], [0]) == [Insertion(Fate.FULL, new=4, late=1, discarded=2)]
    assert tree.chain(9) == [1, 2, 3, 4]
    tree.advance([1, 2])
    assert tree.insert([(4, [4, 5, 6])], [0, 1, 2]) == [Insertion(Fate.KEPT, new=2, repeated=1)]
    assert tree.chain(9) == [3, 4, 5, 6]


def test_a_tree_says_what_it_holds() -> None:
    tree = ProposalTree(4)
    tree.insert([(3, [0, 1, 2])], [0, 0, 0, 0])
    assert repr(tree) == "ProposalTree(length=4, nodes=2, trunk=[1, 2])"


def test_a_branch_behind_a_token_that_was_not_said_is_dropped_whatever_it_begins_with() -> None:
    """The trunk had 4 where 0 was committed, and the branch after it 1, which was committed next."""
    tree, committed = ProposalTree(2), [0, 1]
    done = tree.insert([(0, (4,)), (1, (1, 7))], committed)
    assert [each.fate for each in done] == [Fate.LATE, Fate.MISMATCH]
    assert tree.chain(5) == []
    assert [each.fate for each in tree.insert([(0, (0,)), (1, (1, 7))], committed)] == [Fate.LATE, Fate.KEPT]
    assert tree.chain(5) == [7]
