"""`make bench-ahead ARGS="--pair qwen"`: the gain from an edge with a real pair of models, by kind of question.

    PYTHONPATH=examples python benchmarks/real_pair.py --pair qwen [--rtt 20] [--repeats 1] [--resume]

Plain vLLM without the plugin, the paper's method (wait for every draft) and this project's (draft ahead, with branches,
as `vllm serve --speculative-config edge` and `edge-client connect` do by default) side by side: their servers on one
core, one real edge at a time on the other, behind a relay that adds delay. Greedy and sampled. Tokens per second are
those of a streaming answer, without its prompt; each ratio is to plain vLLM in the same round, which is a repeat at one
temperature. Every run is saved when it is done; --resume continues a file with its missing rounds.
"""

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from harness import results
from harness.edges import CONNECT, Edges, drafting, flags
from harness.results import Kept, output_path
from harness.runs import Run, Slot, timed
from harness.servers import Arm, Target, edge, launch, metered, stand_aside, story, waiting
from pair_figures import PLAIN, as_split, as_table, summarise
from pairs import CACHE, PAIRS, Pair, PairError, prepare
from questions import QUESTIONS

LOGS = results.LOGS / "pair"
WAITING, AHEAD, NO_NOISE = "waiting", "ahead", "no noise"
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Plan:
    """The measurements to make."""

    pair: Pair
    dtype: str
    arms: tuple[Arm, ...]
    rtts_ms: tuple[float, ...]
    temperatures: tuple[float, ...]
    repeats: int
    num_questions: int
    """Questions of each kind."""
    num_tokens: int
    """Most tokens of an answer."""

    def rounds(self) -> Iterator[list[Slot]]:
        """The rounds, each with all compared runs: each arm at each RTT. Each round starts with another arm; plain vLLM
        has no RTT."""
        places = [(arm.name, rtt_ms) for rtt_ms in self.rtts_ms for arm in self.arms if arm.config is not None]
        places += [(arm.name, 0.0) for arm in self.arms if arm.config is None]
        for repeat, (number, temperature) in product(range(self.repeats), enumerate(self.temperatures)):
            shift = (repeat + number) * 2 % len(places)
            yield [
                Slot(arm=arm, rtt_ms=rtt_ms, temperature=temperature, repeat=repeat)
                for arm, rtt_ms in places[shift:] + places[:shift]
            ]

    def settings(self) -> dict[str, object]:
        """Settings that all runs in one file share."""
        said = {name: value for name, value in asdict(self).items() if name not in ("repeats", "temperatures")}
        return {**said, "pair": self.pair.name}


def arms_of(
    names: Sequence[str], uplinks: Sequence[float], k: int | None, others: Sequence[str] = ()
) -> tuple[Arm, ...]:
    """The arms. `uplinks`: bytes per token that an edge drafting ahead may send; none: the default. `k` likewise.

    `others`: edges that draft ahead with their own options, as `NAME: OPTIONS`.
    """
    found = [Arm(PLAIN, PLAIN, PLAIN)]
    if WAITING in names:
        found.append(Arm(WAITING, WAITING, WAITING, waiting(k, credit_tokens=k or 5), ("--max-width", "1")))
    if AHEAD in names and not uplinks:
        found.append(Arm(AHEAD, AHEAD, AHEAD, edge(k)))
    if NO_NOISE in names:
        found.append(Arm(NO_NOISE, NO_NOISE, NO_NOISE, edge(k, tell_seeds=False)))
    for uplink in uplinks if AHEAD in names else ():
        name = f"{AHEAD}, {uplink:g} bytes"
        found.append(Arm(name, name, AHEAD, edge(k), ("--uplink-bytes-per-token", f"{uplink:g}")))
    for name, _, options in (other.partition(":") for other in others):
        found.append(Arm(name, name, AHEAD, edge(k), tuple(shlex.split(options))))
    return tuple(found)


# -- measuring -----------------------------------------------------------------------------------------------------


def measure(plan: Plan, slot: Slot, arm: Arm, target: Target) -> Iterator[Run]:
    """One run per kind of question, with the same edge."""
    options = [*flags(draft=plan.pair.draft_directory(CACHE), threads=1), *arm.edge]
    rtt_ms = slot.rtt_ms if target.has_gateway else None
    with drafting(target.server, rtt_ms, CONNECT, options, LOGS / "edge.log") as edges:
        target.chat("Say hello.", WARM_UP_TOKENS)
        for kind in QUESTIONS:
            yield measure_kind(plan, replace(slot, kind=kind), target, edges)


