"""`make bench-never-slower`: the plugin never makes a server slower. A grid on a real `vllm serve`, with verdicts.

    PYTHONPATH=examples python benchmarks/grid.py [--quick] [--resume] [--requests 1 --requests 8] [--edges poor]

Three servers run at once: vanilla, vLLM's own `ngram` method, ours; float32, their models on one core, which idle
servers do not use. On the other core are the load (load.py), the edges (replay.py) and a relay that adds delay
(relay.py). A run is a number of requests that start together; each of ours is compared with the vanilla and ngram runs
next to it (verdicts.py). Every run is saved when it is done; --resume continues a file. Prints a line per cell; exits
with status 1 if any fails, or if any token of an answer differs from vanilla's earlier answer.
"""

import statistics
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import verdicts
from harness import results
from harness.edges import REPLAY, drafting, flags
from harness.load import CHAT, Answer, prompts
from harness.replay import Accuracy, Recording
from harness.results import Kept, output_path
from harness.runs import Run, Slot, differences, timed
from harness.servers import Target, edge, launch, metered, stand_aside, story
from verdicts import DEAD, EDGES, GOOD, NGRAM, OURS, POOR, STALLING, VANILLA, Cell, Limits, cell_of, fleet

from vllm_specedge.policy.step_cost import KNOTS

LOGS = results.LOGS / "never-slower"
RECORDINGS = LOGS / "recordings.json"
MAX_SEQS = 64
REQUESTS, RTTS_MS, REPEATS = (1, 4, 8, 16, 32), (0.0, 20.0, 80.0), 3
QUICK_REQUESTS, QUICK_RTTS_MS, QUICK_EDGES = (1, 8), (20.0,), (GOOD, POOR, DEAD)
NUM_TOKENS = {1: 120, 4: 80, 8: 64, 16: 64, 32: 48}
"""Tokens of each answer, by the largest of these numbers of requests that is not exceeded: about ten seconds a run."""
WARM_UP_TOKENS, WARM_UP_TOKENS_OF_MANY, MANY = 16, 8, 9
ACCURACY = {kind: Accuracy(0.3, 0.3) if kind == POOR else Accuracy(0.75, 0.6) for kind in EDGES}
STALLS = {"stall_s": 2.0, "stall_every_s": 5.0}


@dataclass(frozen=True)
class Settings:
    """Settings that all compared runs must share."""

    mode: str
    k: int
    tokens: int
    """Tokens of each answer; 0: by NUM_TOKENS."""
    pass_ms: float
    seed: int

    def num_tokens(self, requests: int) -> int:
        return self.tokens or NUM_TOKENS[max((key for key in NUM_TOKENS if key <= requests), default=1)]

    def num_warm_up_tokens(self, requests: int) -> int:
        return min(self.num_tokens(requests), WARM_UP_TOKENS if requests < MANY else WARM_UP_TOKENS_OF_MANY)

    def configs(self) -> dict[str, dict[str, object] | None]:
        """Each server's --speculative-config."""
        lookup = {"prompt_lookup_min": 5, "prompt_lookup_max": 5}
        ours = edge(self.k, mode=self.mode) if self.mode else edge(self.k)
        return {VANILLA: None, NGRAM: {"method": "ngram", "num_speculative_tokens": self.k, **lookup}, OURS: ours}

    def edge_options(self, cell: Cell, repeat: int) -> list[str]:
        accuracy, (connections, capacity) = ACCURACY[cell.edge], fleet(cell.requests, cell.edge)
        options = flags(recordings=RECORDINGS, first=accuracy.first, second=accuracy.second, pass_ms=self.pass_ms)
        options += flags(seed=self.seed + 1000 * repeat, edges=connections, max_requests=capacity)
        return options + (flags(**STALLS) if cell.edge == STALLING else [])


def measure(settings: Settings, slot: Slot, target: Target, recordings: Sequence[Recording]) -> Run:
    asked = [recording.prompt for recording in recordings[: slot.requests]]
    cell = cell_of(slot)
    options = settings.edge_options(cell, slot.repeat) if cell else []
    num_edges = fleet(cell.requests, cell.edge).connections if cell else 0
    with drafting(target.server, slot.rtt_ms, REPLAY, options, LOGS / "edges.log", num_edges) as edges:
        target.ask(asked, settings.num_warm_up_tokens(slot.requests))

        def ask() -> list[Answer]:
            with edges.stopped() if edges and slot.edge == DEAD else nullcontext():
                return target.ask(asked, settings.num_tokens(slot.requests))

        answers, used = metered(target, edges, ask)
    return Run(
        **asdict(slot),
        **timed(answers),
        **used,
        differences=differences(recordings, answers),
        edge_totals=edges.totals(slot.edge == DEAD) if edges else {},
        learned=learned_by(target) if edges else None,
    )


