"""The rows of the next forward pass: of one request, or of several if the draft model can share passes. Pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from edge_client.drafting.draft_tree import Node
from edge_client.drafting.pacing import Pace
from edge_client.drafting.request import DraftedRequest

MAX_CHAIN = 8
"""Maximum committed tokens of a request that may share a pass with rows of other requests."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that has something to run."""

    number: int
    request: DraftedRequest
    nodes: list[Node]
    """Draft tokens, most probable first; none: committed tokens are next."""

    @property
    def order(self) -> tuple[float, int]:
        """Sort key, least first: committed tokens, then the most probable draft token, then the longest wait."""
        return (-self.nodes[0].survival if self.nodes else -1.0, self.request.turn)

    @property
    def survivals(self) -> list[float]:
        """Survival of each of its rows; 1 for committed tokens, which are certainly needed."""
        return [node.survival for node in self.nodes] or [1.0] * self.num_committed

    @property
    def num_committed(self) -> int:
        """Committed tokens that the drafter lacks."""
        return len(self.request.tree.tokens) - self.request.tree.num_entered

    @property
    def is_sharing(self) -> bool:
        """Whether it can share a pass: it has draft tokens, or a few committed tokens behind entries it already has."""
        return bool(self.nodes) or (self.request.tree.num_entered > 0 and self.num_committed <= MAX_CHAIN)


def rows_of_next_pass(
    waiting: Sequence[Waiting], pace: Pace, max_width: int, max_shared_rows: int
) -> list[tuple[Waiting, list[Node]]]:
    """The requests in the next pass, with the draft tokens that each runs; none: its committed tokens.

    `waiting` has at least one request. The pass is for the request that needs it most. Others join if they and it can
    share a pass: it then takes the most probable rows of all, as many as give the most tokens per second.
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
    for each in sharing:  # a chain is taken whole or not at all
        if not each.nodes and (not chosen or each.num_committed <= width):
            chosen.append((each, []))
            width -= each.num_committed
    drafted = Counter(place for _, _, place in [row for row in rows if sharing[row[2]].nodes][: max(0, width)])
    return chosen + [(sharing[place], sharing[place].nodes[:number]) for place, number in drafted.items()]
