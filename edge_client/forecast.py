"""Whether a machine would help a server: the shipping simulator, with what was measured of both.

Pure: what a gateway's /metrics say, and times of forward passes and round trips, are arguments.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from vllm_specedge.estimators import crossing
from vllm_specedge.simulation.models import FittedServer
from vllm_specedge.simulation.report import HELPS, plain
from vllm_specedge.simulation.run import simulate
from vllm_specedge.simulation.scenario import EdgeModel, Scenario

ASSUMED_ACCEPTANCE = 0.6
"""Where nothing was verified on the server yet."""
MIN_DRAFTS = 50
"""After so many verified drafts the server's own count is believed."""
TOKENS = 400
"""Simulated for each number of requests."""
LOADS = (1, 4)
"""Requests at a time."""
_HALVINGS = 40
_METRIC = "specedge_engine_"


class Knowledge(NamedTuple):
    """What a gateway knows."""

    server: FittedServer | None
    """What the first engine has learnt its steps to take; None: no engine has said so yet."""
    acceptance: float | None
    """How often a draft token is right whose past is; None: too few drafts were verified."""


class Speeds(NamedTuple):
    """Of all answers together, in tokens per second."""

    requests: int
    plain: float
    edge: float

    @property
    def ratio(self) -> float:
        return self.edge / self.plain


@dataclass(frozen=True, slots=True)
class Measured:
    """A machine, its way to a server, and the server."""

    pass_s: float
    """A forward pass of one row."""
    wide_pass_s: float
    """One of `rows`."""
    rows: int
    max_width: int
    rtt_s: float
    server: FittedServer
    acceptance: float
    spec_tokens: int
    max_shared_rows: int = 0
    """Of a pass that several requests share."""
    max_requests: int = 1 << 10
    """That this machine drafts for at once."""

    @property
    def row_s(self) -> float:
        """What each further row adds to a pass."""
        return max(0.0, self.wide_pass_s - self.pass_s) / (self.rows - 1) if self.rows > 1 else 0.0


def knowledge(metrics: str) -> Knowledge:
    """From a gateway's /metrics, in Prometheus' text form."""
    samples = [sample for family in text_string_to_metric_families(metrics) for sample in family.samples]
    totals = {sample.name: sample.value for sample in samples if not sample.labels}
    counted = [
        totals.get(f"{_METRIC}{name}_total", 0.0) for name in ("verified_drafts", "verified_tokens", "accepted_tokens")
    ]
    by_engine: dict[int, dict[str, dict[int, float]]] = {}
    for sample in samples:
        if sample.name.startswith(f"{_METRIC}step_") and "engine" in sample.labels:
            parts = by_engine.setdefault(int(sample.labels["engine"]), {})
            name = sample.name.removeprefix(f"{_METRIC}step_")
            parts.setdefault(name, {})[int(sample.labels.get("tokens", 0))] = sample.value
    servers = [_server(parts) for _, parts in sorted(by_engine.items()) if parts.get("seconds")]
    return Knowledge(servers[0] if servers else None, acceptance_of(*counted))


def _server(parts: Mapping[str, Mapping[int, float]]) -> FittedServer:
    knots, seconds = zip(*sorted(parts["seconds"].items()), strict=True)
    slope_s = (seconds[-1] - seconds[-2]) / (knots[-1] - knots[-2]) if len(knots) > 1 else 0.0
    each = [parts.get(f"{name}_seconds", {}).get(0, 0.0) for name in ("request", "verifying")]
    return FittedServer(knots, seconds, max(0.0, slope_s), *each)


def acceptance_of(drafts: float, verified: float, accepted: float) -> float | None:
    """How often a token is right whose past is, if so many tokens were accepted of drafts of that mean length.

    None for fewer drafts than MIN_DRAFTS. It takes all drafts for as long as their mean.
    """
    if drafts < MIN_DRAFTS:
        return None
    length, right = verified / drafts, accepted / drafts
    return crossing(lambda acceptance: _accepted(acceptance, length) < right, 0.0, 1.0, _HALVINGS)


def _accepted(acceptance: float, length: float) -> float:
    """Tokens accepted of a draft of this length, on average; between two whole lengths on a straight line."""
    whole = int(length)
    return sum(acceptance**depth for depth in range(1, whole + 1)) + (length - whole) * acceptance ** (whole + 1)


def forecast(measured: Measured, loads: Iterable[int] = LOADS) -> list[Speeds]:
    """Tokens per second without this machine and with it, by requests at a time; it drafts for as many as it takes."""
    edge = EdgeModel(
        measured.pass_s,
        measured.row_s,
        measured.acceptance,
        max_width=measured.max_width,
        max_shared_rows=measured.max_shared_rows,
    )
    scenario = Scenario(
        server=measured.server, rtt_s=measured.rtt_s, edge=edge, max_edges=1, spec_tokens=measured.spec_tokens
    )
    loaded = [
        replace(
            scenario,
            requests=requests,
            tokens=TOKENS // requests,
            share=min(1.0, measured.max_requests / requests),
        )
        for requests in loads
    ]
    return [Speeds(each.requests, plain(each).tokens_per_s, simulate(each).tokens_per_s) for each in loaded]


def would_help(speeds: Sequence[Speeds]) -> bool:
    """At any of these loads."""
    return any(each.ratio >= HELPS for each in speeds)


def verdict(measured: Measured, speeds: Sequence[Speeds]) -> str:
    """Whether it would help, how much or why not, in plain words."""
    if would_help(speeds):
        best = max(speeds, key=lambda each: each.ratio)
        times = f"{best.ratio:.1f}" if best.ratio >= 1.1 else f"{best.ratio:.2f}"
        return f"would help: about {times} times at {_requests(best.requests)}"
    first = speeds[0]
    return f"would not help: {first.ratio:.2f} times at {_requests(first.requests)}; {_obstacle(measured)}"


def _requests(number: int) -> str:
    return "1 request" if number == 1 else f"{number} requests"


def _obstacle(measured: Measured) -> str:
    """What most probably is in the way. It names numbers, so that whoever reads it can judge."""
    server, pass_ms, rtt_ms = measured.server, 1e3 * measured.pass_s, 1e3 * measured.rtt_s
    step_ms = 1e3 * server.step_s(1, 1)
    verifying_ms = 1e3 * server.step_s(1, 1 + measured.spec_tokens, is_verifying=True)
    if pass_ms > step_ms / 2:
        return (
            f"a forward pass takes {pass_ms:.1f} ms here and a step of the server {step_ms:.1f} ms: "
            "take a smaller draft or a faster device"
        )
    if verifying_ms > 1.5 * step_ms:
        return (
            f"a step that verifies {measured.spec_tokens} tokens takes the server {verifying_ms:.1f} ms, "
            f"one without {step_ms:.1f} ms"
        )
    if rtt_ms > 2 * step_ms:
        return f"the round trip takes {rtt_ms:.1f} ms and a step of the server {step_ms:.1f} ms"
    return f"drafts that are right {measured.acceptance:.0%} of the time are worth too little: take a better draft"
