"""A draft model's candidates at each position of recorded answers, for edges that replay them (replay.py).

On a machine with two cores a draft model beside a server slows it (`make bench-beside`). An edge elsewhere does not. So
the draft model reads the answers beforehand, and an edge that replays its candidates waits for the time of its passes,
but leaves the machine to the server.
"""

import time

from edge_client.drafters import Drafter
from edge_client.drafters.profile import Clock, profile
from harness.replay import Recording


class DraftReader:
    """A draft model that reads answers, and the times of its passes."""

    def __init__(self, drafter: Drafter, clock: Clock = time.perf_counter) -> None:
        self._drafter = drafter
        self._times = profile(drafter, clock)

    @property
    def pass_s(self) -> float:
        """Seconds of a pass of one row."""
        return self._times[1]

    @property
    def row_s(self) -> float:
        """Seconds that each further row adds to a pass, on average up to the widest."""
        widest = max(self._times)
        return max(0.0, self._times[widest] - self._times[1]) / max(1, widest - 1)

    def read(self, recording: Recording, num_candidates: int) -> Recording:
        """The recording with the draft's candidates at each position, each after the true past."""
        sequence = self._drafter.open()
        known = list(recording.prompt)
        guesses = []
        for token in recording.answer:
            guesses.append(tuple(sequence.append(known, num_candidates)))
            known = [token]
        return recording._replace(guesses=tuple(guesses))
