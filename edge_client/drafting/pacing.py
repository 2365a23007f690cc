"""An edge's measurements of itself and its server, and how deep and wide to draft and when to send a frame.

Pure: times come as arguments. Rule: nothing here is tuned to a machine; a value not yet measured has a stated prior.
"""

import math
from dataclasses import dataclass, field

from edge_client.drafting.pass_times import PassTimes
from vllm_specedge.estimators import Smoothed

NUM_BINS = 10
PRIOR_WEIGHT = 4.0
MAX_SEEN = 400.0
UPLINK_BYTES_PER_TOKEN = 128.0
"""Default uplink budget in bytes per generated token: in simulation more gains no speed, 23 loses some."""
HTTP2_HEADER_BYTES = 9
FRAME_BYTES = 20
"""Size of a Propose without its tokens, HTTP/2 header included."""
MIN_FLOOR, MAX_FLOOR = 0.03, 0.5
FLOOR_GAIN = 0.1
COST_MEMORY = 0.95
SHORTER_GAIN, LONGER_GAIN = 0.5, 0.03
MARGIN_S = 0.002


@dataclass(slots=True)
class Calibration:
    """The measured probability that a token is right, by the draft's claimed probability, which is also the prior."""

    _seen: list[float] = field(default_factory=lambda: [0.0] * NUM_BINS)
    _right: list[float] = field(default_factory=lambda: [0.0] * NUM_BINS)

    def observe(self, claimed: float, is_right: bool) -> None:
        index = self._bin(claimed)
        if self._seen[index] >= MAX_SEEN:  # older observations count less
            self._seen[index] /= 2
            self._right[index] /= 2
        self._seen[index] += 1
        self._right[index] += is_right

    def __call__(self, claimed: float) -> float:
        index = self._bin(claimed)
        return (PRIOR_WEIGHT * claimed + self._right[index]) / (PRIOR_WEIGHT + self._seen[index])

    @staticmethod
    def _bin(claimed: float) -> int:
        return min(NUM_BINS - 1, max(0, int(claimed * NUM_BINS)))


@dataclass(slots=True)
class Pace:
    """One edge's measurements."""

    pass_s: PassTimes = field(default_factory=PassTimes)
    """Seconds of a forward pass by its rows."""
    calibration: Calibration = field(default_factory=Calibration)
    sampled_calibration: Calibration = field(default_factory=Calibration)
    """Calibration for sampled requests, where noise chooses among the draft's candidates."""
    rtt_s: float = 0.0
    round_s: Smoothed = field(default_factory=Smoothed)
    """Mean seconds from one commit of a request to the next."""
    short_round_s: float | None = None
    """Seconds of a short round: follows shorter rounds at once, longer ones slowly."""
    uplink_bytes_per_token: float = UPLINK_BYTES_PER_TOKEN
    """Limit on the average uplink bytes per generated token, HTTP/2 frame headers included."""
    max_tokens_per_s: float = 0.0
    """Limit on draft tokens per second; 0: none."""
    floor: float = 0.05
    """Minimum survival of a node to be drafted or sent; adjusted to keep to `uplink_bytes_per_token`."""
    share: float = 1.0
    """Maximum share of the time to draft, below 1 if the machine gets too hot."""
    rest_until_s: float = 0.0
    """No pass starts before this time, to keep to `max_tokens_per_s` and `share`."""
    _bytes: float = 0.0
    _tokens: float = 0.0

    def drafted(self, num_tokens: int, started_s: float, took_s: float = 0.0) -> None:
        """Record a pass and its draft tokens. The next pass may have to wait until `rest_until_s`."""
        if self.share < 1.0:
            self.rest_until_s = max(self.rest_until_s, started_s + took_s / self.share)
        if self.max_tokens_per_s:
            self.rest_until_s = max(self.rest_until_s, started_s) + num_tokens / self.max_tokens_per_s

    def round_took(self, seconds: float) -> None:
        """Record the time from the previous commit of a request to this one."""
        self.round_s.observe(seconds)
        before_s = self.short_round_s if self.short_round_s is not None else seconds
        gain = SHORTER_GAIN if seconds < before_s else LONGER_GAIN
        self.short_round_s = before_s + gain * (seconds - before_s)

    def sent(self, num_bytes: int) -> None:
        """Record a proposal's bytes. Proposals that the link dropped do not count."""
        self._bytes += num_bytes + HTTP2_HEADER_BYTES

    def committed(self, num_tokens: int) -> None:
        """Record generated tokens, and adjust `floor` by what their proposals cost."""
        self._tokens += num_tokens
        surplus = self._bytes / self._tokens / self.uplink_bytes_per_token - 1.0
        self.floor = min(MAX_FLOOR, max(MIN_FLOOR, self.floor * (1.0 + FLOOR_GAIN * min(surplus, 1.0))))
        self._bytes *= COST_MEMORY
        self._tokens *= COST_MEMORY

    def horizon(self, max_draft: int, credit: int) -> int:
        """How many positions past the last commit are useful now.

        In each step the server verifies up to `max_draft` tokens and adds one more. A commit reaches this edge half a
        round trip late, and a proposal takes as long back, so the edge also drafts for the steps during that time.
        """
        rounds = 1.0 + self.rtt_s / self.round_s.mean if self.round_s.mean else 1.0
        return min(credit, max_draft + math.ceil((max_draft + 1) * rounds))

    def width(self, survivals: list[float], max_width: int) -> int:
        """How many nodes to run in one pass for the most useful tokens per second. `survivals` are descending."""
        best, best_rate, total = 1, 0.0, 0.0
        for rows, survival in enumerate(survivals[:max_width], 1):
            total += survival
            rate = total / max(self.pass_s(rows), 1e-6)
            if rate > best_rate * (1 + 1e-9):
                best, best_rate = rows, rate
        return best

    def is_enough(self, survivals: list[float]) -> bool:
        """Whether to propose a trunk with these survivals to a server that has no draft.

        The server may be waiting. The trunk is sent once one more token would raise the round's expected tokens by a
        smaller fraction than its pass would lengthen the round.
        """
        expected = 1.0 + sum(survivals)
        round_s = self.rtt_s + (self.round_s.mean or 0.0) + len(survivals) * self.pass_s(1)
        before = survivals[-2] if len(survivals) > 1 else 1.0
        return survivals[-1] * survivals[-1] / before * round_s <= expected * self.pass_s(1)

    def is_worth_a_frame(self, expected: float) -> bool:
        """Whether this many expected tokens are worth the overhead of a frame."""
        return expected * self.uplink_bytes_per_token >= FRAME_BYTES

    def deadline_s(self, committed_s: float, now_s: float) -> float:
        """When to send, at the latest, for the next step of a server that already has a draft.

        That step begins about one round after the last one. The commit arrived here half a round trip late, and a
        proposal takes as long. If it is too late for that step, the deadline is for a later one.
        """
        round_s = self.short_round_s
        if not round_s:
            return now_s
        at_s = committed_s + round_s - self.rtt_s - MARGIN_S
        return at_s if at_s >= now_s else at_s + math.ceil((now_s - at_s) / round_s) * round_s
