"""Scaling under changing demand: a rule that looks ahead against rules that react to waiting requests or busy engines.

A fluid model of requested tokens, and of engines that each generate a number of tokens per second. With all rules,
tokens that would wait longer than the target are refused, and count as misses. Engines take a while to start, and are
paid for from then on.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil, cos, pi, sqrt
from typing import Protocol

from rich import box
from rich.console import Console
from rich.table import Table

from vllm_specedge.policy.foresight import HEADROOM, Foresight, engines_needed
from vllm_specedge.simulation.models import chance, key_of

DAY_S = 86_400.0
ANSWER_S = 10
"""Seconds of an answer, over which the tokens of a request are spread."""
DECIDED_EVERY_S = 15.0
"""Seconds between decisions, as in the Kubernetes autoscaler."""
STABLE_S = 300.0
"""Seconds for which fewer engines must suffice before one is stopped; the same autoscaler's default."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Demand in tokens per second: a daily rise and fall, surges, and noise."""

    days: float = 3.0
    mean: float = 1000.0
    swing: float = 0.6
    surges_per_day: float = 8.0
    surge: float = 0.8
    """Demand added by a surge, as a share of the mean; varies from 0.5 to 1.5 times this."""
    ramp_s: float = 360.0
    """Seconds in which a surge rises; varies from 0.5 to 1.5 times this."""
    plateau_s: float = 600.0
    request_tokens: float = 200.0
    """Tokens of a request; more mean more noise, as requests arrive one at a time."""
    seed: int = 0

    def surges(self) -> list[tuple[float, float, float]]:
        """Start, rise time and added demand of each surge."""
        key, at_s, found, number = key_of(self.seed, 5), 0.0, list[tuple[float, float, float]](), 0
        while True:
            at_s += DAY_S / self.surges_per_day * (0.4 + 1.2 * chance(key, 3 * number))
            if at_s >= self.days * DAY_S:
                return found
            height = self.surge * self.mean * (0.5 + chance(key, 3 * number + 1))
            found.append((at_s, self.ramp_s * (0.5 + chance(key, 3 * number + 2)), height))
            number += 1

    def seconds(self) -> Iterator[tuple[float, bool]]:
        """The demand of each second, and whether it is part of a surge."""
        key, surges = key_of(self.seed, 6), deque(self.surges())
        running, noise = list[tuple[float, float, float]](), 0.0
        for second in range(int(self.days * DAY_S)):
            while surges and surges[0][0] <= second:
                running.append(surges.popleft())
            running = [each for each in running if second < each[0] + 2 * each[1] + self.plateau_s]
            smooth = self.mean * (1.0 - self.swing * cos(2 * pi * second / DAY_S))
            smooth += sum(each[2] * self._shape(second - each[0], each[1]) for each in running)
            # The sum of twelve uniform numbers, less 6, is nearly normal.
            if second % ANSWER_S == 0:
                noise = sum(chance(key, 12 * second + index) for index in range(12)) - 6.0
            yield max(0.0, smooth + noise * sqrt(smooth * self.request_tokens / ANSWER_S)), bool(running)

    def _shape(self, since_s: float, ramp_s: float) -> float:
        """The shape of a surge: up in `ramp_s`, level, and down as fast."""
        return max(0.0, min(1.0, since_s / ramp_s, (2 * ramp_s + self.plateau_s - since_s) / ramp_s))


@dataclass(frozen=True, slots=True)
class Fleet:
    """The properties of engines."""

    capacity: float = 200.0
    """Tokens per second of each engine."""
    start_s: float = 180.0
    target_s: float = 2.0
    """Maximum waiting time; requests that would wait longer are refused."""
    request_tokens: float = 200.0


@dataclass(slots=True)
class Seen:
    """The inputs of a rule."""

    demand: float
    """Present demand in tokens per second, refused requests included."""
    waiting: float
    """Waiting requests."""
    busy: float
    """Share of the running engines that is busy."""
    engines: int
    """Running engines."""
    ordered: int
    """Running and starting engines."""


class Rule(Protocol):
    def observe(self, seen: Seen, now_s: float) -> None:
        """Record the present state; called every second."""

    def wanted(self, seen: Seen) -> int:
        """The number of engines that there should be."""
        ...


@dataclass(slots=True)
class Waiting:
    """The usual autoscaling of LLM servers: one engine more if requests wait, one less if the others would not become
    busier than `busy`."""

    threshold: float = 1.0
    """Mean waiting requests per engine."""
    busy: float = 0.8
    _waiting: deque[float] = field(default_factory=lambda: deque(maxlen=int(DECIDED_EVERY_S)))
    _load: deque[float] = field(default_factory=lambda: deque(maxlen=int(4 * DECIDED_EVERY_S)))

    def observe(self, seen: Seen, now_s: float) -> None:
        self._waiting.append(seen.waiting)
        self._load.append(seen.busy * seen.engines)

    def wanted(self, seen: Seen) -> int:
        waiting = sum(self._waiting) / len(self._waiting)
        if waiting > self.threshold * seen.engines:
            return seen.ordered + 1
        is_idle = sum(self._load) / len(self._load) < self.busy * (seen.ordered - 1)
        return max(1, seen.ordered - is_idle)


