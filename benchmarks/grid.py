"""`make bench-never-slower`: turning it on never makes a server slower. A grid on a real `vllm serve`, with verdicts.

    PYTHONPATH=examples python benchmarks/grid.py [--quick] [--resume] [--requests 1 --requests 8] [--edges poor]

Three servers run at once: vanilla, vLLM's own `ngram` method, ours; float32, their models on one core, whoever is not
asked uses none of it. On the other core are the load (streams.py), the edges (replay.py) and a relay that adds delay
(relay.py). A run is so many requests that start together; each of ours is compared with the vanilla and ngram runs next
to it (verdicts.py). All is saved after every run; --resume goes on with a file that was left. Prints a line for each
cell; status 1 if any fails, or if any answer is not what vanilla said before, token by token.
"""

import asyncio
import json
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import httpx2 as httpx
import psutil
import typer
from harness.edges import Edges, check, edge_totals
from harness.relay import Relay
from harness.replay import REPLAY, Accuracy, Recording, write_recordings
from harness.results import CACHE, RESULTS, circumstances, console, progress_bar, save_runs
from harness.servers import QUESTIONS, Target, Usage, core_shares, launch_all, prompt_of, usage
from harness.streams import Answer, ask_all, decoding, duration_s
from stack import EDGE_CORE, MODEL_NAME, StackError, start, wait_for
from verdicts import (
    DEAD,
    EDGES,
    GOOD,
    LEGEND,
    NGRAM,
    OURS,
    POOR,
    STALLING,
    VANILLA,
    Cell,
    Learned,
    Limits,
    Run,
    Slot,
    all_cells,
    as_json,
    bin_of,
    fleet,
    noise,
    noise_lines,
    quantiles_ms,
    quiet_line,
    results,
    run_of,
    schedule,
    server_model,
    table,
)

from vllm_specedge.policy.step_cost import KNOTS

LOGS = CACHE / "bench" / "never-slower"
RECORDINGS = LOGS / "recordings.json"
KV_BYTES = 400 << 20
MAX_SEQS = 64
REQUESTS, RTTS_MS, REPEATS = (1, 4, 8, 16, 32), (0.0, 20.0, 80.0), 3
QUICK_REQUESTS, QUICK_RTTS_MS, QUICK_EDGES = (1, 8), (20.0,), (GOOD, POOR, DEAD)
NUM_TOKENS = {1: 120, 4: 80, 8: 64, 16: 64, 32: 48}
"""Of each answer, by requests (the largest that is no more): a run takes about ten seconds."""
WARM_UP_TOKENS, WARM_UP_TOKENS_OF_MANY, MANY = 16, 8, 9
ACCURACIES = {POOR: Accuracy(0.3, 0.3)}
DEFAULT_ACCURACY = Accuracy(0.75, 0.6)
STALL_S, STALL_EVERY_S = 2.0, 5.0
SETTLE_S = 0.1


@dataclass(frozen=True)
class Settings:
    """What runs that are compared must have in common."""

    mode: str
    k: int
    tokens: int
    """Of each answer; 0: by NUM_TOKENS."""
    pass_ms: float
    seed: int

    def num_tokens(self, requests: int) -> int:
        return self.tokens or NUM_TOKENS[max((key for key in NUM_TOKENS if key <= requests), default=1)]

    def num_warm_up_tokens(self, requests: int) -> int:
        return min(self.num_tokens(requests), WARM_UP_TOKENS if requests < MANY else WARM_UP_TOKENS_OF_MANY)

    def speculation(self, arm: str, gateway_port: int) -> dict[str, object] | None:
        """A server's --speculative-config."""
        if arm == VANILLA:
            return None
        if arm == NGRAM:
            lookup = {"prompt_lookup_min": 5, "prompt_lookup_max": 5}
            return {"method": "ngram", "num_speculative_tokens": self.k, **lookup}
        mode = {"mode": self.mode} if self.mode else {}
        return {"method": "edge", "num_speculative_tokens": self.k, "listen": f"127.0.0.1:{gateway_port}", **mode}


@dataclass(frozen=True)
class Plan:
    """What is measured, and where it is kept."""

    settings: Settings
    cells: tuple[Cell, ...]
    repeats: int
    limits: Limits
    output: Path

    @property
    def max_requests(self) -> int:
        return max(cell.requests for cell in self.cells)


@dataclass
class Kept:
    """All that was measured so far, in this session of the servers and before."""

    sessions: list[dict[str, object]]
    runs: list[Run]
    prompt_tokens: int = 0
    """Of a request, on average."""

    @property
    def session(self) -> int:
        return len(self.sessions) - 1

    def done(self) -> set[tuple[Cell, int]]:
        return {(run.cell, run.repeat) for run in self.runs if run.cell is not None}


