"""Draw the result of a demo: python benchmarks/demo_picture.py RESULTS.json PICTURE.svg

`make demo` writes RESULTS.json (.cache/demo.json), which is the last line that it prints. `make picture` draws the
README's picture from benchmarks/results/demo.json.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer
from matplotlib.figure import Figure
from pairs import PAIRS

PLAIN, EDGE = "#8a8a8a", "#2e8b57"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "demo", "font.family": "sans-serif", "font.size": 11}
"""Text stays text, so that it can be searched, read aloud, and compared by a test. Equal numbers give equal files."""


def bars(results: dict[str, Any]) -> dict[str, float]:
    """The bars from top to bottom: speedup over plain vLLM."""
    return {"plain vLLM": 1.0, **results["by_kind"], "all": results["speedup"]}


def draw(results: dict[str, Any], picture: Path) -> None:
    """Draw one bar per kind of question, and plain vLLM's; on white, for light and dark pages."""
    shown = bars(results)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.9), layout="constrained", facecolor="white")
        axes = figure.subplots()
        colours = [PLAIN if name == "plain vLLM" else EDGE for name in shown]
        drawn = axes.barh(list(shown), list(shown.values()), color=colours)
        axes.bar_label(drawn, fmt="%.2f", padding=4)
        axes.invert_yaxis()
        axes.axvline(1.0, color=PLAIN, linewidth=0.8)
        axes.set_xlim(right=1.12 * max(shown.values()))
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("times plain vLLM's tokens per second, one request at a time, two CPU cores")
        same = ", every token the same" if results["identical"] else ""
        rates = f"{results['tokens_per_s_plain']:.1f} to {results['tokens_per_s_edge']:.1f} tokens/s"
        title = f"{PAIRS[results['pair']].title}\nmake demo, {results['dtype']}: {rates}{same}"
        axes.set_title(title, loc="left", size=11)
        figure.savefig(picture, metadata={"Date": None})


def main(
    results: Annotated[Path, typer.Argument(help="The results file of `make demo`.")],
    picture: Annotated[Path, typer.Argument(help="The SVG file to write.")],
) -> None:
    """Draw a demo's result."""
    draw(json.loads(results.read_text()), picture)


if __name__ == "__main__":
    typer.run(main)
