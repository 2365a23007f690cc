"""`make bench-emulated`: the real server, gateway, wire and edges at an accelerator's speed, without one.

    PYTHONPATH=examples python benchmarks/emulated.py [--server a100-14b] [--requests 64] [--rtt-ms 20]

Three `vllm serve` whose worker says a pseudo language model's tokens after a modelled step time (emulated_worker.py):
vanilla, ours, and ours without holds (mode `budget`), whose time between two steps is all overhead. The edges are the
real client, an edge a request, with a draft model that is right so often (replay.py). Prints tokens a second, what the
engine needs between two steps, and fails if any token is not the pseudo model's.

Server, front end, gateway, 64 edges and the load share this machine's cores, which no real deployment asks of a single
machine. --slower 4 makes all that is modelled (steps, round trips, passes) four times as long, so that two cores
suffice; what the engine's Python needs between two steps stays what it is.
"""

import asyncio
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import httpx2 as httpx
import psutil
import typer
from emulation import SERVER_VARIABLE, SLOWER_VARIABLE, target
from harness.edges import Edges, check
from harness.relay import Relay
from harness.replay import REPLAY, Recording, write_recordings
from harness.results import CACHE, RESULTS, circumstances, console
from harness.servers import Target, core_shares, launch_all, usage
from harness.streams import Answer, ask_all, decoding, duration_s
from stack import MODEL_NAME, StackError, start, wait_for
from verdicts import bin_of, pooled, quantiles_ms

from vllm_specedge.simulation.models import SERVERS

LOGS = CACHE / "bench" / "emulated"
KV_BYTES = 2 << 30
STEP_TOKENS = 8192
VANILLA, OURS, BUDGET = ARMS = ("vanilla", "edges", "edges, never held")
MODES = {OURS: "auto", BUDGET: "budget"}
MAX_OVERHEAD = 1.25
"""Of vanilla's, what the engine may need between two steps with an edge for each request."""
WARM_UP_TOKENS = 24
NICE = 19
"""Of edges, relay and load: they stand for other machines, and get what the server leaves of this one."""


@dataclass(frozen=True)
class Load:
    """What is measured."""

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

    def recordings(self, first_number: int) -> list[Recording]:
        """Requests of their own numbers: the pseudo model's answers to them."""
        model = target()
        made = []
        for number in range(first_number, first_number + self.requests):
            key, prompt = model.key(number), model.prompt(number, self.prompt_tokens)
            answer = [model.token(key, position) for position in range(len(prompt), len(prompt) + self.tokens)]
            made.append(Recording(tuple(prompt), tuple(answer)))
        return made


@dataclass(frozen=True)
class Run:
    """One run of one server, times in seconds."""

    arm: str
    repeat: int
    tokens_per_s: float
    """While all decode."""
    whole_tokens_per_s: float
    first_token_s: float
    gap_ms: dict[str, float]
    step_ms: float
    """As modelled, on average."""
    between_ms: float
    """From the end of a step to the start of the next, on average."""
    num_steps: int
    cpu_s: dict[str, float]
    core_busy: list[float]
    seconds: float
    counters: dict[str, int]
    up_bytes: int
    down_bytes: int
    num_wrong: int
    """Answers with a token that is not the pseudo model's."""


def launch(load: Load, stack: ExitStack) -> dict[str, Target]:
    env = {SERVER_VARIABLE: load.server, SLOWER_VARIABLE: str(load.slower)}
    env |= {"PYTHONPATH": str(Path(__file__).parent), "VLLM_SERVER_DEV_MODE": "1"}
    arguments = ["--worker-cls", "emulated_worker.EmulatedWorker", "--max-model-len", "2048"]
    arguments += ["--max-num-seqs", str(load.requests), "--max-num-batched-tokens", str(STEP_TOKENS)]
    arguments += ["--kv-cache-memory-bytes", str(KV_BYTES)]

    def speculation(arm: str, gateway_port: int) -> dict[str, object] | None:
        if arm not in MODES:
            return None
        config = {"method": "edge", "num_speculative_tokens": load.k, "listen": f"127.0.0.1:{gateway_port}"}
        return config | {"mode": MODES[arm], "ngram": False, "max_edges": max(256, load.edges)}

    return launch_all(ARMS, speculation, arguments, LOGS, stack, env)


