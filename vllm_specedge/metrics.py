"""Every metric's name, unit and meaning, in one table each; values are read from the counters the core keeps."""

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_specedge.router import Router

ENGINE_COUNTERS = (
    ("steps", "Decode steps of requests, with a draft or without."),
    ("committed_tokens", "Tokens chosen by the target."),
    ("verified_drafts", "Drafts that the target verified."),
    ("verified_tokens", "Draft tokens that the target verified."),
    ("accepted_tokens", "Draft tokens that the target accepted."),
    ("proposed_tokens", "Draft tokens that reached the engine."),
    ("proposals_kept", "Proposals kept in a proposal tree."),
    ("proposals_late", "Proposals for positions that were decided already."),
    ("proposals_mismatch", "Proposals that contradicted what was decided meanwhile."),
    ("proposals_gap", "Proposals that continue something the engine does not have."),
    ("proposals_full", "Proposals cut because the request's tree was full."),
    ("holds", "Times a request was held for its draft."),
    ("missed_holds", "Holds that ended without a draft."),
    ("wakes", "Times a draft woke a parked engine."),
    ("wake_us", "Microseconds from a draft's arrival to the parked engine's looking at it, in total."),
    ("dropped_closed", "Proposals for requests that were over."),
    ("dropped_token_id", "Proposals with a token id outside of the vocabulary."),
    ("unexpected_frames", "Frames a gateway should not send."),
)
"""What an engine reports in Stats, in this order."""

GATEWAY_COUNTERS = (
    ("proposed_tokens", "Draft tokens that edges sent and the gateway passed on."),
    ("assigned", "Requests given to an edge."),
    ("declined", "Requests that an edge gave back."),
    ("dropped_closed", "Proposals for requests that were over."),
    ("dropped_late", "Proposals for positions that were decided already."),
    ("dropped_ahead", "Proposals past the credit."),
    ("dropped_token_id", "Proposals with a token id outside of the vocabulary."),
    ("floods", "Edges closed because they sent too many frames."),
    ("commit_gaps", "Requests dropped because commits were missing."),
    ("requests_over_limit", "Requests not drafted for because of a bound."),
    ("unexpected_engine_frames", "Frames an engine should not send."),
    ("refused", "Edges refused or closed with a Bye."),
    ("slow_edges", "Edges closed because they did not read."),
    ("silent_edges", "Edges closed because they said nothing."),
    ("task_errors", "Errors that ended a task; each is in the log."),
)


def engine_values(counters: Counter[str]) -> tuple[int, ...]:
    """An engine's counters as Stats carries them; they wrap at 2**32, as a restart would reset them."""
    return tuple(counters[name] % 2**32 for name, _ in ENGINE_COUNTERS)


class RouterCollector(Collector):
    """The router's and its engines' counters, in Prometheus' form."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def collect(self) -> Iterator[Metric]:
        router = self._router
        yield GaugeMetricFamily("specedge_edges", "Edges connected.", len(router.edges))
        yield GaugeMetricFamily("specedge_engines", "vLLM engines connected.", len(router.engines))
        yield GaugeMetricFamily("specedge_requests", "Live requests known to the gateway.", router.num_requests)
        for name, help_text in GATEWAY_COUNTERS:
            yield CounterMetricFamily(f"specedge_gateway_{name}", help_text, router.counters[name])
        engines = router.engine_counters()
        for index, (name, help_text) in enumerate(ENGINE_COUNTERS):
            # An engine of another release may know fewer counters, or more.
            total = sum(values[index] for values in engines if index < len(values))
            yield CounterMetricFamily(f"specedge_engine_{name}", help_text, total)
