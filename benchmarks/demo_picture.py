"""The picture of a demo's result: python benchmarks/demo_picture.py RESULTS.json PICTURE.svg

`make demo` writes RESULTS.json (.cache/demo.json): the last line that it prints. The README's picture is of
benchmarks/results/demo.json, by `make picture`.
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
"""Text as text: it is searched, read aloud, and compared by a test. The same file for the same numbers."""


def bars(results: dict[str, Any]) -> dict[str, float]:
    """What is drawn, from top to bottom: times plain vLLM."""
    return {"plain vLLM": 1.0, **results["by_kind"], "all": results["speedup"]}


def draw(results: dict[str, Any], picture: Path) -> None:
    """One bar a kind of question, beside plain vLLM's; white behind it, for pages of either scheme."""
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
    results: Annotated[Path, typer.Argument(help="What `make demo` wrote.")],
    picture: Annotated[Path, typer.Argument(help="The SVG file to write.")],
) -> None:
    """Draw a demo's result."""
    draw(json.loads(results.read_text()), picture)


if __name__ == "__main__":
    typer.run(main)
