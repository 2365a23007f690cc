"""One measured run, in the form of all benchmarks, and comparison of runs. Pure: plain values in and out.

Rule: machines drift, so a run is compared only with neighbouring runs of others: of the same repeat, or adjacent.
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
"""Ratio of successive bins in which gaps are counted: 1 % is less than any run's noise."""
SHARED = ("edges", "load", "front_end", "gateway")
"""Processes on the other core than the model. The engine's core process is there too, but it busy-waits for the model
and uses all remaining time, so that core is always busy."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One run to make: an arm and its load."""

    arm: str
    requests: int = 1
    """Concurrent requests."""
    kind: str = ""
    """Kind of questions."""
    temperature: float | None = 0.0
    """None: not in the request, so that it is the model's own."""
    rate: float = 0.0
    """Rate of Poisson arrivals as a share of plain vLLM's capacity; 0: a constant number of concurrent requests."""
    rtt_ms: float | None = None
    """Round trip to the edges; None: irrelevant."""
    edge: str | None = None
    """Kind of edges."""
    repeat: int = 0

    @property
    def slot(self) -> "Slot":
        return Slot(**{each.name: getattr(self, each.name) for each in fields(Slot)})

    @property
    def case(self) -> "Slot":
        """The load alone, which is the same for all arms and repeats."""
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
    """Number of the servers' start, and of the run after it."""
    number: int = 0
    num_tokens: int
    seconds: float
    """From the first request to the last token; for consecutive requests, the sum."""
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    """The same from each request's first token, without the prompts."""
    cpu_s: dict[str, float] = field(default_factory=dict)
    """By process: worker, engine_core, front_end, gateway, edges, and load for the load generator and the relay."""
    core_busy: list[float] = field(default_factory=list)
    """By core: busy share of the run, by any process."""
    core_steal: list[float] = field(default_factory=list)
    """By core: share that the hypervisor gave to other machines."""
    first_token_s: dict[str, float] = field(default_factory=dict)
    """p50, p99 and max over the requests."""
    each: list[list[float]] = field(default_factory=list)
    """Of each request, if recorded: seconds to its first token, to its last, and its number of tokens."""
    gap_ms: dict[str, float] = field(default_factory=dict)
    """Between two chunks of a stream: p50, p95, p99."""
    token_gap_ms: dict[str, float] = field(default_factory=dict)
    """The same with each gap divided by the number of tokens in the chunk after it."""
    tokens_per_chunk: float = 1.0
    counters: dict[str, int] = field(default_factory=dict)
    """Change of the engine's counters over the run."""
    edge_totals: dict[str, int] = field(default_factory=dict)
    """Totals reported by the edges, including the warm-up."""
    worker: dict[str, float] = field(default_factory=dict)
    """Counters of an emulated worker."""
    up_bytes: int = 0
    down_bytes: int = 0
    differences: list[list[int]] = field(default_factory=list)
    """Pairs of an answer and its first token that differs from the recording."""
    answers: list[Any] = field(default_factory=list)
    """Tokens of each answer, or a digest of its text, if answers are compared between arms."""
    learned: dict[str, Any] | None = None
    """What our engine had learned about its steps."""
    gaps: dict[int, int] = field(default_factory=dict)
    """Number of gaps by bin, see `bin_of`; each counts once."""
    token_gaps: dict[int, int] = field(default_factory=dict)

    @property
    def whole_tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def cpu_s_per_token(self) -> float:
        """CPU seconds per token of the engine: its worker and its core process."""
        return self.worker_s_per_token + self.cpu_s.get("engine_core", 0.0) / self.num_tokens

    @property
    def worker_s_per_token(self) -> float:
        """CPU seconds per token of the worker alone: the engine's core process busy-waits."""
        return self.cpu_s.get("worker", 0.0) / self.num_tokens

    @property
    def edge_busy(self) -> float:
        """Share of one core used by the edges' process."""
        return self.cpu_s.get("edges", 0.0) / self.seconds

    @property
    def shared_busy(self) -> float:
        """Share of one core used by all processes on the other core except the engine's core process."""
        return sum(self.cpu_s.get(name, 0.0) for name in SHARED) / self.seconds

    @property
    def foreign_busy(self) -> float:
        """Share of one core used by processes that do not belong to the run."""
        return sum(self.core_busy) - sum(self.cpu_s.values()) / self.seconds

    @property
    def first_token_p50_s(self) -> float:
        return self.first_token_s["p50"]

    @property
    def gap_p99_ms(self) -> float:
        return self.gap_ms["p99"]


