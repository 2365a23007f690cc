"""`make bench-ahead ARGS="--pair qwen"`: what an edge brings with a real pair of models, by kind of question.

    PYTHONPATH=examples python benchmarks/real_pair.py --pair qwen [--rtt 20] [--repeats 1] [--resume]

Plain vLLM without the plugin, the paper's way (wait for every draft) and this project's (draft ahead, with branches, as
`vllm serve --speculative-config edge` and `edge-client connect` do by default) side by side: a server each on one core,
one real edge at a time on the other, behind a relay that adds delay. Greedy and sampled. Tokens a second are those
while an answer streams, without its prompt; each ratio is to plain vLLM in the same round, which is a repeat at one
temperature. All is saved after every round; --resume goes on with a file that was left.
"""

import asyncio
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import httpx2 as httpx
import psutil
import typer
from ahead import LOGS
from harness.edges import check
from harness.relay import Relay, Traffic
from harness.results import RESULTS, circumstances, progress_bar
from harness.servers import Target, launch_all
from harness.streams import Answer
from pair_figures import PLAIN, Run, Said, as_split, as_table, run_of, summarise
from pairs import CACHE, PAIRS, Pair, PairError, prepare
from questions import QUESTIONS
from rich.console import Console
from stack import BIN, EDGE_CORE, StackError, start, wait_for

WAITING, AHEAD = "waiting", "ahead"
WAIT_LIMIT_MS = 1000
WARM_UP_TOKENS = 8
CHAT_LIMIT_S = 600.0

console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Arm:
    """A way of serving: a server's options, and its edge's."""

    name: str
    server: str
    options: dict[str, object] | None = None
    """Beside `method` and `listen`; None: plain vLLM."""
    edge: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    pair: Pair
    dtype: str
    arms: tuple[Arm, ...]
    rtts_ms: tuple[float, ...]
    temperatures: tuple[float, ...]
    repeats: int
    num_questions: int
    """Of each kind."""
    num_tokens: int
    """Of each answer at most."""

    def rounds(self) -> Iterator[tuple[int, float]]:
        """Repeat and temperature. All that is compared is measured within one."""
        return product(range(self.repeats), self.temperatures)

    def cells(self, repeat: int, temperature: float) -> list[tuple[Arm, float]]:
        """Arms and RTTs in ms of a round; each starts with another arm. Plain vLLM has no RTT."""
        cells = [(arm, rtt) for rtt in self.rtts_ms for arm in self.arms if arm.options is not None]
        cells += [(arm, 0.0) for arm in self.arms if arm.options is None]
        shift = (repeat + self.temperatures.index(temperature)) * 2 % len(cells)
        return cells[shift:] + cells[:shift]


def arms_of(names: Sequence[str], uplinks: Sequence[float], k: int | None) -> tuple[Arm, ...]:
    """`uplinks`: bytes a token that an edge drafting ahead may send; none: as by default. `k` likewise."""
    number = {} if k is None else {"num_speculative_tokens": k}
    waiting = {**number, "mode": "wait", "hold_limit_ms": WAIT_LIMIT_MS, "ngram": False, "credit_tokens": k or 5}
    found = [Arm(PLAIN, PLAIN)]
    if WAITING in names:
        found.append(Arm(WAITING, WAITING, waiting, ("--max-width", "1")))
    if AHEAD in names and not uplinks:
        found.append(Arm(AHEAD, AHEAD, number))
    for uplink in uplinks if AHEAD in names else ():
        found.append(Arm(f"{AHEAD}, {uplink:g} bytes", AHEAD, number, ("--uplink-bytes-per-token", f"{uplink:g}")))
    return tuple(found)


# -- asking --------------------------------------------------------------------------------------------------------


async def ask(url: str, body: dict[str, Any]) -> Answer:
    """One streamed chat completion."""
    answer = Answer(time.monotonic())
    body = {**body, "stream": True, "return_token_ids": True}
    async with (
        httpx.AsyncClient(trust_env=False, timeout=CHAT_LIMIT_S) as client,
        client.stream("POST", f"{url}/v1/chat/completions", json=body) as got,
    ):
        got.raise_for_status()
        async for line in got.aiter_lines():
            answer.take(line, time.monotonic())
    return answer


