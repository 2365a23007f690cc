"""`make bench-overload`: goodput of a real server under overload, by admission policy.

    PYTHONPATH=examples python benchmarks/overload.py [--times 1,1.5,2,3] [--seconds 60] [--runs 1] [--quick]

SmolLM2 on one core, two classes with different targets, open-loop arrivals: Poisson and in bursts, the same ones for
each arm. Each cell is shown with the simulator's, which uses step times that this server learned during the cell: a
machine does not keep its speed. With several runs, each with arrivals of its own, a cell has their means. Exits with
status 1 if a goal is missed or the simulator is off by more than 15 %. Where nothing holds the load, a server that is
5 % faster can serve half as many again in time, so there it is off by the distance to what it gives for step times up
to 5 % shorter and longer.
"""

import asyncio
import json
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Annotated, Any

import httpx2 as httpx
import typer
from harness.load import LIMIT_S, Answer
from harness.results import CACHE, LOGS, circumstances, console, markdown, output_path
from harness.servers import Target, edge, launch, stand_aside, story
from overload_middleware import CLASS_HEADER, COST_MODEL

from edge_client.forecast import knowledge
from vllm_specedge.simulation.arrivals import Arrival, Kind, arrivals
from vllm_specedge.simulation.models import Server
from vllm_specedge.simulation.overload import CLASSES, Overload, simulate_overload
from vllm_specedge.simulation.overload_arms import ARMS
from vllm_specedge.simulation.overload_report import KINDS
from vllm_specedge.simulation.scenario import Scenario

MAX_SEQS, STEP_TOKENS, PROMPT_TOKENS, ANSWER_TOKENS = 32, 512, 64, 64
KV_BYTES = 1 << 30
WARM_UP = (1, 2, 4, 8, 12, 16, 24, 32)
"""Concurrent requests from which the server learns its step times."""
VOCABULARY = range(1000, 40_000)
MIN_GOODPUT, MIN_RATIO, AGREEMENT = 0.9, 1.8, 0.15
SETTLE_S, LOOK_S = 2.0, 4.0
HELD = (COST_MODEL, "fixed")
"""Arms whose goodput depends little on the server's speed."""
SPEEDS = (0.95, 0.975, 1.0, 1.025, 1.05)
"""Step times of the simulated range, relative to the learned ones. Those learned in different cells differ more: in
results/overload.json, the capacity by them is 1.7 to 2.3 requests per second."""


@dataclass(frozen=True)
class Cell:
    """One arm under one load: means over its runs."""

    kind: Kind
    arm: str
    times: float
    goodput_per_s: float
    simulated_per_s: float
    """With the step times that the server learned in the cell: of those read every LOOK_S, the ones with the median
    capacity."""
    met: dict[str, float]
    """By class, the share of requests that met their targets."""
    refused: int
    capacity_per_s: float = 0.0
    """Capacity by these step times; loads are multiples of the capacity before all cells."""
    server: Server | None = None
    """These step times, of the first run."""
    runs: tuple[tuple[float, float], ...] = ()
    """Goodput of each run, measured and simulated."""
    simulated_range: tuple[float, float] = (0.0, 0.0)
    """Lowest and highest simulated goodput at SPEEDS."""

    @property
    def off(self) -> float:
        """The simulator's error relative to the measured goodput; 0 if both are 0."""
        low, high = (self.simulated_per_s,) * 2 if self.arm in HELD else self.simulated_range
        apart = max(low - self.goodput_per_s, self.goodput_per_s - high, 0.0)
        return apart / self.goodput_per_s if self.goodput_per_s else inf if apart else 0.0


@dataclass(frozen=True)
class Scaled:
    """A server whose steps take `by` times as long."""

    server: Server
    by: float

    @property
    def draft_step_s(self) -> float:
        return self.by * self.server.draft_step_s

    def step_s(self, requests: int, tokens: int, is_verifying: bool = False) -> float:
        return self.by * self.server.step_s(requests, tokens, is_verifying)