def run_of(values: Mapping[str, Any]) -> Run:
    """A run from JSON, where all keys are strings."""
    histograms = {name: {int(key): n for key, n in values[name].items()} for name in ("gaps", "token_gaps")}
    return Run(**{**values, **histograms})


# -- one run ---------------------------------------------------------------------------------------------------------


def timed(*batches: Sequence[Answer]) -> dict[str, Any]:
    """A client's times of consecutive batches of answers, as fields of a Run."""
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
    """Quantiles of the times to first tokens, and between chunks."""
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
    """The gap that a share `part` of all gaps does not exceed, to half a percent."""
    rank, seen = ceil(part * sum(histogram.values())), 0
    for number, count in sorted(histogram.items()):
        seen += count
        if seen >= rank:
            return 1000 * MIN_GAP_S * exp((number + 0.5) * log(BIN))
    raise ValueError("no gaps")


def differences(recordings: Sequence[Recording], answers: Iterable[Answer]) -> list[list[int]]:
    """Number and first different token of each answer that differs from its recording; an answer may end earlier."""
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
    """Median and range of a ratio over the repeats."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}..{self.high:.2f})"

    def named(self, name: str) -> dict[str, float]:
        """The ratio as in a results file."""
        return {name: self.median, f"{name}_min": self.low, f"{name}_max": self.high}


def spread(values: Sequence[float]) -> Ratio | None:
    return Ratio(statistics.median(values), min(values), max(values)) if values else None


def of_same_repeat(run: Run, others: Iterable[Run]) -> list[Run]:
    return [other for other in others if (other.repeat, other.temperature) == (run.repeat, run.temperature)]


Beside = Callable[[Run, Sequence[Run]], list[Run]]
"""Selects the runs that a run is compared with."""


def beside(run: Run, others: Sequence[Run], name: str, which: Beside) -> float | None:
    """Mean of an attribute of the runs next to this one."""
    near = [getattr(other, name) for other in which(run, others)]
    return statistics.fmean(near) if near else None


def ratio(
    own: Sequence[Run], others: Sequence[Run], name: str = "tokens_per_s", which: Beside = of_same_repeat
) -> Ratio | None:
    """Ratio of an attribute of each run to that of the others next to it; None if there are none."""
    return spread([getattr(run, name) / near for run in own if (near := beside(run, others, name, which))])


def middle(runs: Iterable[Run], of: str | Callable[[Run], float]) -> float:
    """Median of an attribute, or of a function of a run."""
    return statistics.median(getattr(run, of) if isinstance(of, str) else of(run) for run in runs)


def counted(runs: Iterable[Run]) -> Counter[str]:
    """Sums of the counters of engines and relays, and of the clients' tokens."""
    total: Counter[str] = Counter()
    for run in runs:
        own = {"tokens": run.num_tokens, "up_bytes": run.up_bytes, "down_bytes": run.down_bytes}
        total.update({**run.counters, **own})
    return total


def share(counts: Counter[str], name: str, whole: str) -> float | None:
    """Share of one counter in another; None if either is missing."""
    return counts[name] / counts[whole] if name in counts and counts[whole] else None


def pooled(histograms: Iterable[Mapping[int, int]]) -> Counter[int]:
    total: Counter[int] = Counter()
    for histogram in histograms:
        total.update(histogram)
    return total


def num_different(runs: Iterable[Run]) -> int:
    """Number of greedy answers that differ from the first run of the same case and repeat."""
    first: dict[tuple[Slot, int], list[Any]] = {}
    return sum(
        one != other
        for run in runs
        if run.temperature == 0
        for one, other in zip(first.setdefault((run.case, run.repeat), run.answers), run.answers, strict=True)
    )
