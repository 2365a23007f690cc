"""`make bench-ahead`: what drafting ahead is worth, by how far away the edge is. An ablation on a real `vllm serve`.

    PYTHONPATH=examples python benchmarks/ahead.py [--quick] [--rtt 20 --rtt 80] [--arms branches] [--real]

All five servers run at once (15 GiB), each with its model in float32 on the same core; whoever is not asked uses none
of it. One edge at a time is on another core, behind a relay that adds delay and counts bytes (relay.py). It drafts from
the vanilla server's recorded answers (replay.py), or with --real from the shipped draft. Each ratio is to vanilla in
the same repeat. Prints two tables and writes all runs to a JSON file; status 1 if any answer is not vanilla's, token by
token.
"""

import json
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer
from harness.edges import check, edge_totals
from harness.relay import Relay, Traffic
from harness.replay import REPLAY, Accuracy, Recording, write_recordings
from harness.results import CACHE, RESULTS, circumstances, console, markdown, progress_bar
from harness.servers import QUESTIONS, Target, launch_all, prompt_of
from stack import (
    EDGE_CORE,
    StackError,
    start,
    wait_for,
)

LOGS = CACHE / "bench" / "ahead"
RECORDINGS = LOGS / "recordings.json"
KV_BYTES = 200 << 20
WARM_UP_TOKENS = 16
CREDIT_TOKENS = 32
WAIT_LIMIT_MS = 1000
"""Where the server always waits, for longer than any answer takes; the other arms have the default limit."""
PASS_MS = 6.0
VANILLA = "vanilla"


@dataclass(frozen=True)
class Arm:
    """One way of serving: a server's options, and what its edge may do."""

    name: str
    title: str
    server: str
    options: dict[str, object] | None = None
    """Beside `method`, `num_speculative_tokens` and `listen`; None: no speculation."""
    max_width: int = 1
    """Of the edge's passes; 1: no branches, 0: as the drafter can."""


def all_arms(k: int) -> list[Arm]:
    """Each but the first two adds one thing to the one before; k is the most draft tokens a step verifies."""
    wait = {"mode": "wait", "hold_limit_ms": WAIT_LIMIT_MS, "ngram": False}
    ahead: dict[str, object] = {"mode": "auto", "credit_tokens": CREDIT_TOKENS}
    return [
        Arm(VANILLA, VANILLA, VANILLA),
        Arm("chain-and-wait", "chain-and-wait", "chain-and-wait", {**wait, "credit_tokens": k}),
        Arm("run-ahead", "+ run-ahead", "run-ahead", {**wait, "credit_tokens": CREDIT_TOKENS}),
        Arm("partial-reuse", "+ partial reuse", "auto", {**ahead, "ngram": False}),
        Arm("branches", "+ branches", "auto", {**ahead, "ngram": False}, max_width=0),
        Arm("ngram", "+ n-gram rung", "ngram", {**ahead, "ngram": True}, max_width=0),
    ]


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    rtts_ms: tuple[float, ...]
    repeats: int
    num_prompts: int
    num_tokens: int
    k: int
    arms: tuple[str, ...]
    is_real: bool
    accuracy: Accuracy

    def chosen(self) -> list[Arm]:
        return [arm for arm in all_arms(self.k) if arm.name in (VANILLA, *self.arms)]

    def cells(self) -> Iterator[tuple[int, float, Arm]]:
        """Repeat, RTT in ms and arm; each round starts with another arm, so that none always runs on a warm machine."""
        arms = self.chosen()
        for repeat in range(self.repeats):
            for number, rtt_ms in enumerate(self.rtts_ms):
                shift = (repeat + number) % len(arms)
                for arm in arms[shift:] + arms[:shift]:
                    yield repeat, rtt_ms, arm


@dataclass(frozen=True)
class Run:
    """One arm at one RTT, once."""

    arm: str
    rtt_ms: float
    repeat: int
    num_tokens: int
    seconds: float
    counters: dict[str, int]
    up_bytes: int
    down_bytes: int
    differences: tuple[tuple[int, int], ...]
    """Prompt and first token that is not as recorded."""
    edge: dict[str, int]
    """The edge's own totals, with the warm-up's."""

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


# -- processes -----------------------------------------------------------------------------------------------------


def launch(plan: Plan, stack: ExitStack) -> dict[str, Target]:
    """Start the servers that the arms need; returns them by name when all are healthy."""
    options = {arm.server: arm.options for arm in plan.chosen()}

    def speculation(name: str, gateway_port: int) -> dict[str, object] | None:
        own = options[name]
        edge = {"method": "edge", "num_speculative_tokens": plan.k, "listen": f"127.0.0.1:{gateway_port}"}
        return edge | own if own is not None else None

    arguments = ["--max-model-len", "2048", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(KV_BYTES)]
    return launch_all(list(options), speculation, arguments, LOGS, stack)


