"""`make bench-emulated`: the real server, gateway, wire and edges at an accelerator's speed, without one.

    PYTHONPATH=examples:. python benchmarks/emulated.py [--server a100-14b] [--requests 64] [--rtt-ms 20]

Three `vllm serve` whose worker emits a pseudo language model's tokens after a modelled step time (emulated_worker.py):
vanilla, ours with and without edges, and ours without holds (mode `budget`), whose time between two steps is all
overhead. The edges are the real client, one edge per request, with a draft model of a configured accuracy (replay.py).
Prints tokens per second and the engine's time between two steps, and fails if any token is not the pseudo model's.

With --asynchronous (`make bench-emulated-asynchronous`) the servers take this machine for one with an H100
(tests/fake_gpu), where vLLM uses its V2 runner and schedules a step while another is computed.

Server, front end, gateway, 64 edges and the load share this machine's cores, unlike in any real deployment. --slower 4
makes all modelled times (steps, round trips, passes) four times as long, so that two cores suffice; the time of the
engine's Python between two steps does not change.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx2 as httpx
import psutil
import typer
from emulation import SERVER_VARIABLE, SLOWER_VARIABLE, target
from harness import results
from harness.edges import NICE, REPLAY, drafting, flags
from harness.load import Answer
from harness.replay import Recording, write_recordings
from harness.results import Column, Kept, output_path, table
from harness.runs import Ratio, Run, Slot, counted, differences, middle, share, spread, timed
from harness.servers import Target, edge, launch, metered, story

from tests.fake_gpu.environment import simulated_h100
from vllm_specedge.simulation.models import SERVERS

LOGS = results.LOGS / "emulated"
RECORDINGS = LOGS / "recordings.json"
STEP_TOKENS = 8192
VANILLA, ALONE, OURS, BUDGET = "vanilla", "no edges", "edges", "edges, never held"
SYNCHRONOUS = "vanilla, synchronous"
"""With --asynchronous, what plain vLLM itself needs between two steps if it waits for the first."""
MODES = {OURS: "auto", BUDGET: "budget"}
SERVER = {VANILLA: VANILLA, SYNCHRONOUS: SYNCHRONOUS, ALONE: OURS, OURS: OURS, BUDGET: BUDGET}
"""The server of each arm."""
MAX_OVERHEAD = {ALONE: 1.05, BUDGET: 1.25}
"""Most time between two steps, relative to vanilla's."""
KV_BYTES = 1 << 30
WARM_UP_TOKENS = 24


@dataclass(frozen=True)
class Load:
    """The load to measure."""

    server: str
    requests: int
    edges: int
    rtt_ms: float
    prompt_tokens: int
    tokens: int
    k: int
    pass_ms: float
    first: float
    second: float
    slower: float
    is_asynchronous: bool = False

    def recordings(self, first_number: int) -> list[Recording]:
        """Requests numbered from `first_number`, with the pseudo model's answers."""
        model = target()
        made = []
        for number in range(first_number, first_number + self.requests):
            key, prompt = model.key(number), model.prompt(number, self.prompt_tokens)
            answer = [model.token(key, position) for position in range(len(prompt), len(prompt) + self.tokens)]
            made.append(Recording(tuple(prompt), tuple(answer)))
        return made


def arms(load: Load) -> list[str]:
    return [arm for arm in SERVER if arm != SYNCHRONOUS or load.is_asynchronous]


def configs(load: Load) -> dict[str, dict[str, object] | None]:
    """Each server's --speculative-config."""
    ours = {arm: edge(load.k, mode=mode, ngram=False, max_edges=max(256, load.edges)) for arm, mode in MODES.items()}
    return {arm: ours.get(arm) for arm in arms(load) if SERVER[arm] == arm}


def launch_emulated(load: Load, stack: ExitStack) -> dict[str, Target]:
    env = {SERVER_VARIABLE: load.server, SLOWER_VARIABLE: str(load.slower)}
    env |= {"PYTHONPATH": str(Path(__file__).parent), "VLLM_SERVER_DEV_MODE": "1"}
    arguments = ["--worker-cls", "emulated_worker.EmulatedWorker", "--max-num-batched-tokens", str(STEP_TOKENS)]
    if load.is_asynchronous:
        simulated = simulated_h100(LOGS / "h100")
        env |= {**simulated, "PYTHONPATH": os.pathsep.join([env["PYTHONPATH"], simulated["PYTHONPATH"]])}
        arguments += ["--attention-backend", "TRITON_ATTN"]
    own = {SYNCHRONOUS: ["--no-async-scheduling"]}
    sizes = {"max_seqs": load.requests, "kv_bytes": KV_BYTES}
    return launch(configs(load), LOGS, stack, *arguments, **sizes, env=env, own_arguments=own)


