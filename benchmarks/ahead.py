"""`make bench-ahead`: the gain of drafting ahead, by the edge's round trip. An ablation on a real `vllm serve`.

    PYTHONPATH=examples python benchmarks/ahead.py [--quick] [--rtt 20 --rtt 80] [--arms branches] [--real]

All five servers run at once (15 GiB), each with its model in float32 on the same core; idle servers do not use it. One
edge at a time runs on another core, behind a relay that adds delay and counts bytes (relay.py). It drafts from the
vanilla server's recorded answers (replay.py), or with --real from the shipped draft. Each ratio is to vanilla in the
same repeat. Prints two tables and writes all runs to a JSON file; exits with status 1 if any token of an answer differs
from vanilla's.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from harness import results, runs
from harness.edges import REPLAY, drafting, flags
from harness.load import QUESTIONS, chat_prompt
from harness.replay import Accuracy, Recording
from harness.results import CACHE, Column, Kept, markdown, output_path
from harness.runs import Run, Slot, counted, share
from harness.servers import Arm, Target, edge, launch, metered, stand_aside, story, waiting

LOGS = results.LOGS / "ahead"
RECORDINGS = LOGS / "recordings.json"
WARM_UP_TOKENS = 16
CREDIT_TOKENS = 32
PASS_MS = 6.0
RTTS_MS = (0.0, 5.0, 20.0, 80.0)
VANILLA = "vanilla"
NO_BRANCHES = ("--max-width", "1")


def all_arms(k: int) -> list[Arm]:
    """All arms. Each but the first two adds one thing to the previous one; a step verifies at most k draft tokens."""
    ahead = edge(k, mode="auto", credit_tokens=CREDIT_TOKENS, ngram=False)
    return [
        Arm(VANILLA, VANILLA, VANILLA),
        Arm("chain-and-wait", "chain-and-wait", "chain-and-wait", waiting(k, credit_tokens=k), NO_BRANCHES),
        Arm("run-ahead", "+ run-ahead", "run-ahead", waiting(k, credit_tokens=CREDIT_TOKENS), NO_BRANCHES),
        Arm("partial-reuse", "+ partial reuse", "auto", ahead, NO_BRANCHES),
        Arm("branches", "+ branches", "auto", ahead),
        Arm("ngram", "+ n-gram rung", "ngram", {**ahead, "ngram": True}),
    ]


@dataclass(frozen=True)
class Plan:
    """The measurements to make."""

    rtts_ms: tuple[float, ...]
    repeats: int
    num_prompts: int
    num_tokens: int
    k: int
    arms: tuple[str, ...]
    is_real: bool
    accuracy: Accuracy

    def chosen(self) -> dict[str, Arm]:
        return {arm.name: arm for arm in all_arms(self.k) if arm.name in (VANILLA, *self.arms)}

    def slots(self) -> Iterator[Slot]:
        """All runs; each round starts with another arm, so that none always runs on a warm machine."""
        arms = list(self.chosen())
        for repeat in range(self.repeats):
            for number, rtt_ms in enumerate(self.rtts_ms):
                shift = (repeat + number) % len(arms)
                for arm in arms[shift:] + arms[:shift]:
                    yield Slot(arm=arm, rtt_ms=rtt_ms, repeat=repeat)

    def draft(self) -> list[str]:
        """Command-line options of an edge."""
        if self.is_real:
            return flags(draft=CACHE / "smollm2-draft")
        return flags(recordings=RECORDINGS, pass_ms=PASS_MS, **asdict(self.accuracy))


# -- measuring -----------------------------------------------------------------------------------------------------


def measure(plan: Plan, slot: Slot, target: Target, known: Sequence[Recording]) -> Run:
    """Send all recorded prompts, one request after the other."""
    arm = plan.chosen()[slot.arm]
    options = [*plan.draft(), *arm.edge]
    rtt_ms = slot.rtt_ms if target.has_gateway else None
    with drafting(target.server, rtt_ms, REPLAY, options, LOGS / f"edge-{arm.name}.log") as edges:
        target.ask([known[0].prompt], WARM_UP_TOKENS)
        answers, used = metered(
            target, edges, lambda: [target.ask([each.prompt], len(each.answer), is_streamed=False)[0] for each in known]
        )
    return Run(
        **asdict(slot),
        **runs.timed(*([answer] for answer in answers)),
        **used,
        differences=runs.differences(known, answers),
        edge_totals=edges.totals() if edges else {},
    )


def measure_all(plan: Plan, kept: Kept) -> list[Recording]:
    """Make all runs; returns vanilla's answers to the prompts."""
    arms = plan.chosen()
    with story("ahead") as stack:
        configs = {arm.server: arm.config for arm in arms.values()}
        targets = launch(configs, LOGS, stack, max_seqs=8, kv_bytes=200 << 20)
        stand_aside()
        vanilla = targets[VANILLA]
        prompts = [chat_prompt(question) for question in QUESTIONS[: plan.num_prompts]]
        vanilla.ask(prompts[:1], WARM_UP_TOKENS)
        known = vanilla.record(prompts, plan.num_tokens, RECORDINGS)
        kept.measure_all(
            list(plan.slots()),
            lambda slot: [measure(plan, slot, targets[arms[slot.arm].server], known)],
            lambda made: {"cells": summarise(plan, made)},
            "whole_tokens_per_s",
        )
    return known