def edge_command(plan: Plan, url: str, max_width: int) -> list[str]:
    command = [sys.executable, str(REPLAY), url, "--max-width", str(max_width)]
    if plan.is_real:
        return [*command, "--draft", str(CACHE / "smollm2-draft")]
    accuracy = plan.accuracy
    command += ["--first", str(accuracy.first), "--second", str(accuracy.second), "--seed", str(accuracy.seed)]
    return [*command, "--recordings", str(RECORDINGS), "--pass-ms", str(PASS_MS)]


@contextmanager
def drafting(plan: Plan, arm: Arm, target: Target, rtt_ms: float) -> Iterator[tuple[Relay | None, Path]]:
    """The arm's edge, admitted through a relay of its own. Yields the relay (vanilla has none) and the edge's log."""
    log = LOGS / f"edge-{arm.name}.log"
    if arm.options is None:
        yield None, log
        return
    with Relay(target.server.gateway_port, rtt_ms / 1000) as relay:
        process = start(edge_command(plan, relay.url, arm.max_width), log, {"HF_HUB_OFFLINE": "1"}, core=EDGE_CORE)
        try:
            wait_for(process, f"{target.server.gateway_url}/healthz", "edges", 1)
            yield relay, log
            check(process)
        finally:
            process.stop()
    target.wait_for_no_edge()


# -- measuring -----------------------------------------------------------------------------------------------------


def record(plan: Plan, vanilla: Target) -> list[Recording]:
    """What the target says without speculation."""
    vanilla.ask(prompt_of(QUESTIONS[0]), WARM_UP_TOKENS)
    recordings = [vanilla.ask(prompt_of(question), plan.num_tokens)[0] for question in QUESTIONS[: plan.num_prompts]]
    write_recordings(RECORDINGS, recordings)
    return recordings


def measure(plan: Plan, arm: Arm, target: Target, rtt_ms: float, repeat: int, recordings: Sequence[Recording]) -> Run:
    """Ask all that was recorded, one request after the other."""
    with drafting(plan, arm, target, rtt_ms) as (relay, log):
        target.ask(recordings[0].prompt, WARM_UP_TOKENS)
        counters_before, before = target.counters(), relay.traffic if relay else Traffic(0, 0)
        answers = [target.ask(known.prompt, len(known.answer)) for known in recordings]
        time.sleep(0.1 + rtt_ms / 1000)  # what is on its way is part of it
        after = relay.traffic if relay else Traffic(0, 0)
        counters = target.counters()
        counters.subtract(counters_before)
    return Run(
        arm=arm.name,
        rtt_ms=rtt_ms,
        repeat=repeat,
        num_tokens=sum(len(answer.answer) for answer, _ in answers),
        seconds=sum(took_s for _, took_s in answers),
        counters=dict(counters),
        up_bytes=after.up_bytes - before.up_bytes,
        down_bytes=after.down_bytes - before.down_bytes,
        differences=tuple(differences(recordings, [answer for answer, _ in answers])),
        edge=edge_totals(log) if relay else {},
    )


def differences(expected: Sequence[Recording], got: Sequence[Recording]) -> Iterator[tuple[int, int]]:
    for number, (want, have) in enumerate(zip(expected, got, strict=True)):
        if want != have:
            pairs = zip(want.answer, have.answer, strict=False)
            yield number, next((at for at, pair in enumerate(pairs) if pair[0] != pair[1]), -1)


def measure_all(plan: Plan, stack: ExitStack) -> tuple[list[Recording], list[Run]]:
    with console.status("Starting all servers (minutes) ..."):
        targets = launch(plan, stack)
    # From here on, so that the servers are not pinned too: the relay and the asking never stop the model's core.
    psutil.Process().cpu_affinity([EDGE_CORE])
    recordings = record(plan, targets[VANILLA])
    cells, runs = list(plan.cells()), []
    with progress_bar() as progress:
        task = progress.add_task("measuring", total=len(cells))
        for repeat, rtt_ms, arm in cells:
            progress.update(task, description=f"{arm.title}, RTT {rtt_ms:g} ms", refresh=True)
            runs.append(measure(plan, arm, targets[arm.server], rtt_ms, repeat, recordings))
            progress.console.print(
                f"repeat {repeat + 1}, RTT {rtt_ms:g} ms, {arm.title}: {runs[-1].tokens_per_s:.1f} tok/s"
                + (f", NOT IDENTICAL at {runs[-1].differences}" if runs[-1].differences else "")
            )
            progress.advance(task)
    return recordings, runs


