"""`make bench-timeline`: one second of a real run as a drawing: while the server verifies, the edges draft.

    PYTHONPATH=examples python benchmarks/timeline.py [--requests 4] [--rtt 20]

A real `vllm serve` whose worker records its steps (traced_worker.py), and real edge clients behind a relay that record
their forward passes (replay.py --trace; a replayed draft, as two cores have no room for more draft models). All times
are from the machine's monotonic clock. Writes benchmarks/results/timeline.json and .svg, and prints the share of the
time in which both worked.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from harness import results
from harness.edges import REPLAY, drafting, flags
from harness.load import MIXED, Answer, decoding, prompts
from harness.results import circumstances, output_path
from harness.runs import differences
from harness.servers import edge, launch, stand_aside, story
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from spans import DRAFTING, PLAIN, SERVER, VERIFYING, Span, covered_s, overlap_s, passes, steps, window
from traced_worker import TRACE_VARIABLE

LOGS = results.LOGS / "timeline"
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


def measure(settings: Settings, scratch: Path) -> tuple[list[Span], list[Answer]]:
    """Record the answers without edges, then ask again with edges; raises StackError if the answers differ."""
    step_trace, pass_trace, known = scratch / "steps.jsonl", scratch / "passes.jsonl", scratch / "recordings.json"
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {TRACE_VARIABLE: str(step_trace), "PYTHONPATH": os.pathsep.join(paths)}
    options = flags(recordings=known, first=settings.first, pass_ms=settings.pass_ms, max_requests=1)
    options += flags(edges=settings.requests, trace=pass_trace)
    asked = prompts(MIXED, settings.requests)
    with story("timeline") as stack:
        worker = ("--worker-cls", "traced_worker.TracedWorker")
        configs = {"server": edge(settings.k, ngram=False)}
        target = launch(configs, LOGS, stack, *worker, max_seqs=16, kv_bytes=2 << 30, env=env)["server"]
        stand_aside()
        plain = target.record(asked, settings.tokens, known)
        log = LOGS / "edges.log"
        with drafting(target.server, settings.rtt_ms, REPLAY, options, log, settings.requests):
            target.ask(asked, WARM_UP_TOKENS)
            answers = target.ask(asked, settings.tokens)
        if differences(plain, answers):
            raise target.server.process.fail("answers with edges differ from those without")
    step_lines, pass_lines = ([json.loads(line) for line in file.open()] for file in (step_trace, pass_trace))
    return [*steps(step_lines), *passes(pass_lines)], answers


def main(
    requests: Annotated[int, typer.Option(help="Concurrent requests, with an edge each.", min=1)] = 4,
    rtt: Annotated[float, typer.Option(help="Round trip in ms.", min=0)] = 20.0,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=32)] = 96,
    first: Annotated[float, typer.Option(help="How often the draft is right.")] = 0.75,
    pass_ms: Annotated[float, typer.Option(help="Time of an edge's forward pass.")] = 6.0,
    k: Annotated[int, typer.Option(help="Most draft tokens verified per request.", min=1)] = 5,
    output: Annotated[Path | None, typer.Option(help="Default: benchmarks/results/timeline.json.")] = None,
) -> None:
    """Draw one second of a real run: while the server verifies, the edges draft."""
    settings = Settings(requests, rtt, tokens, first, pass_ms, k)
    with tempfile.TemporaryDirectory() as scratch:
        spans, answers = measure(settings, Path(scratch))
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
    path = output_path("timeline.json", output)
    saved = {"settings": asdict(settings), **circumstances(), "figures": figures, "spans": list(map(asdict, shown))}
    path.write_text(json.dumps(saved, indent=1) + "\n")
    title = f"{requests} requests, {requests} edges {rtt:g} ms away: both at work {figures['both']:.0%} of the time"
    draw(shown, title, path.with_suffix(".svg"))
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))
    print(f"Drawn: {path.with_suffix('.svg').name}; all answers are the same as without edges.")


if __name__ == "__main__":
    typer.run(main)
