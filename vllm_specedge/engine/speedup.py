"""How fast tokens come, over how fast they would come without drafts; and the last steps, to look at. Pure."""

from collections import Counter, deque

from vllm_specedge.engine.requests import DraftedRequest
from vllm_specedge.wire.telemetry import Group

MEMORY = 0.98
"""Part of what is known that stays with each step."""
MAX_GROUPS = 128
"""Steps that are kept until they are reported, the last ones."""


class Speedup:
    """Seconds that tokens took, and that they would have taken in plain steps."""

    def __init__(self, counters: Counter[str]) -> None:
        self.groups: deque[Group] = deque(maxlen=MAX_GROUPS)
        self._counters = counters
        self._gained_s = self._spent_s = 0.0
        self._plain_s = 0.0
        """What all tokens so far would have taken without drafts."""
        self._last_end_s: float | None = None
        self._plain_step_s = 0.0
        """What the step that is told would have taken without drafts, and with all that could have been in it; 0 where
        that is not known."""
        self._num_rows = 1

    @property
    def ratio(self) -> float:
        """Tokens per second of late, over what plain steps are thought to give."""
        return self._gained_s / self._spent_s if self._spent_s > 0.0 else 1.0

    def stepped(self, started_s: float, ended_s: float, num_rows: int, plain_step_s: float) -> None:
        """A step is done that could have had `num_rows` requests; `plain_step_s`: 0 if it is not to be counted."""
        self._gained_s *= MEMORY
        self._spent_s *= MEMORY
        since_s = self._last_end_s if self._last_end_s is not None else started_s
        self._last_end_s = ended_s
        self._num_rows, self._plain_step_s = num_rows, plain_step_s
        if plain_step_s:
            self._spent_s += ended_s - since_s
            self._counters["decode_us"] += int((ended_s - since_s) * 1e6)
            self._counters["plain_decode_us"] = int(self._plain_s * 1e6)

    def committed(self, request: DraftedRequest, num_tokens: int, ended_s: float) -> None:
        if self._plain_step_s and request.committed_s:
            plain_s = num_tokens * self._plain_step_s / self._num_rows
            self._gained_s += plain_s
            self._plain_s += plain_s
            request.gained_s = MEMORY * request.gained_s + num_tokens * self._plain_step_s
            request.spent_s = MEMORY * request.spent_s + ended_s - request.committed_s
        request.committed_s = ended_s

    def idle(self) -> None:
        """No request is left: the time until the next one is nobody's."""
        self._last_end_s = None