# -- processes -------------------------------------------------------------------------------------------------------


def launch(settings: Settings, stack: ExitStack) -> dict[str, Target]:
    """Start the three servers at once; returns them by arm when all are healthy."""
    arguments = ["--max-model-len", "2048", "--max-num-seqs", str(MAX_SEQS), "--kv-cache-memory-bytes", str(KV_BYTES)]
    return launch_all((VANILLA, NGRAM, OURS), settings.speculation, arguments, LOGS, stack)


def edge_command(settings: Settings, cell: Cell, repeat: int, url: str) -> list[str]:
    accuracy = ACCURACIES.get(cell.edge, DEFAULT_ACCURACY)
    connections, capacity = fleet(cell.requests, cell.edge)
    command = [sys.executable, str(REPLAY), url, "--recordings", str(RECORDINGS)]
    command += ["--first", str(accuracy.first), "--second", str(accuracy.second)]
    command += ["--seed", str(settings.seed + 1000 * repeat), "--pass-ms", str(settings.pass_ms)]
    command += ["--edges", str(connections), "--max-requests", str(capacity)]
    if cell.edge == STALLING:
        command += ["--stall-s", str(STALL_S), "--stall-every-s", str(STALL_EVERY_S)]
    return command


@contextmanager
def drafting(settings: Settings, slot: Slot, target: Target, log: Path) -> Iterator[Edges | None]:
    """The edges of a run of ours, all admitted; None for the others."""
    if slot.cell is None:
        yield None
        return
    with Relay(target.server.gateway_port, slot.cell.rtt_ms / 1000) as relay:
        process = start(edge_command(settings, slot.cell, slot.repeat, relay.url), log, core=EDGE_CORE)
        edges = Edges(process, relay)
        try:
            num_edges = fleet(slot.cell.requests, slot.cell.edge).connections
            wait_for(process, f"{target.server.gateway_url}/healthz", "edges", num_edges)
            yield edges
            check(process)
        finally:
            process.stop()
    target.wait_for_no_edge()


@contextmanager
def dead(edges: Edges | None, slot: Slot) -> Iterator[None]:
    """The edges as they are in the cell: a dead one is stopped, while its connection stays open."""
    if edges is None or slot.cell is None or slot.cell.edge != DEAD:
        yield
        return
    edges.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        edges.signal(signal.SIGCONT)  # so that it can end


# -- measuring -------------------------------------------------------------------------------------------------------


def record(plan: Plan, vanilla: Target) -> list[Recording]:
    """What the target says without speculation, to as many prompts as there are requests at most."""
    prompts = [f"Task {n + 1}: {QUESTIONS[n % len(QUESTIONS)]}" for n in range(plan.max_requests)]
    num_tokens = max(plan.settings.num_tokens(cell.requests) for cell in plan.cells)
    answers = ask(vanilla, [prompt_of(prompt) for prompt in prompts], num_tokens)
    recordings = [Recording(answer.prompt, answer.tokens) for answer in answers]
    write_recordings(RECORDINGS, recordings)
    return recordings


def ask(target: Target, prompts: Sequence[str | Sequence[int]], num_tokens: int) -> list[Answer]:
    target.num_asked += len(prompts) * num_tokens
    try:
        return asyncio.run(ask_all(target.server.url, MODEL_NAME, prompts, num_tokens))
    except (httpx.HTTPError, RuntimeError) as error:
        raise target.server.process.fail(f"asking failed: {error!r}") from error


def measure(
    settings: Settings, slot: Slot, target: Target, recordings: Sequence[Recording], place: tuple[int, int]
) -> Run:
    """One run; `place` is its session and its number there."""
    prompts = [recording.prompt for recording in recordings[: slot.requests]]
    log = LOGS / "edges.log"
    with drafting(settings, slot, target, log) as edges:
        ask(target, prompts, settings.num_warm_up_tokens(slot.requests))
        counters = target.counters()
        with dead(edges, slot):
            before = usage(target, edges)
            answers = ask(target, prompts, settings.num_tokens(slot.requests))
            after = usage(target, edges)
        time.sleep(SETTLE_S + (slot.cell.rtt_ms / 1000 if slot.cell else 0.0))  # what is on its way comes
        counted = target.counters()
        counted.subtract(counters)
    totals = edge_totals(log, slot.cell is None or slot.cell.edge == DEAD) if edges else {}
    learned = learned_by(target) if slot.cell else None
    return run_from(slot, place, answers, differences(recordings, answers), (before, after), counted, totals, learned)


def learned_by(target: Target) -> Learned:
    """What the engine says of its steps now."""
    values = target.server.metrics()
    prefix = "specedge_engine_step_"
    others = (values[f'{prefix}{name}_seconds{{engine="0"}}'] for name in ("request", "context", "verifying"))
    return Learned([values[f'{prefix}seconds{{engine="0",tokens="{size}"}}'] for size in KNOTS], *others)


