"""`make published`: the tables of README and docs/ that are made from files in results/.

    PYTHONPATH=examples python benchmarks/published.py [--write]

A document has each between `<!-- table: NAME -->` and `<!-- end of table -->`. Without --write it prints the documents
whose tables differ from the files (tests/test_published_figures.py checks the same).
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from evidence_figures import Interval
from harness.results import RESULTS, ROOT, markdown
from overload import simulated

BLOCK = re.compile(r"<!-- table: (?P<name>[\w-]+) -->\n(?P<table>.*?)<!-- end of table -->", re.DOTALL)
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md")
SAMPLING_COLUMNS = (
    "most probable",
    "with noise",
    "as an edge does",
    "two most probable",
    "two as an edge does",
    "optimum",
)
KINDS = ("chat", "code", "editing")
SHOWN_RTT_MS = 20.0
"""Round trip at which sampled answers are shown."""
OWN_SAMPLING = "the model's own sampling"
FIGURES = {"tokens_per_s": "tokens/s", "whole_tokens_per_s": "tokens/s with prompts", "gap_p99": "p99 between chunks"}


def sampling(pair: str) -> str:
    """Shares of the target's sampled tokens that a draft has, by temperature, over all kinds of questions."""
    rows = json.loads((RESULTS / f"sampling-drafts-{pair}.json").read_text())["rows"]
    overall: list[dict[str, Any]] = [row for row in rows if row["kind"] == "all"]
    shown = [[f"{row['temperature']:g}", *(f"{row[name]:.2f}" for name in SAMPLING_COLUMNS)] for row in overall]
    return markdown(["temperature", *SAMPLING_COLUMNS], shown)


def sampled(pair: str) -> str:
    """Tokens per second of sampled requests, times plain vLLM's, with the noise told to edges and kept from them."""
    cells = json.loads((RESULTS / f"sampling-{pair}.json").read_text())["cells"]
    shown = []
    for cell in cells:
        if cell["temperature"]:
            counts = cell["by_kind"]
            way = "told" if cell["arm"] == "ahead" else "not told"
            times = [counts[kind]["times"][0] for kind in KINDS]
            per_step = counts["all"]["tokens_per_step"]
            shown.append(
                [f"{cell['temperature']:g}", way, *(f"{each:.2f}" for each in (*times, cell["mean"][0], per_step))]
            )
    return markdown(["temperature", "noise", *KINDS, "mean", "tokens a step"], shown)


def real_pair(pair: str) -> str:
    """Tokens per second with an edge, times plain vLLM's, by round trip and kind of question."""
    cells = json.loads((RESULTS / f"pair-{pair}.json").read_text())["cells"]
    shown = []
    for cell in cells:
        rtt_ms, temperature = cell["rtt_ms"], cell["temperature"]
        if not temperature or rtt_ms == SHOWN_RTT_MS:
            load = f"{rtt_ms:g} ms" + (f", at temperature {temperature:g}" if temperature else "")
            times = [f"{cell['by_kind'][kind]['times'][0]:.2f}" for kind in KINDS]
            shown.append([load, *times, f"**{cell['mean'][0]:.2f}**"])
    return markdown(["round trip between edge and server", *KINDS, "mean"], shown)


# -- make evidence, make bench-overload ----------------------------------------------------------------------------


def evidence(pair: str) -> str:
    """Tokens per second of a streaming request, times plain vLLM's in the same start: loads by places."""
    cells = _cells(pair)
    places = list(dict.fromkeys(cell["arm"] for cell in cells))
    shown = []
    for load in dict.fromkeys(map(_load, cells)):
        of_load = {cell["arm"]: _over_starts(Interval(*cell["tokens_per_s"])) for cell in cells if _load(cell) == load}
        shown.append([load, *(of_load.get(place, "") for place in places)])
    return markdown(["requests", *places], shown)


def goals(pair: str) -> str:
    """Each goal with its figure, its interval over starts and its verdict."""
    shown = []
    for cell in _cells(pair):
        for goal, verdict in cell["verdicts"].items():
            figure, bound = goal.split(" ", 1)
            shown.append([cell["arm"], _load(cell), FIGURES[figure], bound, str(Interval(*cell[figure])), verdict])
    return markdown(["place", "requests", "times plain vLLM's", "goal", "measured", "verdict"], shown)


