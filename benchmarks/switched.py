"""`make bench-switched`: gain or cost of edges within one server that switches drafts on and off every few seconds.

    PYTHONPATH=examples python benchmarks/switched.py [--pair smollm2] [--edges poor --edges dead]

One `vllm serve` with edges, at a constant number of concurrent requests. In every second period nothing is verified and
no request is held (switching/), while the gateway, the edges and their proposals continue. A period is compared with
its neighbours, so that neither a server's start nor a drifting machine affects the comparison. Not included is the
plugin's cost without drafts: that is the place "no edges" of `make evidence`.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from evidence import DEAD, DTYPES, LOGS, MAX_SEQS, REAL, RECORDINGS, REPLAYED, WARM_UP_TOKENS, drafting_as
from harness import results
from harness.load import Answer
from harness.replay import write_recordings
from harness.results import ROOT, Kept, output_path
from harness.runs import Run, Slot, gap_figures, latencies
from harness.servers import Target, edge, launch, metered, stand_aside, story
from harness.workload import MIXED, Question, chosen, questions, varied
from pairs import CACHE, PAIRS, PairError, prepare
from switched_figures import ACTIVE, INERT, Period, as_table, periods, summarise
from switching.specedge_switching import VARIABLE, is_active

PLAIN, OURS = "plain", "edge"


@dataclass(frozen=True)
class Settings:
    """Settings that all compared runs share."""

    pair: str
    dtype: str
    tokens: int
    """Mean of the answers' maximum number of tokens."""
    period_s: float
    seconds: float
    """Duration of a run."""
    options: dict[str, Any]
    """Options of the server that are not defaults."""

    def questions(self) -> list[Question]:
        return chosen(questions(), MIXED, sum(map(len, questions().values())))

    def bodies(self) -> list[dict[str, Any]]:
        """Requests with answers of many lengths: equal ones would end together and put all prompts into one period."""
        return [
            {**question.body, "seed": number, "max_tokens": varied(self.tokens, number)}
            for number, question in enumerate(self.questions())
        ]


def measure(settings: Settings, slot: Slot, target: Target) -> Iterator[Run]:
    """Two runs: the periods with drafts, and those without."""
    body = {} if slot.temperature is None else {"temperature": slot.temperature}
    bodies = [{**each, **body} for each in settings.bodies()]
    with drafting_as(slot, target, PAIRS[settings.pair], REPLAYED.get(slot.edge or "", {})) as edges:
        target.converse(bodies[: slot.requests], WARM_UP_TOKENS)
        with edges.stopped() if edges and slot.edge == DEAD else nullcontext():
            from_s = time.monotonic()

            def ask() -> list[Answer]:
                return target.converse_for(bodies, settings.tokens, slot.requests, settings.seconds)

            answers, used = metered(target, edges, ask)
    seen = periods(answers, settings.period_s, from_s, from_s + settings.seconds)
    first_s = [answer.first_token_s for answer in answers]
    for arm in (ACTIVE, INERT):
        own = [each for each in seen if is_active(each.number) == (arm == ACTIVE)]
        yield Run(**{**asdict(slot), "arm": arm}, **used, **_figures(own, settings.period_s), **_first(first_s))


def _figures(own: Sequence[Period], period_s: float) -> dict[str, Any]:
    num_tokens = sum(each.num_tokens for each in own)
    return {
        "num_tokens": num_tokens,
        "seconds": len(own) * period_s,
        "answers": [[each.number, each.num_tokens] for each in own],
        **gap_figures("gap", [gap_s for each in own for gap_s in each.gaps_s]),
    }


def _first(first_s: Sequence[float]) -> dict[str, Any]:
    return {"first_token_s": latencies(first_s, [])["first_token_s"]}


def measure_all(settings: Settings, kept: Kept, slots: Sequence[Slot]) -> None:
    pair, is_replaying = PAIRS[settings.pair], any(slot.edge in REPLAYED for slot in slots)
    shared: dict[str, Any] = {"max_seqs": MAX_SEQS, "kv_bytes": 400 << 20, "dtype": settings.dtype}
    shared["model"] = pair.target_directory(CACHE)
    with story("switched") as stack:
        if is_replaying:
            with story("switched") as before:
                plain = launch({PLAIN: None}, LOGS, before, **shared)[PLAIN]
                bodies = [{**question.body, "temperature": 0} for question in settings.questions()]
                answers = plain.converse(bodies, 2 * settings.tokens)
                write_recordings(RECORDINGS, [answer.recording for answer in answers])
        env = {"PYTHONPATH": str(ROOT / "benchmarks" / "switching"), VARIABLE: str(settings.period_s)}
        target = launch({OURS: edge(None, **settings.options)}, LOGS, stack, env=env, **shared)[OURS]
        kept.measure_all(
            slots,
            lambda slot: measure(settings, slot, target),
            lambda runs: {"cells": summarise(runs)},
            "whole_tokens_per_s",
        )


def main(
    pair: Annotated[str, typer.Option(help=f"One of {', '.join(PAIRS)}.")] = "smollm2",
    requests: Annotated[list[int], typer.Option(help="Concurrent requests; repeatable.")] = [1, 8, 32],  # noqa: B006
    edges: Annotated[list[str], typer.Option(help=f"{', '.join(REPLAYED)}, {REAL}.")] = list(REPLAYED),  # noqa: B006
    rtt: Annotated[float, typer.Option(help="Round trip in ms.")] = 20.0,
    own_sampling: Annotated[bool, typer.Option("--own-sampling", help="The model's own, not greedy.")] = False,
    repeats: Annotated[int, typer.Option(help="Starts of the server to add.", min=0)] = 1,
    period_s: Annotated[float, typer.Option(help="Seconds of each period.", min=1)] = 3.0,
    seconds: Annotated[float, typer.Option(help="Duration of a run.", min=10)] = 60.0,
    tokens: Annotated[int, typer.Option(help="Mean of the answers' maximum tokens.", min=16)] = 64,
    options: Annotated[str, typer.Option(help="Server options as JSON: '{\"max_stretch\": 1.2}'.")] = "{}",
    output: Annotated[Path | None, typer.Option(help="Default: benchmarks/results/switched-PAIR.json.")] = None,
) -> None:
    """Measure the gain or cost of edges within one server."""
    if pair not in PAIRS or (unknown := set(edges) - {*REPLAYED, REAL}):
        raise typer.BadParameter(f"there is no {pair if pair not in PAIRS else ', '.join(sorted(unknown))}")
    settings = Settings(pair, DTYPES[pair], tokens, period_s, seconds, json.loads(options))
    kept = Kept.load(output_path(f"switched-{pair}.json", output), asdict(settings), is_resumed=True)
    LOGS.mkdir(parents=True, exist_ok=True)
    try:
        prepare(PAIRS[pair], CACHE)
    except PairError as error:
        sys.exit(f"switched: {error}")
    stand_aside()
    for _ in range(repeats):
        repeat = 1 + max((run.repeat for run in kept.runs), default=-1)
        temperature = None if own_sampling else 0.0
        slots = [
            Slot(arm=ACTIVE, requests=number, temperature=temperature, rtt_ms=rtt, edge=kind, repeat=repeat)
            for number, kind in product(requests, edges)
            if temperature == 0 or kind == REAL
        ]
        measure_all(settings, kept, slots)
    print(as_table(summarise(kept.runs)))
    results.console.print(f"All runs are in {kept.path}")


if __name__ == "__main__":
    typer.run(main)