# -- what it comes to ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One arm at one RTT over all repeats."""

    arm: str
    title: str
    rtt_ms: float
    tokens_per_s: float
    ratio: float
    """To vanilla in the same repeat: the median, and the ends of the range."""
    ratio_min: float
    ratio_max: float
    tokens_per_step: float | None
    acceptance: float | None
    """Of the verified draft tokens."""
    tree_hits: float | None
    """A hundred tokens."""
    round_trips_saved: float | None
    """Of the steps, those whose next draft was in the tree already when they ended."""
    proposed_per_token: float | None
    """Draft tokens that reached the engine."""
    up_bytes_per_token: float | None
    down_bytes_per_token: float | None
    identical: bool


def summarise(plan: Plan, runs: Sequence[Run]) -> list[Cell]:
    arms = plan.chosen()
    return [
        summarise_cell(arm, rtt_ms, [run for run in runs if (run.arm, run.rtt_ms) == (arm.name, rtt_ms)], runs)
        for arm in arms
        for rtt_ms in plan.rtts_ms
    ]


def summarise_cell(arm: Arm, rtt_ms: float, own: Sequence[Run], runs: Sequence[Run]) -> Cell:
    vanilla = {run.repeat: run.tokens_per_s for run in runs if (run.arm, run.rtt_ms) == (VANILLA, rtt_ms)}
    ratios = [run.tokens_per_s / vanilla[run.repeat] for run in own]
    counted: Counter[str] = Counter()
    for run in own:
        counted.update(run.counters)
    num_tokens = sum(run.num_tokens for run in own)
    has_edge = arm.options is not None
    return Cell(
        arm=arm.name,
        title=arm.title,
        rtt_ms=rtt_ms,
        tokens_per_s=statistics.median(run.tokens_per_s for run in own),
        ratio=statistics.median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        tokens_per_step=part(counted, "committed_tokens", "steps"),
        acceptance=part(counted, "accepted_tokens", "verified_tokens"),
        tree_hits=100 * counted["tree_hits"] / num_tokens if "tree_hits" in counted else None,
        round_trips_saved=part(counted, "round_trips_saved", "steps"),
        proposed_per_token=counted["proposed_tokens"] / num_tokens if has_edge else None,
        up_bytes_per_token=sum(run.up_bytes for run in own) / num_tokens if has_edge else None,
        down_bytes_per_token=sum(run.down_bytes for run in own) / num_tokens if has_edge else None,
        identical=not any(run.differences for run in own),
    )


def part(counted: Counter[str], name: str, whole: str) -> float | None:
    return counted[name] / counted[whole] if name in counted and counted[whole] else None


def ablation(plan: Plan, cells: Sequence[Cell]) -> str:
    """Times vanilla: the median of the repeats, and their range."""
    by_place = {(cell.arm, cell.rtt_ms): cell for cell in cells}

    def show(arm: Arm, rtt_ms: float) -> str:
        cell = by_place[arm.name, rtt_ms]
        if arm.name == VANILLA:
            return f"{cell.tokens_per_s:.1f} tok/s"
        return f"{cell.ratio:.2f} ({cell.ratio_min:.2f} to {cell.ratio_max:.2f})"

    rows = [[arm.title, *(show(arm, rtt_ms) for rtt_ms in plan.rtts_ms)] for arm in plan.chosen()]
    return markdown(["times vanilla", *(f"RTT {rtt_ms:g} ms" for rtt_ms in plan.rtts_ms)], rows)


DETAILS: tuple[tuple[str, Callable[[Cell], object], str], ...] = (
    ("RTT ms", lambda cell: cell.rtt_ms, "g"),
    ("tok/s", lambda cell: cell.tokens_per_s, ".1f"),
    ("ratio", lambda cell: cell.ratio, ".2f"),
    ("tokens a step", lambda cell: cell.tokens_per_step, ".2f"),
    ("acceptance", lambda cell: cell.acceptance, ".2f"),
    ("tree hits a 100 tokens", lambda cell: cell.tree_hits, ".1f"),
    ("steps with the next draft there", lambda cell: cell.round_trips_saved, ".2f"),
    ("proposed a token", lambda cell: cell.proposed_per_token, ".2f"),
    ("up B a token", lambda cell: cell.up_bytes_per_token, ".1f"),
    ("down B a token", lambda cell: cell.down_bytes_per_token, ".1f"),
    ("identical", lambda cell: "yes" if cell.identical else "NO", ""),
)


def details(cells: Sequence[Cell]) -> str:
    rows = [
        [cell.title, *("-" if (value := get(cell)) is None else format(value, form) for _, get, form in DETAILS)]
        for cell in cells
    ]
    return markdown(["", *(name for name, _, _ in DETAILS)], rows)


RATIO_GOALS = {20.0: 2.0, 80.0: 1.8}
"""Times vanilla, at least, by RTT in ms: of the replayed edge with all that there is."""
UP_GOAL, DOWN_GOAL = 128.0, 16.0
"""Bytes for each generated token, at most."""


