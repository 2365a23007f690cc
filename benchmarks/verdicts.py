"""What `make bench-never-slower` measures in which order, and what the runs come to. Pure: plain values in and out.

Rule 1: machines drift, so a run is compared only with the runs of the others next to it, for the same requests.
Rule 2: a verdict is by the median over repeats, so that one bad moment of the machine is no failure.
"""

import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice, pairwise
from math import ceil, exp, log
from typing import Any, NamedTuple

from vllm_specedge.policy.step_cost import CONTEXT_UNIT, on_curve

VANILLA, NGRAM, OURS = "vanilla", "ngram", "edge"
GOOD, POOR, STALLING, DEAD, HALF = EDGES = ("good", "poor", "stalling", "dead", "half")
MIN_GAP_S = 1e-4
BIN = 1.01
"""Gaps are counted in bins, each so many times as long as the one before: 1 % is less than any run's noise."""
MAX_CONNECTIONS = 8
SHARED = ("edges", "load", "front_end", "gateway")
"""What runs beside the model on the other core. The engine's core process does too, but it fills what is left: it waits
for the model in a loop, so that core is always busy."""
BUSY = 0.7
"""Where these need more of it than this, the test bed may itself be the limit."""
FOREIGN = 0.15
"""Where others use more of a core than this, a run says little. (Idle servers use some hundredths.)"""
VERIFIED = ("verified_tokens", "ngram_verified_tokens")


# -- the order -------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A place in the grid: concurrent requests, round trip in ms, and what the edges are like."""

    requests: int
    rtt_ms: float
    edge: str


class Slot(NamedTuple):
    """One run to make; `cell` is None for those that are compared with."""

    arm: str
    requests: int
    cell: Cell | None = None
    repeat: int = 0


def all_cells(requests: Iterable[int], rtts_ms: Sequence[float], edges: Sequence[str]) -> list[Cell]:
    """Of a single request no half has an edge."""
    cells = (Cell(number, rtt_ms, edge) for number in requests for rtt_ms in rtts_ms for edge in edges)
    return [cell for cell in cells if cell.edge != HALF or cell.requests > 1]


def schedule(cells: Sequence[Cell], repeats: int, done: Collection[tuple[Cell, int]] = ()) -> list[Slot]:
    """All runs in their order, without those of ours (cell, repeat) that are done. Every second repeat is reversed."""
    slots: list[Slot] = []
    for requests in dict.fromkeys(cell.requests for cell in cells):
        row = [cell for cell in cells if cell.requests == requests]
        own = [
            Slot(OURS, requests, cell, repeat)
            for repeat in range(repeats)
            for cell in (reversed(row) if repeat % 2 else row)
            if (cell, repeat) not in done
        ]
        slots += interleave(own, requests)
    return slots


def interleave(own: Sequence[Slot], requests: int) -> Iterator[Slot]:
    """Vanilla or ngram, in turn, around every two of ours: each of ours is at most two runs away from either."""
    if not own:
        return
    last = VANILLA
    yield Slot(VANILLA, requests)
    rest, kinds = iter(own), cycle((NGRAM, VANILLA))
    while pair := tuple(islice(rest, 2)):
        yield from pair
        last = next(kinds)
        yield Slot(last, requests)
    if last != VANILLA:
        yield Slot(VANILLA, requests)


class Fleet(NamedTuple):
    """Edge connections, and how many requests each of them takes."""

    connections: int
    capacity: int