def simulated_range(run: Overload) -> tuple[float, float]:
    """Lowest and highest goodput at SPEEDS."""
    scaled = [replace(run, scenario=replace(run.scenario, server=Scaled(run.scenario.server, by))) for by in SPEEDS]
    goodputs = [simulate_overload(each).goodput_per_s for each in scaled]
    return min(goodputs), max(goodputs)


def over(runs: Sequence[Cell]) -> Cell:
    """The cell of an arm's runs under one load."""
    return replace(
        runs[0],
        goodput_per_s=fmean(run.goodput_per_s for run in runs),
        simulated_per_s=fmean(run.simulated_per_s for run in runs),
        met={name: fmean(run.met[name] for run in runs) for name in runs[0].met},
        refused=sum(run.refused for run in runs),
        capacity_per_s=fmean(run.capacity_per_s for run in runs),
        runs=tuple((run.goodput_per_s, run.simulated_per_s) for run in runs),
        simulated_range=(
            fmean(run.simulated_range[0] for run in runs),
            fmean(run.simulated_range[1] for run in runs),
        ),
    )


@dataclass
class Asked:
    """A request, and its outcome."""

    arrival: Arrival
    answer: Answer
    status: int = 0

    @property
    def is_good(self) -> bool:
        chunks, target = self.answer.chunks, self.arrival.class_.target
        if self.status != 200 or sum(each.num_tokens for each in chunks) < self.arrival.answer_tokens:
            return False
        itl_s = (chunks[-1].at_s - chunks[0].at_s) / max(1, self.arrival.answer_tokens - 1)
        return self.answer.first_token_s <= target.ttft_s and itl_s <= target.itl_s


async def _ask(client: httpx.AsyncClient, url: str, model: str, arrival: Arrival, tokens: list[int]) -> Asked:
    body = {"model": model, "prompt": tokens, "max_tokens": arrival.answer_tokens, "ignore_eos": True, "stream": True}
    body |= {"temperature": 0, "return_token_ids": True, "priority": arrival.class_.priority}
    asked = Asked(arrival, Answer(time.monotonic()))
    async with client.stream("POST", url, json=body, headers={CLASS_HEADER: arrival.class_.name}) as response:
        asked.status = response.status_code
        if response.status_code == 200:
            async for line in response.aiter_lines():
                asked.answer.take(line, time.monotonic())
    return asked


async def _ask_all(target: Target, coming: Iterable[Arrival], seed: int) -> tuple[list[Asked], list[Server]]:
    """Send each request at its arrival time. Returns the outcomes, and the server's step times every LOOK_S."""
    chance, url, tasks = Random(seed), f"{target.server.url}/v1/completions", list[asyncio.Task[Asked]]()
    metrics = f"{target.server.gateway_url}/metrics"
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(trust_env=False, timeout=LIMIT_S, limits=limits) as client:
        started_s, looked_s, looks = time.monotonic(), -inf, list[asyncio.Task[httpx.Response]]()
        for arrival in coming:
            await asyncio.sleep(max(0.0, started_s + arrival.at_s - time.monotonic()))
            tokens = [chance.choice(VOCABULARY) for _ in range(PROMPT_TOKENS)]
            tasks.append(asyncio.create_task(_ask(client, url, target.server.model, arrival, tokens)))
            if time.monotonic() - looked_s >= LOOK_S:
                looked_s = time.monotonic()
                looks.append(asyncio.create_task(client.get(metrics)))
        return [await task for task in tasks], [_step_times(target, await look) for look in looks]


def _step_times(target: Target, metrics: httpx.Response) -> Server:
    """The step times that this server has learned."""
    server = knowledge(metrics.text).server
    if server is None:
        raise target.server.process.fail("the engine has not reported its step times")
    return server


def _learn(target: Target) -> None:
    chance = Random(0)
    for number in WARM_UP:
        target.ask([[chance.choice(VOCABULARY) for _ in range(PROMPT_TOKENS)] for _ in range(number)], ANSWER_TOKENS)
    time.sleep(SETTLE_S)  # engines report once per second


