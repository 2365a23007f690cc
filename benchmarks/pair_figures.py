"""What `make bench-ahead ARGS="--pair ..."` computes from its runs (benchmarks/real_pair.py)."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from questions import QUESTIONS

PLAIN = "plain"
ALL = "all"


@dataclass(frozen=True)
class Said:
    """One answer: its kind, its tokens, and those that came after the first chunk, with the seconds they took."""

    kind: str
    tokens: tuple[int, ...]
    num_timed: int
    seconds: float


@dataclass(frozen=True)
class Run:
    """One arm, once."""

    arm: str
    rtt_ms: float
    temperature: float
    repeat: int
    answers: list[Said]
    counters: dict[str, dict[str, int]] = field(default_factory=dict)
    """The engine's, by kind of question; none of plain vLLM."""
    up_bytes: int = 0
    down_bytes: int = 0

    def tokens_per_s(self, kind: str) -> float:
        """0 where no answer of the kind had a second chunk."""
        chosen = [answer for answer in self.answers if kind in (answer.kind, ALL)]
        seconds = sum(answer.seconds for answer in chosen)
        return sum(answer.num_timed for answer in chosen) / seconds if seconds else 0.0


def run_of(read: dict[str, Any]) -> Run:
    """A run as JSON gives it."""
    said = [Said(**{**answer, "tokens": tuple(answer["tokens"])}) for answer in read["answers"]]
    return Run(**{**read, "answers": said})


@dataclass(frozen=True)
class Figures:
    """One kind of question (`all`: the tokens of all kinds) in one cell, over all repeats."""

    times: tuple[float, float, float]
    """Plain vLLM's tokens a second: median, least, most."""
    tokens_per_s: float
    acceptance: float
    verified_per_step: float
    tokens_per_step: float
    step_times: float
    """How many times as long as plain vLLM's a step takes, holding included: `tokens_per_step` over it is `times`."""


@dataclass(frozen=True)
class Cell:
    """One arm at one RTT and temperature."""

    arm: str
    rtt_ms: float
    temperature: float
    by_kind: dict[str, Figures]
    mean: tuple[float, float, float]
    """The kinds' mean of times plain vLLM: median, least, most."""
    up_bytes_per_token: float
    parted: int
    """Greedy answers that are not plain vLLM's, token by token, over all repeats."""


def summarise(runs: Sequence[Run]) -> list[Cell]:
    plain = {(run.repeat, run.temperature): run for run in runs if run.arm == PLAIN}
    keys = dict.fromkeys((run.temperature, run.rtt_ms, run.arm) for run in runs if run.arm != PLAIN)
    return [
        _cell([run for run in runs if (run.temperature, run.rtt_ms, run.arm) == key], plain)
        for key in sorted(keys, key=lambda key: (key[0], key[2], key[1]))
    ]


def _cell(runs: Sequence[Run], plain: dict[tuple[int, float], Run]) -> Cell:
    pairs = [(run, plain[run.repeat, run.temperature]) for run in runs]
    num_tokens = sum(len(answer.tokens) for run in runs for answer in run.answers)
    first = runs[0]
    return Cell(
        first.arm,
        first.rtt_ms,
        first.temperature,
        {kind: _figures(kind, pairs) for kind in (*QUESTIONS, ALL)},
        _spread([statistics.mean(_times(kind, *pair) for kind in QUESTIONS) for pair in pairs]),
        sum(run.up_bytes for run in runs) / num_tokens,
        0 if first.temperature else sum(_num_parted(run, base) for run, base in pairs),
    )


def _figures(kind: str, pairs: Sequence[tuple[Run, Run]]) -> Figures:
    times = _spread([_times(kind, *pair) for pair in pairs])
    counted: Counter[str] = Counter()
    for run, _ in pairs:
        for name, counters in run.counters.items():
            counted.update(counters if kind in (name, ALL) else {})
    num_steps = max(counted["steps"], 1)
    tokens_per_step = counted["committed_tokens"] / num_steps
    return Figures(
        times,
        statistics.median(run.tokens_per_s(kind) for run, _ in pairs),
        counted["accepted_tokens"] / max(counted["verified_tokens"], 1),
        counted["verified_tokens"] / num_steps,
        tokens_per_step,
        tokens_per_step / times[0],
    )


def _times(kind: str, run: Run, base: Run) -> float:
    return run.tokens_per_s(kind) / base.tokens_per_s(kind)


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def _num_parted(run: Run, base: Run) -> int:
    return sum(one.tokens != other.tokens for one, other in zip(run.answers, base.answers, strict=True))


def as_table(cells: Sequence[Cell]) -> str:
    """Markdown."""
    lines = [
        f"| T | arm | RTT ms | {' | '.join(QUESTIONS)} | mean | accepted | tokens a step | bytes up a token | parted |",
        "|---|---|---|" + "---|" * (len(QUESTIONS) + 5),
    ]
    for cell in cells:
        spreads = [*(cell.by_kind[kind].times for kind in QUESTIONS), cell.mean]
        times = [f"{middle:.2f} ({least:.2f}..{most:.2f})" for middle, least, most in spreads]
        every = cell.by_kind[ALL]
        rest = [f"{every.acceptance:.0%}", f"{every.tokens_per_step:.2f}", f"{cell.up_bytes_per_token:.0f}"]
        row = [f"{cell.temperature:g}", cell.arm, f"{cell.rtt_ms:g}", *times, *rest, str(cell.parted)]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def as_split(cells: Sequence[Cell]) -> str:
    """Where each ratio comes from, as Markdown: tokens a step, over how much longer a step takes."""
    lines = ["| T | arm | RTT ms | kind | verified a step | accepted | tokens a step | step times |", "|---" * 8 + "|"]
    for cell, kind in product(cells, QUESTIONS):
        seen = cell.by_kind[kind]
        values = [f"{seen.verified_per_step:.2f}", f"{seen.acceptance:.0%}", f"{seen.tokens_per_step:.2f}"]
        row = [f"{cell.temperature:g}", cell.arm, f"{cell.rtt_ms:g}", kind, *values, f"{seen.step_times:.2f}"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)