# -- results -------------------------------------------------------------------------------------------------------


def summarise(plan: Plan, made: Sequence[Run]) -> list[dict[str, Any]]:
    """One cell per arm and RTT, over all repeats so far."""
    places = product(plan.chosen().values(), plan.rtts_ms)
    return [
        summarise_cell(arm, rtt_ms, of(made, arm.name, rtt_ms), of(made, VANILLA, rtt_ms)) for arm, rtt_ms in places
    ]


def of(made: Sequence[Run], arm: str, rtt_ms: float) -> list[Run]:
    return [run for run in made if (run.arm, run.rtt_ms) == (arm, rtt_ms)]


def summarise_cell(arm: Arm, rtt_ms: float, own: Sequence[Run], vanilla: Sequence[Run]) -> dict[str, Any]:
    ratio = runs.ratio(own, vanilla, "whole_tokens_per_s")
    counts = counted(own if arm.config is not None else ())
    hits = share(counts, "tree_hits", "tokens")
    return {
        "arm": arm.name,
        "title": arm.title,
        "rtt_ms": rtt_ms,
        "tokens_per_s": runs.middle(own, "whole_tokens_per_s") if own else None,
        **(ratio.named("ratio") if ratio else {}),
        "tokens_per_step": share(counts, "committed_tokens", "steps"),
        "acceptance": share(counts, "accepted_tokens", "verified_tokens"),
        "tree_hits": None if hits is None else 100 * hits,
        "round_trips_saved": share(counts, "round_trips_saved", "steps"),
        "proposed_per_token": share(counts, "proposed_tokens", "tokens"),
        "up_bytes_per_token": share(counts, "up_bytes", "tokens"),
        "down_bytes_per_token": share(counts, "down_bytes", "tokens"),
        "identical": not any(run.differences for run in own),
    }


def ablation(plan: Plan, cells: Sequence[Mapping[str, Any]]) -> str:
    """Table of speedups over vanilla: the median of the repeats, and their range."""
    by_place = {(cell["arm"], cell["rtt_ms"]): cell for cell in cells}

    def show(arm: Arm, rtt_ms: float) -> str:
        cell = by_place[arm.name, rtt_ms]
        if arm.name == VANILLA:
            return f"{cell['tokens_per_s']:.1f} tok/s"
        return f"{cell['ratio']:.2f} ({cell['ratio_min']:.2f} to {cell['ratio_max']:.2f})"

    rows = [[arm.title, *(show(arm, rtt_ms) for rtt_ms in plan.rtts_ms)] for arm in plan.chosen().values()]
    return markdown(["times vanilla", *(f"RTT {rtt_ms:g} ms" for rtt_ms in plan.rtts_ms)], rows)