def ask_all(plan: Plan, kind: str, target: Target, temperature: float, repeat: int) -> list[Said]:
    """Every question of a kind, one after the other."""
    said = []
    for number, question in enumerate(QUESTIONS[kind][: plan.num_questions]):
        body = {"model": target.server.model, "messages": [{"role": "user", "content": question}]}
        body |= {"max_tokens": plan.num_tokens, "temperature": temperature}
        body |= {"seed": 100 * repeat + number} if temperature else {}
        answer = asyncio.run(ask(target.server.url, body))
        target.num_asked += len(answer.tokens)
        first, last = answer.chunks[0], answer.chunks[-1]
        num_timed = len(answer.tokens) - first.num_tokens
        said.append(Said(kind, answer.tokens, num_timed, last.at_s - first.at_s))
    return said


@contextmanager
def drafting(plan: Plan, arm: Arm, target: Target, rtt_ms: float) -> Iterator[Relay | None]:
    """The arm's edge, admitted through a relay of its own; none for plain vLLM."""
    if arm.options is None:
        yield None
        return
    with Relay(target.server.gateway_port, rtt_ms / 1000) as relay:
        command = [str(BIN / "edge-client"), "connect", relay.url, "--draft", str(plan.pair.draft_directory(CACHE))]
        process = start([*command, "--threads", "1", *arm.edge], LOGS / "edge.log", {"HF_HUB_OFFLINE": "1"}, EDGE_CORE)
        try:
            wait_for(process, f"{target.server.gateway_url}/healthz", "edges", 1)
            yield relay
            check(process)
        finally:
            process.stop()
    target.wait_for_no_edge()


def measure(plan: Plan, arm: Arm, target: Target, cell: tuple[int, float, float]) -> Run:
    repeat, temperature, rtt_ms = cell
    with drafting(plan, arm, target, rtt_ms) as relay:
        warm = {"model": target.server.model, "messages": [{"role": "user", "content": "Say hello."}]}
        target.num_asked += len(asyncio.run(ask(target.server.url, {**warm, "max_tokens": WARM_UP_TOKENS})).tokens)
        answers, counters = [], {}
        counted, before = target.counters(), relay.traffic if relay else Traffic(0, 0)
        for kind in QUESTIONS:
            answers += ask_all(plan, kind, target, temperature, repeat)
            counted_before, counted = counted, target.counters()
            counters[kind] = {name: value - counted_before[name] for name, value in counted.items()}
        after = relay.traffic if relay else Traffic(0, 0)
    up_bytes, down_bytes = after.up_bytes - before.up_bytes, after.down_bytes - before.down_bytes
    return Run(arm.name, rtt_ms, temperature, repeat, answers, counters, up_bytes, down_bytes)


def start_servers(plan: Plan, stack: ExitStack) -> dict[str, Target]:
    servers = {arm.server: arm.options for arm in plan.arms}

    def speculation(name: str, gateway_port: int) -> dict[str, object] | None:
        own = servers[name]
        return {"method": "edge", "listen": f"127.0.0.1:{gateway_port}"} | own if own is not None else None

    arguments = ["--max-model-len", "2048", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(400 << 20)]
    model = plan.pair.target_directory(CACHE)
    with console.status("Starting all servers (minutes) ..."):
        return launch_all(list(servers), speculation, arguments, LOGS, stack, model=model, dtype=plan.dtype)


def measure_all(plan: Plan, targets: dict[str, Target], rounds: Sequence[tuple[int, float]]) -> Iterator[list[Run]]:
    """The runs of these rounds, round by round."""
    psutil.Process().cpu_affinity([EDGE_CORE])  # as in ahead.py: asking never stops the model's core
    with progress_bar() as progress:
        task = progress.add_task("measuring", total=sum(len(plan.cells(*each)) for each in rounds))
        for repeat, temperature in rounds:
            runs = []
            for arm, rtt_ms in plan.cells(repeat, temperature):
                progress.update(task, description=f"{arm.name}, {rtt_ms:g} ms, T {temperature:g}", refresh=True)
                runs.append(measure(plan, arm, targets[arm.server], (repeat, temperature, rtt_ms)))
                progress.advance(task)
            yield runs


