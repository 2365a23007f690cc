"""`make bench`: edges against the alternatives of a user, on real `vllm serve`, at equal concurrency.

    PYTHONPATH=examples python benchmarks/bench.py [--quick] [--requests 1 --requests 8] [--rtt 20] [--arms edge]

Five servers run at once (18 GiB), each with its model in float32 on the same core; idle servers do not use it: plain
vLLM, its `ngram` and its `draft_model` with the shipped draft, the paper's method (wait for every draft), and ours. One
real edge with the shipped draft runs on the other core, behind a relay that adds delay (relay.py). The load is vLLM's
own benchmark (`vllm bench serve`, as a library). All arms of a case follow each other, in reverse order in every second
repeat. Every run is saved when it is done; --resume continues. Prints a table, and where edges help and where they
lose, and draws both; exits with status 1 if greedy answers differ between arms.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from figures import ARMS, DRAFT_MODEL, NGRAM, OURS, REMOTE, VANILLA, WAIT, Prices, as_table, break_evens, summarise
from harness import results
from harness.edges import CONNECT, drafting, flags
from harness.load import KINDS, MIXED, prompts
from harness.results import CACHE, Kept, console, output_path
from harness.runs import Run, Slot, digest, latencies, num_different
from harness.servers import Target, edge, launch, metered, stand_aside, story, waiting
from harness.vllm_bench import asked_by_vllm
from plots import draw
from vllm.benchmarks.datasets import SampleRequest

LOGS = results.LOGS / "bench"
DRAFT = CACHE / "smollm2-draft"
MAX_SEQS = 64
REQUESTS, RTTS_MS, REPEATS = (1, 4, 8, 16, 32), (0.0, 5.0, 20.0, 80.0), 3
QUICK_REQUESTS, QUICK_RTTS_MS = (1, 8), (5.0, 80.0)
WARM_UP_TOKENS = 16
TEMPERATURE = 0.7


@dataclass(frozen=True)
class Settings:
    """Settings that all compared runs share."""

    tokens: int
    """Tokens of each answer."""
    k: int
    draft_k: int
    """Draft tokens of vLLM's draft_model, each of which costs a pass."""

    def configs(self) -> dict[str, dict[str, object] | None]:
        """Each server's --speculative-config."""
        return {
            VANILLA: None,
            NGRAM: {"method": "ngram", "num_speculative_tokens": self.k},
            DRAFT_MODEL: {"method": "draft_model", "model": str(DRAFT), "num_speculative_tokens": self.draft_k},
            WAIT: waiting(self.k),
            OURS: edge(self.k),
        }


def schedule(cases: Sequence[Slot], arms: Sequence[str], rtts: Sequence[float], repeats: int) -> list[Slot]:
    """All runs: the arms of a case follow each other, in reverse order in every second repeat."""
    slots = []
    for repeat in range(repeats):
        for number, case in enumerate(cases):
            block = [(arm, rtt_ms) for arm in arms for rtt_ms in (rtts if arm in REMOTE else (None,))]
            for arm, rtt_ms in block if (repeat + number) % 2 == 0 else reversed(block):
                slots.append(replace(case, arm=arm, rtt_ms=rtt_ms, repeat=repeat))
    return slots


