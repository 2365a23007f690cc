"""Probing steps that do not seem best, because their cost was not measured for long. Pure."""

from dataclasses import dataclass
from enum import Enum

FIRST_PROBE_AFTER, PROBE_AFTER = 4, 64
"""Steps whose drafts did not seem worth verifying, before a few tokens are verified to measure the current cost. Few at
first, when the cost is hardly known, and twice as many each time."""
FORCED_AFTER = 2
"""A probe that would slow a request by more than allowed is made after this many times as many steps."""
PLAIN_PROBE_AFTER = 256
"""Consecutive steps that verified something, before one verifies nothing to measure its current cost."""


class Probe(Enum):
    """What the next step probes."""

    NONE = "none"
    VERIFY = "verify"
    """Verify a few tokens even if that seems not to pay, unless it would slow a request by more than allowed."""
    FORCED = "forced"
    """Verify a few tokens at any expected cost: else a cost once estimated too high would never be measured again."""
    PLAIN = "plain"
    """Verify nothing."""


@dataclass(slots=True)
class Probing:
    """The time since verifying, or not verifying, was last tried."""

    num_refused: int = 0
    """Consecutive steps in which drafts were there and none was verified."""
    num_verifying: int = 0
    """Consecutive steps that verified something."""
    after: int = FIRST_PROBE_AFTER
    """Such refused steps before the next probe."""

    @property
    def next(self) -> Probe:
        if self.num_refused >= self.after:
            return Probe.FORCED if self.num_refused >= FORCED_AFTER * self.after else Probe.VERIFY
        return Probe.PLAIN if self.num_verifying >= PLAIN_PROBE_AFTER else Probe.NONE

    def started(self, has_drafts: bool, is_verifying: bool) -> None:
        """Record a step that begins: whether there were drafts, and whether it verifies any."""
        self.num_verifying = self.num_verifying + 1 if is_verifying else 0
        if is_verifying:
            if self.num_refused >= self.after:  # this was a probe
                self.after = min(PROBE_AFTER, 2 * self.after)
            self.num_refused = 0
        elif has_drafts:
            self.num_refused += 1
