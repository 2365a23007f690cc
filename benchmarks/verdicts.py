"""Order of the measurements of `make bench-never-slower`, and results from its runs. Pure: plain values in and out.

Rule 1: machines drift, so a run is compared only with adjacent runs of the other servers, for the same requests.
Rule 2: a verdict is on the median over repeats, so that one bad moment of the machine is not a failure.
"""

import statistics
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from math import ceil
from typing import Any, NamedTuple

from harness.results import Column, table
from harness.runs import SHARED, Ratio, Run, Slot, beside, counted, middle, pooled, quantile_ms, ratio, share

from vllm_specedge.policy.step_cost import CONTEXT_UNIT, on_curve

VANILLA, NGRAM, OURS = "vanilla", "ngram", "edge"
GOOD, POOR, STALLING, DEAD, HALF = EDGES = ("good", "poor", "stalling", "dead", "half")
MAX_CONNECTIONS = 8
BUSY = 0.7
"""If the processes that share the other core use more of it than this, the test bed itself may be the limit."""
FOREIGN = 0.15
"""If other processes use more of a core than this, a run means little. (Idle servers use some hundredths.)"""


# -- the order -------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A cell of the grid: concurrent requests, round trip in ms, and kind of edges."""

    requests: int
    rtt_ms: float
    edge: str


def cell_of(slot: Slot) -> Cell | None:
    """The cell of a run; None for vanilla and ngram runs."""
    return None if slot.rtt_ms is None or slot.edge is None else Cell(slot.requests, slot.rtt_ms, slot.edge)


def all_cells(requests: Iterable[int], rtts_ms: Sequence[float], edges: Sequence[str]) -> list[Cell]:
    """All cells, except half of the requests with an edge at a single request."""
    cells = (Cell(number, rtt_ms, edge) for number in requests for rtt_ms in rtts_ms for edge in edges)
    return [cell for cell in cells if cell.edge != HALF or cell.requests > 1]


def schedule(cells: Sequence[Cell], repeats: int, done: Collection[Slot] = ()) -> list[Slot]:
    """All runs in order, without those of ours that are done. Every second repeat is reversed."""
    slots: list[Slot] = []
    for requests in dict.fromkeys(cell.requests for cell in cells):
        row = [cell for cell in cells if cell.requests == requests]
        own = [
            Slot(arm=OURS, **cell._asdict(), repeat=repeat)
            for repeat in range(repeats)
            for cell in (reversed(row) if repeat % 2 else row)
        ]
        slots += interleave([slot for slot in own if slot not in done], requests)
    return slots


def interleave(own: Sequence[Slot], requests: int) -> Iterator[Slot]:
    """Runs with vanilla or ngram, in turn, around every two of ours: each of ours is at most two runs from either."""
    if not own:
        return
    last = VANILLA
    yield Slot(arm=VANILLA, requests=requests)
    rest, kinds = iter(own), cycle((NGRAM, VANILLA))
    while pair := tuple(islice(rest, 2)):
        yield from pair
        last = next(kinds)
        yield Slot(arm=last, requests=requests)
    if last != VANILLA:
        yield Slot(arm=VANILLA, requests=requests)


class Fleet(NamedTuple):
    """Number of edge connections, and of requests that each accepts."""

    connections: int
    capacity: int