# -- the file ------------------------------------------------------------------------------------------------------


def described(plan: Plan) -> dict[str, Any]:
    """The plan as it is in a file."""
    said = json.loads(json.dumps({**asdict(plan), "pair": plan.pair.name}))
    return {name: value for name, value in said.items() if name not in ("repeats", "temperatures")}


def save(plan: Plan, runs: Sequence[Run], output: Path) -> None:
    written = circumstances() | {"plan": described(plan)}
    written |= {"cells": [asdict(cell) for cell in summarise(runs)], "runs": [asdict(run) for run in runs]}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(written, indent=1) + "\n")


def load(plan: Plan, output: Path) -> list[Run]:
    """The runs of a file that this plan, but for more rounds, has left; of none if there is none."""
    if not output.exists():
        return []
    written = json.loads(output.read_text())
    if written["plan"] != described(plan):
        sys.exit(f"real_pair: {output} was measured by another plan: give another --output.")
    return [run_of(each) for each in written["runs"]]


def report(plan: Plan, runs: Sequence[Run], output: Path) -> bool:
    """Print all; False where a greedy answer in float32 is not plain vLLM's."""
    cells = summarise(runs)
    print(f"{plan.pair.title}, {plan.dtype}; times plain vLLM, median (range) of {plan.repeats}\n")
    print(as_table(cells), as_split(cells), sep="\n\n")
    console.print(f"All runs are in {output}")
    return plan.dtype != "float32" or not any(cell.parted for cell in cells)


def main(
    pair: Annotated[str, typer.Option(help=f"Of {', '.join(PAIRS)}.")] = "qwen",
    dtype: Annotated[str, typer.Option(help="Of the servers.")] = "bfloat16",
    arms: Annotated[list[str], typer.Option(help="Plain always runs.")] = [WAITING, AHEAD],  # noqa: B006
    rtt: Annotated[list[float], typer.Option(help="Round trips in ms; may be given again.")] = [0, 20, 80],  # noqa: B006
    temperature: Annotated[list[float], typer.Option(help="May be given again.")] = [0, 0.7],  # noqa: B006
    uplink: Annotated[list[float], typer.Option(help="Edges of so many bytes a token; may be given again.")] = [],  # noqa: B006
    k: Annotated[
        int | None, typer.Option(help="Draft tokens that a step verifies at most, if not as by default.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Of everything.", min=1)] = 3,
    questions: Annotated[int, typer.Option(help="Of each kind.", min=1, max=3)] = 3,
    tokens: Annotated[int, typer.Option(help="Of each answer, at most.", min=16)] = 96,
    output: Annotated[Path | None, typer.Option(help="Default: benchmarks/results/pair-PAIR.json.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the output file; only what is missing.")] = False,
) -> None:
    """What an edge brings with a real pair of models, by kind of question."""
    if pair not in PAIRS:
        raise typer.BadParameter(f"there is no pair {pair}; there are {', '.join(PAIRS)}")
    chosen = arms_of(arms, uplink, k)
    plan = Plan(PAIRS[pair], dtype, chosen, tuple(rtt), tuple(temperature), repeats, questions, tokens)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the servers are stopped
    output = output or RESULTS / f"pair-{pair}.json"
    runs = load(plan, output) if resume else []
    missing = [each for each in plan.rounds() if each not in {(run.repeat, run.temperature) for run in runs}]
    try:
        prepare(plan.pair, CACHE)
        with ExitStack() as stack:
            for measured in measure_all(plan, start_servers(plan, stack), missing) if missing else ():
                runs += measured
                save(plan, runs, output)
    except (PairError, StackError) as error:
        sys.exit(f"real_pair: {error}")
    sys.exit(not report(plan, runs, output))


if __name__ == "__main__":
    typer.run(main)