def learned_by(target: Target) -> dict[str, Any]:
    """The engine's current estimates of its step times, as fields of verdicts.Learned."""
    values, prefix = target.server.metrics(), "specedge_engine_step_"
    parts = {
        f"{name}_s": values[f'{prefix}{name}_seconds{{engine="0"}}'] for name in ("request", "context", "verifying")
    }
    return {"curve_s": [values[f'{prefix}seconds{{engine="0",tokens="{size}"}}'] for size in KNOTS], **parts}


def measure_all(settings: Settings, slots: Sequence[Slot], kept: Kept, limits: Limits) -> None:
    with story("grid") as stack:
        targets = launch(settings.configs(), LOGS, stack, max_seqs=MAX_SEQS, kv_bytes=400 << 20)
        stand_aside()
        vanilla, most = targets[VANILLA], max(slot.requests for slot in slots)
        vanilla.ask(prompts(CHAT, 1), WARM_UP_TOKENS)
        num_tokens = max(settings.num_tokens(slot.requests) for slot in slots)
        recordings = vanilla.record(prompts(CHAT, most), num_tokens, RECORDINGS)
        prompt_tokens = round(statistics.fmean(len(recording.prompt) for recording in recordings))

        def figures(runs: Sequence[Run]) -> dict[str, object]:
            return {
                "limits": asdict(limits),
                "edges": {"accuracy": {kind: asdict(each) for kind, each in ACCURACY.items()}, "stalls": STALLS},
                "cells": verdicts.results(runs, limits),
                "vanilla_against_itself": [asdict(one) for one in verdicts.noise(runs)],
                "prompt_tokens": prompt_tokens,
                "server_model": verdicts.server_model(runs, settings.k, prompt_tokens),
            }

        kept.measure_all(slots, lambda slot: [measure(settings, slot, targets[slot.arm], recordings)], figures)


def main(
    requests: Annotated[list[int] | None, typer.Option(help=f"Concurrent requests; repeatable. {REQUESTS}.")] = None,
    rtt: Annotated[list[float] | None, typer.Option(help=f"Round trips in ms; repeatable. {RTTS_MS}.")] = None,
    edges: Annotated[list[str] | None, typer.Option(help=f"{', '.join(EDGES)}; repeatable; default: all.")] = None,
    repeats: Annotated[int, typer.Option(help=f"Repeats of every cell; 0: {REPEATS}, 1 with --quick.", min=0)] = 0,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer; 0: for about ten seconds a run.", min=0)] = 0,
    k: Annotated[int, typer.Option(help="Most draft tokens that a step verifies per request.", min=1)] = 5,
    mode: Annotated[str, typer.Option(help="Our server's `mode`; empty: its default.")] = "",
    pass_ms: Annotated[float, typer.Option(help="Time of a forward pass of an edge.")] = 6.0,
    min_ratio: Annotated[float, typer.Option(help="Least tokens/s relative to vanilla and ngram.")] = Limits.min_ratio,
    max_p99_ratio: Annotated[
        float, typer.Option(help="Largest p99 gap between chunks, relative to vanilla.")
    ] = Limits.max_p99_ratio,
    seed: Annotated[int, typer.Option(help="Seed of the replayed drafts and the stalls.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="1 and 8 requests, RTT 20 ms, good, poor, dead; once.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the output file: only missing runs.")] = False,
    output: Annotated[Path | None, typer.Option(help="Default: benchmarks/results/never-slower.json.")] = None,
) -> None:
    """Check that the plugin never makes a server slower: a grid with verdicts."""
    edges = edges or list(QUICK_EDGES if quick else EDGES)
    if unknown := set(edges) - set(EDGES):
        raise typer.BadParameter(f"there are no {', '.join(sorted(unknown))} edges; there are {', '.join(EDGES)}")
    sizes, rtts_ms = (QUICK_REQUESTS, QUICK_RTTS_MS) if quick else (REQUESTS, RTTS_MS)
    settings, limits = Settings(mode, k, tokens, pass_ms, seed), Limits(min_ratio, max_p99_ratio)
    kept = Kept.load(output_path("never-slower.json", output, quick), asdict(settings), resume)
    cells = verdicts.all_cells(requests or sizes, rtt or rtts_ms, edges)
    if slots := verdicts.schedule(cells, repeats or (1 if quick else REPEATS), kept.done):
        measure_all(settings, slots, kept, limits)
    print(verdicts.report(kept.runs, limits))
    results.console.print(f"All runs are in {kept.path}")
    sys.exit(not verdicts.is_kept(kept.runs, limits))


if __name__ == "__main__":
    typer.run(main)
