"""Compare the simulation with a measurement: simulate each cell of a results file of `grid.py`.

    python benchmarks/compare_simulation.py benchmarks/results/never-slower.json --max-edges 8

The server's step times are fitted to those in the file (`server_model.rows`: requests, tokens, seconds, 1 if drafts
were verified). Cells have requests, rtt_ms, edge, tokens_per_s and vanilla_tokens_per_s, and are simulated as they are
measured, in rounds of answers that start together. Draft length, forward pass, accuracy and answer lengths are taken
from the file if it has them. Exits with status 1 if a cell differs by more than 15 %.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from harness.results import Column, table
from scipy.optimize import nnls

from vllm_specedge.policy.step_cost import KNOTS
from vllm_specedge.simulation.models import FittedServer
from vllm_specedge.simulation.report import EDGES, plain, tokens_each, with_edge
from vllm_specedge.simulation.run import simulate
from vllm_specedge.simulation.scenario import Scenario

MAX_DIFFERENCE = 0.15
MIN_ROUNDS = 4
"""Least number of rounds of answers that start together; the first one is not measured."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One cell of a results file, in tokens per second."""

    requests: int
    rtt_s: float
    edge: str
    measured: float
    measured_plain: float
    simulated: float
    simulated_plain: float

    @property
    def difference(self) -> float:
        """Difference of the simulation from the measurement, relative to the measurement."""
        return self.simulated / self.measured - 1.0

    @property
    def is_far(self) -> bool:
        return abs(self.difference) > MAX_DIFFERENCE


def _compared(scenario: Scenario, values: Mapping[str, Any], cell: Mapping[str, Any]) -> Comparison:
    requests, rtt_ms, edge = cell["requests"], cell["rtt_ms"], cell.get("edge", EDGES[0])
    load = _as_measured(replace(scenario, requests=requests, rtt_s=rtt_ms / 1e3), values)
    drafted = with_edge(load, edge)
    accuracy = values.get("edges", {}).get("accuracy", {}).get(edge)
    if accuracy is not None:
        model = replace(drafted.edge, acceptance=accuracy["first"], branch=accuracy["second"])
        drafted = replace(drafted, edge=model)
    return Comparison(
        requests,
        load.rtt_s,
        edge,
        # Includes the time of prompts and of the last answers, as in the simulation.
        measured=cell.get("whole_tokens_per_s", cell["tokens_per_s"]),
        measured_plain=cell.get("vanilla_whole_tokens_per_s", cell["vanilla_tokens_per_s"]),
        simulated=simulate(drafted).tokens_per_s,
        simulated_plain=plain(load).tokens_per_s,
    )


def _as_measured(scenario: Scenario, values: Mapping[str, Any]) -> Scenario:
    """The scenario as benchmarks/grid.py measures it: answers of the same length that start together."""
    settings = values.get("settings", {})
    answers = [run["num_tokens"] for run in values.get("runs", ()) if run["requests"] == scenario.requests]
    num_tokens = answers[0] // scenario.requests if answers else scenario.output_tokens
    rounds = max(MIN_ROUNDS, ceil(tokens_each(scenario.requests) / num_tokens))
    return replace(
        scenario,
        spec_tokens=settings.get("k", scenario.spec_tokens),
        edge=replace(scenario.edge, pass_s=settings.get("pass_ms", 1e3 * scenario.edge.pass_s) / 1e3),
        prompt_tokens=values.get("prompt_tokens", scenario.prompt_tokens),
        output_tokens=num_tokens,
        tokens=rounds * num_tokens,
        warm_up=1 / rounds,
        is_in_step=True,
    )


COLUMNS = (
    Column("requests", lambda each: each.requests),
    Column("RTT ms", lambda each: each.rtt_s * 1e3, "g"),
    Column("edges", lambda each: each.edge),
    Column("measured tok/s", lambda each: each.measured, ".1f"),
    Column("simulated tok/s", lambda each: each.simulated, ".1f"),
    Column("difference", lambda each: each.difference, "+.0%"),
    Column("measured plain", lambda each: each.measured_plain, ".1f"),
    Column("simulated plain", lambda each: each.simulated_plain, ".1f"),
    Column("", lambda each: "far" if each.is_far else ""),
)


def fitted(rows: Sequence[Sequence[float]]) -> FittedServer:
    """A server fitted to rows of requests, tokens, seconds, and 1 if draft tokens were among them, else 0.

    Least squares of the relative errors; more tokens and more requests never take less time.
    """
    if not rows or any(len(row) != 4 or min(row[:3]) <= 0 or row[3] not in (0, 1) for row in rows):
        raise ValueError("rows must have requests, tokens, seconds (all positive), and 0 or 1")
    smallest, largest = min(row[1] for row in rows), max(row[1] for row in rows)
    knots = [knot for knot in KNOTS if smallest / 2 < knot < largest] or [int(smallest)]
    features = [[1.0, each[0], each[0] * each[3], *_climbed(knots, each[1])] for each in rows]
    relative = [[each / row[2] for each in one] for one, row in zip(features, rows, strict=True)]
    weights, _ = nnls(np.array(relative), np.ones(len(rows)))
    base_s, request_s, verifying_s, *slopes = map(float, weights)
    seconds = [base_s]
    for index in range(1, len(knots)):
        seconds.append(seconds[-1] + slopes[index - 1] * (knots[index] - knots[index - 1]))
    return FittedServer(tuple(knots), tuple(seconds), slopes[-1], request_s, verifying_s)


def _climbed(knots: Sequence[int], tokens: float) -> list[float]:
    """Number of tokens past each knot, up to the next one."""
    ends = [*knots[1:], inf]
    return [min(max(0.0, tokens - knot), end - knot) for knot, end in zip(knots, ends, strict=True)]


def main(
    results_file: Annotated[Path, typer.Argument(help="A results file of benchmarks/grid.py.")],
    prompt_tokens: Annotated[int, typer.Option(help="Prompt tokens of a request, if not in the file.", min=2)] = 64,
    output_tokens: Annotated[int, typer.Option(help="Tokens of an answer, if not in the file.", min=1)] = 256,
    max_edges: Annotated[int, typer.Option(help="Most edges; they share the requests.", min=1)] = 1 << 20,
) -> None:
    """Simulate the measured cells, and print both results."""
    try:
        values = json.loads(results_file.read_text())
        server = fitted(values["server_model"]["rows"])
        base = Scenario(server=server, prompt_tokens=prompt_tokens, output_tokens=output_tokens, max_edges=max_edges)
        compared = [_compared(base, values, cell) for cell in values["cells"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"compare_simulation: {results_file} cannot be read, or is not a results file of grid.py: {error!r}")
    print(table(COLUMNS, compared))
    sys.exit(any(each.is_far for each in compared))


if __name__ == "__main__":
    typer.run(main)
