"""Steps against what seems best, since what they cost was not seen for long. Pure."""

from dataclasses import dataclass
from enum import Enum

FIRST_PROBE_AFTER, PROBE_AFTER = 4, 64
"""Steps with drafts that did not seem worth verifying; then a little is verified, to see what that costs now. Soon at
first, when what it costs is hardly known, and after twice as many steps each time."""
FORCED_AFTER = 2
"""A probe that would slow somebody by more than allowed waits for this many times as many steps, and is made then."""
PLAIN_PROBE_AFTER = 256
"""Steps in a row that verified something; then one does not, to see what that costs now."""


class Probe(Enum):
    """What the next step tries."""

    NONE = "none"
    VERIFY = "verify"
    """A little, even where it seems not to pay, as long as nobody seems to be slowed by more than allowed."""
    FORCED = "forced"
    """A little, whatever it seems to cost: else a cost that was once thought too high would never be seen again."""
    PLAIN = "plain"
    """Nothing."""


@dataclass(slots=True)
class Probing:
    """How long verifying, or leaving it, has not been tried."""

    num_refused: int = 0
    """Steps in a row in which drafts were there and none was verified."""
    num_verifying: int = 0
    """Steps in a row that verified something."""
    after: int = FIRST_PROBE_AFTER
    """Refused steps before the next probe."""

    @property
    def next(self) -> Probe:
        if self.num_refused >= self.after:
            return Probe.FORCED if self.num_refused >= FORCED_AFTER * self.after else Probe.VERIFY
        return Probe.PLAIN if self.num_verifying >= PLAIN_PROBE_AFTER else Probe.NONE

    def started(self, has_drafts: bool, is_verifying: bool) -> None:
        """A step began: whether there were drafts, and whether it verifies any."""
        self.num_verifying = self.num_verifying + 1 if is_verifying else 0
        if is_verifying:
            if self.num_refused >= self.after:  # this was a probe
                self.after = min(PROBE_AFTER, 2 * self.after)
            self.num_refused = 0
        elif has_drafts:
            self.num_refused += 1
