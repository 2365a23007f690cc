"""`make bench`: edges against what a user would pick instead, on real `vllm serve`, at equal concurrency.

    PYTHONPATH=examples python benchmarks/bench.py [--quick] [--requests 1 --requests 8] [--rtt 20] [--arms edge]

Five servers run at once (18 GiB), each with its model in float32 on the same core; whoever is not asked uses none of
it: plain vLLM, its `ngram` and its `draft_model` with the shipped draft, the paper's way (wait for every draft), and
ours. One real edge with the shipped draft is on the other core, behind a relay that adds delay (relay.py). The load is
vLLM's own benchmark (`vllm bench serve`, as a library). All arms of a case follow each other, in reverse order in every
second repeat. All runs are saved as they are made; --resume goes on. Prints a table, where edges help and where they
lose, and draws both; status 1 if greedy answers differ between arms.
"""

import asyncio
import contextlib
import json
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from figures import (
    ARMS,
    DRAFT_MODEL,
    NGRAM,
    OURS,
    REMOTE,
    VANILLA,
    WAIT,
    Case,
    Prices,
    Run,
    break_evens,
    digest,
    num_different,
    table,
)
from harness.edges import Edges
from harness.prompts import KINDS, MIXED, prompts
from harness.relay import Relay
from harness.results import CACHE, RESULTS, circumstances, console, progress_bar, save_runs
from harness.servers import Target, launch_all, usage
from plots import draw
from stack import EDGE_CORE, MODEL_NAME, StackError, edge_client
from vllm.benchmarks.datasets import SampleRequest
from vllm.benchmarks.serve import TaskType, benchmark

LOGS = CACHE / "bench" / "bench"
DRAFT = CACHE / "smollm2-draft"
KV_BYTES = 400 << 20
MAX_SEQS = 64
WAIT_LIMIT_MS = 1000
REQUESTS, RTTS_MS, REPEATS = (1, 4, 8, 16, 32), (0.0, 5.0, 20.0, 80.0), 3
QUICK_REQUESTS, QUICK_RTTS_MS = (1, 8), (5.0, 80.0)
WARM_UP_TOKENS = 16
TEMPERATURE = 0.7


@dataclass(frozen=True)
class Settings:
    """What runs that are compared have in common."""

    tokens: int
    """Of each answer."""
    k: int
    draft_k: int
    """Draft tokens of vLLM's draft_model, which pays for each of them."""

    def speculation(self, arm: str, gateway_port: int) -> dict[str, object] | None:
        """A server's --speculative-config."""
        edge = {"method": "edge", "num_speculative_tokens": self.k, "listen": f"127.0.0.1:{gateway_port}"}
        return {
            VANILLA: None,
            NGRAM: {"method": "ngram", "num_speculative_tokens": self.k},
            DRAFT_MODEL: {"method": "draft_model", "model": str(DRAFT), "num_speculative_tokens": self.draft_k},
            WAIT: {**edge, "mode": "wait", "hold_limit_ms": WAIT_LIMIT_MS, "ngram": False},
            OURS: edge,
        }[arm]

    def num_prompts(self, requests: int) -> int:
        return max(4, 2 * requests)


class Slot(tuple[str, Case, float | None, int]):
    """One run to make: arm, case, RTT in ms or None, repeat."""


def schedule(all_cases: Sequence[Case], arms: Sequence[str], rtts: Sequence[float], repeats: int) -> list[Slot]:
    """All arms of a case follow each other; every second time in reverse order."""
    slots = []
    for repeat in range(repeats):
        for number, case in enumerate(all_cases):
            block = [(arm, rtt_ms) for arm in arms for rtt_ms in (rtts if arm in REMOTE else (None,))]
            for arm, rtt_ms in block if (repeat + number) % 2 == 0 else reversed(block):
                slots.append(Slot((arm, case, rtt_ms, repeat)))
    return slots


