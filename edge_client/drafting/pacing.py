"""What an edge measures of itself and of its server, and what follows: how deep, how wide, and in how large frames.

Pure: times come as arguments. Rule: nothing here is tuned to a machine; what is not measured yet has a stated prior.
"""

import math
from dataclasses import dataclass, field

from edge_client.drafting.pass_times import PassTimes
from vllm_specedge.estimators import Smoothed

NUM_BINS = 10
PRIOR_WEIGHT = 4.0
MAX_SEEN = 400.0
UPLINK_BYTES_PER_TOKEN = 128.0
"""What a generated token may cost on the way up by default: in simulation more buys no speed, 23 costs some."""
HTTP2_HEADER_BYTES = 9
FRAME_BYTES = 20
"""Of a Propose without its tokens, with its HTTP/2 header."""
MIN_FLOOR, MAX_FLOOR = 0.03, 0.5
FLOOR_GAIN = 0.1
COST_MEMORY = 0.95
SHORTER_GAIN, LONGER_GAIN = 0.5, 0.03
MARGIN_S = 0.002


@dataclass(slots=True)
class Calibration:
    """How often tokens are right that the draft calls so probable: measured, with the claim itself as the prior."""

    _seen: list[float] = field(default_factory=lambda: [0.0] * NUM_BINS)
    _right: list[float] = field(default_factory=lambda: [0.0] * NUM_BINS)

    def observe(self, claimed: float, is_right: bool) -> None:
        index = self._bin(claimed)
        if self._seen[index] >= MAX_SEEN:  # what is old counts less
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
    """A forward pass of so many rows."""
    calibration: Calibration = field(default_factory=Calibration)
    sampled_calibration: Calibration = field(default_factory=Calibration)
    """Of requests that the target samples, where noise chooses among the draft's candidates."""
    rtt_s: float = 0.0
    round_s: Smoothed = field(default_factory=Smoothed)
    """From one commit of a request to the next."""
    short_round_s: float | None = None
    """A short one: follows shorter ones at once, longer ones slowly."""
    uplink_bytes_per_token: float = UPLINK_BYTES_PER_TOKEN
    """What a generated token may cost on the way up, on average, the HTTP/2 frame headers included."""
    max_tokens_per_s: float = 0.0
    """Draft no faster; 0: as fast as it goes."""
    floor: float = 0.05
    """Draft tokens that are less probable are not drafted; follows from what they may cost."""
    share: float = 1.0
    """The part of the time to draft in, at most: less where it gets too hot."""
    rest_until_s: float = 0.0
    """No pass before, to keep to `max_tokens_per_s` and `share`."""
    _bytes: float = 0.0
    _tokens: float = 0.0

    def drafted(self, num_tokens: int, started_s: float, took_s: float = 0.0) -> None:
        """A pass that started then drafted so many tokens: the next one may have to wait, by `rest_until_s`."""
        if self.share < 1.0:
            self.rest_until_s = max(self.rest_until_s, started_s + took_s / self.share)
        if self.max_tokens_per_s:
            self.rest_until_s = max(self.rest_until_s, started_s) + num_tokens / self.max_tokens_per_s

    def round_took(self, seconds: float) -> None:
        """A commit followed the one before it after so long."""
        self.round_s.observe(seconds)
        before_s = self.short_round_s if self.short_round_s is not None else seconds
        gain = SHORTER_GAIN if seconds < before_s else LONGER_GAIN
        self.short_round_s = before_s + gain * (seconds - before_s)

    def sent(self, num_bytes: int) -> None:
        """A proposal went up, of so many bytes; one that the link dropped did not."""
        self._bytes += num_bytes + HTTP2_HEADER_BYTES

    def committed(self, num_tokens: int) -> None:
        """So many tokens were generated: what is drafted next follows from what their proposals cost."""
        self._tokens += num_tokens
        surplus = self._bytes / self._tokens / self.uplink_bytes_per_token - 1.0
        self.floor = min(MAX_FLOOR, max(MIN_FLOOR, self.floor * (1.0 + FLOOR_GAIN * min(surplus, 1.0))))
        self._bytes *= COST_MEMORY
        self._tokens *= COST_MEMORY

    def horizon(self, max_draft: int, credit: int) -> int:
        """How many positions past the last commit are of use now.

        The server verifies `max_draft` and takes one more a step; this edge sees a commit half a round trip late, and
        is heard as much later, so it drafts for the steps of that time too.
        """
        rounds = 1.0 + self.rtt_s / self.round_s.mean if self.round_s.mean else 1.0
        return min(credit, max_draft + math.ceil((max_draft + 1) * rounds))

    def width(self, survivals: list[float], max_width: int) -> int:
        """How many of the most probable nodes (descending) to run in one pass: most useful tokens a second."""
        best, best_rate, total = 1, 0.0, 0.0
        for rows, survival in enumerate(survivals[:max_width], 1):
            total += survival
            rate = total / max(self.pass_s(rows), 1e-6)
            if rate > best_rate * (1 + 1e-9):
                best, best_rate = rows, rate
        return best

    def is_enough(self, survivals: list[float]) -> bool:
        """Whether a trunk, so probable to survive as far as each token, is to be proposed to a server that has nothing.

        It may be waiting: it hears as soon as one more token would not raise the tokens of this round by as much as
        the pass for it makes the round longer.
        """
        expected = 1.0 + sum(survivals)
        round_s = self.rtt_s + (self.round_s.mean or 0.0) + len(survivals) * self.pass_s(1)
        before = survivals[-2] if len(survivals) > 1 else 1.0
        return survivals[-1] * survivals[-1] / before * round_s <= expected * self.pass_s(1)

    def is_worth_a_frame(self, expected: float) -> bool:
        """Whether so many tokens that are expected to survive are worth what a frame costs beside them."""
        return expected * self.uplink_bytes_per_token >= FRAME_BYTES

    def deadline_s(self, committed_s: float, now_s: float) -> float:
        """By when to send what a server that has a draft could use in its next step.

        That step begins about a round after the last one, whose commit came here half a round trip late; a proposal
        takes as long. What would be too late for it is for the one after.
        """
        round_s = self.short_round_s
        if not round_s:
            return now_s
        at_s = committed_s + round_s - self.rtt_s - MARGIN_S
        return at_s if at_s >= now_s else at_s + math.ceil((now_s - at_s) / round_s) * round_s
