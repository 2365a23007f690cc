"""`make bench-timeline`: one second of a real run, drawn: while the server verifies, the edges draft.

    PYTHONPATH=examples python benchmarks/timeline.py [--requests 4] [--rtt 20]

A real `vllm serve` whose worker writes down its steps (traced_worker.py), real edge clients behind a relay that write
down their forward passes (replay.py --trace; a replayed draft, for two cores have no room for more draft models). All
times are of the machine's monotonic clock. Writes benchmarks/results/timeline.json and .svg, and prints how much of the
time both were at work.
"""

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer
from harness.prompts import MIXED, prompts
from harness.relay import Relay
from harness.replay import REPLAY, Recording, write_recordings
from harness.results import CACHE, RESULTS, circumstances
from harness.servers import free_ports
from harness.streams import Answer, ask_all, decoding
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from spans import DRAFTING, PLAIN, SERVER, VERIFYING, Span, covered_s, overlap_s, passes, steps, window
from stack import EDGE_CORE, MODEL_NAME, Process, StackError, answering, start, start_server, wait_for
from traced_worker import TRACE_VARIABLE

LOGS = CACHE / "bench" / "timeline"
WARM_UP_TOKENS = 24
SHOWN_S = 1.0
COLOURS = {PLAIN: "#bbbbbb", VERIFYING: "#1f77b4", DRAFTING: "#f1a340"}


def draw(spans: Sequence[Span], title: str, path: Path) -> None:
    lanes = sorted({span.lane for span in spans}, key=lambda lane: (lane != SERVER, lane))
    figure = Figure(figsize=(9, 0.9 + 0.38 * len(lanes)), layout="constrained")
    axes = figure.subplots()
    for row, lane in enumerate(lanes):
        own = [span for span in spans if span.lane == lane]
        bars = [(1e3 * span.start_s, 1e3 * (span.end_s - span.start_s)) for span in own]
        axes.broken_barh(
            bars, (row - 0.38, 0.76), facecolors=[COLOURS[span.kind] for span in own], edgecolor="white", lw=0.4
        )
        for span in own:
            axes.text(500 * (span.start_s + span.end_s), row, span.label, ha="center", va="center", size=7, color="w")
    axes.set_yticks(range(len(lanes)), lanes)
    axes.invert_yaxis()
    axes.set_xlim(0, 1e3 * SHOWN_S)
    axes.set_xlabel("ms")
    axes.set_title(title, size=9)
    handles = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items()]
    axes.legend(handles=handles, ncols=3, frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)


# -- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    requests: int
    rtt_ms: float
    tokens: int
    first: float
    """How often the draft is right."""
    pass_ms: float
    k: int


def edges(settings: Settings, url: str, recordings: Path, trace: Path) -> Process:
    """One for each request."""
    command = [sys.executable, str(REPLAY), url, "--recordings", str(recordings)]
    command += ["--first", str(settings.first), "--pass-ms", str(settings.pass_ms), "--max-requests", "1"]
    command += ["--edges", str(settings.requests), "--trace", str(trace)]
    return start(command, LOGS / "edges.log", core=EDGE_CORE)


def measure(settings: Settings, scratch: Path) -> tuple[list[Span], list[Answer]]:
    """Ask once plainly, which is recorded, and again with edges; raises StackError if the answers differ."""
    port, gateway_port = free_ports(2)
    config = {"method": "edge", "num_speculative_tokens": settings.k, "listen": f"127.0.0.1:{gateway_port}"}
    arguments = ["--max-model-len", "2048", "--max-num-seqs", "16", "--worker-cls", "traced_worker.TracedWorker"]
    arguments += ["--speculative-config", json.dumps({**config, "ngram": False})]
    step_trace, pass_trace, known = scratch / "steps.jsonl", scratch / "passes.jsonl", scratch / "recordings.json"
    os.environ[TRACE_VARIABLE] = str(step_trace)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    asked = prompts(MIXED, settings.requests)
    model = CACHE / MODEL_NAME
    running = start_server(model, LOGS / "server.log", port, *arguments, gateway_port=gateway_port)
    with answering(running) as server:
        psutil.Process().cpu_affinity([EDGE_CORE])
        plain = asyncio.run(ask_all(server.url, MODEL_NAME, asked, settings.tokens))
        write_recordings(known, [Recording(answer.prompt, answer.tokens) for answer in plain])
        with Relay(gateway_port, settings.rtt_ms / 1000) as relay:
            drafting = edges(settings, relay.url, known, pass_trace)
            try:
                wait_for(drafting, f"{server.gateway_url}/healthz", "edges", settings.requests)
                asyncio.run(ask_all(server.url, MODEL_NAME, asked, WARM_UP_TOKENS))
                answers = asyncio.run(ask_all(server.url, MODEL_NAME, asked, settings.tokens))
            finally:
                drafting.stop()
        if [answer.tokens for answer in answers] != [answer.tokens for answer in plain]:
            raise server.process.fail("answers with edges differ from those without")
    read = (list(map(json.loads, trace.read_text().splitlines())) for trace in (step_trace, pass_trace))
    step_lines, pass_lines = read
    return [*steps(step_lines), *passes(pass_lines)], answers


def main(
    requests: Annotated[int, typer.Option(help="At once, an edge each.", min=1)] = 4,
    rtt: Annotated[float, typer.Option(help="Round trip in ms.", min=0)] = 20.0,
    tokens: Annotated[int, typer.Option(help="Of each answer.", min=32)] = 96,
    first: Annotated[float, typer.Option(help="How often the draft is right.")] = 0.75,
    pass_ms: Annotated[float, typer.Option(help="Of an edge's forward pass.")] = 6.0,
    k: Annotated[int, typer.Option(help="Draft tokens verified for a request at most.", min=1)] = 5,
) -> None:
    """One second of a real run: while the server verifies, the edges draft."""
    settings = Settings(requests, rtt, tokens, first, pass_ms, k)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    LOGS.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            spans, answers = measure(settings, Path(scratch))
    except StackError as error:
        sys.exit(f"timeline: {error}")
    first_s = max(answer.chunks[0].at_s for answer in answers)
    num_tokens, took_s = decoding(answers)
    shown = window(spans, first_s + max(0.0, (took_s - SHOWN_S) / 2), SHOWN_S)
    verifying = [span for span in shown if span.lane == SERVER]
    drafting = [span for span in shown if span.lane != SERVER]
    figures = {
        "tokens_per_s": num_tokens / took_s,
        "server_busy": covered_s(verifying) / SHOWN_S,
        "edges_drafting": covered_s(drafting) / SHOWN_S,
        "both": overlap_s(verifying, drafting) / SHOWN_S,
    }
    path = RESULTS / "timeline.json"
    saved = {"settings": asdict(settings), **circumstances(), "figures": figures, "spans": list(map(asdict, shown))}
    path.write_text(json.dumps(saved, indent=1) + "\n")
    title = f"{requests} requests, {requests} edges {rtt:g} ms away: both at work {figures['both']:.0%} of the time"
    draw(shown, title, path.with_suffix(".svg"))
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))
    print(f"Drawn: {path.with_suffix('.svg').name}; all answers are those without edges.")


if __name__ == "__main__":
    typer.run(main)