DETAILS = (
    Column("", "title"),
    Column("RTT ms", "rtt_ms", "g"),
    Column("tok/s", "tokens_per_s", ".1f"),
    Column("ratio", "ratio", ".2f"),
    Column("tokens per step", "tokens_per_step", ".2f"),
    Column("acceptance", "acceptance", ".2f"),
    Column("tree hits per 100 tokens", "tree_hits", ".1f"),
    Column("steps with the next draft ready", "round_trips_saved", ".2f"),
    Column("proposed per token", "proposed_per_token", ".2f"),
    Column("up B a token", "up_bytes_per_token", ".1f"),
    Column("down B per token", "down_bytes_per_token", ".1f"),
    Column("identical", lambda cell: "yes" if cell["identical"] else "NO"),
)
RATIO_GOALS = {20.0: 2.0, 80.0: 1.8}
"""Least speedup over vanilla by RTT in ms, with the replayed edge and all features."""
BYTE_GOALS = {"up": 128.0, "down": 16.0}
"""Most bytes per generated token."""


def goals(plan: Plan, cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The last arm against the goals, if it has branches: the goals are for all features together."""
    arm = list(plan.chosen().values())[-1]
    last = [cell for cell in cells if cell["arm"] == arm.name and arm.edge != NO_BRANCHES]
    for cell in last:
        goal = RATIO_GOALS.get(cell["rtt_ms"])
        if goal and not plan.is_real:
            yield f"{arm.title}, RTT {cell['rtt_ms']:g} ms: {cell['ratio']:.2f} times vanilla; goal: at least {goal}"
    for way, limit in BYTE_GOALS.items() if last else ():
        most = max(cell[f"{way}_bytes_per_token"] or 0.0 for cell in last)
        yield f"{arm.title}: at most {most:.1f} bytes {way} per token; goal: at most {limit:g}"


def report(plan: Plan, kept: Kept, known: Sequence[Recording]) -> bool:
    """Print the report; returns whether all answers are vanilla's."""
    cells = summarise(plan, kept.runs)
    lengths = [len(recording.prompt) for recording in known]
    draft = "the shipped draft" if plan.is_real else f"a replayed draft (seed {plan.accuracy.seed}, {PASS_MS:g} ms)"
    print(
        f"{len(known)} prompts of {min(lengths)} to {max(lengths)} tokens, {plan.num_tokens} tokens each, "
        f"K = {plan.k}, {draft}, {plan.repeats} repeats: median (range)\n"
    )
    print(ablation(plan, cells), results.table(DETAILS, cells), "\n".join(goals(plan, cells)), sep="\n\n")
    results.console.print(f"All runs are in {kept.path}")
    return all(cell["identical"] for cell in cells)


ARM_NAMES = tuple(arm.name for arm in all_arms(1) if arm.name != VANILLA)


def main(
    rtt: Annotated[list[float], typer.Option(help="Round trips in ms; repeatable.")] = list(RTTS_MS),  # noqa: B006
    repeats: Annotated[int, typer.Option(help="Repeats of everything.", min=1)] = 3,
    prompts: Annotated[int, typer.Option(help="Requests in each run.", min=1, max=len(QUESTIONS))] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=WARM_UP_TOKENS, max=1024)] = 120,
    k: Annotated[int, typer.Option(help="Most draft tokens that a step verifies.", min=1, max=32)] = 5,
    arms: Annotated[list[str], typer.Option(help=f"{', '.join(ARM_NAMES)}; vanilla always runs.")] = list(ARM_NAMES),  # noqa: B006
    real: Annotated[bool, typer.Option("--real", help="Draft with .cache/smollm2-draft, not from recordings.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="One repeat of two prompts of 64 tokens; --rtt 20.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the replayed drafts.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Default: benchmarks/results/ahead[-real].json.")] = None,
) -> None:
    """Measure the gain of drafting ahead, by the edge's round trip."""
    if unknown := set(arms) - set(ARM_NAMES):
        raise typer.BadParameter(f"there is no arm {', '.join(sorted(unknown))}; there are {', '.join(ARM_NAMES)}")
    if quick:
        rtt, repeats, prompts, tokens = ([20.0] if rtt == list(RTTS_MS) else rtt), 1, 2, 64
    plan = Plan(tuple(rtt), repeats, prompts, tokens, k, tuple(arms), real, Accuracy(seed=seed))
    options = {arm.name: arm.config for arm in plan.chosen().values()}
    settings = {**asdict(plan), "pass_ms": PASS_MS, "options": options}
    path = output_path("ahead-real.json" if real else "ahead.json", output, quick)
    kept = Kept.load(path, settings, is_resumed=False)
    known = measure_all(plan, kept)
    sys.exit(not report(plan, kept, known))


if __name__ == "__main__":
    typer.run(main)
