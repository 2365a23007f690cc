"""`make bench-drafters`: forward passes of each drafter that runs here, and its draft tokens for 1 and 4 requests.

    PYTHONPATH=examples python benchmarks/drafters.py [--pair smollm2] [--gguf FILE] [--seconds 10]

First each drafter's profile, as an edge measures it at start. Then an edge without a network: requests whose answers
agree with the draft as often as real ones do, and a server with a step every 30 ms. The result is the number of right
draft tokens per second. `alone` has a pass for each request, as before passes were shared. The file has the latest
figures of each pair.
"""

import json
import time
from collections.abc import Iterator, Sequence
from math import nan
from pathlib import Path
from random import Random
from typing import Annotated, Any, TypeAlias

import typer
from harness.results import Column, circumstances, output_path, table
from pairs import CACHE, PAIRS, prepare
from questions import QUESTIONS
from transformers import AutoTokenizer

from edge_client.drafters import Drafter, DrafterOptions, SharingDrafter
from edge_client.drafters.choose import INT8, LLAMA_CPP, MLX, TRANSFORMERS, load_drafter
from edge_client.drafters.profile import WIDTHS, profile
from edge_client.drafting.jobs import Sequences, one_by_one, run_pass
from edge_client.drafting.pacing import Pace
from edge_client.drafting.pass_times import PassTimes
from edge_client.drafting.speculation import Speculation
from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.frames import Close, CloseReason, Commit, Open, Propose

PROMPT_TOKENS, CREDIT, MAX_DRAFT = 200, 16, 5
MAX_TOKENS = 1000
"""A request ends at this length, and starts again."""
ACCEPTANCE = 0.7
STEP_S = 0.03
"""Time of a server step for all requests together."""
Row: TypeAlias = dict[str, Any]


class Requests:
    """Requests that an edge drafts for, with a simulated target."""

    def __init__(self, drafter: Drafter, times: dict[int, float], texts: list[list[int]], shares: bool) -> None:
        is_shared = shares and isinstance(drafter, SharingDrafter)
        self.speculation = Speculation(
            drafter.max_context_tokens,
            drafter.max_width,
            pace=Pace(PassTimes(times)),
            max_shared_rows=drafter.max_shared_rows if is_shared else 0,
        )
        self.together = drafter.branch_together if is_shared else one_by_one
        self.sequences = Sequences(drafter.open, self.speculation.needs)
        self.chance, self.texts, self.known = Random(1), texts, [0] * len(texts)
        self.drafts: list[dict[int, int]] = [{} for _ in texts]
        """Draft tokens of each request by position."""
        self.num_accepted = self.num_passes = self.num_rows = 0
        for request in range(len(texts)):
            self.open(request)

    def open(self, request: int) -> None:
        self.known[request] = 0
        self.speculation.receive(Open(request, len(self.texts[request]), MAX_DRAFT, CREDIT, ""), 0.0)
        self.commit(request, self.texts[request])

    def commit(self, request: int, tokens: list[int]) -> None:
        base = self.known[request]
        self.known[request] += len(tokens)
        self.speculation.receive(Commit(request, base, tuple(tokens)), time.monotonic())

    def run(self, until_s: float) -> None:
        next_step_s = time.monotonic()
        while (now_s := time.monotonic()) < until_s:
            if now_s >= next_step_s:
                next_step_s = now_s + STEP_S
                for request in range(len(self.texts)):
                    self.verify(request)
            self.take(self.speculation.poll(now_s))
            if jobs := self.speculation.next_pass():
                said = run_pass(jobs, self.sequences.of(jobs), self.together)
                done_s = time.monotonic()
                self.take(self.speculation.drafted(jobs, said, done_s - now_s, done_s))
                self.num_passes += 1
                self.num_rows += sum(len(job.tokens) for job in jobs)

    def take(self, frames: Sequence[Frame]) -> None:
        for frame in frames:
            if isinstance(frame, Propose) and frame.tokens:
                base, tokens = frame.runs[0]
                self.drafts[frame.request].update(enumerate(tokens, base))

    def verify(self, request: int) -> None:
        """Commit a step: each proposed token is right with the given probability, and a bonus token follows."""
        draft, known = self.drafts[request], self.known[request]
        num_right = 0
        while num_right < MAX_DRAFT and known + num_right in draft and self.chance.random() < ACCEPTANCE:
            num_right += 1
        self.num_accepted += num_right
        right = [draft[known + at] for at in range(num_right)]
        draft.clear()
        self.commit(request, [*right, self.chance.choice(self.texts[request])])
        if self.known[request] > MAX_TOKENS:
            self.speculation.receive(Close(request, CloseReason.FINISHED), 0.0)
            self.open(request)


