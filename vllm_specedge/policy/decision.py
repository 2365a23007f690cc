"""What the next step verifies, and who waits for a draft. Pure: plain values in, a decision out; no clock, no vLLM.

Everything is counted in tokens: a second is worth `rate` of them, what the server makes in one. So a draft token is
worth verifying if the chance that it is right exceeds what the step grows by, and a draft is worth waiting for if what
it brings exceeds what is not made meanwhile.

Rule 1: what rises expected tokens per second is done, nothing else; a server that is full verifies nothing.
Rule 2: whoever has to be served first is not delayed: while prompts are computed or wait nobody is held, and drafts get
only what they leave of the step; of the cache, see plan.Row.
Rule 3: nobody is held longer than HoldLimits.hold_limit_s after its last token, whoever it is held for.
Rule 4: the order in which rows are given changes nothing; among equals the more important, then the older comes first.
"""

from dataclasses import dataclass, field, replace

from vllm_specedge.policy.holding import holding
from vllm_specedge.policy.situation import HOLDING_MODES, Situation
from vllm_specedge.policy.verifying import budget


@dataclass(slots=True)
class Decision:
    """For each candidate that is in neither: decode plainly."""

    lengths: dict[str, int] = field(default_factory=dict)
    """Draft tokens to verify."""
    holds: dict[str, float] = field(default_factory=dict)
    """Left out of the step, until when at most."""
    wait_until_s: float | None = None
    """Nobody runs before, unless a draft arrives: then all are in `holds`."""


def decide(situation: Situation) -> Decision:
    """What the next step does. The order in which rows are given decides nothing."""
    ordered = replace(situation, rows=sorted(situation.rows, key=lambda row: (row.priority, row.order)))
    lengths = budget(ordered)
    if situation.limits.mode not in HOLDING_MODES or not ordered.rows:
        return Decision(lengths)
    holds, wait_until_s = holding(ordered, lengths)
    return Decision(lengths if wait_until_s is None else {}, holds, wait_until_s)
