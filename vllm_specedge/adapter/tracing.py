"""A span for each request in vLLM's own traces (`--otlp-traces-endpoint`), from the engine's process.

vLLM makes its own span of a request in the front end, which knows nothing about drafts. This one has the same parent,
if the client sent one, and names the request.
"""

import time
from typing import Any

from vllm.logger import init_logger

from vllm_specedge.adapter import hooks
from vllm_specedge.engine.request_trace import RequestSpan

logger = init_logger("vllm.specedge.tracing")

SPAN_NAME = "specedge_request"


class RequestSpans:
    """The spans of the running requests."""

    def __init__(self) -> None:
        self._spans: dict[str, RequestSpan] = {}

    def open(self, request: Any) -> None:
        self._spans[request.request_id] = RequestSpan(time.monotonic(), request.num_tokens)

    def held(self, request_id: str) -> None:
        """The request is left out of the next step."""
        span = self._spans.get(request_id)
        if span is not None:
            span.is_held = True

    def stepped(self, request: Any, num_verified: int, started_s: float) -> None:
        """A step of this request has just ended."""
        span = self._spans.get(request.request_id)
        if span is not None:
            span.step(request.num_tokens, num_verified, started_s, time.monotonic())

    def close(self, request: Any) -> None:
        """The request has ended: write its span."""
        from vllm.tracing import extract_trace_context, instrument_manual

        span = self._spans.pop(request.request_id, None)
        if span is None:
            return
        instrument_manual(
            span_name=SPAN_NAME,
            start_time=int(request.arrival_time * 1e9),
            attributes={"gen_ai.request.id": request.request_id, **span.attributes()},
            context=extract_trace_context(request.trace_headers),
        )


def request_spans(vllm_config: Any) -> RequestSpans | None:
    """The spans; None if traces are not requested or cannot be made."""
    if vllm_config.observability_config.otlp_traces_endpoint is None:
        return None
    problems = hooks.problems(hooks.TRACING)
    if problems:
        logger.warning("No traces of drafts: %s", "; ".join(problems))
        return None
    return RequestSpans()
