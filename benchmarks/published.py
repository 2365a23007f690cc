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
from harness.results import RESULTS, ROOT, markdown

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


def sampling(pair: str) -> str:
    """Shares of the target's sampled tokens that a draft has, by temperature, over all kinds of questions."""
    rows = json.loads((RESULTS / f"sampling-drafts-{pair}.json").read_text())["rows"]
    overall: list[dict[str, Any]] = [row for row in rows if row["kind"] == "all"]
    shown = [[f"{row['temperature']:g}", *(f"{row[name]:.2f}" for name in SAMPLING_COLUMNS)] for row in overall]
    return markdown(["temperature", *SAMPLING_COLUMNS], shown)


# -- into the documents --------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[], str]] = {
    "sampling-smollm2": lambda: sampling("smollm2"),
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
