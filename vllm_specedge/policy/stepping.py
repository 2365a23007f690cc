"""Whether the engine's steps run synchronously, so that drafts can be verified, or asynchronously. Pure.

An asynchronous engine schedules a step while the previous one is computed. There is no gap between two steps, but the
tokens of the previous step are not known when drafts would have to be chosen. A synchronous step knows them, and is
longer by the gap (StepCost.gap_s).

Rule 1: without useful drafts every step is asynchronous, as in plain vLLM.
Rule 2: no switch for a single step: each switch leaves the pipeline empty once.
Rule 3: measurements count more than expectations: if synchronous steps made fewer tokens per second than plain ones
would have, the next try comes later each time.
Rule 4: no try is too short to measure something, and none costs more than a small part of the pause before it.
"""

from dataclasses import dataclass

WANTED_BEFORE = 2
"""Consecutive asynchronous steps that should have been synchronous, before the switch."""
UNWANTED_BEFORE = 6
"""Consecutive synchronous steps with nothing to verify and no draft to wait for, before the switch back; one is enough
if the try was judged already and does not pay."""
JUDGED_AFTER, PAYS_AFTER = 12, 48
"""Synchronous steps after which the measured gain decides whether to go on: it must be LEAST_GAIN first, 1 later."""
LEAST_GAIN = 0.9
FIRST_PAUSE, LAST_PAUSE = 64, 4096
"""Asynchronous steps between a try that did not pay and the next; doubled each time."""
TRIED_PER_PAUSED = 1 / 32
"""Steps of a try before it is judged, per step of the pause before it; at most JUDGED_AFTER."""


@dataclass(slots=True)
class Stepping:
    """Whether the next steps are synchronous."""

    is_synchronous: bool = False
    num_switches: int = 0
    _num_against: int = 0
    """Consecutive steps that spoke against the present state."""
    _num_steps: int = 0
    """Synchronous steps since the last switch."""
    _pause: int = FIRST_PAUSE
    """Asynchronous steps before the next try, if this one does not pay."""
    _num_paused: int = 0
    """Asynchronous steps left before the next try."""
    _judged_after: int = JUDGED_AFTER

    def planned(self, is_useful: bool, gain: float) -> None:
        """Record a planned step. `is_useful`: a synchronous step would verify something now, or wait for a draft.
        `gain`: recent tokens per second of synchronous steps, relative to asynchronous ones."""
        if self.is_synchronous:
            self._after_synchronous(is_useful, gain)
        elif self._num_paused:
            self._num_paused -= 1
        else:
            self._num_against = self._num_against + 1 if is_useful else 0
            if self._num_against >= WANTED_BEFORE:
                self._switch()

    def _after_synchronous(self, is_useful: bool, gain: float) -> None:
        self._num_steps += 1
        self._num_against = 0 if is_useful else self._num_against + 1
        enough = 1 if self._num_steps >= self._judged_after else UNWANTED_BEFORE
        if self._has_failed(gain) or (gain < 1.0 and self._num_against >= enough):
            self._judged_after = min(JUDGED_AFTER, int(self._pause * TRIED_PER_PAUSED))
            self._num_paused, self._pause = self._pause, min(LAST_PAUSE, 2 * self._pause)
            self._switch()
            return
        if self._num_steps >= PAYS_AFTER:
            self._pause, self._judged_after = FIRST_PAUSE, JUDGED_AFTER
        if self._num_against >= UNWANTED_BEFORE:
            self._switch()

    def _has_failed(self, gain: float) -> bool:
        if self._num_steps >= PAYS_AFTER:
            return gain < 1.0
        return self._num_steps >= self._judged_after and gain < LEAST_GAIN

    def _switch(self) -> None:
        self.is_synchronous = not self.is_synchronous
        self.num_switches += 1
        self._num_against = self._num_steps = 0
