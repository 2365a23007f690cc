"""Steps while no request can have a draft. Pure.

Most servers have no edge most of the time. Their steps take no time per request here: few are planned and measured, and
what they decide is booked a few times a second, when there can be drafts, and when a request ends.
"""

from vllm_specedge.engine.ledger import RequestLedger
from vllm_specedge.engine.requests import DraftedRequest
from vllm_specedge.engine.speedup import Speedup

MEASURED_EVERY = 4
"""One step in this many is planned, and its cost learnt."""
BOOKED_EVERY_S = 0.25
"""Seconds after which decided tokens are booked at the latest, for the metrics."""


class PlainSteps:
    """The plain steps that were not measured, and the tokens that were not booked."""

    def __init__(self, ledger: RequestLedger, speedups: Speedup) -> None:
        self._ledger = ledger
        self._speedups = speedups
        self._num_unmeasured = 0
        """Steps since the last measured one."""
        self._plain_step_s = 0.0
        """Seconds of a step like that one."""
        self._ended_s = 0.0
        """End of the last step."""
        self._booked_s = 0.0
        """Time at which all tokens were booked."""
        self._has_unbooked = False
        """Whether a step has ended since. Tokens of one that has not are left: it may have verified drafts of an edge
        that is gone."""

    @property
    def is_measurement_due(self) -> bool:
        """Whether the next step should be measured."""
        return self._num_unmeasured >= MEASURED_EVERY - 1

    def measured(self, plain_step_s: float) -> None:
        """Record a step that was measured, and the seconds of a plain step like it."""
        self._num_unmeasured, self._plain_step_s = 0, plain_step_s

    def unmeasured(self, started_s: float, ended_s: float, has_prompts: bool) -> None:
        """Record a step that was not measured. The one after a prompt should be: it may have more of it."""
        self._num_unmeasured = MEASURED_EVERY if has_prompts else self._num_unmeasured + 1
        self._speedups.unmeasured(started_s, ended_s, not has_prompts)

    def ended(self, num_requests: int, ended_s: float) -> None:
        """Record the end of a step that decided a token of each of its requests."""
        self._ended_s, self._has_unbooked = ended_s, True
        self._speedups.all_committed(num_requests)
        if ended_s - self._booked_s >= BOOKED_EVERY_S:
            self.book_all()

    def book_all(self) -> None:
        if not self._has_unbooked:
            return
        self._booked_s, self._has_unbooked = self._ended_s, False
        for request in self._ledger:
            self.book(request)

    def book(self, request: DraftedRequest) -> None:
        """Book the tokens that were decided since the last time, each in a step of its own."""
        num_steps = len(request.tokens) - request.tree.length
        if num_steps > 0:
            _book(request, num_steps, num_steps)
            self._speedups.booked(request, num_steps, self._plain_step_s, self._ended_s)

    def commit(self, request: DraftedRequest, ended_s: float) -> None:
        """Book a step of a request that has neither an edge nor a draft, while others have."""
        num_tokens = len(request.tokens) - request.tree.length
        _book(request, num_tokens, 1)
        self._speedups.committed(request, num_tokens, ended_s)
        request.held_since_s = None


def _book(request: DraftedRequest, num_tokens: int, num_steps: int) -> None:
    request.tree.skip(num_tokens)
    request.count("committed_tokens", num_tokens)
    request.count("steps", num_steps)