def run_from(
    slot: Slot,
    place: tuple[int, int],
    answers: Sequence[Answer],
    differing: list[list[int]],
    used: tuple[Usage, Usage],
    counters: Counter[str],
    totals: dict[str, int],
    learned: Learned | None,
) -> Run:
    before, after = used
    gaps = [gap for answer in answers for gap in answer.gaps()]
    by_chunk = Counter(bin_of(gap.seconds) for gap in gaps)
    by_token = Counter(bin_of(gap.seconds / gap.num_tokens) for gap in gaps)
    first_s = sorted(answer.first_token_s for answer in answers)
    num_tokens = sum(len(answer.tokens) for answer in answers)
    decode_tokens, decode_s = decoding(answers)
    return Run(
        arm=slot.arm,
        requests=slot.requests,
        rtt_ms=slot.cell.rtt_ms if slot.cell else None,
        edge=slot.cell.edge if slot.cell else None,
        repeat=slot.repeat,
        session=place[0],
        number=place[1],
        num_tokens=num_tokens,
        seconds=duration_s(answers),
        decode_tokens=decode_tokens,
        decode_seconds=decode_s,
        cpu_s={name: round(after.cpu_s[name] - before.cpu_s.get(name, 0.0), 2) for name in after.cpu_s},
        core_busy=core_shares(before, after, lambda name: name not in ("idle", "iowait")),
        core_steal=core_shares(before, after, lambda name: name == "steal"),
        first_token_s={"p50": first_s[len(first_s) // 2], "max": first_s[-1]},
        gap_ms=quantiles_ms(by_chunk),
        token_gap_ms=quantiles_ms(by_token),
        tokens_per_chunk=num_tokens / sum(len(answer.chunks) for answer in answers),
        counters=dict(counters),
        edge_totals=totals,
        up_bytes=after.traffic.up_bytes - before.traffic.up_bytes,
        down_bytes=after.traffic.down_bytes - before.traffic.down_bytes,
        differences=differing,
        learned=learned,
        gaps=dict(by_chunk),
        token_gaps=dict(by_token),
    )


def differences(recordings: Sequence[Recording], answers: Iterable[Answer]) -> list[list[int]]:
    """Prompt and first token of each answer that is not as recorded."""
    found = []
    for number, (known, answer) in enumerate(zip(recordings, answers, strict=False)):
        pairs = zip(known.answer, answer.tokens, strict=False)
        at = next((at for at, pair in enumerate(pairs) if pair[0] != pair[1]), None)
        found += [[number, at]] if at is not None else []
    return found


def measure_all(plan: Plan, kept: Kept, slots: Sequence[Slot], stack: ExitStack) -> None:
    """Make all runs; each is in `kept` and in the file as soon as it is done."""
    with console.status("Starting three servers (minutes) ..."):
        targets = launch(plan.settings, stack)
    # From here on, so that the servers are not pinned too: the relay and the asking never stop the model's core.
    psutil.Process().cpu_affinity([EDGE_CORE])
    ask(targets[VANILLA], [prompt_of(QUESTIONS[0])], WARM_UP_TOKENS)
    recordings = record(plan, targets[VANILLA])
    kept.prompt_tokens = round(statistics.fmean(len(recording.prompt) for recording in recordings))
    with progress_bar() as progress:
        task = progress.add_task("measuring", total=len(slots))
        for number, slot in enumerate(slots):
            progress.update(task, description=title(slot), refresh=True)
            run = measure(plan.settings, slot, targets[slot.arm], recordings, (kept.session, number))
            kept.runs.append(run)
            save(plan, kept)
            progress.console.print(said(slot, run), markup=False)
            progress.advance(task)


def title(slot: Slot) -> str:
    if slot.cell is None:
        return f"{slot.requests} requests, {slot.arm}"
    return f"{slot.requests} requests, RTT {slot.cell.rtt_ms:g} ms, {slot.cell.edge} edges, repeat {slot.repeat + 1}"


def said(slot: Slot, run: Run) -> str:
    text = f"{title(slot)}: {run.tokens_per_s:.1f} tok/s in {run.seconds:.1f} s, p99 {run.gap_ms.get('p99', 0):.0f} ms"
    return text + (f", NOT IDENTICAL at {run.differences}" if run.differences else "")


# -- what is kept ----------------------------------------------------------------------------------------------------


def save(plan: Plan, kept: Kept) -> None:
    """Write all to the file, whole or not at all; a run is a line."""
    head = {
        "settings": asdict(plan.settings),
        "limits": asdict(plan.limits),
        "edges": {
            "accuracy": {edge: asdict(ACCURACIES.get(edge, DEFAULT_ACCURACY)) for edge in EDGES},
            "stalls": {"stall_s": STALL_S, "every_s": STALL_EVERY_S},
        },
        "sessions": kept.sessions,
        "cells": [as_json(result) for result in results(kept.runs, plan.limits)],
        "vanilla_against_itself": [asdict(one) for one in noise(kept.runs)],
        "prompt_tokens": kept.prompt_tokens,
        "server_model": server_model(kept.runs, plan.settings.k, kept.prompt_tokens),
    }
    save_runs(plan.output, head, kept.runs)


def load(plan: Plan) -> Kept:
    """What an earlier session left. Raises StackError if it was measured otherwise."""
    if not plan.output.exists():
        return Kept([], [])
    values = json.loads(plan.output.read_text())
    if values["settings"] != asdict(plan.settings):
        raise StackError(f"{plan.output} has other settings ({values['settings']}): choose another --output")
    return Kept(values["sessions"], [run_of(run) for run in values["runs"]], values["prompt_tokens"])


def report(plan: Plan, kept: Kept) -> bool:
    """Print what it comes to; returns whether all cells are as promised and all answers are vanilla's."""
    found = results(kept.runs, plan.limits)
    print(table(sorted(found, key=lambda result: (result.requests, result.rtt_ms, EDGES.index(result.edge)))))
    print(f"\n{LEGEND}\n\n{noise_lines(noise(kept.runs))}\n{quiet_line(kept.runs)}")
    num_failed = sum(bool(result.failures) for result in found)
    num_different = sum(bool(run.differences) for run in kept.runs)
    print(
        f"{len(found) - num_failed} of {len(found)} cells ok; answers differ from the recorded in {num_different} runs"
    )
    console.print(f"All runs are in {plan.output}")
    return not num_failed and not num_different


def output_path(is_quick: bool) -> Path:
    return CACHE / "bench" / "quick-never-slower.json" if is_quick else RESULTS / "never-slower.json"


def main(
    requests: Annotated[list[int] | None, typer.Option(help=f"At once; may be given again. {REQUESTS}")] = None,
    rtt: Annotated[list[float] | None, typer.Option(help=f"Round trips in ms; may be given again. {RTTS_MS}")] = None,
    edges: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(EDGES)}; may be given again. All")] = None,
    repeats: Annotated[int, typer.Option(help=f"Of every cell; 0: {REPEATS}, 1 with --quick.", min=0)] = 0,
    tokens: Annotated[int, typer.Option(help="Of each answer; 0: as many as take about ten seconds.", min=0)] = 0,
    k: Annotated[int, typer.Option(help="Draft tokens that a step verifies for a request at most.", min=1)] = 5,
    mode: Annotated[str, typer.Option(help="Our server's `mode`; empty: its default.")] = "",
    pass_ms: Annotated[float, typer.Option(help="What one forward pass of an edge takes.")] = 6.0,
    min_ratio: Annotated[float, typer.Option(help="Tokens a second, to vanilla's and ngram's.")] = Limits.min_ratio,
    max_p99_ratio: Annotated[
        float, typer.Option(help="Of the gaps between chunks, to vanilla's.")
    ] = Limits.max_p99_ratio,
    seed: Annotated[int, typer.Option(help="Of the replayed drafts and the stalls.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="1 and 8 requests, RTT 20 ms, good, poor, dead; once.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the output file; only what is missing.")] = False,
    output: Annotated[Path | None, typer.Option(help="Default: benchmarks/results/never-slower.json.")] = None,
) -> None:
    """Whether turning it on ever makes a server slower: a grid with verdicts."""
    edges = edges or list(QUICK_EDGES if quick else EDGES)
    if unknown := set(edges) - set(EDGES):
        raise typer.BadParameter(f"there are no {', '.join(sorted(unknown))} edges; there are {', '.join(EDGES)}")
    cells = all_cells(
        requests or (QUICK_REQUESTS if quick else REQUESTS), rtt or (QUICK_RTTS_MS if quick else RTTS_MS), edges
    )
    plan = Plan(
        settings=Settings(mode, k, tokens, pass_ms, seed),
        cells=tuple(cells),
        repeats=repeats or (1 if quick else REPEATS),
        limits=Limits(min_ratio, max_p99_ratio),
        output=(output or output_path(quick)).absolute(),
    )
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the servers are stopped
    try:
        kept = load(plan) if resume else Kept([], [])
        slots = schedule(plan.cells, plan.repeats, kept.done())
        if slots:
            kept = replace(kept, sessions=[*kept.sessions, circumstances()])
            with ExitStack() as stack:
                measure_all(plan, kept, slots, stack)
    except StackError as error:
        sys.exit(f"grid: {error}")
    if not report(plan, kept):
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