@contextmanager
def edges(load: Load, at: Target, recordings: Path) -> Iterator[Edges | None]:
    """One for each request, all in one process, behind a relay that delays."""
    if not at.has_gateway:
        yield None
        return
    with Relay(at.server.gateway_port, load.slower * load.rtt_ms / 1000) as relay:
        command = [sys.executable, str(REPLAY), relay.url]
        command += ["--recordings", str(recordings), "--first", str(load.first), "--second", str(load.second)]
        command += ["--pass-ms", str(load.slower * load.pass_ms), "--edges", str(load.edges)]
        command += ["--max-requests", str(-(-load.requests // load.edges))]
        process = start(command, LOGS / "edges.log")
        psutil.Process(process.popen.pid).nice(NICE)
        try:
            wait_for(process, f"{at.server.gateway_url}/healthz", "edges", load.edges)
            yield Edges(process, relay)
            check(process)
        finally:
            process.stop()
    at.wait_for_no_edge()


def emulation(at: Target) -> Counter[str]:
    """What the worker counted so far."""
    response = httpx.post(f"{at.server.url}/collective_rpc", json={"method": "emulation"}, trust_env=False)
    response.raise_for_status()
    return Counter(response.json()["results"][0])


def ask(at: Target, recordings: Sequence[Recording], num_tokens: int) -> list[Answer]:
    at.num_asked += len(recordings) * num_tokens
    try:
        return asyncio.run(ask_all(at.server.url, MODEL_NAME, [each.prompt for each in recordings], num_tokens))
    except (httpx.HTTPError, RuntimeError) as error:
        raise at.server.process.fail(f"asking failed: {error!r}") from error


def measure(load: Load, arm: str, repeat: int, at: Target) -> Run:
    """The requests of each repeat are others, so that no cache knows their prompts."""
    recordings = load.recordings((1 + repeat) * load.requests)
    path = LOGS / "recordings.json"
    write_recordings(path, recordings)
    with edges(load, at, path) as drafting:
        ask(at, recordings, WARM_UP_TOKENS)
        counted, emulated, before = at.counters(), emulation(at), usage(at, drafting)
        answers = ask(at, recordings, load.tokens)
        after = usage(at, drafting)
        emulated = {name: value - emulated[name] for name, value in emulation(at).items()}
        counters = at.counters()
        counters.subtract(counted)
    decode_tokens, decode_s = decoding(answers)
    gaps = pooled(Counter(bin_of(gap.seconds) for gap in answer.gaps()) for answer in answers)
    return Run(
        arm=arm,
        repeat=repeat,
        tokens_per_s=decode_tokens / decode_s,
        whole_tokens_per_s=sum(len(answer.tokens) for answer in answers) / duration_s(answers),
        first_token_s=statistics.median(answer.first_token_s for answer in answers),
        gap_ms=quantiles_ms(gaps),
        step_ms=1e3 * emulated["modelled_s"] / emulated["num_steps"],
        between_ms=1e3 * emulated["between_s"] / emulated["num_between"],
        num_steps=int(emulated["num_steps"]),
        cpu_s={name: round(after.cpu_s[name] - before.cpu_s.get(name, 0.0), 2) for name in after.cpu_s},
        core_busy=core_shares(before, after, lambda name: name not in ("idle", "iowait")),
        seconds=duration_s(answers),
        counters=dict(counters),
        up_bytes=after.traffic.up_bytes - before.traffic.up_bytes,
        down_bytes=after.traffic.down_bytes - before.traffic.down_bytes,
        num_wrong=sum(known.answer != answer.tokens for known, answer in zip(recordings, answers, strict=True)),
    )


# -- what it comes to ------------------------------------------------------------------------------------------------


HEADER = ("arm", "tok/s", "x vanilla", "p99 gap ms", "step ms", "between steps ms", "accepted a step", "cores busy")


def middle(runs: Sequence[Run], arm: str, name: str) -> float:
    return statistics.median(getattr(run, name) for run in runs if run.arm == arm)


def spread(runs: Sequence[Run], arm: str, name: str) -> str:
    values = [getattr(run, name) for run in runs if run.arm == arm]
    return f"{statistics.median(values):.1f} ({min(values):.1f}..{max(values):.1f})"


def report(load: Load, runs: Sequence[Run]) -> bool:
    """Print a line an arm; returns whether every token was right. More overhead than aimed at is said, and no error."""
    print(f"| {' | '.join(HEADER)} |\n| --- |{' ---: |' * (len(HEADER) - 1)}")
    for arm in ARMS:
        own = [run for run in runs if run.arm == arm]
        counted = sum((Counter(run.counters) for run in own), Counter[str]())
        accepted = counted["accepted_tokens"] / counted["steps"] if counted["steps"] else 0.0
        cells = [
            arm,
            spread(runs, arm, "tokens_per_s"),
            f"{middle(runs, arm, 'tokens_per_s') / middle(runs, VANILLA, 'tokens_per_s'):.2f}",
            f"{statistics.median(run.gap_ms['p99'] for run in own):.1f}",
            f"{middle(runs, arm, 'step_ms'):.1f}",
            spread(runs, arm, "between_ms"),
            f"{accepted:.2f}",
            f"{statistics.median(sum(run.core_busy) for run in own):.2f}",
        ]
        print(f"| {' | '.join(cells)} |")
    step_ms = middle(runs, VANILLA, "step_ms") / load.slower
    for arm in (VANILLA, BUDGET):
        between_ms = middle(runs, arm, "between_ms")
        print(f"{arm}: {between_ms:.1f} ms between two steps, {between_ms / step_ms:.0%} of a step at full speed")
    ratio = middle(runs, BUDGET, "between_ms") / middle(runs, VANILLA, "between_ms")
    num_verified = sum(run.counters.get("verified_tokens", 0) for run in runs if run.arm == BUDGET)
    verdict = "ok" if ratio <= MAX_OVERHEAD else f"over the {MAX_OVERHEAD:g} aimed at"
    if not num_verified:
        verdict = "says little: nothing was verified, so this is what edges cost that are only told of tokens"
    print(f"\nBetween two steps, with {load.edges} edges: {ratio:.2f} of vanilla's own overhead ({verdict}).")
    num_wrong = sum(run.num_wrong for run in runs)
    print(f"{num_wrong} of {len(runs) * load.requests} answers have a token that is not the pseudo model's.")
    return num_wrong == 0


def main(
    server: Annotated[str, typer.Option(help=f"Of {', '.join(SERVERS)}.")] = "a100-14b",
    requests: Annotated[int, typer.Option(help="At once.", min=1)] = 64,
    num_edges: Annotated[int, typer.Option("--edges", help="0: one a request.", min=0)] = 0,
    rtt_ms: Annotated[float, typer.Option(help="Between edges and gateway.")] = 20.0,
    prompt_tokens: Annotated[int, typer.Option(help="Of each request.", min=2)] = 64,
    tokens: Annotated[int, typer.Option(help="Of each answer.", min=WARM_UP_TOKENS)] = 192,
    k: Annotated[int, typer.Option(help="Draft tokens verified for a request at most.", min=1)] = 5,
    pass_ms: Annotated[float, typer.Option(help="One forward pass of an edge.")] = 6.0,
    first: Annotated[float, typer.Option(help="How often a draft token is right.")] = 0.75,
    second: Annotated[float, typer.Option(help="How often its second candidate is, where it is not.")] = 0.6,
    slower: Annotated[float, typer.Option(help="All that is modelled takes so many times as long.", min=1)] = 1.0,
    repeats: Annotated[int, typer.Option(help="Of each arm, in turn.", min=1)] = 3,
    output: Annotated[Path | None, typer.Option(help="Default: benchmarks/results/emulated-SERVER.json.")] = None,
) -> None:
    """Server, gateway, wire and edges at an accelerator's speed."""
    load = Load(
        server, requests, num_edges or requests, rtt_ms, prompt_tokens, tokens, k, pass_ms, first, second, slower
    )
    runs: list[Run] = []
    where = circumstances()
    try:
        with ExitStack() as stack:
            with console.status("Starting three servers (minutes) ..."):
                targets = launch(load, stack)
            psutil.Process().nice(NICE)
            for repeat in range(repeats):
                for arm in ARMS if repeat % 2 == 0 else reversed(ARMS):
                    runs.append(measure(load, arm, repeat, targets[arm]))
                    console.print(f"{arm}, repeat {repeat + 1}: {runs[-1].tokens_per_s:.0f} tok/s", markup=False)
    except StackError as error:
        sys.exit(f"emulated: {error}")
    path = output or RESULTS / f"emulated-{server}.json"
    path.write_text(json.dumps({**where, "load": asdict(load), "runs": [asdict(run) for run in runs]}, indent=1) + "\n")
    if not report(load, runs):
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