def cost(pair: str) -> str:
    """Tokens per second of the server's cores, the edges' time for a token, and requests served in time."""
    shown = []
    for cell in _cells(pair):
        own_ms, plain_ms = cell["server_ms_a_token"], cell["plain_server_ms_a_token"]
        has_draft_model = cell["arm"].startswith("edge, ")  # the other edges replay their drafts
        shown.append(
            [
                cell["arm"],
                _load(cell),
                f"{1000 / own_ms:.1f} ({1000 / plain_ms:.1f})",
                f"{plain_ms / own_ms:.2f}",
                f"{cell['edge_ms_a_token']:.0f}" if has_draft_model else "",
                f"{cell['served_in_time']:.0%} ({cell['plain_served_in_time']:.0%})",
            ]
        )
    per_second = "tokens per core-second of the server (plain vLLM's)"
    return markdown(["place", "requests", per_second, "times", "edges' core, ms a token", "in time (plain)"], shown)


def _over_starts(measured: Interval) -> str:
    """One start has no interval."""
    return str(measured) if measured.num_starts > 1 else f"{measured.median:.2f}"


def _cells(pair: str) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads((RESULTS / f"evidence-{pair}.json").read_text())["cells"]
    return cells


def _load(cell: dict[str, Any]) -> str:
    how_many = f"{cell['rate']:g} of capacity" if cell["rate"] else str(cell["requests"])
    temperature = cell["temperature"]
    sampling = OWN_SAMPLING if temperature is None else "greedy" if temperature == 0 else f"T {temperature:g}"
    return f"{how_many}, {sampling}"


def overload(kind: str) -> str:
    """Goodput of a real server under arrivals of one kind: requests a second in time, and their share by class."""
    runs = [json.loads((RESULTS / name).read_text()) for name in ("overload.json", "overload-adaptive.json")]
    cells = [cell for run in runs for cell in run["cells"] if cell["kind"] == kind]
    loads = dict.fromkeys(cell["times"] for cell in cells)
    shown = [
        [arm, *(_goodput(cell) for cell in cells if cell["arm"] == arm)]
        for arm in dict.fromkeys(cell["arm"] for cell in cells)
    ]
    return markdown([f"{kind} arrivals", *(f"{each:g} times" for each in loads)], shown)


def _goodput(cell: dict[str, Any]) -> str:
    shares = ", ".join(f"{share:.2f}" for share in cell["met"].values())
    other = simulated(cell["arm"], cell["simulated_per_s"], cell["simulated_range"])
    return f"{cell['goodput_per_s']:.2f} ({shares}) {other}"


# -- into the documents --------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[], str]] = {
    "pair-qwen": lambda: real_pair("qwen"),
    "sampling-smollm2": lambda: sampling("smollm2"),
    "sampling-qwen": lambda: sampling("qwen"),
    "sampled-qwen": lambda: sampled("qwen"),
    "evidence-smollm2": lambda: evidence("smollm2"),
    "goals-smollm2": lambda: goals("smollm2"),
    "evidence-qwen": lambda: evidence("qwen"),
    "goals-qwen": lambda: goals("qwen"),
    "cost-smollm2": lambda: cost("smollm2"),
    "cost-qwen": lambda: cost("qwen"),
    "overload-poisson": lambda: overload("poisson"),
    "overload-bursty": lambda: overload("bursty"),
}


def filled(text: str) -> str:
    """A document with its tables regenerated from the files. Raises KeyError for an unknown table."""
    return BLOCK.sub(
        lambda block: f"<!-- table: {block['name']} -->\n\n{TABLES[block['name']]()}\n\n<!-- end of table -->", text
    )


def unlike(document: Path, should_write: bool) -> bool:
    """Whether a document's tables differed from the files."""
    text = document.read_text()
    made = filled(text)
    if made != text and should_write:
        document.write_text(made)
    return made != text


def main(
    write: Annotated[bool, typer.Option("--write", help="Write them into the documents.")] = False,
) -> None:
    """The tables of README and docs/ that are made from files in results/."""
    found = [str(document.relative_to(ROOT)) for document in DOCUMENTS if unlike(document, write)]
    print(("Written: " if write else "Different from the files: ") + (", ".join(found) or "none"))
    sys.exit(1 if found and not write else 0)


if __name__ == "__main__":
    typer.run(main)