def fleet(requests: int, edge: str) -> Fleet:
    """A fleet with room for all requests, or for exactly half of them."""
    if edge != HALF:
        connections = min(requests, MAX_CONNECTIONS)
        return Fleet(connections, ceil(requests / connections))
    half = requests // 2
    connections = max(number for number in range(1, MAX_CONNECTIONS + 1) if half % number == 0)
    return Fleet(connections, half // connections)


# -- results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """Tolerances of "never slower"."""

    min_ratio: float = 0.97
    """Least tokens per second, relative to vanilla's and to ngram's."""
    max_p99_ratio: float = 1.15
    """Largest 99th percentile of gaps between chunks, relative to vanilla's."""


def nearest(run: Run, others: Iterable[Run]) -> list[Run]:
    """Of `others` with the same number of requests and session, the last before the run and the first after it."""
    same = [other for other in others if (other.session, other.requests) == (run.session, run.requests)]
    before = [other for other in same if other.number < run.number]
    after = [other for other in same if other.number > run.number]
    return [
        *([max(before, key=lambda other: other.number)] if before else []),
        *([min(after, key=lambda other: other.number)] if after else []),
    ]


def results(runs: Sequence[Run], limits: Limits) -> list[dict[str, Any]]:
    """Results of all cells that have a run and one to compare it with, in the order of their first runs."""
    cells = dict.fromkeys(cell for run in runs if (cell := cell_of(run)) is not None)
    found = (result_of(cell, runs, limits) for cell in cells)
    return [result for result in found if result is not None]


def result_of(cell: Cell, runs: Sequence[Run], limits: Limits) -> dict[str, Any] | None:
    """One cell over all of its repeats, for the table and the file."""
    own = [run for run in runs if cell_of(run) == cell]
    vanilla, ngram = (
        [run for run in runs if (run.arm, run.requests) == (arm, cell.requests)] for arm in (VANILLA, NGRAM)
    )
    to_vanilla, to_ngram = (ratio(own, others, which=nearest) for others in (vanilla, ngram))
    if to_vanilla is None:
        return None
    p99_ms, vanilla_p99_ms = (quantile_ms(pooled(run.gaps for run in each), 0.99) for each in (own, vanilla))
    token_ms, vanilla_token_ms = (quantile_ms(pooled(run.token_gaps for run in each), 0.99) for each in (own, vanilla))
    counts = counted(own)
    counts["all_verified_tokens"] = counts["verified_tokens"] + counts["ngram_verified_tokens"]
    num_differences = sum(len(run.differences) for run in own)
    failed = failures(to_vanilla, to_ngram, p99_ms / vanilla_p99_ms, num_differences, limits)
    return {
        **cell._asdict(),
        "repeats": len(own),
        "tokens_per_s": middle(own, "tokens_per_s"),
        "vanilla_tokens_per_s": middle_near(own, vanilla),
        "ngram_tokens_per_s": middle_near(own, ngram),
        **to_vanilla.named("ratio"),
        **(to_ngram.named("ngram_ratio") if to_ngram else dict.fromkeys(Ratio(0, 0, 0).named("ngram_ratio"))),
        "p99_ms": p99_ms,
        "vanilla_p99_ms": vanilla_p99_ms,
        "p99_ratio": p99_ms / vanilla_p99_ms,
        "token_p99_ms": token_ms,
        "token_p99_ratio": token_ms / vanilla_token_ms,
        # Includes the time of prompts and of the last answers:
        "whole_tokens_per_s": middle(own, "whole_tokens_per_s"),
        "vanilla_whole_tokens_per_s": middle_near(own, vanilla, "whole_tokens_per_s"),
        "whole_ratio": median_ratio(own, vanilla, "whole_tokens_per_s"),
        "cpu_s_per_token_ratio": median_ratio(own, vanilla, "cpu_s_per_token"),
        "worker_s_per_token_ratio": median_ratio(own, vanilla, "worker_s_per_token"),
        "first_token_ratio": middle(own, "first_token_p50_s") / middle(vanilla, "first_token_p50_s"),
        "tokens_per_step": share(counts, "committed_tokens", "steps"),
        "acceptance": share(counts, "accepted_tokens", "verified_tokens"),
        "verified_per_token": share(counts, "all_verified_tokens", "committed_tokens"),
        "edge_busy": middle(own, "edge_busy"),
        "shared_busy": middle(own, "shared_busy"),
        "core_busy": [statistics.median(shares) for shares in zip(*(run.core_busy for run in own), strict=True)],
        "foreign_busy": max(run.foreign_busy for run in own),
        "num_differences": num_differences,
        "failures": failed,
        "verdict": f"FAIL ({', '.join(failed)})" if failed else "ok",
    }


def median_ratio(own: Sequence[Run], others: Sequence[Run], name: str) -> float:
    found = ratio(own, others, name, nearest)
    return found.median if found else 0.0


def middle_near(own: Sequence[Run], others: Sequence[Run], name: str = "tokens_per_s") -> float | None:
    """Median of an attribute of the runs adjacent to each of ours."""
    near = [mean for run in own if (mean := beside(run, others, name, nearest)) is not None]
    return statistics.median(near) if near else None


def failures(
    to_vanilla: Ratio, to_ngram: Ratio | None, p99_ratio: float, num_differences: int, limits: Limits
) -> list[str]:
    """The limits that were not met."""
    is_missed = {
        "tokens": num_differences > 0,
        "vs vanilla": to_vanilla.median < limits.min_ratio,
        "vs ngram": to_ngram is not None and to_ngram.median < limits.min_ratio,
        "p99": p99_ratio > limits.max_p99_ratio,
    }
    return [name for name, is_so in is_missed.items() if is_so]


@dataclass(frozen=True)
class Noise:
    """How much vanilla varies: tokens per second of each of its runs relative to the previous one."""

    requests: int
    num_runs: int
    ratio_min: float
    ratio_max: float

    def __str__(self) -> str:
        return (
            f"vanilla against itself, {self.requests} requests, {self.num_runs} runs: "
            f"{self.ratio_min:.2f}..{self.ratio_max:.2f} from one run to the next"
        )


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
    """Step times that our engine had learned by the end of a run, in seconds (StepCost.parts_s)."""

    curve_s: list[float]
    request_s: float
    context_s: float
    verifying_s: float

    def step_s(self, requests: int, tokens: int, context: int) -> float:
        is_verifying = tokens > requests
        each_s = self.request_s + self.verifying_s * is_verifying
        return on_curve(self.curve_s, tokens) + requests * each_s + context / CONTEXT_UNIT * self.context_s


def server_model(runs: Sequence[Run], k: int, prompt_tokens: int) -> dict[str, object]:
    """Measured step times. `rows`: requests, tokens in the step, seconds, 1 if it verifies drafts.

    Plain steps: as seen by vanilla's clients, including prefill. Others: as learned by our engine, in the middle of the
    answers, from 0 to k draft tokens per request.
    """
    rows: list[list[float]] = []
    for requests in sorted({run.requests for run in runs}):
        same = [run for run in runs if run.requests == requests]
        plain = [run for run in same if run.arm == VANILLA]
        if plain:
            first_s = middle(plain, "first_token_p50_s")
            step_s = quantile_ms(pooled(run.gaps for run in plain), 0.5) / 1000
            rows += [[requests, requests, step_s, 0], [requests, requests * prompt_tokens, first_s, 0]]
        learned = [(run.num_tokens // requests, Learned(**run.learned)) for run in same if run.learned is not None]
        for tokens in range(requests, requests * (1 + k) + 1, requests) if learned else ():
            seconds = [one.step_s(requests, tokens, requests * (prompt_tokens + made // 2)) for made, one in learned]
            rows.append([requests, tokens, statistics.median(seconds), int(tokens > requests)])
    return {"rows": rows}


# -- as text ---------------------------------------------------------------------------------------------------------


def ratio_in(result: dict[str, Any], name: str) -> Ratio | None:
    values = [result[f"{name}{end}"] for end in ("", "_min", "_max")]
    return None if None in values else Ratio(*values)


COLUMNS = (
    Column("requests", "requests"),
    Column("RTT ms", "rtt_ms", "g"),
    Column("edges", "edge"),
    Column("tok/s", "tokens_per_s", ".1f"),
    Column("x vanilla", lambda result: ratio_in(result, "ratio")),
    Column("x ngram", lambda result: ratio_in(result, "ngram_ratio")),
    Column("whole x", "whole_ratio", ".2f"),
    Column("p99 gap ms", "p99_ms", ".0f"),
    Column("gap x", "p99_ratio", ".2f"),
    Column("token gap x", "token_p99_ratio", ".2f"),
    Column("CPU x", "cpu_s_per_token_ratio", ".2f"),
    Column("worker x", "worker_s_per_token_ratio", ".2f"),
    Column("tok/step", "tokens_per_step", ".2f"),
    Column("edges' CPU", "edge_busy", ".0%"),
    Column("shared CPU", lambda result: f"{result['shared_busy']:.0%}{'!' if result['shared_busy'] > BUSY else ''}"),
    Column("verdict", "verdict"),
)
LEGEND = (
    "Tokens per second while all decode; whole: from the first request to the last token. "
    "x: relative to vanilla (x ngram: to ngram), from adjacent runs; median (range) over repeats. Gaps: 99th "
    "percentile between chunks, and with each divided by its chunk's tokens. CPU: seconds per token of worker and "
    f"engine core; worker: of it alone. Shared CPU: {', '.join(SHARED)}, of one core; ! above {BUSY:.0%}: the test "
    "bed may be the limit."
)


def quiet_line(runs: Sequence[Run]) -> str:
    """A line on other load on the machine."""
    shares = sorted(run.foreign_busy for run in runs)
    num_loud = sum(share > FOREIGN for share in shares)
    return (
        f"other processes used {shares[len(shares) // 2]:.2f} of a core (median; at most {shares[-1]:.2f}), "
        f"more than {FOREIGN:g} in {num_loud} of {len(shares)} runs"
    )


def report(runs: Sequence[Run], limits: Limits) -> str:
    """One line per cell, and figures on how far they can be trusted."""
    found = sorted(
        results(runs, limits), key=lambda each: (each["requests"], each["rtt_ms"], EDGES.index(each["edge"]))
    )
    num_ok = sum(not result["failures"] for result in found)
    num_different = sum(bool(run.differences) for run in runs)
    return "\n".join(
        [
            table(COLUMNS, found),
            f"\n{LEGEND}\n",
            *map(str, noise(runs)),
            quiet_line(runs),
            f"{num_ok} of {len(found)} cells ok; answers differ from the recorded ones in {num_different} runs",
        ]
    )


def is_kept(runs: Sequence[Run], limits: Limits) -> bool:
    """Whether all cells are within the limits, and all answers are vanilla's."""
    return not any(result["failures"] for result in results(runs, limits)) and not any(run.differences for run in runs)
