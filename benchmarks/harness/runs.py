"""One measured run, as all benchmarks keep it, and how runs are compared. Pure: plain values in and out.

Rule: machines drift, so a run is compared only with the runs of others beside it: of the same repeat, or next to it.
"""

import hashlib
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import ceil, exp, log
from typing import Any, NamedTuple

from harness.load import Answer, decoding, duration_s
from harness.replay import Recording

MIN_GAP_S = 1e-4
BIN = 1.01
"""Gaps are counted in bins, each so many times as long as the one before: 1 % is less than any run's noise."""
SHARED = ("edges", "load", "front_end", "gateway")
"""What runs beside the model on the other core. The engine's core process does too, but it fills what is left: it waits
for the model in a loop, so that core is always busy."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One run to make: an arm, and what it meets."""

    arm: str
    requests: int = 1
    """At once."""
    kind: str = ""
    """Of what is asked."""
    temperature: float | None = 0.0
    """None: none is asked for, so that it is the model's own."""
    rate: float = 0.0
    """Of requests that come by themselves (Poisson), of plain vLLM's capacity; 0: so many at once, always."""
    rtt_ms: float | None = None
    """To the edges; None: nothing hangs on it."""
    edge: str | None = None
    """What the edges are like."""
    repeat: int = 0

    @property
    def slot(self) -> "Slot":
        return Slot(**{each.name: getattr(self, each.name) for each in fields(Slot)})

    @property
    def case(self) -> "Slot":
        """What all arms are asked alike, in any repeat."""
        return replace(self.slot, arm="", rtt_ms=None, edge=None, repeat=0)

    @property
    def title(self) -> str:
        sampled = "model's own T" if self.temperature is None else f"T {self.temperature:g}" if self.temperature else ""
        load = f"{self.rate:g} of capacity" if self.rate else f"{self.requests} requests"
        parts = [load, self.kind, sampled]
        parts += [self.arm, f"RTT {self.rtt_ms:g} ms" if self.rtt_ms is not None else ""]
        parts += [f"{self.edge} edges" if self.edge else "", f"repeat {self.repeat + 1}"]
        return ", ".join(filter(None, parts))


@dataclass(frozen=True, kw_only=True)
class Run(Slot):
    """One run of one server. Times in seconds; CPU seconds and busy shares are those of the run alone."""

    session: int = 0
    """Which start of the servers, and the run's number after it."""
    number: int = 0
    num_tokens: int
    seconds: float
    """From the first request sent to the last token; of requests one after the other, in sum."""
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    """From when each request had its first token: without the prompts."""
    cpu_s: dict[str, float] = field(default_factory=dict)
    """By process: worker, engine_core, front_end, gateway, edges, and load for the load generator and the relay."""
    core_busy: list[float] = field(default_factory=list)
    """By core: the share of the run, whoever used it."""
    core_steal: list[float] = field(default_factory=list)
    """By core: the share that the hypervisor gave to others."""
    first_token_s: dict[str, float] = field(default_factory=dict)
    """p50, p99 and max over the requests."""
    each: list[list[float]] = field(default_factory=list)
    """Of each request, where that is kept: seconds to its first token, to its last, and its tokens."""
    gap_ms: dict[str, float] = field(default_factory=dict)
    """Between two chunks of a stream: p50, p95, p99."""
    token_gap_ms: dict[str, float] = field(default_factory=dict)
    """The same with each gap divided by the number of tokens in the chunk after it."""
    tokens_per_chunk: float = 1.0
    counters: dict[str, int] = field(default_factory=dict)
    """The engine's, from before the run to after it."""
    edge_totals: dict[str, int] = field(default_factory=dict)
    """What the edges say of themselves, the warm-up included."""
    worker: dict[str, float] = field(default_factory=dict)
    """What an emulated worker counted."""
    up_bytes: int = 0
    down_bytes: int = 0
    differences: list[list[int]] = field(default_factory=list)
    """Answer, and its first token that is not as recorded."""
    answers: list[Any] = field(default_factory=list)
    """The tokens of each, or a digest of its text, where they are compared between arms."""
    learned: dict[str, Any] | None = None
    """What our engine had learned of its steps."""
    gaps: dict[int, int] = field(default_factory=dict)
    """How many gaps by bin, see `bin_of`; each counts once."""
    token_gaps: dict[int, int] = field(default_factory=dict)

    @property
    def whole_tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def cpu_s_per_token(self) -> float:
        """Of the engine: its worker and its core process."""
        return self.worker_s_per_token + self.cpu_s.get("engine_core", 0.0) / self.num_tokens

    @property
    def worker_s_per_token(self) -> float:
        """CPU seconds of the worker alone: the engine's core process waits in a loop."""
        return self.cpu_s.get("worker", 0.0) / self.num_tokens

    @property
    def edge_busy(self) -> float:
        """Of one core, by the edges' process."""
        return self.cpu_s.get("edges", 0.0) / self.seconds

    @property
    def shared_busy(self) -> float:
        """Of one core, by all that runs on the model's neighbour but the engine's core process."""
        return sum(self.cpu_s.get(name, 0.0) for name in SHARED) / self.seconds

    @property
    def foreign_busy(self) -> float:
        """Of one core, by whatever is none of this run: a machine that is not quiet."""
        return sum(self.core_busy) - sum(self.cpu_s.values()) / self.seconds

    @property
    def first_token_p50_s(self) -> float:
        return self.first_token_s["p50"]

    @property
    def gap_p99_ms(self) -> float:
        return self.gap_ms["p99"]