def _simulated(server: Server, seconds: float, gold_itl_ms: float, itl_ms: float) -> Overload:
    gold, default = CLASSES
    classes = (
        replace(gold, target=replace(gold.target, itl_s=gold_itl_ms / 1e3)),
        replace(default, target=replace(default.target, itl_s=itl_ms / 1e3)),
    )
    scenario = Scenario(
        server=server,
        requests=0,
        prompt_tokens=PROMPT_TOKENS,
        output_tokens=ANSWER_TOKENS,
        max_running=MAX_SEQS,
        max_step_tokens=STEP_TOKENS,
        # The simulated policy knows what the server had learned, also from loads that this cell does not have.
        is_oracle=True,
    )
    return Overload(scenario, classes=classes, duration_s=seconds, warm_up_s=seconds / 4)


def _measure(target: Target, run: Overload) -> Cell:
    itl_ms = {each.name: 1e3 * each.target.itl_s for each in run.classes}
    said = {"arm": run.arm, "limit": run.limit, "gold_itl_ms": itl_ms["gold"], "itl_ms": itl_ms["default"]}
    httpx.post(f"{target.server.url}/arm", json=said, trust_env=False).raise_for_status()
    per_s, seed = run.times * run.capacity_per_s, run.scenario.seed
    coming = arrivals(run.kind, per_s, run.duration_s, run.classes, ANSWER_TOKENS, seed)
    answered, learned = asyncio.run(_ask_all(target, coming, seed))
    asked = [each for each in answered if each.arrival.at_s >= run.warm_up_s]
    speeds = [replace(run, scenario=replace(run.scenario, server=each)) for each in learned]
    typical = sorted(speeds, key=lambda each: each.capacity_per_s)[len(speeds) // 2]
    by_class = {each.name: [one for one in asked if one.arrival.class_.name == each.name] for each in run.classes}
    typical = replace(typical, rated=run.scenario.server)
    return Cell(
        run.kind,
        run.arm,
        run.times,
        sum(one.is_good for one in asked) / (run.duration_s - run.warm_up_s),
        simulate_overload(typical).goodput_per_s,
        {name: sum(one.is_good for one in of) / max(1, len(of)) for name, of in by_class.items()},
        sum(one.status == 429 for one in asked),
        replace(typical, rated=None).capacity_per_s,
        typical.scenario.server,
        simulated_range=simulated_range(typical),
    )


def _table(kind: Kind, times: Sequence[float], cells: Sequence[Cell]) -> str:
    def text(cell: Cell) -> str:
        met = " ".join(f"{part:.2f}" for part in cell.met.values())
        return f"{cell.goodput_per_s:.2f} {simulated(cell.arm, cell.simulated_per_s, cell.simulated_range)} ({met})"

    rows = [
        [arm, *(text(cell) for cell in cells if cell.kind == kind and cell.arm == arm)]
        for arm in ARMS
        if any(cell.arm == arm for cell in cells)
    ]
    return markdown([f"{kind} arrivals", *(f"{each:g} times" for each in times)], rows)


def simulated(arm: str, simulated_per_s: float, simulated_range: Sequence[float]) -> str:
    """The text for the simulator's goodput in a table."""
    low, high = (f"{each:.2f}" for each in ((simulated_per_s,) * 2 if arm in HELD else simulated_range))
    return f"[{low}]" if low == high else f"[{low}..{high}]"


def problems(cells: Sequence[Cell]) -> list[str]:
    """One line for each missed goal."""
    found = []
    by_key = {(cell.kind, cell.arm, cell.times): cell for cell in cells}
    for cell in cells:
        if cell.arm == COST_MODEL and cell.times >= 2.0:
            at_capacity = by_key.get((cell.kind, COST_MODEL, 1.0))
            queue_time = by_key.get((cell.kind, "queue time", cell.times))
            where = f"{cell.kind}, {cell.times:g} times"
            if at_capacity is not None and cell.goodput_per_s < MIN_GOODPUT * at_capacity.goodput_per_s:
                found.append(f"{where}: {cell.goodput_per_s:.2f}, at capacity {at_capacity.goodput_per_s:.2f}")
            if queue_time is not None and cell.goodput_per_s < MIN_RATIO * queue_time.goodput_per_s:
                found.append(f"{where}: {cell.goodput_per_s:.2f}, by queue time {queue_time.goodput_per_s:.2f}")
        if cell.off > AGREEMENT:
            found.append(f"{cell.kind}, {cell.arm}, {cell.times:g} times: the simulator is off by {cell.off:.0%}")
    return found


def _serving(stack: ExitStack, slo: dict[str, Any]) -> Target:
    """A server whose arm of admission can be changed."""
    LOGS.mkdir(parents=True, exist_ok=True)
    targets = launch(
        {"overload": edge(None, ngram=False, slo=slo)},
        LOGS,
        stack,
        *("--middleware", "overload_middleware.ArmMiddleware", "--no-enable-prefix-caching"),
        *("--max-num-batched-tokens", str(STEP_TOKENS)),
        max_seqs=MAX_SEQS,
        kv_bytes=KV_BYTES,
        env={"PYTHONPATH": str(Path(__file__).parent)},
        model=CACHE / "smollm2",
    )
    return targets["overload"]


def _write(path: Path, settings: dict[str, Any], base: Overload, cells: Sequence[Cell]) -> None:
    """Write the results file. `base`: the load at capacity, before all cells."""
    known = {"capacity_per_s": base.capacity_per_s, "limit": base.limit, "server": base.scenario.server}
    figures: dict[str, Any] = {
        "settings": settings | known,
        "session": circumstances(),
        "cells": [asdict(cell) for cell in cells],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1, default=asdict) + "\n")


