"""Whether a machine would help a server: a run of the shipping simulator with measurements of both.

Pure: the text of a gateway's /metrics and the times of forward passes and round trips are arguments.
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
"""Acceptance rate to assume if the server has not verified any drafts yet."""
MIN_DRAFTS = 50
"""Verified drafts after which the server's own acceptance rate is used."""
TOKENS = 400
"""Tokens to simulate for each number of requests."""
LOADS = (1, 4)
"""Numbers of concurrent requests to simulate."""
_HALVINGS = 40
_METRIC = "specedge_engine_"


class Knowledge(NamedTuple):
    """What a gateway's metrics report."""

    server: FittedServer | None
    """Step times that the first engine has measured; None: no engine has reported any yet."""
    acceptance: float | None
    """Probability that a draft token is right if all before it are; None: too few drafts were verified."""


class Speeds(NamedTuple):
    """Tokens per second over all requests, without (`plain`) and with (`edge`) this machine."""

    requests: int
    plain: float
    edge: float

    @property
    def ratio(self) -> float:
        return self.edge / self.plain


@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements of a machine, its link to a server, and the server."""

    pass_s: float
    """Seconds of a forward pass with one row."""
    wide_pass_s: float
    """Seconds of one with `rows` rows."""
    rows: int
    max_width: int
    rtt_s: float
    server: FittedServer
    acceptance: float
    spec_tokens: int
    max_shared_rows: int = 0
    """Maximum rows of a pass that several requests share."""
    max_requests: int = 1 << 10
    """Maximum concurrent requests that this machine drafts for."""

    @property
    def row_s(self) -> float:
        """Seconds that each further row adds to a pass."""
        return max(0.0, self.wide_pass_s - self.pass_s) / (self.rows - 1) if self.rows > 1 else 0.0


def knowledge(metrics: str) -> Knowledge:
    """Parse a gateway's /metrics in Prometheus' text format."""
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
    """Probability that a token is right if all before it are, from the totals of drafts, verified and accepted tokens.

    None for fewer drafts than MIN_DRAFTS. All drafts are assumed to have the mean length.
    """
    if drafts < MIN_DRAFTS:
        return None
    length, right = verified / drafts, accepted / drafts
    return crossing(lambda acceptance: _accepted(acceptance, length) < right, 0.0, 1.0, _HALVINGS)


def _accepted(acceptance: float, length: float) -> float:
    """Mean accepted tokens of a draft of this length, interpolated linearly between whole lengths."""
    whole = int(length)
    return sum(acceptance**depth for depth in range(1, whole + 1)) + (length - whole) * acceptance ** (whole + 1)


def forecast(measured: Measured, loads: Iterable[int] = LOADS) -> list[Speeds]:
    """Tokens per second without and with this machine, for each load. It drafts for at most `max_requests` of them."""
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
    """Whether the machine helps at any of these loads."""
    return any(each.ratio >= HELPS for each in speeds)


def verdict(measured: Measured, speeds: Sequence[Speeds]) -> str:
    """Whether the machine would help, and how much or why not, in plain words."""
    if would_help(speeds):
        best = max(speeds, key=lambda each: each.ratio)
        times = f"{best.ratio:.1f}" if best.ratio >= 1.1 else f"{best.ratio:.2f}"
        return f"would help: about {times} times at {_requests(best.requests)}"
    first = speeds[0]
    return f"would not help: {first.ratio:.2f} times at {_requests(first.requests)}; {_obstacle(measured)}"


def _requests(number: int) -> str:
    return "1 request" if number == 1 else f"{number} requests"


def _obstacle(measured: Measured) -> str:
    """The most probable obstacle, with the numbers behind it."""
    server, pass_ms, rtt_ms = measured.server, 1e3 * measured.pass_s, 1e3 * measured.rtt_s
    step_ms = 1e3 * server.step_s(1, 1)
    verifying_ms = 1e3 * server.step_s(1, 1 + measured.spec_tokens, is_verifying=True)
    if pass_ms > step_ms / 2:
        return (
            f"a forward pass takes {pass_ms:.1f} ms here and a step of the server {step_ms:.1f} ms: "
            "use a smaller draft model or a faster device"
        )
    if verifying_ms > 1.5 * step_ms:
        return (
            f"a step that verifies {measured.spec_tokens} tokens takes the server {verifying_ms:.1f} ms, "
            f"one without {step_ms:.1f} ms"
        )
    if rtt_ms > 2 * step_ms:
        return f"the round trip takes {rtt_ms:.1f} ms and a step of the server {step_ms:.1f} ms"
    return f"an acceptance rate of {measured.acceptance:.0%} is too low to help: use a better draft model"