def fleet(requests: int, edge: str) -> Fleet:
    """Room for all requests, or for exactly half of them."""
    if edge != HALF:
        connections = min(requests, MAX_CONNECTIONS)
        return Fleet(connections, ceil(requests / connections))
    half = requests // 2
    connections = max(number for number in range(1, MAX_CONNECTIONS + 1) if half % number == 0)
    return Fleet(connections, half // connections)


# -- one run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run of one server. Times in seconds; CPU seconds and busy shares are those of the run alone."""

    arm: str
    requests: int
    rtt_ms: float | None
    edge: str | None
    repeat: int
    session: int
    """Which start of the servers, and the run's number after it: only runs of one session are compared."""
    number: int
    num_tokens: int
    seconds: float
    """From the first request sent to the last token."""
    decode_tokens: int
    decode_seconds: float
    """From when each request had its first token: without the prompts."""
    cpu_s: dict[str, float]
    """By process: worker, engine_core, front_end, gateway, edges, and load for the load generator and the relay."""
    core_busy: list[float]
    """By core: the share of the run, whoever used it."""
    core_steal: list[float]
    """By core: the share that the hypervisor gave to others."""
    first_token_s: dict[str, float]
    """p50 and max over the requests."""
    gap_ms: dict[str, float]
    """Between two chunks of a stream: p50, p95, p99."""
    token_gap_ms: dict[str, float]
    """The same with each gap divided by the number of tokens in the chunk after it."""
    tokens_per_chunk: float
    counters: dict[str, int]
    """The engine's, from before the run to after it."""
    edge_totals: dict[str, int]
    """What the edges say of themselves, the warm-up included."""
    up_bytes: int
    down_bytes: int
    differences: list[list[int]]
    """Prompt, and the first token that is not as recorded."""
    learned: "Learned | None"
    """By our engine."""
    gaps: dict[int, int]
    """How many gaps by bin, see `bin_of`; each counts once."""
    token_gaps: dict[int, int]

    @property
    def whole_tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def cpu_s_per_token(self) -> float:
        """Of the engine: its worker and its core process."""
        return (self.cpu_s.get("worker", 0.0) + self.cpu_s.get("engine_core", 0.0)) / self.num_tokens

    @property
    def worker_s_per_token(self) -> float:
        """CPU seconds of the worker alone: the engine's core process waits in a loop."""
        return self.cpu_s.get("worker", 0.0) / self.num_tokens

    @property
    def shared_busy(self) -> float:
        """Of one core, by all that runs on the model's neighbour but the engine's core process."""
        return sum(self.cpu_s.get(name, 0.0) for name in SHARED) / self.seconds

    @property
    def foreign_busy(self) -> float:
        """Of one core, by whatever is none of this run: a machine that is not quiet."""
        return sum(self.core_busy) - sum(self.cpu_s.values()) / self.seconds

    @property
    def cell(self) -> Cell | None:
        return None if self.rtt_ms is None or self.edge is None else Cell(self.requests, self.rtt_ms, self.edge)


def run_of(values: Mapping[str, Any]) -> Run:
    """A run as it was written to JSON, where all keys are strings."""
    histograms = {name: {int(key): n for key, n in values[name].items()} for name in ("gaps", "token_gaps")}
    learned = Learned(**values["learned"]) if values["learned"] is not None else None
    return Run(**{**values, **histograms, "learned": learned})


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


def quantiles_ms(histogram: Mapping[int, int]) -> dict[str, float]:
    return {f"p{percent}": quantile_ms(histogram, percent / 100) for percent in (50, 95, 99)} if histogram else {}


def pooled(histograms: Iterable[Mapping[int, int]]) -> Counter[int]:
    total: Counter[int] = Counter()
    for histogram in histograms:
        total.update(histogram)
    return total


# -- what it comes to ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What "never slower" allows for."""

    min_ratio: float = 0.97
    """Tokens a second, to vanilla's and to ngram's."""
    max_p99_ratio: float = 1.15
    """The 99th percentile of gaps between chunks, to vanilla's."""


class Ratios(NamedTuple):
    """Over the repeats."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """One cell over all of its repeats."""

    requests: int
    rtt_ms: float
    edge: str
    repeats: int
    tokens_per_s: float
    vanilla_tokens_per_s: float
    ngram_tokens_per_s: float | None
    ratio: float
    ratio_min: float
    ratio_max: float
    ngram_ratio: float | None
    ngram_ratio_min: float | None
    ngram_ratio_max: float | None
    p99_ms: float
    vanilla_p99_ms: float
    p99_ratio: float
    token_p99_ms: float
    token_p99_ratio: float
    whole_tokens_per_s: float
    vanilla_whole_tokens_per_s: float
    whole_ratio: float
    """Tokens a second with the time that prompts take and that the last answers take alone, to vanilla's."""
    cpu_s_per_token_ratio: float
    worker_s_per_token_ratio: float
    first_token_ratio: float
    """Of the medians over requests."""
    tokens_per_step: float | None
    acceptance: float | None
    """Of the edges' verified draft tokens."""
    verified_per_token: float | None
    """Draft tokens, the n-gram rung's included."""
    edge_busy: float
    """Of one core, by the edges' process."""
    shared_busy: float
    """The same by all of SHARED."""
    core_busy: list[float]
    """By core, whoever used it: medians."""
    foreign_busy: float
    """The most of any of its runs."""
    num_differences: int
    failures: list[str]

    @property
    def verdict(self) -> str:
        return f"FAIL ({', '.join(self.failures)})" if self.failures else "ok"


def nearest(run: Run, others: Iterable[Run]) -> list[Run]:
    """Of `others`, for as many requests and in the same session, the last before the run and the first after it."""
    same = [other for other in others if (other.session, other.requests) == (run.session, run.requests)]
    before = [other for other in same if other.number < run.number]
    after = [other for other in same if other.number > run.number]
    return [
        *([max(before, key=lambda other: other.number)] if before else []),
        *([min(after, key=lambda other: other.number)] if after else []),
    ]


def mean_near(run: Run, others: Sequence[Run], name: str) -> float | None:
    """Of an attribute of the runs next to this one."""
    near = [getattr(other, name) for other in nearest(run, others)]
    return statistics.fmean(near) if near else None


def ratios(own: Sequence[Run], others: Sequence[Run], name: str = "tokens_per_s") -> Ratios | None:
    values = [getattr(run, name) / near for run in own if (near := mean_near(run, others, name))]
    return Ratios(statistics.median(values), min(values), max(values)) if values else None


def median_ratio(own: Sequence[Run], others: Sequence[Run], name: str) -> float:
    found = ratios(own, others, name)
    return found.median if found else 0.0


def results(runs: Sequence[Run], limits: Limits) -> list[Result]:
    """Of all cells that have a run and something to compare it with, in the order in which they were first run."""
    cells = dict.fromkeys(run.cell for run in runs if run.cell is not None)
    found = (result_of(cell, runs, limits) for cell in cells if cell is not None)
    return [result for result in found if result is not None]


def result_of(cell: Cell, runs: Sequence[Run], limits: Limits) -> Result | None:
    own = [run for run in runs if run.cell == cell]
    vanilla, ngram = (
        [run for run in runs if (run.arm, run.requests) == (arm, cell.requests)] for arm in (VANILLA, NGRAM)
    )
    to_vanilla, to_ngram = ratios(own, vanilla), ratios(own, ngram)
    if to_vanilla is None:
        return None
    p99_ms, vanilla_p99_ms = (quantile_ms(pooled(run.gaps for run in each), 0.99) for each in (own, vanilla))
    token_ms, vanilla_token_ms = (quantile_ms(pooled(run.token_gaps for run in each), 0.99) for each in (own, vanilla))
    counted = pooled_counters(own)
    num_differences = sum(len(run.differences) for run in own)
    return Result(
        **cell._asdict(),
        repeats=len(own),
        tokens_per_s=statistics.median(run.tokens_per_s for run in own),
        vanilla_tokens_per_s=middle(own, vanilla) or 0.0,
        ngram_tokens_per_s=middle(own, ngram),
        ratio=to_vanilla.median,
        ratio_min=to_vanilla.low,
        ratio_max=to_vanilla.high,
        ngram_ratio=to_ngram.median if to_ngram else None,
        ngram_ratio_min=to_ngram.low if to_ngram else None,
        ngram_ratio_max=to_ngram.high if to_ngram else None,
        p99_ms=p99_ms,
        vanilla_p99_ms=vanilla_p99_ms,
        p99_ratio=p99_ms / vanilla_p99_ms,
        token_p99_ms=token_ms,
        token_p99_ratio=token_ms / vanilla_token_ms,
        whole_tokens_per_s=statistics.median(run.whole_tokens_per_s for run in own),
        vanilla_whole_tokens_per_s=middle(own, vanilla, "whole_tokens_per_s") or 0.0,
        whole_ratio=median_ratio(own, vanilla, "whole_tokens_per_s"),
        cpu_s_per_token_ratio=median_ratio(own, vanilla, "cpu_s_per_token"),
        worker_s_per_token_ratio=median_ratio(own, vanilla, "worker_s_per_token"),
        first_token_ratio=first_token_s(own) / first_token_s(vanilla),
        tokens_per_step=part(counted["committed_tokens"], counted["steps"]),
        acceptance=part(counted["accepted_tokens"], counted["verified_tokens"]),
        verified_per_token=part(sum(counted[name] for name in VERIFIED), counted["committed_tokens"]),
        edge_busy=statistics.median(run.cpu_s.get("edges", 0.0) / run.seconds for run in own),
        shared_busy=statistics.median(run.shared_busy for run in own),
        core_busy=[statistics.median(shares) for shares in zip(*(run.core_busy for run in own), strict=True)],
        foreign_busy=max(run.foreign_busy for run in own),
        num_differences=num_differences,
        failures=failures(to_vanilla, to_ngram, p99_ms / vanilla_p99_ms, num_differences, limits),
    )


def middle(own: Sequence[Run], others: Sequence[Run], name: str = "tokens_per_s") -> float | None:
    """Of an attribute of those next to each of ours: the median."""
    near = [mean for run in own if (mean := mean_near(run, others, name)) is not None]
    return statistics.median(near) if near else None


def first_token_s(runs: Iterable[Run]) -> float:
    return statistics.median(run.first_token_s["p50"] for run in runs)


def pooled_counters(runs: Iterable[Run]) -> Counter[str]:
    total: Counter[str] = Counter()
    for run in runs:
        total.update(run.counters)
    return total


def part(number: float, whole: float) -> float | None:
    return number / whole if whole else None


def failures(
    to_vanilla: Ratios, to_ngram: Ratios | None, p99_ratio: float, num_differences: int, limits: Limits
) -> list[str]:
    """What of the promise was not kept."""
    is_missed = {
        "tokens": num_differences > 0,
        "vs vanilla": to_vanilla.median < limits.min_ratio,
        "vs ngram": to_ngram is not None and to_ngram.median < limits.min_ratio,
        "p99": p99_ratio > limits.max_p99_ratio,
    }
    return [name for name, is_so in is_missed.items() if is_so]


@dataclass(frozen=True)
class Noise:
    """How much vanilla varies against itself: tokens a second of each of its runs to that of the one before."""

    requests: int
    num_runs: int
    ratio_min: float
    ratio_max: float


def noise(runs: Sequence[Run]) -> list[Noise]:
    found = []
    for requests in dict.fromkeys(run.requests for run in runs):
        own = [run for run in runs if (run.arm, run.requests) == (VANILLA, requests)]
        pairs = [(one, other) for one, other in pairwise(own) if one.session == other.session]
        steps = [other.tokens_per_s / one.tokens_per_s for one, other in pairs]
        if steps:
            found.append(Noise(requests, len(own), min(steps), max(steps)))
    return found


# -- the server for the simulator ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learned:
    """What our engine had learned its steps to take when a run ended, in seconds (StepCost.parts_s)."""

    curve_s: list[float]
    request_s: float
    context_s: float
    verifying_s: float

    def step_s(self, requests: int, tokens: int, context: int) -> float:
        is_verifying = tokens > requests
        each_s = self.request_s + self.verifying_s * is_verifying
        return on_curve(self.curve_s, tokens) + requests * each_s + context / CONTEXT_UNIT * self.context_s


def server_model(runs: Sequence[Run], k: int, prompt_tokens: int) -> dict[str, object]:
    """Measured times of steps. `rows`: requests, tokens in the step, seconds, 1 if it verifies drafts.

    Plain: what vanilla's clients saw, the prompts' step included. And what our engine learned, in the middle of the
    answers, from no draft token a request to k.
    """
    rows: list[list[float]] = []
    for requests in sorted({run.requests for run in runs}):
        same = [run for run in runs if run.requests == requests]
        plain = [run for run in same if run.arm == VANILLA]
        if plain:
            step_s = quantile_ms(pooled(run.gaps for run in plain), 0.5) / 1000
            rows += [[requests, requests, step_s, 0], [requests, requests * prompt_tokens, first_token_s(plain), 0]]
        learned = [(run.num_tokens // requests, run.learned) for run in same if run.learned is not None]
        for tokens in range(requests, requests * (1 + k) + 1, requests) if learned else ():
            seconds = [one.step_s(requests, tokens, requests * (prompt_tokens + made // 2)) for made, one in learned]
            rows.append([requests, tokens, statistics.median(seconds), int(tokens > requests)])
    return {"rows": rows}


# -- as text ---------------------------------------------------------------------------------------------------------

HEADER = (
    "requests",
    "RTT ms",
    "edges",
    "tok/s",
    "x vanilla",
    "x ngram",
    "whole x",
    "p99 gap ms",
    "gap x",
    "token gap x",
    "CPU x",
    "worker x",
    "tok/step",
    "edges' CPU",
    "shared CPU",
    "verdict",
)


LEGEND = (
    "Tokens a second while all decode; whole: from the first request to the last token. "
    "x: times vanilla's (x ngram: times ngram's), from the runs next to each; median (range) over repeats. Gaps: 99th "
    "percentile between chunks, and with each divided by its chunk's tokens. CPU: seconds a token of worker and engine "
    f"core; worker: its alone. Shared CPU: {', '.join(SHARED)}, of one core; ! above {BUSY:.0%}: the test bed may be "
    "the limit."
)


def table(found: Iterable[Result]) -> str:
    lines = [HEADER, ["---:"] * (len(HEADER) - 1) + ["---"], *(line(result) for result in found)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def line(result: Result) -> list[str]:
    is_full = "!" if result.shared_busy > BUSY else ""
    return [
        str(result.requests),
        f"{result.rtt_ms:g}",
        result.edge,
        f"{result.tokens_per_s:.1f}",
        shown(result.ratio, result.ratio_min, result.ratio_max),
        shown(result.ngram_ratio, result.ngram_ratio_min, result.ngram_ratio_max),
        f"{result.whole_ratio:.2f}",
        f"{result.p99_ms:.0f}",
        f"{result.p99_ratio:.2f}",
        f"{result.token_p99_ratio:.2f}",
        f"{result.cpu_s_per_token_ratio:.2f}",
        f"{result.worker_s_per_token_ratio:.2f}",
        f"{result.tokens_per_step:.2f}" if result.tokens_per_step else "-",
        f"{result.edge_busy:.0%}",
        f"{result.shared_busy:.0%}{is_full}",
        result.verdict,
    ]


def shown(ratio: float | None, low: float | None, high: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f} ({low:.2f}..{high:.2f})"


def noise_lines(found: Iterable[Noise]) -> str:
    return "\n".join(
        f"vanilla against itself, {one.requests} requests, {one.num_runs} runs: "
        f"{one.ratio_min:.2f}..{one.ratio_max:.2f} from one run to the next"
        for one in found
    )


def quiet_line(runs: Sequence[Run]) -> str:
    """Whether the machine was left alone."""
    shares = sorted(run.foreign_busy for run in runs)
    num_loud = sum(share > FOREIGN for share in shares)
    return (
        f"other processes used {shares[len(shares) // 2]:.2f} of a core (median; at most {shares[-1]:.2f}), "
        f"more than {FOREIGN:g} in {num_loud} of {len(shares)} runs"
    )


def as_json(result: Result) -> dict[str, object]:
    return {**asdict(result), "verdict": result.verdict}
