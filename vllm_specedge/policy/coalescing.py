"""Which commits an edge is told at once, and which are coalesced. Pure.

A draft that is not verified costs all the same: each commit is work for the engine, the gateway and the edge. So the
commits of a request whose drafts were left unverified for a while are coalesced: its edge is told many tokens at once.
So are those of all requests of an edge of which nothing was verified for long, whose drafts are wrong or too late
before anybody could refuse them. What the edge then proposes is verified if that pays by now, which ends it.
"""

from dataclasses import dataclass

COALESCE_AFTER = 8
"""Commits of steps that left a draft unverified; more than two probes (probing.FIRST_PROBE_AFTER) come before."""
UNUSED_AFTER = 32
"""Steps in a row that verified nothing for any of the requests that an edge answers."""
COALESCED_TOKENS = 32
"""Tokens that are collected before they are published."""


@dataclass(slots=True)
class Coalescing:
    """The commits of one request since it was given to its edge."""

    num_refused: int = 0
    """Commits of steps that left its edge's draft unverified, since one was last verified."""
    num_collected: int = 0
    """Tokens since those last published."""
    is_edge_unused: bool = False
    """Nothing of its edge was verified for long."""

    @property
    def is_due(self) -> bool:
        """Whether all that was collected is to be published now."""
        is_coalescing = self.num_refused > COALESCE_AFTER or self.is_edge_unused
        return not is_coalescing or self.num_collected >= COALESCED_TOKENS

    def committed(self, num_tokens: int, is_refused: bool, is_verified: bool, num_unused: int = 0) -> None:
        """A step decided this many tokens.

        `is_refused`: a draft was there when the step was planned, and was left out. `is_verified`: one was verified.
        `num_unused`: steps in a row that verified nothing for any request of the edge.
        """
        if is_verified:
            self.num_refused = 0
        self.num_refused += is_refused
        self.num_collected += num_tokens
        self.is_edge_unused = num_unused > UNUSED_AFTER

    def published(self) -> None:
        self.num_collected = 0
