"""Which rows the next forward pass has: of one request, or of several where the draft model can share a pass. Pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from edge_client.drafting.draft_tree import Node
from edge_client.drafting.pacing import Pace
from edge_client.drafting.request import DraftedRequest

MAX_CHAIN = 8
"""Committed tokens of a request that share a pass with others' rows."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that has something to run."""

    number: int
    request: DraftedRequest
    nodes: list[Node]
    """Draft tokens, most probable first; none: committed tokens are next."""

    @property
    def order(self) -> tuple[float, int]:
        """The least is the next: committed tokens first, then what is most probably needed, then who waits longest."""
        return (-self.nodes[0].survival if self.nodes else -1.0, self.request.turn)

    @property
    def survivals(self) -> list[float]:
        """Of its rows: what is committed is needed for certain."""
        return [node.survival for node in self.nodes] or [1.0] * self.num_committed

    @property
    def num_committed(self) -> int:
        """Committed tokens that the drafter lacks."""
        return len(self.request.tree.tokens) - self.request.tree.num_entered

    @property
    def is_sharing(self) -> bool:
        """Whether it needs no more than rows of a shared pass: draft tokens, or few committed ones behind others."""
        return bool(self.nodes) or (self.request.tree.num_entered > 0 and self.num_committed <= MAX_CHAIN)


def rows_of_next_pass(
    waiting: Sequence[Waiting], pace: Pace, max_width: int, max_shared_rows: int
) -> list[tuple[Waiting, list[Node]]]:
    """The requests that have a part in it, with the draft tokens that each runs; none: its committed tokens.

    `waiting`: one at least. The pass is for the one that needs it most; others join if both need no more than rows of a
    shared pass: of all together those that are most probably needed, as many as give most tokens a second.
    """
    first = min(waiting, key=lambda each: each.order)
    if max_shared_rows <= max_width or not first.is_sharing:
        return [(first, first.nodes[: pace.width(first.survivals, max_width)])]
    sharing = sorted((each for each in waiting if each.is_sharing), key=lambda each: each.order)
    rows = sorted(
        (-survival, each.request.turn, place)
        for place, each in enumerate(sharing)
        for survival in each.survivals[:max_width]
    )
    width = pace.width([-survival for survival, _, _ in rows], max_shared_rows)
    chosen = list[tuple[Waiting, list[Node]]]()
    for each in sharing:  # a chain goes in as a whole, or not at all
        if not each.nodes and (not chosen or each.num_committed <= width):
            chosen.append((each, []))
            width -= each.num_committed
    drafted = Counter(place for _, _, place in [row for row in rows if sharing[row[2]].nodes][: max(0, width)])
    return chosen + [(sharing[place], sharing[place].nodes[:number]) for place, number in drafted.items()]
