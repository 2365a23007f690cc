"""The speedup: the speed of tokens relative to their speed without drafts; and the last steps, for display. Pure."""

from collections import Counter, deque
from dataclasses import dataclass

from vllm_specedge.engine.requests import DraftedRequest
from vllm_specedge.wire.telemetry import Group

MEMORY = 0.98
"""Share of the sums that each step keeps."""
OLD_TRY = 0.1
"""Share of the sums of synchronous steps that is kept when such steps begin again after asynchronous ones."""
FIRST_STEP = 2.0
"""Most that the first step that verifies counts for, in plain steps. Kernels may be compiled for it, or memory
allocated; if an asynchronous engine took that for the cost of synchronous steps, it would not make another for long."""
MAX_GROUPS = 128
"""Maximum steps kept until they are reported, the last ones."""


@dataclass(slots=True)
class _Ratio:
    """Ratio of the seconds that the tokens of some steps would have taken in plain steps to those that they took."""

    gained_s: float = 0.0
    spent_s: float = 0.0

    @property
    def value(self) -> float:
        return self.gained_s / self.spent_s if self.spent_s > 0.0 else 1.0

    def decay(self, kept: float = MEMORY) -> None:
        self.gained_s *= kept
        self.spent_s *= kept


class Speedup:
    """Sums of the seconds that tokens took, and that they would have taken in plain steps."""

    def __init__(self, counters: Counter[str]) -> None:
        self.groups: deque[Group] = deque(maxlen=MAX_GROUPS)
        self._counters = counters
        self._all = _Ratio()
        self._waiting, self._running = _Ratio(), _Ratio()
        """Ratios of synchronous steps (with a gap) and of the others."""
        self._has_gap = False
        self._plain_s = 0.0
        """Seconds that all tokens so far would have taken without drafts."""
        self._last_end_s: float | None = None
        self._plain_step_s = 0.0
        """Seconds that the recorded step would have taken without drafts and with all requests that could have been in
        it; 0 if not known."""
        self._num_rows = 1

    def take_groups(self) -> list[Group]:
        """The steps done since the previous call, or the last ones of them."""
        return [self.groups.popleft() for _ in range(len(self.groups))]  # another thread may add one meanwhile

    @property
    def ratio(self) -> float:
        """Recent tokens per second, relative to the estimate for plain steps."""
        return self._all.value

    @property
    def gain_of_waiting(self) -> float:
        """Tokens per second of synchronous steps, relative to those of the others, as far as known."""
        running = self._running.value
        return self._waiting.value / running if running > 0.0 else 1.0

    def stepped(
        self,
        started_s: float,
        ended_s: float,
        num_rows: int,
        plain_step_s: float,
        has_gap: bool = False,
        is_first: bool = False,
    ) -> None:
        """Record a step that could have had `num_rows` requests. `plain_step_s`: 0 if the step does not count.
        `is_first`: it is the engine's first that verifies."""
        if has_gap and not self._has_gap:
            self._waiting.decay(OLD_TRY)
        self._has_gap = has_gap
        self._all.decay()
        self._of_kind.decay()
        since_s = self._last_end_s if self._last_end_s is not None else started_s
        self._last_end_s = ended_s
        self._num_rows, self._plain_step_s = num_rows, plain_step_s
        if plain_step_s:
            spent_s = min(ended_s - since_s, FIRST_STEP * plain_step_s) if is_first else ended_s - since_s
            self._all.spent_s += spent_s
            self._of_kind.spent_s += spent_s
            self._counters["decode_us"] += int((ended_s - since_s) * 1e6)
            self._counters["plain_decode_us"] = int(self._plain_s * 1e6)

    def committed(self, request: DraftedRequest, num_tokens: int, ended_s: float) -> None:
        if self._plain_step_s and request.committed_s:
            plain_s = num_tokens * self._plain_step_s / self._num_rows
            self._add(plain_s)
            request.gained_s = MEMORY * request.gained_s + num_tokens * self._plain_step_s
            request.spent_s = MEMORY * request.spent_s + ended_s - request.committed_s
        request.committed_s = ended_s

    def unmeasured(self, started_s: float, ended_s: float, is_decoding: bool) -> None:
        """Record a step without drafts whose size is not known: its tokens took the time that they take in plain steps.
        `is_decoding`: it had no prompts."""
        if is_decoding:
            took_s = ended_s - (self._last_end_s if self._last_end_s is not None else started_s)
            self._plain_s += took_s
            self._counters["decode_us"] += int(took_s * 1e6)
            self._counters["plain_decode_us"] = int(self._plain_s * 1e6)
        self._last_end_s = ended_s
        self._plain_step_s = 0.0

    def all_committed(self, num_requests: int) -> None:
        """Record that each of a step's requests has got one token."""
        if self._plain_step_s:
            self._add(num_requests * self._plain_step_s / self._num_rows)

    def booked(self, request: DraftedRequest, num_steps: int, plain_step_s: float, ended_s: float) -> None:
        """Record steps of a request that took what plain steps take: its speedup moves towards 1."""
        kept = MEMORY**num_steps
        seconds = (1 - kept) / (1 - MEMORY) * plain_step_s
        request.gained_s = kept * request.gained_s + seconds
        request.spent_s = kept * request.spent_s + seconds
        request.committed_s = ended_s

    def _add(self, plain_s: float) -> None:
        self._all.gained_s += plain_s
        self._of_kind.gained_s += plain_s
        self._plain_s += plain_s

    @property
    def _of_kind(self) -> "_Ratio":
        return self._waiting if self._has_gap else self._running

    def idle(self) -> None:
        """Record that no request is left: the time until the next one does not count."""
        self._last_end_s = None
