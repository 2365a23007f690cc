"""Traces of requests in vLLM's own way, `--otlp-traces-endpoint`: what a collector gets of a real server."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from stack import start_server, wait_for

from vllm_specedge.adapter import hooks

from .conftest import MODEL, MODEL_NAME
from .test_ngram_rung import repetitive

collector = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
PORT, GATEWAY_PORT = 8260, 8261
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
NUM_TOKENS = 40
DEADLINE_S = 30.0


class Collector(BaseHTTPRequestHandler):
    """Takes spans in OTLP over HTTP."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        request = collector.ExportTraceServiceRequest.FromString(body)
        server: Any = self.server
        with server.arrived:
            server.spans += [
                span for each in request.resource_spans for scope in each.scope_spans for span in scope.spans
            ]
            server.arrived.notify_all()
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def collecting() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    server.spans, server.arrived = [], threading.Condition()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_hooks_are_there() -> None:
    assert hooks.tracing_problems() == []


def test_a_request_s_span_has_its_groups(tmp_path: Path) -> None:
    config = {
        "method": "edge",
        "num_speculative_tokens": 4,
        "listen": f"127.0.0.1:{GATEWAY_PORT}",
        "mode": "never-wait",
    }
    with collecting() as received:
        endpoint = f"http://127.0.0.1:{received.server_port}/v1/traces"
        arguments = ("--max-model-len", "1024", "--max-num-seqs", "4", "--otlp-traces-endpoint", endpoint)
        arguments += ("--speculative-config", json.dumps(config))
        env = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "200"}
        server = start_server(MODEL, tmp_path / "server.log", PORT, *arguments, env=env)
        try:
            wait_for(server.process, f"{server.url}/health")
            body = {"model": MODEL_NAME, "prompt": repetitive(1), "max_tokens": NUM_TOKENS, "temperature": 0}
            headers = {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"}
            answer = httpx.post(
                f"{server.url}/v1/completions",
                json={**body, "ignore_eos": True},
                headers=headers,
                trust_env=False,
                timeout=DEADLINE_S,
            )
            assert answer.status_code == 200
            with received.arrived:
                both = {"llm_request", "specedge_request"}
                assert received.arrived.wait_for(lambda: both <= {span.name for span in received.spans}, DEADLINE_S)
        finally:
            server.process.stop()
    of_name = {span.name: span for span in received.spans}
    span = of_name["specedge_request"]
    assert span.trace_id.hex() == of_name["llm_request"].trace_id.hex() == TRACE_ID
    assert span.end_time_unix_nano > span.start_time_unix_nano
    values = {each.key: each.value for each in span.attributes}
    assert answer.json()["id"] in values["gen_ai.request.id"].string_value
    totals = {name: values[f"specedge.{name}"].int_value for name in ("steps", "verified_tokens", "accepted_tokens")}
    assert totals["accepted_tokens"] > 0
    assert totals["steps"] == NUM_TOKENS - totals["accepted_tokens"]
    for name in ("verified_tokens", "accepted_tokens"):
        of_steps = [value.int_value for value in values[f"specedge.group.{name}"].array_value.values]
        assert (len(of_steps), sum(of_steps)) == (totals["steps"], totals[name])