def measured(drafter: Drafter, times: dict[int, float], texts: list[list[int]], shares: bool, seconds: float) -> Row:
    at_work = Requests(drafter, times, texts, shares)
    at_work.run(time.monotonic() + seconds / 4)  # prefill of the prompts

    def counts() -> tuple[int, ...]:
        return at_work.num_accepted, at_work.speculation.stats.drafted_tokens, at_work.num_passes, at_work.num_rows

    before, started_s = counts(), time.monotonic()
    at_work.run(started_s + seconds)
    took_s = time.monotonic() - started_s
    accepted, drafted, passes, rows = (now - then for now, then in zip(counts(), before, strict=True))
    return {
        "requests": len(texts),
        "passes": "shared" if shares else "alone",
        "accepted_per_s": accepted / took_s,
        "drafted_per_s": drafted / took_s,
        "pass_ms": 1e3 * took_s / max(1, passes),
        "rows_a_pass": rows / max(1, passes),
    }


def drafters(pair: str, gguf: Path | None, threads: int) -> Iterator[tuple[str, Drafter]]:
    """Drafters by name, one after the other."""
    directory = str(PAIRS[pair].draft_directory(CACHE))
    for runtime in (INT8, TRANSFORMERS, MLX):
        yield runtime, load_drafter(DrafterOptions(directory, "cpu", threads, runtime=runtime))
    if gguf is not None:
        yield LLAMA_CPP, load_drafter(DrafterOptions(str(gguf), "cpu", threads))


PROFILE = (
    Column("drafter", "drafter"),
    *(Column(f"{rows} rows, ms", lambda row, rows=rows: row.get(f"rows_{rows}", nan), ".1f") for rows in WIDTHS),
)
SPEEDS = (
    Column("drafter", "drafter"),
    Column("requests", "requests"),
    Column("passes", "passes"),
    Column("right draft tokens/s", "accepted_per_s", ".1f"),
    Column("drafted tokens/s", "drafted_per_s", ".1f"),
    Column("ms a pass", "pass_ms", ".1f"),
    Column("rows a pass", "rows_a_pass", ".1f"),
)


def main(
    pair: Annotated[str, typer.Option(help="smollm2 or qwen.")] = "smollm2",
    gguf: Annotated[Path | None, typer.Option(help="A GGUF file of the same draft.")] = None,
    seconds: Annotated[float, typer.Option(help="Seconds per figure.")] = 10.0,
    threads: Annotated[int, typer.Option(help="Threads of each drafter.")] = 1,
    ahead: Annotated[
        Path | None, typer.Option(help="Results of real_pair.py with edges of several drafters, to show as well.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Default: benchmarks/results/drafters.json.")] = None,
) -> None:
    """Measure forward passes of each drafter that runs here, and its draft tokens for one and four requests."""
    prepare(PAIRS[pair], CACHE)
    tokenizer = AutoTokenizer.from_pretrained(PAIRS[pair].target_directory(CACHE))
    texts = [tokenizer(" ".join(kind))["input_ids"] * 3 for kind in QUESTIONS.values()]
    texts = [text[:PROMPT_TOKENS] for text in (*texts, texts[0][1:])]
    profiles, speeds = list[Row](), list[Row]()
    for name, drafter in drafters(pair, gguf, threads):
        times = profile(drafter, time.perf_counter)
        profiles.append({"drafter": name, **{f"rows_{rows}": 1e3 * took_s for rows, took_s in times.items()}})
        for number, shares in ((1, False), (4, False), (4, True)):
            speeds.append({"drafter": name, **measured(drafter, times, texts[:number], shares, seconds)})
    print(table(PROFILE, profiles), table(SPEEDS, speeds), sep="\n\n")
    measured_now = {**circumstances(), "profiles": profiles, "speeds": speeds}
    if ahead is not None:
        measured_now["times_plain"] = {cell["arm"]: cell["mean"] for cell in json.loads(ahead.read_text())["cells"]}
    path = output_path("drafters.json", output)
    others = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**others, pair: measured_now}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
