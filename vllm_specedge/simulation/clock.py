"""Virtual time, and frames that take time to arrive."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from vllm_specedge.simulation.models import chance
from vllm_specedge.wire.codec import Frame


class VirtualTime:
    """A clock that jumps from one action to the next."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._order = count()

    def at(self, at_s: float, action: Callable[..., None], *arguments: object) -> None:
        """Schedule an action. Actions due at the same time run in the order in which they were scheduled."""
        heapq.heappush(self._due, (max(at_s, self.now_s), next(self._order), action, arguments))

    def after(self, delay_s: float, action: Callable[..., None], *arguments: object) -> None:
        self.at(self.now_s + delay_s, action, *arguments)

    def run(self, limit_s: float, is_over: Callable[[], bool]) -> None:
        """Run actions until `is_over`, until none is left, or until `limit_s`."""
        while self._due and not is_over():
            at_s, _, action, arguments = heapq.heappop(self._due)
            if at_s > limit_s:
                return
            self.now_s = at_s
            action(*arguments)


@dataclass(slots=True)
class Way:
    """One direction of a connection: frames arrive with a delay, in order."""

    time: VirtualTime
    delay_s: float
    jitter_s: float
    key: int
    deliver: Callable[[Frame], None]
    _number: int = 0
    _last_s: float = 0.0

    def send(self, frame: Frame) -> None:
        self._number += 1
        jitter_s = self.jitter_s * chance(self.key, self._number) if self.jitter_s else 0.0
        self._last_s = max(self._last_s, self.time.now_s + self.delay_s + jitter_s)
        self.time.at(self._last_s, self.deliver, frame)