def chosen_cases(requests: Sequence[int], kinds: Sequence[str], is_quick: bool) -> list[Case]:
    """All loads with a mixture of prompts; all kinds at one load; both again at TEMPERATURE at the smallest load."""
    found = [Case(number, MIXED, 0.0) for number in requests]
    found += [Case(requests[len(requests) // 2] if not is_quick else requests[0], kind, 0.0) for kind in kinds]
    found += [Case(requests[0], MIXED, TEMPERATURE)]
    return list(dict.fromkeys(found))


# -- measuring -------------------------------------------------------------------------------------------------------


def launch(settings: Settings, arms: Sequence[str], stack: ExitStack) -> dict[str, Target]:
    arguments = ["--max-model-len", "2048", "--max-num-seqs", str(MAX_SEQS), "--kv-cache-memory-bytes", str(KV_BYTES)]
    return launch_all(arms, settings.speculation, arguments, LOGS, stack)


@contextmanager
def edge(target: Target, rtt_ms: float | None) -> Iterator[Edges | None]:
    """The real edge with the shipped draft, for the arms that have one."""
    if rtt_ms is None:
        yield None
        return
    options = ("--max-requests", str(MAX_SEQS))
    with (
        Relay(target.server.gateway_port, rtt_ms / 1000) as relay,
        edge_client(relay.url, str(DRAFT), LOGS / "edge.log", *options) as process,
    ):
        yield Edges(process, relay)
    target.wait_for_no_edge()


def drive(target: Target, asked: Sequence[str], requests: int, tokens: int, temperature: float) -> dict[str, Any]:
    """vLLM's own benchmark: all prompts, so many at a time, always `tokens` tokens each."""
    url = target.server.url
    samples = [SampleRequest(prompt=prompt, prompt_len=0, expected_output_len=tokens) for prompt in asked]
    with (LOGS / "vllm-bench.log").open("a") as log, contextlib.redirect_stdout(log):
        result: dict[str, Any] = asyncio.run(
            benchmark(
                task_type=TaskType.GENERATION,
                endpoint_type="openai",
                api_url=f"{url}/v1/completions",
                base_url=url,
                model_id=MODEL_NAME,
                model_name=MODEL_NAME,
                tokenizer=None,
                input_requests=samples,
                logprobs=None,
                request_rate=math.inf,
                burstiness=1.0,
                disable_tqdm=True,
                num_warmups=0,
                profile=False,
                selected_percentile_metrics=["ttft", "itl"],
                selected_percentiles=[50, 95, 99],
                ignore_eos=True,
                goodput_config_dict={},
                max_concurrency=requests,
                lora_modules=None,
                extra_headers=None,
                extra_body={"temperature": temperature},
                ready_check_timeout_sec=0,
            )
        )
    if result["failed"] or result["total_output_tokens"] != len(asked) * tokens:
        raise target.server.process.fail(f"vllm bench serve: {result['failed']} failed, {result.get('errors')}")
    return result


def measure(settings: Settings, slot: Slot, target: Target) -> Run:
    arm, case, rtt_ms, repeat = slot
    count = settings.num_prompts(case.requests)
    asked = prompts(case.kind, count, first=repeat * count)
    with edge(target, rtt_ms) as drafting:
        drive(target, asked[: case.requests], case.requests, WARM_UP_TOKENS, case.temperature)
        before = usage(target, drafting)
        result = drive(target, asked, case.requests, settings.tokens, case.temperature)
        after = usage(target, drafting)
    used = {name: after.cpu_s[name] - before.cpu_s.get(name, 0.0) for name in after.cpu_s}
    num_tokens = result["total_output_tokens"]
    verified, accepted = (result.get(f"spec_decode_{name}_tokens") or 0 for name in ("draft", "accepted"))
    return Run(
        arm=arm,
        requests=case.requests,
        kind=case.kind,
        temperature=case.temperature,
        rtt_ms=rtt_ms,
        repeat=repeat,
        num_tokens=num_tokens,
        seconds=result["duration"],
        tokens_per_s=result["output_throughput"],
        ttft_ms=percentiles_ms(result["ttfts"], (50, 99)),
        itl_ms=percentiles_ms([gap_s for gaps_s in result["itls"] for gap_s in gaps_s], (50, 95, 99)),
        tokens_per_step=num_tokens / (num_tokens - accepted),
        acceptance=accepted / verified if verified else None,
        verified_per_accepted=verified / accepted if accepted else None,
        up_bytes_per_token=(after.traffic.up_bytes - before.traffic.up_bytes) / num_tokens,
        down_bytes_per_token=(after.traffic.down_bytes - before.traffic.down_bytes) / num_tokens,
        server_cpu_s_per_token=(used.get("worker", 0.0) + used.get("engine_core", 0.0)) / num_tokens,
        edge_busy=used["edges"] / result["duration"],
        answers=[] if case.temperature else [digest(text) for text in result["generated_texts"]],
    )


def percentiles_ms(seconds: Sequence[float], parts: Sequence[int]) -> dict[str, float]:
    return {f"p{part}": 1e3 * float(np.percentile(seconds, part)) for part in parts}


# -- what is kept ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """All runs so far, of this session of the servers and of those before."""

    settings: Settings
    prices: Prices
    sessions: list[dict[str, object]]
    runs: list[Run]

    def done(self) -> set[Slot]:
        return {Slot((run.arm, run.case, run.rtt_ms, run.repeat)) for run in self.runs}

    def save(self, path: Path) -> None:
        head = {"settings": asdict(self.settings), "prices": asdict(self.prices), "sessions": self.sessions}
        save_runs(path, head, self.runs)


def load(path: Path, settings: Settings, prices: Prices) -> Kept:
    """What an earlier session left. Raises StackError if it was measured otherwise."""
    if not path.exists():
        return Kept(settings, prices, [], [])
    values = json.loads(path.read_text())
    if values["settings"] != asdict(settings):
        raise StackError(f"{path} has other settings ({values['settings']}): choose another --output")
    return Kept(settings, prices, values["sessions"], [Run(**run) for run in values["runs"]])


def measure_all(kept: Kept, slots: Sequence[Slot], path: Path, stack: ExitStack) -> None:
    arms = [arm for arm in ARMS if any(slot[0] == arm for slot in slots)]
    with console.status(f"Starting {len(arms)} servers (minutes) ..."):
        targets = launch(kept.settings, arms, stack)
    psutil.Process().cpu_affinity([EDGE_CORE])
    with progress_bar() as progress:
        task = progress.add_task("measuring", total=len(slots))
        for slot in slots:
            arm, case, rtt_ms, _ = slot
            at = f", RTT {rtt_ms:g} ms" if rtt_ms is not None else ""
            title = f"{case.requests} requests, {case.kind}, T {case.temperature:g}: {arm}{at}"
            progress.update(task, description=title, refresh=True)
            run = measure(kept.settings, slot, targets[arm])
            kept.runs.append(run)
            kept.save(path)
            progress.console.print(f"{title}: {run.tokens_per_s:.1f} tok/s", markup=False)
            progress.advance(task)


def main(
    requests: Annotated[list[int] | None, typer.Option(help=f"At once; may be given again. {REQUESTS}")] = None,
    rtt: Annotated[list[float] | None, typer.Option(help=f"Round trips in ms; may be given again. {RTTS_MS}")] = None,
    kinds: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(KINDS)}; may be given again.")] = None,
    arms: Annotated[list[str] | None, typer.Option(help=f"Beside vanilla, of {', '.join(ARMS)}. All.")] = None,
    repeats: Annotated[int, typer.Option(help=f"0: {REPEATS}, 1 with --quick.", min=0)] = 0,
    tokens: Annotated[int, typer.Option(help="Of each answer.", min=2)] = 48,
    k: Annotated[int, typer.Option(help="Draft tokens verified for a request at most.", min=1)] = 5,
    draft_k: Annotated[int, typer.Option(help="The same of vLLM's draft_model.", min=1)] = 3,
    server_price: Annotated[float, typer.Option(help="Of a server, dollars an hour.", min=0)] = 1.2,
    edge_price: Annotated[float, typer.Option(help="Of an edge, dollars an hour.", min=0)] = 0.1,
    quick: Annotated[bool, typer.Option("--quick", help="About 15 minutes.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the output file.")] = False,
    output: Annotated[Path | None, typer.Option(help="Default: benchmarks/results/bench.json.")] = None,
) -> None:
    """Edges against what a user would pick instead."""
    own = [arm for arm in ARMS if arm == VANILLA or arms is None or arm in arms]
    all_cases = chosen_cases(requests or (QUICK_REQUESTS if quick else REQUESTS), kinds or KINDS[quick * 3 :], quick)
    slots = schedule(all_cases, own, rtt or (QUICK_RTTS_MS if quick else RTTS_MS), repeats or (1 if quick else REPEATS))
    path = (output or (CACHE / "bench" / "quick.json" if quick else RESULTS / "bench.json")).absolute()
    settings, prices = Settings(tokens, k, draft_k), Prices(server_price, edge_price)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    LOGS.mkdir(parents=True, exist_ok=True)
    try:
        kept = load(path, settings, prices) if resume else Kept(settings, prices, [], [])
        todo = [slot for slot in slots if slot not in kept.done()]
        if todo:
            kept = replace(kept, sessions=[*kept.sessions, circumstances()])
            with ExitStack() as stack:
                measure_all(kept, todo, path, stack)
    except StackError as error:
        sys.exit(f"bench: {error}")
    print(table(kept.runs, prices), *break_evens(kept.runs), sep="\n")
    for made in draw(kept.runs, path):
        console.print(f"drawn: {made}", markup=False)
    different = num_different(kept.runs)
    print(f"{different} greedy answers are not the first arm's. All runs are in {path.name}.")
    if different:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
