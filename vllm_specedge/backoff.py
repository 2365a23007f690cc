"""Pauses before one more try, longer after each that failed (docs/protocol.md, "Pauses"). Pure."""

from dataclasses import dataclass

MAX_PAUSE_S = 30.0


@dataclass(slots=True)
class Backoff:
    """How long to pause; whoever many do alike takes a random time between 0 and that."""

    first_s: float = 0.5
    """Doubled with each try."""
    limit_s: float = MAX_PAUSE_S
    lasting_s: float = 60.0
    """What lasted this long has not failed, whatever ended it."""
    num_ended: int = 0
    """Tries that ended since one lasted."""

    def ended(self, lasted_s: float) -> float:
        """A try ended after so many seconds. Returns the pause before the next, in seconds."""
        if lasted_s >= self.lasting_s:
            self.num_ended = 0
        self.num_ended += 1
        return min(self.limit_s, self.first_s * 2.0 ** min(self.num_ended, 32))
