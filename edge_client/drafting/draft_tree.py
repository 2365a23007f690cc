"""The draft tokens after the committed tokens of one request: a trunk, and branches where the draft is unsure.

Rule 1: the root is the last committed token. Every other node is a draft token; its survival is the probability that
the target chooses all tokens of its path.
Rule 2: children are in the draft's order of preference. The trunk follows each node's first child.
Rule 3: a node runs through the draft model after its parent. Then the drafter holds an entry for it, and the node has
children unless the draft has no candidates there.
Rule 4: only this module knows which entries the drafter holds (edge_client/drafters, DraftSequence).
"""

from collections.abc import Callable, Iterator, Sequence

from edge_client.drafters import Candidate
from vllm_specedge.wire.frames import Propose


class Node:
    """One draft token, or the root."""

    __slots__ = ("children", "claimed", "entry", "is_expanded", "is_sent", "parent", "position", "survival", "token")

    def __init__(self, token: int, position: int, parent: "Node | None", survival: float, claimed: float) -> None:
        self.token = token
        self.position = position
        self.parent = parent
        self.survival = survival
        self.claimed = claimed
        """Its probability given its parent, according to the draft."""
        self.children: list[Node] = []
        self.entry: int | None = None
        """Its entry in the drafter's cache, once its pass has started."""
        self.is_expanded = False
        self.is_sent = False

    def chain(self) -> Iterator["Node"]:
        """The nodes that follow it along first children."""
        node = self
        while node.children:
            node = node.children[0]
            yield node

    def below(self) -> Iterator["Node"]:
        """All nodes under it, parents first."""
        stack = [self]
        while stack:
            children = stack.pop().children
            yield from children
            stack.extend(children)


class DraftTree:
    """The committed tokens of one request, the draft tokens after them, and which of both the drafter holds."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.root = Node(-1, -1, None, 1.0, 1.0)
        self.num_prefix = 0
        """Number of the drafter's first entries that are, in order, the first committed tokens."""
        self._path: list[int] = []
        """The entries of the committed tokens after those, ascending."""
        self._num_entries = 0

    def __len__(self) -> int:
        return sum(1 for _ in self.root.below())

    @property
    def num_entered(self) -> int:
        """Number of committed tokens, from the first on, that the drafter holds."""
        return self.num_prefix + len(self._path)

    @property
    def is_caught_up(self) -> bool:
        """Whether the drafter holds all committed tokens."""
        return self.num_entered == len(self.tokens)

    def trunk(self) -> list[Node]:
        return list(self.root.chain())

    def advance(self, tokens: Sequence[int]) -> list[Node]:
        """Commit these tokens (at least one). Returns the nodes that predicted them, up to the first mismatch."""
        node, foreseen = self.root, []
        for token in tokens:
            child = next((child for child in node.children if child.token == token), None)
            if child is None:
                break
            node = child
            foreseen.append(node)
        self._path += [node.entry for node in foreseen if node.entry is not None]
        self.tokens += tokens
        is_whole = len(foreseen) == len(tokens)
        self.root = node if is_whole else Node(tokens[-1], len(self.tokens) - 1, None, 1.0, 1.0)
        self._rescale()
        return foreseen

    def _rescale(self) -> None:
        """Make survivals relative to the new root."""
        self.root.parent = None
        certain = self.root.survival
        if certain < 1.0:
            self.root.survival = 1.0
            for node in self.root.below():
                node.survival /= certain

    def contains(self, node: Node) -> bool:
        """Whether the node is (still) part of the tree."""
        above: Node | None = node
        while above is not None and above is not self.root:
            above = above.parent
        return above is not None

    def expand(self, node: Node, candidates: Sequence[Candidate], calibrate: Callable[[float], float]) -> None:
        """Add the draft model's candidates behind `node`. `calibrate` maps a claimed probability to a measured one."""
        node.is_expanded = True
        node.children = [
            Node(token, node.position + 1, node, node.survival * calibrate(claimed), claimed)
            for token, claimed in candidates
        ]

    # -- the drafter's entries -------------------------------------------------------------------------------------

    def adopt(self, num_entries: int) -> None:
        """Take over the drafter's cache of another request, whose first `num_entries` tokens are the same."""
        self.num_prefix = self._num_entries = num_entries

    def compact(self) -> tuple[int, tuple[int, ...]]:
        """The entries for the drafter to keep before the next pass: how many of the first, and which of those behind.

        The tree uses the new entry numbers from here on.
        """
        nodes = sorted((node for node in self.root.below() if node.entry is not None), key=lambda node: node.entry or 0)
        live = [*self._path, *(node.entry for node in nodes if node.entry is not None)]
        length = self.num_prefix
        num_in_place = 0
        while num_in_place < len(live) and live[num_in_place] == length + num_in_place:
            num_in_place += 1
        self.num_prefix += len(self._path)
        self._path = []
        for index, node in enumerate(nodes):
            node.entry = self.num_prefix + index
        if self.is_caught_up and self.tokens:
            self.root.entry = self.num_prefix - 1
        self._num_entries = length + len(live)
        return length + num_in_place, tuple(live[num_in_place:])

    def enter_committed(self, limit: int) -> list[int]:
        """The next committed tokens that the drafter lacks, at most `limit`; from now on they count as held."""
        tokens = self.tokens[self.num_prefix : self.num_prefix + limit]
        self.num_prefix += len(tokens)
        self._num_entries = self.num_prefix
        if self.is_caught_up:
            self.root.entry = self.num_prefix - 1
        return tokens

    def enter(self, nodes: Sequence[Node]) -> list[int]:
        """Give entries to nodes that are about to run. Returns their parents' entries; none if all form one chain."""
        is_chain = len(nodes) == 1 and nodes[0].position == self._num_entries
        parents = (
            [] if is_chain else [node.parent.entry for node in nodes if node.parent and node.parent.entry is not None]
        )
        for node in nodes:
            node.entry = self._num_entries
            self._num_entries += 1
        return parents


def new_branches(trunk: list[Node], is_of_use: Callable[[Node], bool]) -> list[list[Node]]:
    """The paths that leave the trunk, each from its fork on, whose last useful node was not sent yet.

    A second candidate alone is useless: once the target has chosen it, it is committed already.
    """
    paths = []
    for first in (other for node in trunk if node.parent for other in node.parent.children[1:]):
        path = [node for node in (first, *first.chain()) if is_of_use(node)]
        if len(path) > 1 and not path[-1].is_sent:
            paths.append(path)
    return paths


def proposal(number: int, before: Node, trunk: list[Node], branches: list[list[Node]]) -> Propose:
    """One frame with the new part of a trunk, which follows the node `before`, and these branches. Marks them as sent.

    It starts with the token of `before`, which shows whether the context that it was drafted for has come true.
    """
    run = [before, *trunk]
    end = run[-1].position + 1
    new = [*run, *(node for branch in branches for node in branch)]
    forks = [number for branch in branches for number in (end - branch[0].position, len(branch))]
    for node in new:
        node.is_sent = True
    return Propose(number, run[0].position, tuple(node.token for node in new), tuple(forks))
