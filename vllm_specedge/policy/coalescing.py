"""Of which commits an edge hears at once, and which are collected. Pure.

A draft that is not verified costs all the same: each commit is work for the engine, the gateway and the edge. So a
request whose drafts were left unverified for a while rests: its tokens are collected, and its edge hears of many at
once. So do all requests of an edge of which nothing was verified for long, whose drafts are wrong or too late before
anybody could refuse them. What the edge then proposes is verified if that pays by now, which ends the rest.
"""

from dataclasses import dataclass

REST_AFTER = 8
"""Commits of steps that left a draft unverified; more than two probes (book.FIRST_PROBE_AFTER) come before."""
UNUSED_AFTER = 32
"""Steps in a row that verified nothing for any of the requests that an edge answers."""
REST_TOKENS = 32
"""Collected before they are published."""


@dataclass(slots=True)
class Rest:
    """Of one request."""

    num_refused: int = 0
    """Such commits since a draft of its edge's was last verified."""
    num_collected: int = 0
    """Tokens since the last that are published."""

    def committed(self, num_tokens: int, is_refused: bool, is_verified: bool, num_unused: int = 0) -> bool:
        """A step decided so many tokens; whether all that were collected are to be published now.

        `is_refused`: a draft was there when the step was planned, and was left out. `is_verified`: one was verified.
        `num_unused`: so many steps in a row verified none for any request of its edge.
        """
        if is_verified:
            self.num_refused = 0
        self.num_refused += is_refused
        self.num_collected += num_tokens
        is_resting = self.num_refused > REST_AFTER or num_unused > UNUSED_AFTER
        if is_resting and self.num_collected < REST_TOKENS:
            return False
        self.num_collected = 0
        return True