@dataclass(slots=True)
class Busy:
    """Another usual setup: as many engines as are needed for this share of busy time, by the last half minute."""

    busy: float = 0.8
    _load: deque[float] = field(default_factory=lambda: deque(maxlen=int(2 * DECIDED_EVERY_S)))

    def observe(self, seen: Seen, now_s: float) -> None:
        self._load.append(seen.busy * seen.engines)

    def wanted(self, seen: Seen) -> int:
        return max(1, ceil(sum(self._load) / len(self._load) / self.busy))


@dataclass(slots=True)
class Ahead:
    """Scaling by `specedge_engines_needed`."""

    fleet: Fleet
    headroom: float = HEADROOM
    foresight: Foresight = field(default_factory=Foresight)

    def observe(self, seen: Seen, now_s: float) -> None:
        self.foresight.observe(seen.demand, now_s, self.fleet.start_s)

    def wanted(self, seen: Seen) -> int:
        return engines_needed(self.foresight.foreseen(self.fleet.start_s), self.fleet.capacity, self.headroom)


@dataclass(slots=True)
class Outcome:
    """The totals of a whole trace."""

    asked: float = 0.0
    missed: float = 0.0
    asked_in_surges: float = 0.0
    missed_in_surges: float = 0.0
    engine_s: float = 0.0

    @property
    def engine_hours(self) -> float:
        return self.engine_s / 3600

    @property
    def miss_rate(self) -> float:
        return self.missed / self.asked

    @property
    def miss_rate_in_surges(self) -> float:
        return self.missed_in_surges / max(1e-9, self.asked_in_surges)


def scale(seconds: Iterable[tuple[float, bool]], fleet: Fleet, rule: Rule) -> Outcome:
    """Run a trace's seconds. The first day is not counted: the rule has not learnt the daily season by then."""
    outcome, ready, starting = Outcome(), 1, deque[float]()
    backlog, wanted_lately = 0.0, deque[int](maxlen=int(STABLE_S / DECIDED_EVERY_S))
    for second, (demand, is_surge) in enumerate(seconds):
        while starting and starting[0] <= second:
            starting.popleft()
            ready += 1
        made = ready * fleet.capacity
        backlog += demand
        served = min(backlog, made)
        backlog -= served
        missed = max(0.0, backlog - made * fleet.target_s)
        backlog -= missed
        seen = Seen(demand, backlog / fleet.request_tokens, served / made, ready, ready + len(starting))
        rule.observe(seen, second)
        if second % DECIDED_EVERY_S == 0:
            wanted_lately.append(rule.wanted(seen))
            for _ in range(max(wanted_lately) - seen.ordered):
                starting.append(second + fleet.start_s)
            ready = max(1, min(ready, max(wanted_lately) - len(starting)))
        if second >= DAY_S:
            outcome.asked += demand
            outcome.missed += missed
            outcome.asked_in_surges += demand * is_surge
            outcome.missed_in_surges += missed * is_surge
            outcome.engine_s += ready + len(starting)
    return outcome


# -- output of the command -------------------------------------------------------------------------------------------


def rules(fleet: Fleet) -> dict[str, Callable[[], Rule]]:
    """The rules to compare, by name."""
    waiting = {f"waiting, fewer below {busy:g}": partial(Waiting, busy=busy) for busy in (0.7, 0.9)}
    busy_ = {f"busy {busy:g}": partial(Busy, busy) for busy in (0.7, 0.8, 0.9)}
    ahead = {f"ahead, times {headroom:g}": partial(Ahead, fleet, headroom) for headroom in (1.0, 1.1, HEADROOM)}
    return {**waiting, **busy_, **ahead}


def rows(trace: Trace, fleet: Fleet, num_seeds: int) -> list[dict[str, str | float]]:
    """The outcome of each rule over some traces."""
    found = list[dict[str, str | float]]()
    traces = [list(replace(trace, seed=trace.seed + number).seconds()) for number in range(num_seeds)]
    for name, make in rules(fleet).items():
        runs = [scale(each, fleet, make()) for each in traces]
        asked, in_surges = sum(each.asked for each in runs), sum(each.asked_in_surges for each in runs)
        found.append(
            {
                "rule": name,
                "engine_hours": sum(each.engine_hours for each in runs),
                "missed": sum(each.missed for each in runs) / asked,
                "missed_in_surges": sum(each.missed_in_surges for each in runs) / max(1e-9, in_surges),
            }
        )
    return found


def show(trace: Trace, fleet: Fleet, num_seeds: int, is_json: bool) -> int:
    """Simulate and print. Returns the exit status."""
    found = rows(trace, fleet, num_seeds)
    if is_json:
        print(json.dumps(found, indent=1))  # noqa: T201
        return 0
    table = Table("rule", "engine hours", "missed", "missed in surges", box=box.SIMPLE)
    for row in found:
        table.add_row(
            str(row["rule"]), f"{row['engine_hours']:.0f}", f"{row['missed']:.2%}", f"{row['missed_in_surges']:.2%}"
        )
    Console(width=100).print(table)
    return 0
