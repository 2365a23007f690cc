"""`make published`: the tables of README and docs/ that are made from files in results/.

    python benchmarks/published.py [--write]

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
from evidence_figures import RATE, Interval
from harness.results import RESULTS, ROOT, markdown

BLOCK = re.compile(r"<!-- table: (?P<name>[\w-]+) -->\n(?P<table>.*?)<!-- end of table -->", re.DOTALL)
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md")
PLACES = ("no edges", "poor", "stalling", "dead", "ngram", "draft_model", "waiting", "good", "edge")
"""Prefixes of column names, in the order of the columns."""


def evidence(pair: str) -> str:
    """Tokens per second relative to plain vLLM, by load and place: medians over starts, with intervals."""
    cells: list[dict[str, Any]] = json.loads((RESULTS / f"evidence-{pair}.json").read_text())["cells"]
    arms = list(dict.fromkeys(cell["arm"] for cell in sorted(cells, key=lambda cell: _order(cell["arm"]))))
    by_place = {(_load(cell), cell["arm"]): Interval(*cell[RATE]) for cell in cells}
    loads = list(dict.fromkeys(load for load, _ in by_place))
    return markdown(["", *arms], [[load, *(_shown(by_place.get((load, arm))) for arm in arms)] for load in loads])


def _order(arm: str) -> int:
    return next(index for index, begin in enumerate(PLACES) if arm.startswith(begin))


def _load(cell: dict[str, Any]) -> str:
    sampling = "the model's sampling" if cell["temperature"] is None else "greedy"
    requests = "1 request" if cell["requests"] == 1 else f"{cell['requests']} requests"
    return f"{cell['rate']:g} of capacity, {sampling}" if cell["rate"] else f"{requests}, {sampling}"


def _shown(measured: Interval | None) -> str:
    return "-" if measured is None else str(measured)


# -- into the documents --------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[], str]] = {
    "evidence-smollm2": lambda: evidence("smollm2"),
    "evidence-qwen": lambda: evidence("qwen"),
}


def filled(text: str) -> str:
    """A document with its tables regenerated from the files. Raises KeyError for an unknown table."""
    return BLOCK.sub(
        lambda block: f"<!-- table: {block['name']} -->\n{TABLES[block['name']]()}\n<!-- end of table -->", text
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
