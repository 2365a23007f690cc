"""Figures in README and docs/results.md are those of the files in benchmarks/results/."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks import demo_picture, published
from benchmarks.evidence_figures import summarise
from benchmarks.harness.results import Kept
from benchmarks.overload import AGREEMENT, HELD, Cell

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NUMBERS = ("no", "one", "two", "three", "four", "five")
README, PAGE, DEMO = ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "demo.md"


def cells(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / name).read_text())["cells"]
    return found


def row(document: Path, begin: str) -> list[float]:
    """The numbers in the only row of a table that begins with `begin`."""
    (cells_of_row,) = re.findall(rf"^\| {re.escape(begin)} \|(.+)\|$", document.read_text(), re.MULTILINE)
    return [float(cell.strip(" *")) for cell in cells_of_row.split("|")]


@pytest.mark.parametrize("document", [README, PAGE], ids=["README", "results"])
@pytest.mark.parametrize(
    ("begin", "rtt_ms", "temperature"),
    [("0 ms", 0, 0), ("20 ms", 20, 0), ("80 ms", 80, 0), ("20 ms, at temperature 0.7", 20, 0.7)],
)
def test_a_real_pair(document: Path, begin: str, rtt_ms: float, temperature: float) -> None:
    (cell,) = [
        cell for cell in cells("pair-qwen.json") if (cell["rtt_ms"], cell["temperature"]) == (rtt_ms, temperature)
    ]
    medians = [cell["by_kind"][kind]["times"][0] for kind in ("chat", "code", "editing")]
    assert row(document, begin) == [round(each, 2) for each in (*medians, cell["mean"][0])]


@pytest.mark.parametrize(
    ("begin", "arm"),
    [
        ("draft, wait, verify (as the paper does)", "chain-and-wait"),
        ("drafting ahead, with branches, and the server's own lookup", "ngram"),
    ],
)
def test_drafting_ahead(begin: str, arm: str) -> None:
    measured = [cell["ratio"] for cell in cells("ahead.json") if cell["arm"] == arm]
    assert row(PAGE, begin) == [round(each, 2) for each in measured]


@pytest.mark.parametrize("edge", ["good", "poor"])
def test_never_slower(edge: str) -> None:
    both = [*cells("never-slower.json"), *cells("never-slower-16-32.json")]  # later ones replace earlier ones
    measured = {cell["requests"]: cell["ratio"] for cell in both if (cell["rtt_ms"], cell["edge"]) == (20, edge)}
    assert row(PAGE, f"{edge} edges") == [round(measured[requests], 2) for requests in (1, 4, 8, 16, 32)]


def test_where_it_was_slower_is_said() -> None:
    ratios = [round(cell["ratio"], 2) for cell in cells("never-slower-16-32.json")]
    num_good = sum(ratio >= 0.97 for ratio in ratios)
    for document in (README, PAGE):
        assert f"{min(ratios):.2f} to {max(ratios):.2f}" in document.read_text()
    assert f"in {num_good} of {len(ratios)} cells" in " ".join(PAGE.read_text().split())


def test_the_demo_s_last_line_and_picture(tmp_path: Path) -> None:
    results = json.loads((RESULTS / "demo.json").read_text())
    (line,) = re.findall(r"^```json\n(.+)\n```$", DEMO.read_text(), re.MULTILINE)
    assert json.loads(line) == results
    demo_picture.draw(results, tmp_path / "demo.svg")
    drawn = [said_in(path) for path in (tmp_path / "demo.svg", ROOT / "docs" / "demo.svg")]
    assert drawn[0] == drawn[1]
    assert {f"{times:.2f}" for times in demo_picture.bars(results).values()} <= set(drawn[1])


def said_in(picture: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", picture.read_text())


@pytest.mark.parametrize(
    ("begin", "requests", "kind", "temperature"),
    [
        ("1 request, mixed prompts", 1, "mixed", 0.0),
        ("4 requests, mixed prompts", 4, "mixed", 0.0),
        ("4 requests, rewriting a text", 4, "rewrite", 0.0),
        ("1 request, temperature 0.7", 1, "mixed", 0.7),
    ],
)
def test_against_vllm_s_own_methods(begin: str, requests: int, kind: str, temperature: float) -> None:
    runs = [
        run
        for run in json.loads((RESULTS / "bench.json").read_text())["runs"]
        if (run["requests"], run["kind"], run["temperature"]) == (requests, kind, temperature)
    ]

    def times(arm: str, rtt_ms: float | None) -> list[float]:
        """Ratio of each repeat."""
        rate = {run["repeat"]: run["tokens_per_s"] for run in runs if (run["arm"], run["rtt_ms"]) == (arm, rtt_ms)}
        plain = {run["repeat"]: run["tokens_per_s"] for run in runs if run["arm"] == "vanilla"}
        return [rate[repeat] / plain[repeat] for repeat in sorted(rate)]

    def shown(arm: str, rtt_ms: float | None = None) -> str:
        return f"{statistics.median(times(arm, rtt_ms)):.2f}"

    def with_range(rtt_ms: float) -> str:
        found = times("edge", rtt_ms)
        return f"{shown('edge', rtt_ms)} ({min(found):.2f}..{max(found):.2f})"

    (line,) = re.findall(rf"^\| {re.escape(begin)} \|(.+)\|$", PAGE.read_text(), re.MULTILINE)
    assert [cell.replace("*", "").strip() for cell in line.split("|")] == [
        shown("ngram"),
        shown("draft_model"),
        f"{shown('wait', 5.0)} / {shown('wait', 80.0)}",
        with_range(5.0),
        with_range(80.0),
    ]


def test_how_two_machines_differ_with_the_qwen_pair() -> None:
    path = RESULTS / "evidence-qwen.json"
    kept = Kept.load(path, json.loads(path.read_text())["settings"], is_resumed=True)
    found: dict[tuple[float | None, str], list[float]] = {}
    for number, session in enumerate(kept.sessions):
        for cell in summarise([run for run in kept.runs if run.session == number], "qwen"):
            if cell["arm"].startswith("edge elsewhere") and cell["requests"] == 4:
                key = cell["temperature"], "EPYC" if "EPYC" in session["hardware"] else "Xeon"
                found.setdefault(key, []).append(cell["tokens_per_s"].median)
    one, four = NUMBERS[len(found[0.0, "EPYC"])], NUMBERS[len(found[0.0, "Xeon"])]

    def on_both(temperature: float | None) -> str:
        (first,), other = found[temperature, "EPYC"], found[temperature, "Xeon"]
        return f"{first:.2f} and {statistics.median(other):.2f} ({min(other):.2f} to {max(other):.2f})"

    page = " ".join(PAGE.read_text().split())
    assert f"{one} on an AMD EPYC with AVX-512, {four} on an Intel Xeon with AMX" in page
    assert f"brought {on_both(0.0)} greedy, and {on_both(None)} with sampling" in page


def test_goodput_under_overload() -> None:
    """The sentences beside the tables."""
    found = {(each["kind"], each["arm"], each["times"]): each for each in cells("overload.json")}
    page = " ".join(PAGE.read_text().split())

    def times(kind: str, load: float, other: tuple[str, float]) -> float:
        """Goodput of the cost model relative to another cell's."""
        return float(found[kind, "cost model", load]["goodput_per_s"] / found[kind, *other]["goodput_per_s"])

    at_capacity = [times(kind, load, ("cost model", 1)) for kind in ("poisson", "bursty") for load in (2, 3)]
    kept = (
        "it keeps {:.2f} and {:.2f} times the goodput at capacity in Poisson arrivals, and {:.2f} and {:.2f} in bursts"
    )
    assert kept.format(*at_capacity) in page
    assert min(at_capacity) >= 0.9
    against = [times("poisson", load, ("queue time", load)) for load in (2, 3)]
    assert (
        "Against queue time it is {:.2f} and {:.2f} times (goal 1.8). That goal is out of reach".format(*against)
        in page
    )
    most = max(each["goodput_per_s"] for each in found.values())
    assert all(1.8 * found["poisson", "queue time", load]["goodput_per_s"] > most for load in (2, 3)), "out of reach"
    assert not any(found["bursty", "queue time", load]["goodput_per_s"] for load in (2, 3)), "serves nothing in time"
    gold = [found["poisson", arm, load]["met"]["gold"] for arm in ("cost model", "fixed") for load in (2, 3)]
    served = "it serves {:.2f} and {:.2f} of the gold requests in time, where a fixed limit serves {:.2f} and {:.2f}"
    assert served.format(*gold) in page
    held = [Cell(**each).off for each in found.values() if each["arm"] in HELD]
    assert f"within {100 * max(held):.0f} % in all {len(held)} cells (goal 15 %)" in page
    assert max(held) <= AGREEMENT


