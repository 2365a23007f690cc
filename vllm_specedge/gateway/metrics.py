"""The name, unit and meaning of every metric, in tables; values are read from the core's counters."""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_specedge.gateway.demand import DemandBook
from vllm_specedge.gateway.effects import RequestReport
from vllm_specedge.gateway.router import Router
from vllm_specedge.policy.step_cost import KNOTS
from vllm_specedge.wire.telemetry import DEMAND_COUNTERS, ENGINE_COUNTERS, REQUEST_COUNTERS

GATEWAY_COUNTERS = (
    ("proposed_tokens", "Draft tokens that edges sent and the gateway forwarded."),
    ("assigned", "Requests assigned to an edge."),
    ("assigned_by_prefix", "Requests assigned to an edge because it drafted for a context with the same beginning."),
    ("declined", "Requests that an edge declined."),
    ("dropped_closed", "Proposals for requests that had ended."),
    ("dropped_late", "Proposals for positions that were already decided."),
    ("dropped_ahead", "Proposals past the credit."),
    ("dropped_token_id", "Proposals with a token id outside of the vocabulary."),
    ("floods", "Edges closed because they sent too much."),
    ("revoked", "Edges closed because their token was revoked or expired."),
    ("commit_gaps", "Requests dropped because commits were missing."),
    ("requests_over_limit", "Requests not drafted for because of a limit."),
    ("reports", "Requests whose counters arrived before they closed."),
    ("dropped_reports", "Reports for requests that the gateway does not know or already has a report of."),
    ("unexpected_engine_frames", "Frames that an engine should not send."),
    ("refused", "Edges refused or closed with a Bye."),
    ("unauthorized", "Connections refused because of their token."),
    ("turned_away", "Connections refused because the gateway or their token had reached its limit."),
    ("slow_edges", "Edges closed because they did not read."),
    ("silent_edges", "Edges closed because they sent nothing."),
    ("task_errors", "Errors that ended a task; each is in the log."),
)

STEP_TIMES = (
    ("", "time of a step by its tokens, without what requests and context add", ("engine", "tokens")),
    ("request_", "time that each request adds to a step", ("engine",)),
    ("context_", "time that each 1,024 tokens of context add to a step", ("engine",)),
    ("verifying_", "time that each request adds to a step that verifies drafts", ("engine",)),
)
"""Step times that each engine learns from its own steps: name, meaning and labels of each gauge. The first has a series
for each size."""


def report_row(report: RequestReport) -> dict[str, int]:
    """A report's counters by name, and the engine's number.

    An engine of another release may send fewer values (the rest are 0) or more (they have no name here).
    """
    return {"engine": report.engine, **_by_name(report.values)}


def _by_name(values: Sequence[int]) -> dict[str, int]:
    padded = (*values, *[0] * len(REQUEST_COUNTERS))
    return {name: value for (name, _), value in zip(REQUEST_COUNTERS, padded, strict=False)}


class RequestHistograms:
    """Histograms over finished requests. Without labels, so that the number of series is fixed."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._acceptance_ratio = Histogram(
            "specedge_request_acceptance_ratio",
            "Share of the edges' draft tokens verified for a finished request that the target accepted.",
            registry=registry,
            buckets=[tenths / 10 for tenths in range(11)],
        )
        self._tokens_per_step = Histogram(
            "specedge_request_tokens_per_step",
            "Mean tokens per decode step of a finished request; 1 is plain decoding.",
            registry=registry,
            buckets=(1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8, 12, 16, 32),
        )

    def observe(self, report: RequestReport) -> None:
        """Add one request. Without verified tokens, or without steps, it has no ratio."""
        counters = _by_name(report.values)
        if counters["verified_tokens"]:
            self._acceptance_ratio.observe(counters["accepted_tokens"] / counters["verified_tokens"])
        if counters["steps"]:
            self._tokens_per_step.observe(counters["committed_tokens"] / counters["steps"])


class RouterCollector(Collector):
    """The counters of the router and its engines as Prometheus metrics."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def collect(self) -> Iterator[Metric]:
        router = self._router
        yield GaugeMetricFamily("specedge_edges", "Edges connected.", len(router.edges))
        yield GaugeMetricFamily("specedge_max_edges", "Maximum edges of the gateway.", router.limits.max_edges)
        yield GaugeMetricFamily("specedge_engines", "vLLM engines connected.", len(router.engines))
        yield GaugeMetricFamily("specedge_requests", "Live requests known to the gateway.", router.num_requests)
        for name, help_text in GATEWAY_COUNTERS:
            yield CounterMetricFamily(f"specedge_gateway_{name}", help_text, router.counters[name])
        for (name, help_text), total in zip(ENGINE_COUNTERS, router.engine_totals, strict=True):
            yield CounterMetricFamily(f"specedge_engine_{name}", help_text, total)
        yield from self._step_times()

    def _step_times(self) -> Iterator[Metric]:
        curve, *others = (
            GaugeMetricFamily(f"specedge_engine_step_{name}seconds", f"Learned: {help_text}.", labels=labels)
            for name, help_text, labels in STEP_TIMES
        )
        for number, times in self._router.step_times().items():
            for tokens, time_us in zip(KNOTS, times.curve_us, strict=False):
                curve.add_metric([str(number), str(tokens)], time_us / 1e6)
            each_ns = (times.request_ns, times.context_ns, times.verifying_ns)
            for family, time_ns in zip(others, each_ns, strict=True):
                family.add_metric([str(number)], time_ns / 1e9)
        yield from (curve, *others)


class DemandCollector(Collector):
    """Demand by class of request and capacity by engine, in answer tokens."""

    def __init__(self, book: DemandBook) -> None:
        self._book = book

    def collect(self) -> Iterator[Metric]:
        for index, (name, help_text) in enumerate(DEMAND_COUNTERS):
            family = CounterMetricFamily(f"specedge_{name}", help_text, labels=("class",))
            for class_, totals in self._book.classes.items():
                family.add_metric([class_], totals.counters[index])
            yield family
        text = "Answer tokens per second that requests ask for, refused ones included."
        demand = GaugeMetricFamily("specedge_demand_tokens_per_second", text, labels=("class",))
        for class_, totals in self._book.classes.items():
            demand.add_metric([class_], totals.offered.per_s)
        yield demand
        yield from self._capacity()
        text = "Predicted demand, in answer tokens per second, at the time when an engine started now is ready."
        yield GaugeMetricFamily("specedge_foreseen_demand_tokens_per_second", text, self._book.foreseen_tokens_per_s)
        text = "Engines like the present ones needed for this demand; 0 while no engine has reported its capacity."
        yield GaugeMetricFamily("specedge_engines_needed", text, self._book.engines_needed)

    def _capacity(self) -> Iterator[Metric]:
        text = "Answer tokens per second that an engine can generate within its targets, by its own cost model"
        capacity = GaugeMetricFamily(
            "specedge_capacity_tokens_per_second", f"{text}, with the edges it has.", labels=("engine",)
        )
        alone = GaugeMetricFamily(
            "specedge_capacity_without_edges_tokens_per_second", f"{text}, without edges.", labels=("engine",)
        )
        start = GaugeMetricFamily(
            "specedge_engine_start_seconds",
            "Time from the start of an engine's server process to that of the engine.",
            labels=("engine",),
        )
        for number, said in self._book.capacities():
            capacity.add_metric([str(number)], said.with_edges / 1e3)
            alone.add_metric([str(number)], said.without_edges / 1e3)
            start.add_metric([str(number)], said.start_ms / 1e3)
        yield from (capacity, alone, start)
