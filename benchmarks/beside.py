"""`make bench-beside`: what a draft model on the other core takes from a server on the same machine.

    PYTHONPATH=examples python benchmarks/beside.py [--pair smollm2] [--repeats 5]

Plain vLLM on one core, alone and while the pair's draft runs on the other core without a pause, as an edge does that
drafts for many requests. An edge elsewhere takes nothing: so `make evidence` also has edges that replay the draft
(harness/recorded_draft.py).
"""

import json
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from evidence import DTYPES, drafter_options
from harness.results import LOGS, Column, circumstances, output_path, table
from harness.runs import timed
from harness.servers import Target, launch, stand_aside, story
from harness.workload import questions
from pairs import CACHE, PAIRS, Pair, prepare

from edge_client.drafters.choose import load_drafter
from edge_client.drafters.profile import profile

ALONE, BESIDE = "alone", "beside a draft"
NUM_TOKENS = 48


def run_passes(pair: Pair, is_ready: Event) -> None:
    """Run the draft's forward passes until killed."""
    drafter = load_drafter(drafter_options(pair))
    while True:
        profile(drafter, time.perf_counter)
        is_ready.set()


@contextmanager
def drafting_beside(pair: Pair) -> Iterator[None]:
    """The draft at work on this process's core."""
    context = multiprocessing.get_context("spawn")
    is_ready = context.Event()
    process = context.Process(target=run_passes, args=(pair, is_ready), daemon=True)
    process.start()
    try:
        is_ready.wait()
        yield
    finally:
        process.kill()
        process.join()


def tokens_per_s(target: Target, requests: int) -> float:
    """Tokens per second of each stream, for the same questions each time."""
    asked = [each[0].body for each in questions().values()]
    bodies = [{**asked[number % len(asked)], "temperature": 0, "ignore_eos": True} for number in range(requests)]
    run = timed(target.converse(bodies, NUM_TOKENS))
    return float(run["decode_tokens"] / run["decode_seconds"])


def rows_of(figures: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """One row per number of requests, with medians."""
    return [
        {
            "requests": requests,
            ALONE: median(both[ALONE]),
            BESIDE: median(both[BESIDE]),
            "times": median(beside / alone for alone, beside in zip(both[ALONE], both[BESIDE], strict=True)),
        }
        for requests, both in figures.items()
    ]


COLUMNS = (
    Column("requests", "requests"),
    Column("tokens/s alone", ALONE, ".1f"),
    Column("tokens/s beside a draft", BESIDE, ".1f"),
    Column("times", "times", ".2f"),
)


def main(
    pair: Annotated[str, typer.Option(help=f"One of {', '.join(PAIRS)}.")] = "smollm2",
    requests: Annotated[list[int], typer.Option(help="Concurrent requests; repeatable.")] = [1, 4, 8],  # noqa: B006
    repeats: Annotated[int, typer.Option(help="Repeats, alone and beside a draft in turn.", min=1)] = 5,
    output: Annotated[Path | None, typer.Option(help="Default: benchmarks/results/beside-PAIR.json.")] = None,
) -> None:
    """Measure what a draft model on the other core takes from a server."""
    prepare(PAIRS[pair], CACHE)
    LOGS.mkdir(parents=True, exist_ok=True)
    figures: dict[str, dict[str, list[float]]] = {str(number): {ALONE: [], BESIDE: []} for number in requests}
    with story("beside") as stack:
        model, dtype = PAIRS[pair].target_directory(CACHE), DTYPES[pair]
        [target] = launch(
            {"plain": None}, LOGS, stack, max_seqs=max(requests), kv_bytes=400 << 20, model=model, dtype=dtype
        ).values()
        stand_aside()
        for number in requests:
            tokens_per_s(target, number)  # warm up
        for _ in range(repeats):
            for number in requests:
                figures[str(number)][ALONE].append(tokens_per_s(target, number))
            with drafting_beside(PAIRS[pair]):
                for number in requests:
                    figures[str(number)][BESIDE].append(tokens_per_s(target, number))
    rows = rows_of(figures)
    path = output_path(f"beside-{pair}.json", output)
    path.write_text(json.dumps({"session": circumstances(), "rows": rows, "tokens_per_s": figures}, indent=1) + "\n")
    print(table(COLUMNS, rows))


if __name__ == "__main__":
    typer.run(main)
