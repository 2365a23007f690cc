"""What `make bench-ahead ARGS="--pair ..."` computes from its runs (benchmarks/real_pair.py)."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

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
    counters: dict[str, int] = field(default_factory=dict)
    up_bytes: int = 0
    down_bytes: int = 0

    def tokens_per_s(self, kind: str) -> float:
        """0 where no answer of the kind had a second chunk."""
        chosen = [answer for answer in self.answers if kind in (answer.kind, ALL)]
        seconds = sum(answer.seconds for answer in chosen)
        return sum(answer.num_timed for answer in chosen) / seconds if seconds else 0.0


@dataclass(frozen=True)
class Cell:
    """One arm at one RTT and temperature, by kind: times plain vLLM, median and range over the repeats."""

    arm: str
    rtt_ms: float
    temperature: float
    times: dict[str, tuple[float, float, float]]
    """By kind: median, least, most. `all` counts the tokens of all kinds, `mean` is the mean of the kinds."""
    tokens_per_s: float
    acceptance: float
    tokens_per_step: float
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
    times: dict[str, list[float]] = {
        kind: [run.tokens_per_s(kind) / base.tokens_per_s(kind) for run, base in pairs] for kind in (*QUESTIONS, ALL)
    }
    times["mean"] = [statistics.mean(times[kind][at] for kind in QUESTIONS) for at in range(len(runs))]
    counted = {name: sum(run.counters.get(name, 0) for run in runs) for name in runs[0].counters}
    num_tokens = sum(len(answer.tokens) for run in runs for answer in run.answers)
    first = runs[0]
    return Cell(
        first.arm,
        first.rtt_ms,
        first.temperature,
        {kind: (statistics.median(each), min(each), max(each)) for kind, each in times.items()},
        statistics.median(run.tokens_per_s(ALL) for run in runs),
        counted["accepted_tokens"] / max(counted["verified_tokens"], 1),
        counted["committed_tokens"] / max(counted["steps"], 1),
        sum(run.up_bytes for run in runs) / num_tokens,
        0 if first.temperature else sum(_num_parted(run, base) for run, base in pairs),
    )


def _num_parted(run: Run, base: Run) -> int:
    return sum(one.tokens != other.tokens for one, other in zip(run.answers, base.answers, strict=True))


def as_table(cells: Sequence[Cell]) -> str:
    """Markdown."""
    kinds = (*QUESTIONS, "mean")
    lines = [
        f"| T | arm | RTT ms | {' | '.join(kinds)} | accepted | tokens a step | bytes up a token | parted |",
        "|---|---|---|" + "---|" * (len(kinds) + 4),
    ]
    for cell in cells:
        times = [f"{middle:.2f} ({least:.2f}..{most:.2f})" for middle, least, most in (cell.times[k] for k in kinds)]
        rest = [f"{cell.acceptance:.0%}", f"{cell.tokens_per_step:.2f}", f"{cell.up_bytes_per_token:.0f}"]
        row = [f"{cell.temperature:g}", cell.arm, f"{cell.rtt_ms:g}", *times, *rest, str(cell.parted)]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)
