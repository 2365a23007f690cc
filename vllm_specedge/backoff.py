"""Pauses before a retry, longer after each failure (docs/protocol.md, "Pauses"). Pure."""

from dataclasses import dataclass

MAX_PAUSE_S = 30.0


@dataclass(slots=True)
class Backoff:
    """The pause before each retry. If many clients retry together, each waits a random time between 0 and that."""

    first_s: float = 0.5
    """Doubled with each try."""
    limit_s: float = MAX_PAUSE_S
    lasting_s: float = 60.0
    """A try that lasted this many seconds has not failed, whatever ended it."""
    num_ended: int = 0
    """Tries that ended since one lasted that long."""

    def ended(self, lasted_s: float) -> float:
        """Record a try that ended after `lasted_s`. Returns the pause before the next, in seconds."""
        if lasted_s >= self.lasting_s:
            self.num_ended = 0
        self.num_ended += 1
        return min(self.limit_s, self.first_s * 2.0 ** min(self.num_ended, 32))
