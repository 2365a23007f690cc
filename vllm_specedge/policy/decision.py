"""What the next step verifies, and which requests wait for a draft. Pure: values in, a decision out; no clock, no vLLM.

Everything is measured in tokens: a second is worth `rate` tokens, what the server generates in one. So a draft token is
worth verifying if its probability to be right exceeds the cost of the longer step, and a draft is worth waiting for if
its expected tokens exceed those not generated meanwhile.

Rule 1: only what raises expected tokens per second is done; a full server verifies nothing.
Rule 2: urgent work is not delayed. While prompts are prefilled or wait, no request is held, and drafts only get the
rest of the step; for the cache, see plan.Row.
Rule 3: no request is held longer than HoldLimits.hold_limit_s after its last token, for whatever draft.
Rule 4: the order of the given rows changes nothing. Among equals the more important comes first, then the older.
"""

from dataclasses import dataclass, field, replace

from vllm_specedge.policy.holding import holding
from vllm_specedge.policy.situation import HOLDING_MODES, Situation
from vllm_specedge.policy.verifying import budget


@dataclass(slots=True)
class Decision:
    """The decision for each candidate. Those in neither `lengths` nor `holds` decode plainly."""

    lengths: dict[str, int] = field(default_factory=dict)
    """Number of draft tokens to verify, by request."""
    holds: dict[str, float] = field(default_factory=dict)
    """Requests left out of the step, and until when at most."""
    wait_until_s: float | None = None
    """If set, no request runs before this time unless a draft arrives; then all are in `holds`."""


def decide(situation: Situation) -> Decision:
    """Decide what the next step does. The order of the rows does not matter."""
    ordered = replace(situation, rows=sorted(situation.rows, key=lambda row: (row.priority, row.order)))
    lengths = budget(ordered)
    if situation.limits.mode not in HOLDING_MODES or not ordered.rows:
        return Decision(lengths)
    holds, wait_until_s = holding(ordered, lengths)
    return Decision(lengths if wait_until_s is None else {}, holds, wait_until_s)