def chosen_cases(requests: Sequence[int], kinds: Sequence[str], is_quick: bool) -> list[Slot]:
    """All loads with mixed prompts; all kinds at one load; both again at TEMPERATURE at the smallest load."""
    found = [Slot(arm="", requests=number, kind=MIXED) for number in requests]
    of_kinds = requests[len(requests) // 2] if not is_quick else requests[0]
    found += [Slot(arm="", requests=of_kinds, kind=kind) for kind in kinds]
    found += [Slot(arm="", requests=requests[0], kind=MIXED, temperature=TEMPERATURE)]
    return list(dict.fromkeys(found))


# -- measuring -------------------------------------------------------------------------------------------------------


def drive(target: Target, asked: Sequence[str], slot: Slot, tokens: int) -> dict[str, Any]:
    """Send all prompts at the slot's concurrency; every answer has `tokens` tokens."""
    samples = [SampleRequest(prompt=prompt, prompt_len=0, expected_output_len=tokens) for prompt in asked]
    result = asked_by_vllm(
        target, samples, LOGS, at_once=slot.requests, body={"temperature": slot.temperature}, ignore_eos=True
    )
    if result["total_output_tokens"] != len(asked) * tokens:
        raise target.server.process.fail(f"vllm bench serve: {result['total_output_tokens']} tokens")
    return result


def measure(settings: Settings, slot: Slot, target: Target) -> Run:
    count = max(4, 2 * slot.requests)
    asked = prompts(slot.kind, count, first=slot.repeat * count)
    options = flags(draft=DRAFT, threads=1, max_requests=MAX_SEQS)
    with drafting(target.server, slot.rtt_ms, CONNECT, options, LOGS / "edge.log") as edges:
        drive(target, asked[: slot.requests], slot, WARM_UP_TOKENS)
        result, used = metered(target, edges, lambda: drive(target, asked, slot, settings.tokens))
    num_tokens = result["total_output_tokens"]
    verified, accepted = (result.get(f"spec_decode_{name}_tokens") or 0 for name in ("draft", "accepted"))
    # vLLM's own counters, which all methods have; a step here is one request's share of a step.
    counters = {"committed_tokens": num_tokens, "steps": num_tokens - accepted}
    counters |= {"verified_tokens": verified, "accepted_tokens": accepted} if verified else {}
    return Run(
        **asdict(slot),
        **used | {"counters": counters},
        **latencies(result["ttfts"], [gap_s for gaps_s in result["itls"] for gap_s in gaps_s]),
        num_tokens=num_tokens,
        seconds=result["duration"],
        answers=[] if slot.temperature else [digest(text) for text in result["generated_texts"]],
    )


def measure_all(settings: Settings, slots: Sequence[Slot], kept: Kept, prices: Prices) -> None:
    used = {slot.arm for slot in slots}
    with story("bench") as stack:
        configs = {arm: config for arm, config in settings.configs().items() if arm in used}
        targets = launch(configs, LOGS, stack, max_seqs=MAX_SEQS, kv_bytes=400 << 20)
        stand_aside()
        kept.measure_all(
            slots,
            lambda slot: [measure(settings, slot, targets[slot.arm])],
            lambda runs: {"prices": asdict(prices), "cells": summarise(runs, prices)},
            "whole_tokens_per_s",
        )


def main(
    requests: Annotated[list[int] | None, typer.Option(help=f"Concurrent requests; repeatable. {REQUESTS}.")] = None,
    rtt: Annotated[list[float] | None, typer.Option(help=f"Round trips in ms; repeatable. {RTTS_MS}.")] = None,
    kinds: Annotated[list[str] | None, typer.Option(help=f"{', '.join(KINDS)}; repeatable.")] = None,
    arms: Annotated[list[str] | None, typer.Option(help=f"Besides vanilla: {', '.join(ARMS)}; default: all.")] = None,
    repeats: Annotated[int, typer.Option(help=f"0: {REPEATS}, 1 with --quick.", min=0)] = 0,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=2)] = 48,
    k: Annotated[int, typer.Option(help="Most draft tokens verified per request.", min=1)] = 5,
    draft_k: Annotated[int, typer.Option(help="The same for vLLM's draft_model.", min=1)] = 3,
    server_price: Annotated[float, typer.Option(help="Price of a server, dollars per hour.", min=0)] = 1.2,
    edge_price: Annotated[float, typer.Option(help="Price of an edge, dollars per hour.", min=0)] = 0.1,
    quick: Annotated[bool, typer.Option("--quick", help="About 15 minutes.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the output file.")] = False,
    output: Annotated[Path | None, typer.Option(help="Default: benchmarks/results/bench.json.")] = None,
) -> None:
    """Compare edges with the alternatives of a user."""
    own = [arm for arm in ARMS if arm == VANILLA or arms is None or arm in arms]
    all_cases = chosen_cases(requests or (QUICK_REQUESTS if quick else REQUESTS), kinds or KINDS[quick * 3 :], quick)
    slots = schedule(all_cases, own, rtt or (QUICK_RTTS_MS if quick else RTTS_MS), repeats or (1 if quick else REPEATS))
    settings, prices = Settings(tokens, k, draft_k), Prices(server_price, edge_price)
    LOGS.mkdir(parents=True, exist_ok=True)
    kept = Kept.load(output_path("bench.json", output, quick), asdict(settings), resume)
    if todo := [slot for slot in slots if slot not in kept.done]:
        measure_all(settings, todo, kept, prices)
    print(as_table(kept.runs, prices), *break_evens(kept.runs), sep="\n")
    for made in draw(kept.runs, kept.path):
        console.print(f"drawn: {made}", markup=False)
    different = num_different(kept.runs)
    print(f"{different} greedy answers differ from the first arm's. All runs are in {kept.path.name}.")
    sys.exit(bool(different))


if __name__ == "__main__":
    typer.run(main)
