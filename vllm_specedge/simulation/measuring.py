"""What a simulation measures, from the moment on at which every client has made its warm-up."""

from array import array
from collections import Counter
from dataclasses import dataclass, field

from vllm_specedge.estimators import quantile
from vllm_specedge.simulation.scenario import Outcome, Scenario


@dataclass(slots=True, eq=False)
class Client:
    """Asks, reads the answer, and asks again."""

    made: int = 0
    """Tokens that it got."""


@dataclass(slots=True)
class _Measured:
    """From the end of the warm-up on."""

    started_s: float
    before: Counter[str]
    """The engine's counters as they were then."""
    tokens: int = 0
    gaps_s: "array[float]" = field(default_factory=lambda: array("d"))
    ttfts_s: "array[float]" = field(default_factory=lambda: array("d"))


class Measuring:
    """Tokens as clients get them."""

    def __init__(self, scenario: Scenario, counters: Counter[str]) -> None:
        """`counters`: the engine's."""
        self._warm, self._enough = scenario.warm_up * scenario.tokens, scenario.tokens
        self._counters = counters
        self._num_cold = self._num_busy = scenario.requests
        """Clients that have not made what the warm-up takes; what they all are to make."""
        self._measured = None if scenario.warm_up else _Measured(0.0, Counter())

    @property
    def is_done(self) -> bool:
        """Each client has its tokens."""
        return not self._num_busy

    def count(self, client: Client, num_tokens: int, since_s: float, is_first: bool, now_s: float) -> None:
        """A client got tokens; before, it got some, or asked, at `since_s`."""
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