def measure_kind(plan: Plan, slot: Slot, target: Target, edges: Edges | None) -> Run:
    """Ask all questions of a kind, one after the other."""
    bodies = [
        {"temperature": slot.temperature, **({"seed": 100 * slot.repeat + number} if slot.temperature else {})}
        for number in range(plan.num_questions)
    ]
    asked = list(zip(QUESTIONS[slot.kind], bodies, strict=False))
    answers, used = metered(
        target, edges, lambda: [target.chat(question, plan.num_tokens, **body) for question, body in asked]
    )
    tokens = [list(answer.tokens) for answer in answers]
    return Run(**asdict(slot), **timed(*([answer] for answer in answers)), **used, answers=tokens)


def measure_all(plan: Plan, kept: Kept) -> None:
    """Measure the rounds that are not complete in the file."""
    rounds = [
        slots for slots in plan.rounds() if not {replace(s, kind=k) for s in slots for k in QUESTIONS} <= kept.done
    ]
    missing = [slot for slots in rounds for slot in slots]
    kept.runs = [run for run in kept.runs if replace(run.slot, kind="") not in missing]
    if not missing:
        return
    arms = {arm.name: arm for arm in plan.arms}
    configs, model = {arm.server: arm.config for arm in plan.arms}, plan.pair.target_directory(CACHE)
    with story("real_pair") as stack:
        targets = launch(configs, LOGS, stack, max_seqs=8, kv_bytes=400 << 20, model=model, dtype=plan.dtype)
        stand_aside()
        kept.measure_all(
            missing,
            lambda slot: measure(plan, slot, arms[slot.arm], targets[arms[slot.arm].server]),
            lambda runs: {"cells": summarise(runs)},
        )


def report(plan: Plan, kept: Kept) -> bool:
    """Print the report; returns False if a greedy answer in float32 differs from plain vLLM's."""
    cells = summarise(kept.runs)
    print(f"{plan.pair.title}, {plan.dtype}; times plain vLLM, median (range) of {plan.repeats}\n")
    print(as_table(cells), as_split(cells), sep="\n\n")
    results.console.print(f"All runs are in {kept.path}")
    return plan.dtype != "float32" or not any(cell["parted"] for cell in cells)


def main(
    pair: Annotated[str, typer.Option(help=f"One of {', '.join(PAIRS)}.")] = "qwen",
    dtype: Annotated[str, typer.Option(help="Number format of the servers.")] = "bfloat16",
    arms: Annotated[
        list[str], typer.Option(help="waiting, ahead, 'no noise' (ahead without seeds); plain always runs.")
    ] = [WAITING, AHEAD],  # noqa: B006
    rtt: Annotated[list[float], typer.Option(help="Round trips in ms; repeatable.")] = [0, 20, 80],  # noqa: B006
    temperature: Annotated[list[float], typer.Option(help="Temperatures; repeatable.")] = [0, 0.7],  # noqa: B006
    uplink: Annotated[list[float], typer.Option(help="Add an edge with this many bytes per token; repeatable.")] = [],  # noqa: B006
    other: Annotated[
        list[str], typer.Option(help="Add an edge with its own options, as 'NAME: OPTIONS'; repeatable.")
    ] = [],  # noqa: B006
    k: Annotated[
        int | None, typer.Option(help="Most draft tokens that a step verifies, if other than the default.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Repeats of everything.", min=1)] = 3,
    questions: Annotated[int, typer.Option(help="Questions of each kind.", min=1, max=3)] = 3,
    tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=16)] = 96,
    output: Annotated[Path | None, typer.Option(help="Default: benchmarks/results/pair-PAIR.json.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the output file: only missing rounds.")] = False,
) -> None:
    """Measure the gain from an edge with a real pair of models, by kind of question."""
    if pair not in PAIRS:
        raise typer.BadParameter(f"there is no pair {pair}; there are {', '.join(PAIRS)}")
    chosen = arms_of(arms, uplink, k, other)
    plan = Plan(PAIRS[pair], dtype, chosen, tuple(rtt), tuple(temperature), repeats, questions, tokens)
    kept = Kept.load(output_path(f"pair-{pair}.json", output), plan.settings(), resume)
    try:
        prepare(plan.pair, CACHE)
    except PairError as error:
        sys.exit(f"real_pair: {error}")
    measure_all(plan, kept)
    sys.exit(not report(plan, kept))


if __name__ == "__main__":
    typer.run(main)