def emulation(at: Target) -> dict[str, float]:
    """The worker's counters so far."""
    response = httpx.post(f"{at.server.url}/collective_rpc", json={"method": "emulation"}, trust_env=False)
    response.raise_for_status()
    counts: dict[str, float] = response.json()["results"][0]
    return counts


def measure(load: Load, slot: Slot, at: Target) -> Run:
    """Make a run; each repeat has other requests, so that no prefix cache has their prompts."""
    known = load.recordings((1 + slot.repeat) * load.requests)
    write_recordings(RECORDINGS, known)
    prompts = [recording.prompt for recording in known]
    options = flags(recordings=RECORDINGS, first=load.first, second=load.second, edges=load.edges)
    options += flags(pass_ms=load.slower * load.pass_ms, max_requests=-(-load.requests // load.edges))
    rtt_ms = load.slower * load.rtt_ms if slot.arm in MODES else None
    with drafting(at.server, rtt_ms, REPLAY, options, LOGS / "edges.log", load.edges, is_pinned=False) as edges:
        at.ask(prompts, WARM_UP_TOKENS)
        before = emulation(at)

        def ask() -> tuple[list[Answer], dict[str, float]]:
            return at.ask(prompts, load.tokens), emulation(at)

        (answers, after), used = metered(at, edges, ask)
    worker = {name: value - before[name] for name, value in after.items()}
    wrong = differences(known, answers)
    return Run(**asdict(slot), **timed(answers), **used, worker=worker, differences=wrong)


# -- results ---------------------------------------------------------------------------------------------------------


def step_ms(run: Run) -> float:
    """Mean modelled time of a step."""
    return 1e3 * run.worker["modelled_s"] / run.worker["num_steps"]


def between_ms(run: Run) -> float:
    """Mean time from the end of a step to the start of the next."""
    return 1e3 * run.worker["between_s"] / run.worker["num_between"]


def idle_ms(run: Run) -> float:
    """Mean time of the same during which the device had no step."""
    return 1e3 * run.worker["idle_s"] / run.worker["num_between"]


def summarise(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One cell per arm, over all repeats so far, for the table and the file."""
    vanilla = [run for run in runs if run.arm == VANILLA]
    by_arm = {arm: [run for run in runs if run.arm == arm] for arm in SERVER}
    return [summarise_arm(arm, own, vanilla) for arm, own in by_arm.items() if own]


def summarise_arm(arm: str, own: Sequence[Run], vanilla: Sequence[Run]) -> dict[str, Any]:
    return {
        "arm": arm,
        "tokens_per_s": spread([run.tokens_per_s for run in own]),
        "ratio": middle(own, "tokens_per_s") / middle(vanilla, "tokens_per_s") if vanilla else None,
        "whole_tokens_per_s": middle(own, "whole_tokens_per_s"),
        "first_token_s": middle(own, "first_token_p50_s"),
        "p99_ms": middle(own, "gap_p99_ms"),
        "step_ms": middle(own, step_ms),
        "between_ms": spread(list(map(between_ms, own))),
        "idle_ms": middle(own, idle_ms),
        "waited": share(counted(own), "waited_steps", "engine_steps") or 0.0,
        "accepted_per_step": share(counted(own), "accepted_tokens", "steps") or 0.0,
        "cores_busy": middle(own, lambda run: sum(run.core_busy)),
    }


COLUMNS = (
    Column("arm", "arm"),
    Column("tok/s", lambda cell: in_tenths(cell["tokens_per_s"])),
    Column("x vanilla", "ratio", ".2f"),
    Column("p99 gap ms", "p99_ms", ".1f"),
    Column("step ms", "step_ms", ".1f"),
    Column("between steps ms", lambda cell: in_tenths(cell["between_ms"])),
    Column("idle ms", "idle_ms", ".1f"),
    Column("synchronous", "waited", ".0%"),
    Column("accepted per step", "accepted_per_step", ".2f"),
    Column("cores busy", "cores_busy", ".2f"),
)


def in_tenths(ratio: Ratio) -> str:
    return f"{ratio.median:.1f} ({ratio.low:.1f}..{ratio.high:.1f})"


def report(load: Load, runs: Sequence[Run]) -> bool:
    """Print a line per arm; returns whether every token was right. Too much overhead is reported, but is no error."""
    cells = {cell["arm"]: cell for cell in summarise(runs)}
    print(table(COLUMNS, cells.values()))
    for arm in (VANILLA, BUDGET):
        part = cells[arm]["between_ms"].median / (cells[VANILLA]["step_ms"] / load.slower)
        print(f"{arm}: {cells[arm]['between_ms'].median:.1f} ms between two steps, {part:.0%} of a step at full speed")
    print()
    for arm, limit in MAX_OVERHEAD.items():
        ratio = cells[arm]["between_ms"].median / cells[VANILLA]["between_ms"].median
        verdict = "ok" if ratio <= limit else f"over the goal of {limit:g}"
        if arm in MODES and not counted(run for run in runs if run.arm == arm)["verified_tokens"]:
            verdict = "means little: nothing was verified, so this is the cost of edges that only receive tokens"
        print(f"Between two steps, {arm}: {ratio:.2f} of vanilla's own overhead ({verdict}).")
    if SYNCHRONOUS in cells:
        ratio = cells[BUDGET]["between_ms"].median / cells[SYNCHRONOUS]["between_ms"].median
        print(f"Between two steps, {BUDGET}: {ratio:.2f} of the overhead of {SYNCHRONOUS}.")
    num_wrong = sum(len(run.differences) for run in runs)
    print(f"{num_wrong} of {len(runs) * load.requests} answers have a token that is not the pseudo model's.")
    return num_wrong == 0


def main(
    server: Annotated[str, typer.Option(help=f"One of {', '.join(SERVERS)}.")] = "a100-14b",
    requests: Annotated[int, typer.Option(help="At once.", min=1)] = 64,
    num_edges: Annotated[int, typer.Option("--edges", help="Number of edges; 0: one per request.", min=0)] = 0,
    rtt_ms: Annotated[float, typer.Option(help="Round trip between edges and gateway.")] = 20.0,
    prompt_tokens: Annotated[int, typer.Option(help="Prompt tokens of each request.", min=2)] = 64,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=WARM_UP_TOKENS)] = 192,
    k: Annotated[int, typer.Option(help="Most draft tokens verified per request.", min=1)] = 5,
    pass_ms: Annotated[float, typer.Option(help="Time of a forward pass of an edge.")] = 6.0,
    first: Annotated[float, typer.Option(help="How often a draft token is right.")] = 0.75,
    second: Annotated[float, typer.Option(help="How often its second candidate is right if it is not.")] = 0.6,
    slower: Annotated[float, typer.Option(help="Factor by which all modelled times are longer.", min=1)] = 1.0,
    asynchronous: Annotated[
        bool, typer.Option("--asynchronous", help="Schedule a step while another is computed.")
    ] = False,
    repeats: Annotated[int, typer.Option(help="Repeats of each arm, in turn.", min=1)] = 3,
    output: Annotated[
        Path | None, typer.Option(help="Default: benchmarks/results/emulated-SERVER[-asynchronous].json.")
    ] = None,
) -> None:
    """Measure server, gateway, wire and edges at an accelerator's speed."""
    num_edges = num_edges or requests
    sizes = (server, requests, num_edges, rtt_ms, prompt_tokens, tokens, k, pass_ms, first, second, slower)
    load = Load(*sizes, asynchronous)
    name = f"emulated-{server}{'-asynchronous' if asynchronous else ''}.json"
    kept = Kept.load(output_path(name, output), asdict(load), is_resumed=False)
    slots = [
        Slot(arm=arm, requests=requests, repeat=repeat)
        for repeat in range(repeats)
        for arm in (arms(load) if repeat % 2 == 0 else reversed(arms(load)))
    ]
    with story("emulated") as stack:
        targets = launch_emulated(load, stack)
        psutil.Process().nice(NICE)
        kept.measure_all(
            slots,
            lambda slot: [measure(load, slot, targets[SERVER[slot.arm]])],
            lambda runs: {"cells": summarise(runs)},
        )
    sys.exit(not report(load, kept.runs))


if __name__ == "__main__":
    typer.run(main)