def run_of(values: Mapping[str, Any]) -> Run:
    """A run as it was written to JSON, where all keys are strings."""
    histograms = {name: {int(key): n for key, n in values[name].items()} for name in ("gaps", "token_gaps")}
    return Run(**{**values, **histograms})


# -- one run ---------------------------------------------------------------------------------------------------------


def timed(*batches: Sequence[Answer]) -> dict[str, Any]:
    """What a client sees of batches of answers that are asked for one after the other, by a Run's names."""
    answers = [answer for batch in batches for answer in batch]
    decoded = [decoding(batch) for batch in batches]
    gaps = [gap for answer in answers for gap in answer.gaps()]
    num_tokens = sum(len(answer.tokens) for answer in answers)
    return {
        "num_tokens": num_tokens,
        "seconds": sum(map(duration_s, batches)),
        "decode_tokens": sum(tokens for tokens, _ in decoded),
        "decode_seconds": sum(seconds for _, seconds in decoded),
        "tokens_per_chunk": num_tokens / sum(len(answer.chunks) for answer in answers),
        **latencies([answer.first_token_s for answer in answers], [gap.seconds for gap in gaps]),
        **gap_figures("token_gap", [gap.seconds / gap.num_tokens for gap in gaps]),
    }


def latencies(first_s: Sequence[float], gaps_s: Iterable[float]) -> dict[str, Any]:
    """Of the times to first tokens, and between chunks."""
    ordered = sorted(first_s)
    p99 = ordered[ceil(0.99 * len(ordered)) - 1]
    first_token_s = {"p50": statistics.median(ordered), "p99": p99, "max": ordered[-1]}
    return {"first_token_s": first_token_s, **gap_figures("gap", gaps_s)}


def gap_figures(name: str, seconds: Iterable[float]) -> dict[str, Any]:
    histogram = Counter(map(bin_of, seconds))
    percentiles = {f"p{each}": quantile_ms(histogram, each / 100) for each in (50, 95, 99)} if histogram else {}
    return {f"{name}_ms": percentiles, f"{name}s": dict(histogram)}


def bin_of(seconds: float) -> int:
    return int(log(max(seconds, MIN_GAP_S) / MIN_GAP_S) / log(BIN))


def quantile_ms(histogram: Mapping[int, int], part: float) -> float:
    """The gap that `part` of all gaps do not exceed, to half a percent."""
    rank, seen = ceil(part * sum(histogram.values())), 0
    for number, count in sorted(histogram.items()):
        seen += count
        if seen >= rank:
            return 1000 * MIN_GAP_S * exp((number + 0.5) * log(BIN))
    raise ValueError("no gaps")


def differences(recordings: Sequence[Recording], answers: Iterable[Answer]) -> list[list[int]]:
    """Number and first token of each answer that is not as recorded; an answer may end earlier."""
    found = []
    for number, (known, answer) in enumerate(zip(recordings, answers, strict=False)):
        pairs = zip(known.answer, answer.tokens, strict=False)
        at = next((at for at, pair in enumerate(pairs) if pair[0] != pair[1]), None)
        found += [[number, at]] if at is not None else []
    return found


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


# -- many runs -------------------------------------------------------------------------------------------------------


class Ratio(NamedTuple):
    """Median and range over the repeats."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}..{self.high:.2f})"

    def named(self, name: str) -> dict[str, float]:
        """As it is in a results file."""
        return {name: self.median, f"{name}_min": self.low, f"{name}_max": self.high}


def spread(values: Sequence[float]) -> Ratio | None:
    return Ratio(statistics.median(values), min(values), max(values)) if values else None


def of_same_repeat(run: Run, others: Iterable[Run]) -> list[Run]:
    return [other for other in others if (other.repeat, other.temperature) == (run.repeat, run.temperature)]


Beside = Callable[[Run, Sequence[Run]], list[Run]]
"""With which of the others a run is compared."""


def beside(run: Run, others: Sequence[Run], name: str, which: Beside) -> float | None:
    """The mean of an attribute of the runs beside this one."""
    near = [getattr(other, name) for other in which(run, others)]
    return statistics.fmean(near) if near else None


def ratio(
    own: Sequence[Run], others: Sequence[Run], name: str = "tokens_per_s", which: Beside = of_same_repeat
) -> Ratio | None:
    """Of an attribute of each run to that of the others beside it; None if there are none."""
    return spread([getattr(run, name) / near for run in own if (near := beside(run, others, name, which))])


def middle(runs: Iterable[Run], of: str | Callable[[Run], float]) -> float:
    """The median of an attribute, or of what is computed from a run."""
    return statistics.median(getattr(run, of) if isinstance(of, str) else of(run) for run in runs)


def counted(runs: Iterable[Run]) -> Counter[str]:
    """What engines and relays counted, and the clients' tokens, in sum."""
    total: Counter[str] = Counter()
    for run in runs:
        own = {"tokens": run.num_tokens, "up_bytes": run.up_bytes, "down_bytes": run.down_bytes}
        total.update({**run.counters, **own})
    return total


def share(counts: Counter[str], name: str, whole: str) -> float | None:
    """None where either was not counted."""
    return counts[name] / counts[whole] if name in counts and counts[whole] else None


def pooled(histograms: Iterable[Mapping[int, int]]) -> Counter[int]:
    total: Counter[int] = Counter()
    for histogram in histograms:
        total.update(histogram)
    return total


def num_different(runs: Iterable[Run]) -> int:
    """Greedy answers that are not those of the first run of the same case and repeat."""
    first: dict[tuple[Slot, int], list[Any]] = {}
    return sum(
        one != other
        for run in runs
        if run.temperature == 0
        for one, other in zip(first.setdefault((run.case, run.repeat), run.answers), run.answers, strict=True)
    )