def main(
    times: Annotated[str, typer.Option(help="Load in multiples of capacity, separated by commas.")] = "1,1.5,2,3",
    arms: Annotated[str, typer.Option(help="Arms, separated by commas.")] = ",".join(ARMS),
    seconds: Annotated[float, typer.Option(help="Seconds of arrivals in each cell.", min=4)] = 60.0,
    gold_itl_ms: Annotated[float, typer.Option(help="Target of class gold, between tokens.")] = 80.0,
    itl_ms: Annotated[float, typer.Option(help="Target of the default class.")] = 160.0,
    num_runs: Annotated[int, typer.Option("--runs", help="Runs of each cell, the arms in turn.", min=1)] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Two arms, one load, Poisson: a smoke test.")] = False,
    output: Annotated[Path | None, typer.Option(help="The results file.")] = None,
) -> None:
    loads: list[float] = [2.0] if quick else [float(each) for each in times.split(",")]
    chosen = [COST_MODEL, "none"] if quick else arms.split(",")
    path = output_path("overload.json", output, quick)
    slo: dict[str, Any] = {
        "-1": {"ttft_ms": 1000, "itl_ms": gold_itl_ms},
        "default": {"ttft_ms": 4000, "itl_ms": itl_ms},
    }
    with story("bench-overload") as stack:
        target = _serving(stack, slo)
        stand_aside()
        _learn(target)
        metrics = httpx.get(f"{target.server.gateway_url}/metrics", trust_env=False)
        base = _simulated(_step_times(target, metrics), seconds, gold_itl_ms, itl_ms)
        console.print(f"Capacity: {base.capacity_per_s:.2f} requests per second, {base.limit} at a time")
        cases = [
            replace(base, kind=kind, arm=arm, times=each)
            for kind in (KINDS[:1] if quick else KINDS)
            for arm in chosen
            for each in loads
        ]
        made: list[list[Cell]] = [[] for _ in cases]
        for seed in range(num_runs):
            for case, runs in zip(cases, made, strict=True):
                runs.append(_measure(target, replace(case, scenario=replace(case.scenario, seed=seed))))
                console.print(runs[-1])
    cells = [over(runs) for runs in made]
    _write(path, {"seconds": seconds, "slo": slo}, base, cells)
    print("Requests per second that met their targets, [simulated], (share in class gold, in the default class):")
    for kind in [kind for kind in KINDS if any(cell.kind == kind for cell in cells)]:
        print(f"\n{_table(kind, loads, cells)}")
    missed = problems(cells)
    print("\n" + "\n".join(missed or ["All goals are met."]))
    sys.exit(1 if missed and not quick else 0)


if __name__ == "__main__":
    typer.run(main)