def test_where_the_simulator_of_overload_is_off() -> None:
    page = " ".join(PAGE.read_text().split())
    every = [*cells("overload.json"), *cells("overload-adaptive.json")]
    found = [Cell(**each) for each in every if each["arm"] not in HELD]
    off = [each.off for each in found if each.off > AGREEMENT]
    assert len(off) == 1
    within = f"within 15 % of that range in {len(found) - len(off)} of {len(found)} cells, and {100 * off[0]:.0f} % off"
    assert within in page
    (none,) = [each for each in found if (each.kind, each.arm, each.times) == ("poisson", "none", 2)]
    assert "for *none* at twice the capacity it gives {:.2f} to {:.2f} requests".format(*none.simulated_range) in page
    capacities = [each["capacity_per_s"] for each in cells("overload.json")]
    assert f"its capacity was {min(capacities):.1f} to {max(capacities):.1f} requests a second" in page


def test_goodput_with_an_adaptive_rate() -> None:
    found = {(each["kind"], each["times"]): each for each in cells("overload-adaptive.json")}
    served = [found[kind, load]["goodput_per_s"] for kind in ("poisson", "bursty") for load in (2, 3)]
    page = " ".join(PAGE.read_text().split())
    sentence = (
        "it serves {:.2f} and {:.2f} requests a second in time in Poisson arrivals, and {:.2f} and {:.2f} in bursts"
    )
    assert sentence.format(*served) in page
    means = [each for each in cells("overload-runs.json") if each["arm"] == "adaptive"]
    off = max(abs(each["simulated_per_s"] / each["goodput_per_s"] - 1.0) for each in means)
    assert (
        f"with means of two runs at twice the capacity (`overload-runs.json`) the simulator is within {100 * off:.0f} %"
        in page
    )
    assert {(len(each["runs"]), each["times"]) for each in means} == {(2, 2)}


def test_where_a_draft_beside_the_server_made_it_slower_is_said() -> None:
    (cell,) = [
        each
        for each in cells("evidence-smollm2.json")
        if (each["arm"], each["requests"], each["temperature"]) == ("edge, 20 ms", 4, None)
    ]
    assert cell["verdicts"]["tokens_per_s >= 0.97"] == "missed"
    assert f"**slower than plain vLLM** ({cell['tokens_per_s'][0]:.2f}; the goal is 0.97)" in PAGE.read_text()


def test_tables_that_a_command_makes_are_what_the_files_say() -> None:
    """`make published`."""
    assert [str(document) for document in published.DOCUMENTS if published.unlike(document, should_write=False)] == []


def test_every_table_that_a_command_makes_is_in_a_document_and_another_figure_is_noticed() -> None:
    texts = [document.read_text() for document in published.DOCUMENTS]
    assert {found["name"] for text in texts for found in published.BLOCK.finditer(text)} == published.TABLES.keys()
    page = PAGE.read_text()
    begin = page.index("<!-- table: ")
    figure = re.search(r"0\.\d\d", page[begin:])
    assert figure is not None
    wrong = page[:begin] + page[begin:].replace(figure[0], "0.99", 1)
    assert published.filled(wrong) == page
