"""The measurements of a simulation, which begin when every client has finished its warm-up."""

from array import array
from collections import Counter
from dataclasses import dataclass, field

from vllm_specedge.estimators import quantile
from vllm_specedge.simulation.scenario import Outcome, Scenario


@dataclass(slots=True, eq=False)
class Client:
    """A client that sends a request, reads the answer, and sends the next request."""

    made: int = 0
    """Tokens that it has received."""


@dataclass(slots=True)
class _Measured:
    """Measurements since the end of the warm-up."""

    started_s: float
    before: Counter[str]
    """The engine's counters at that time."""
    tokens: int = 0
    gaps_s: "array[float]" = field(default_factory=lambda: array("d"))
    ttfts_s: "array[float]" = field(default_factory=lambda: array("d"))


class Measuring:
    """Measures tokens as clients receive them."""

    def __init__(self, scenario: Scenario, counters: Counter[str]) -> None:
        """`counters`: the engine's."""
        self._warm, self._enough = scenario.warm_up * scenario.tokens, scenario.tokens
        self._counters = counters
        self._num_cold = self._num_busy = scenario.requests
        """Clients that have not finished their warm-up, and clients that have not received all their tokens."""
        self._measured = None if scenario.warm_up else _Measured(0.0, Counter())

    @property
    def is_done(self) -> bool:
        """Whether each client has received its tokens."""
        return not self._num_busy

    def count(self, client: Client, num_tokens: int, since_s: float, is_first: bool, now_s: float) -> None:
        """Record that a client received tokens. `since_s`: when it received the previous ones, or sent its request."""
        if self._measured is not None:
            (self._measured.ttfts_s if is_first else self._measured.gaps_s).append(now_s - since_s)
            self._measured.tokens += num_tokens
        made, client.made = client.made, client.made + num_tokens
        self._num_cold -= made < self._warm <= client.made
        self._num_busy -= made < self._enough <= client.made
        if self._num_cold == 0 and self._measured is None:
            self._measured = _Measured(now_s, self._counters.copy())

    def outcome(self, now_s: float) -> Outcome:
        measured = self._measured or _Measured(now_s, Counter())
        return Outcome(
            seconds=now_s - measured.started_s,
            tokens=measured.tokens,
            itl_p50_s=quantile(measured.gaps_s, 0.5),
            itl_p99_s=quantile(measured.gaps_s, 0.99),
            ttft_p50_s=quantile(measured.ttfts_s, 0.5),
            ttft_p99_s=quantile(measured.ttfts_s, 0.99),
            counters=self._counters - measured.before,
        )