def goals(plan: Plan, cells: Sequence[Cell]) -> list[str]:
    """How the last arm does, if it has branches: the goals are for the whole."""
    arm = plan.chosen()[-1]
    last = [cell for cell in cells if cell.arm == arm.name and arm.max_width != 1]
    lines = []
    for cell in last:
        if cell.rtt_ms in RATIO_GOALS and not plan.is_real:
            goal = RATIO_GOALS[cell.rtt_ms]
            lines.append(f"{cell.title}, RTT {cell.rtt_ms:g} ms: {cell.ratio:.2f} times vanilla; goal: at least {goal}")
    for name, goal, values in (
        ("up", UP_GOAL, [cell.up_bytes_per_token or 0.0 for cell in last]),
        ("down", DOWN_GOAL, [cell.down_bytes_per_token or 0.0 for cell in last]),
    ):
        if values:
            lines.append(f"{last[0].title}: {max(values):.1f} bytes {name} a token at most; goal: at most {goal:g}")
    return lines


def described(plan: Plan) -> dict[str, object]:
    """Enough to do it again."""
    return circumstances() | {
        "draft": "smollm2-draft" if plan.is_real else {**asdict(plan.accuracy), "pass_ms": PASS_MS},
        "options": {arm.name: arm.options for arm in plan.chosen()},
        "plan": asdict(plan),
    }


def write(path: Path, plan: Plan, cells: Sequence[Cell], runs: Sequence[Run]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    result = described(plan)
    result |= {"cells": [asdict(cell) for cell in cells], "runs": [asdict(run) for run in runs]}
    path.write_text(json.dumps(result, indent=1) + "\n")


def report(plan: Plan, output: Path, recordings: Sequence[Recording], runs: Sequence[Run]) -> bool:
    """Print and write all; returns whether all answers are vanilla's."""
    cells = summarise(plan, runs)
    write(output, plan, cells, runs)
    lengths = [len(recording.prompt) for recording in recordings]
    draft = "the shipped draft" if plan.is_real else f"a replayed draft (seed {plan.accuracy.seed}, {PASS_MS:g} ms)"
    print(
        f"{len(recordings)} prompts of {min(lengths)} to {max(lengths)} tokens, {plan.num_tokens} tokens each, "
        f"K = {plan.k}, {draft}, {plan.repeats} repeats: median (range)\n"
    )
    print(ablation(plan, cells), details(cells), "\n".join(goals(plan, cells)), sep="\n\n")
    console.print(f"All runs are in {output}")
    return all(cell.identical for cell in cells)


def output_path(is_real: bool, is_quick: bool) -> Path:
    name = f"ahead{'-real' if is_real else ''}.json"
    return CACHE / "bench" / f"quick-{name}" if is_quick else RESULTS / name


ARM_NAMES = tuple(arm.name for arm in all_arms(1) if arm.name != VANILLA)


def main(
    rtt: Annotated[list[float], typer.Option(help="Round trips in ms; may be given again.")] = [0, 5, 20, 80],  # noqa: B006
    repeats: Annotated[int, typer.Option(help="Of everything.", min=1)] = 3,
    prompts: Annotated[int, typer.Option(help="Requests in each run.", min=1, max=len(QUESTIONS))] = 4,
    tokens: Annotated[int, typer.Option(help="Of each answer.", min=WARM_UP_TOKENS, max=1024)] = 120,
    k: Annotated[int, typer.Option(help="Draft tokens that a step verifies at most.", min=1, max=32)] = 5,
    arms: Annotated[list[str], typer.Option(help=f"Of {', '.join(ARM_NAMES)}; vanilla always runs.")] = list(ARM_NAMES),  # noqa: B006
    real: Annotated[bool, typer.Option("--real", help="Draft with .cache/smollm2-draft, not from recordings.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="One repeat of two prompts of 64 tokens; --rtt 20.")] = False,
    seed: Annotated[int, typer.Option(help="Of the replayed drafts.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Default: benchmarks/results/ahead[-real].json.")] = None,
) -> None:
    """What drafting ahead is worth, by how far away the edge is."""
    if unknown := set(arms) - set(ARM_NAMES):
        raise typer.BadParameter(f"there is no arm {', '.join(sorted(unknown))}; there are {', '.join(ARM_NAMES)}")
    if quick:
        rtt, repeats, prompts, tokens = ([20.0] if rtt == [0, 5, 20, 80] else rtt), 1, 2, 64
    plan = Plan(tuple(rtt), repeats, prompts, tokens, k, tuple(arms), real, Accuracy(seed=seed))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the servers are stopped
    try:
        with ExitStack() as stack:
            recordings, runs = measure_all(plan, stack)
    except StackError as error:
        sys.exit(f"ahead: {error}")
    if not report(plan, output or output_path(real, quick), recordings, runs):
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
