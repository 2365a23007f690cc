"""The output of `vllm-specedge simulate`: tables and curves."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from vllm_specedge.errors import UserError
from vllm_specedge.estimators import crossing
from vllm_specedge.policy.situation import MODES, HoldLimits
from vllm_specedge.simulation.models import in_server_gain
from vllm_specedge.simulation.run import simulate
from vllm_specedge.simulation.scenario import Outcome, Scenario

AUTO, NO_BRANCHES, ORACLE = "auto", ", no branches", "oracle"
MIN_TOKENS, TOTAL_TOKENS = 100, 4000
"""Minimum tokens of each client, and of all together; random variation is then a few percent."""
HELPS, LOSES = 1.02, 0.98
"""Ratios of tokens per second between these count as no difference."""
MAX_RTT_S, HALVINGS = 0.512, 8
WAIT_S = 1.0
"""Hold limit in mode `wait`: long enough that it always waits for the draft."""
POOR_ACCEPTANCE = 0.3
EDGES = ("good", "poor", "stalling", "dead", "half")
"""Kinds of edges in a results file: as given; seldom right; stalling now and then; silent after a while; as given, but
for half of the requests."""


@dataclass(frozen=True, slots=True)
class Asked:
    requests: Sequence[float]
    rtts_ms: Sequence[float]
    edge: str
    """One of EDGES."""
    has_all_modes: bool
    has_oracle: bool
    has_break_even: bool


@dataclass(frozen=True, slots=True)
class Cell:
    """One load and RTT: plain decoding, and each arm."""

    scenario: Scenario
    plain: Outcome
    arms: Mapping[str, Outcome]

    def ratio(self, arm: str = AUTO) -> float:
        return self.arms[arm].tokens_per_s / self.plain.tokens_per_s

    @property
    def in_server(self) -> float | None:
        """The ratio of in-server drafting; None: not known."""
        scenario = self.scenario
        return in_server_gain(scenario.server, scenario.requests, scenario.spec_tokens, scenario.edge.acceptance)

    @property
    def verdict(self) -> str:
        ratio = self.ratio()
        return "helps" if ratio >= HELPS else "loses" if ratio <= LOSES else "no difference"


def tokens_each(requests: int) -> int:
    """Tokens of each client, enough to make random variation small."""
    return max(MIN_TOKENS, TOTAL_TOKENS // requests)


def arms(scenario: Scenario, has_all_modes: bool, has_oracle: bool) -> dict[str, Scenario]:
    """The scenarios to compare with plain decoding, by name."""
    chosen = {AUTO: scenario}
    if has_all_modes:
        without = replace(scenario, edge=replace(scenario.edge, max_width=1))
        chosen |= {mode: _in_mode(scenario, mode) for mode in MODES}
        chosen |= {mode + NO_BRANCHES: _in_mode(without, mode) for mode in MODES}
    if has_oracle:
        chosen[ORACLE] = replace(scenario, is_oracle=True)
    return chosen


def _in_mode(scenario: Scenario, mode: str) -> Scenario:
    limit_s = WAIT_S if mode == "wait" else scenario.limits.hold_limit_s
    return replace(scenario, limits=HoldLimits(limit_s, mode))


def plain(scenario: Scenario) -> Outcome:
    return simulate(replace(scenario, share=0.0, is_oracle=False))


def cell(scenario: Scenario, has_all_modes: bool = False, has_oracle: bool = False) -> Cell:
    chosen = arms(scenario, has_all_modes, has_oracle)
    return Cell(scenario, plain(scenario), {name: simulate(each) for name, each in chosen.items()})


def break_even_s(scenario: Scenario) -> float:
    """The RTT from which on edges make no difference; 0: they help at none; inf: they help up to MAX_RTT_S."""
    plain_per_s = plain(scenario).tokens_per_s

    def helps(rtt_s: float) -> bool:
        return simulate(replace(scenario, rtt_s=rtt_s)).tokens_per_s >= HELPS * plain_per_s

    if not helps(0.0):
        return 0.0
    if helps(MAX_RTT_S):
        return inf
    return crossing(helps, 0.0, MAX_RTT_S, HALVINGS)


def cells(base: Scenario, asked: Asked) -> list[Cell]:
    """One cell for each requested load and RTT."""
    return [
        cell(
            replace(base, requests=int(requests), rtt_s=rtt_ms / 1e3, tokens=tokens_each(int(requests))),
            asked.has_all_modes,
            asked.has_oracle,
        )
        for requests in asked.requests
        for rtt_ms in asked.rtts_ms
    ]


# -- output --------------------------------------------------------------------------------------------------------


def show(base: Scenario, asked: Asked, curve: Path | None, is_json: bool) -> int:
    """Simulate what was requested and print it. Returns the exit status."""
    if min(asked.requests) < 1:
        raise UserError("--requests takes numbers from 1 on.")
    base = with_edge(base, asked.edge)
    found = cells(base, asked)
    rtt_s = break_even_s(found[0].scenario) if asked.has_break_even else None
    if curve is not None:
        draw(found, curve)
    console = Console()
    if is_json:
        console.print_json(as_json(found, rtt_s))
        return 0
    console.print(table(found))
    if asked.has_all_modes or asked.has_oracle:
        console.print(arms_table(found))
    if rtt_s is not None:
        console.print(_break_even_text(found[0].scenario.requests, rtt_s))
    return 0


def _break_even_text(requests: int, rtt_s: float) -> str:
    load = "one request" if requests == 1 else f"{requests} requests"
    if not rtt_s:
        return f"With {load} edges make no difference at any RTT."
    if rtt_s == inf:
        return f"With {load} edges help at every RTT up to {MAX_RTT_S * 1e3:.0f} ms."
    return f"With {load} edges help up to an RTT of about {rtt_s * 1e3:.0f} ms, and make no difference beyond."


def table(cells: Sequence[Cell]) -> Table:
    """One line per cell: plain decoding, with edges, and the verdict. Fits 80 columns."""
    shown = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        caption="ITL: ms between chunks of an answer, median / p99",
    )
    titles = ("re-\nquests", "RTT\nms", "plain\ntok/s", "edges\ntok/s", "\nratio", "plain\nITL", "edges\nITL")
    for title in (*titles, "verified/\naccepted"):
        shown.add_column(title, justify="right", no_wrap=True)
    shown.add_column("\nverdict", no_wrap=True)
    for each in cells:
        edges = each.arms[AUTO]
        shown.add_row(
            str(each.scenario.requests),
            f"{each.scenario.rtt_s * 1e3:g}",
            f"{each.plain.tokens_per_s:.0f}",
            f"{edges.tokens_per_s:.0f}",
            f"{each.ratio():.2f}",
            f"{each.plain.itl_p50_s * 1e3:.0f} / {each.plain.itl_p99_s * 1e3:.0f}",
            f"{edges.itl_p50_s * 1e3:.0f} / {edges.itl_p99_s * 1e3:.0f}",
            f"{edges.verified_per_accepted:.1f}",
            each.verdict,
        )
    return shown


def arms_table(cells: Sequence[Cell]) -> Table:
    """Each arm's tokens per second relative to plain decoding, one column per cell."""
    shown = Table("plain = 1", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for each in cells:
        title = f"{each.scenario.requests} req.\n{each.scenario.rtt_s * 1e3:g} ms"
        shown.add_column(title, justify="right", no_wrap=True)
    shown.add_row("in-server", *("-" if each.in_server is None else f"{each.in_server:.2f}" for each in cells))
    for name in cells[0].arms:
        shown.add_row(name, *(f"{each.ratio(name):.2f}" for each in cells))
    return shown


def as_json(cells: Sequence[Cell], break_even: float | None) -> str:
    """The results as JSON. `break_even_rtt_ms` is null if edges help at every RTT, or if it was not requested."""
    known = None if break_even in (None, inf) else round(1e3 * (break_even or 0.0), 1)
    return json.dumps({"break_even_rtt_ms": known, "cells": [_cell_json(each) for each in cells]}, indent=1)


def _cell_json(each: Cell) -> dict[str, Any]:
    return {
        "requests": each.scenario.requests,
        "rtt_ms": round(1e3 * each.scenario.rtt_s, 3),
        "verdict": each.verdict,
        "in_server_ratio": each.in_server,
        "plain": _outcome_json(each.plain),
        "arms": {name: _outcome_json(arm) | {"ratio": each.ratio(name)} for name, arm in each.arms.items()},
    }


def _outcome_json(outcome: Outcome) -> dict[str, float]:
    return {
        "tokens_per_s": outcome.tokens_per_s,
        "itl_p50_ms": 1e3 * outcome.itl_p50_s,
        "itl_p99_ms": 1e3 * outcome.itl_p99_s,
        "ttft_p50_ms": 1e3 * outcome.ttft_p50_s,
        "ttft_p99_ms": 1e3 * outcome.ttft_p99_s,
        "verified_per_accepted": outcome.verified_per_accepted,
    }


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Plot throughput and inter-token latency: over RTT if several were simulated, else over load."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an optional extra
    except ImportError:
        raise UserError("--curve draws with matplotlib: pip install 'vllm-specedge[plots]'.") from None
    is_over_rtt = len({each.scenario.rtt_s for each in cells}) > 1
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    speed, latency = figure.subplots(1, 2)
    for requests in sorted({each.scenario.requests for each in cells}) if is_over_rtt else [0]:
        chosen = [each for each in cells if each.scenario.requests == requests or not requests]
        name = f", {requests} requests" if requests else ""
        x = [each.scenario.rtt_s * 1e3 if is_over_rtt else each.scenario.requests for each in chosen]
        (line,) = speed.plot(x, [each.arms[AUTO].tokens_per_s for each in chosen], "o-", label=f"edges{name}")
        color = line.get_color()
        speed.plot(x, [each.plain.tokens_per_s for each in chosen], ":", color=color, label=f"plain{name}")
        latency.plot(x, [each.arms[AUTO].itl_p50_s * 1e3 for each in chosen], "o-", color=color, label=f"median{name}")
        latency.plot(x, [each.arms[AUTO].itl_p99_s * 1e3 for each in chosen], "^--", color=color, label=f"p99{name}")
        latency.plot(x, [each.plain.itl_p50_s * 1e3 for each in chosen], ":", color=color, label=f"plain median{name}")
    for axes, title in ((speed, "tokens per second"), (latency, "ms between chunks of an answer")):
        axes.set(title=title, xlabel="RTT, ms" if is_over_rtt else "requests", ylim=(0, 1.15 * axes.dataLim.y1))
        axes.legend(fontsize="small")
        if not is_over_rtt:
            axes.set_xscale("log", base=2)
    figure.savefig(path)


def with_edge(scenario: Scenario, edge: str) -> Scenario:
    """The scenario with edges of one of the kinds EDGES. Raises UserError for another."""
    if edge not in EDGES:
        raise UserError(f"There are no edges of the kind '{edge:.20}', only {', '.join(EDGES)}.")
    if edge == "poor":
        return replace(scenario, edge=replace(scenario.edge, acceptance=POOR_ACCEPTANCE))
    if edge == "half":
        return replace(scenario, share=0.5)
    fault = "" if edge == "good" else edge
    return replace(scenario, edge=replace(scenario.edge, fault=fault))
