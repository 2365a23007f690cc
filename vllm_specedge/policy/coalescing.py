"""Which commits are sent to an edge immediately, and which are coalesced. Pure.

Unverified drafts cost something, too: each commit is work for the engine, the gateway and the edge. So if a request's
drafts were not verified for a while, its commits are coalesced: the edge gets many tokens at once. The same holds for
all requests of an edge none of whose drafts were verified for long, because they are wrong or too late. If a later
proposal is verified because it pays by then, coalescing ends.
"""

from dataclasses import dataclass

COALESCE_AFTER = 8
"""Commits of steps that left a draft unverified, before coalescing starts; more than two probes
(probing.FIRST_PROBE_AFTER) come first."""
UNUSED_AFTER = 32
"""Consecutive steps that verified nothing of an edge for any of its requests, before coalescing starts."""
COALESCED_TOKENS = 32
"""Tokens to collect before they are published."""


@dataclass(slots=True)
class Coalescing:
    """The commits of one request since it was assigned to its edge."""

    num_refused: int = 0
    """Commits of steps that left its edge's draft unverified, since one was last verified."""
    num_collected: int = 0
    """Tokens not published yet."""
    is_edge_unused: bool = False
    """Whether no draft of its edge was verified for long."""

    @property
    def is_due(self) -> bool:
        """Whether to publish the collected tokens now."""
        is_coalescing = self.num_refused > COALESCE_AFTER or self.is_edge_unused
        return not is_coalescing or self.num_collected >= COALESCED_TOKENS

    def committed(self, num_tokens: int, is_refused: bool, is_verified: bool, num_unused: int = 0) -> None:
        """Record the tokens that a step decided.

        `is_refused`: a draft was there when the step was planned, and was not verified. `is_verified`: one was
        verified. `num_unused`: consecutive steps that verified nothing for any request of the edge.
        """
        if is_verified:
            self.num_refused = 0
        self.num_refused += is_refused
        self.num_collected += num_tokens
        self.is_edge_unused = num_unused > UNUSED_AFTER

    def published(self) -> None:
        self.num_collected = 0
