"""Traces of requests by vLLM's own `--otlp-traces-endpoint`: what a collector receives from a real server."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from stack import Server, start_server, wait_for

from tests.ports import free_port
from vllm_specedge.adapter import hooks

from .conftest import DEADLINE_S, MODEL, MODEL_NAME, ROOM, until
from .test_ngram_rung import repetitive

collector = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
GATEWAY_PORT = free_port()
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
NUM_TOKENS = 40


class Collector(BaseHTTPRequestHandler):
    """Receives spans in OTLP over HTTP."""

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
    assert hooks.problems(hooks.TRACING) == []


def ask(server: Server, received: Any) -> tuple[str, dict[str, Any]]:
    """One request: its id, and its spans by name once both are there."""
    body = {"model": MODEL_NAME, "prompt": repetitive(1), "max_tokens": NUM_TOKENS, "temperature": 0}
    headers = {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"}
    with received.arrived:
        received.spans.clear()
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
        return answer.json()["id"], {span.name: span for span in received.spans}


def totals(span: Any) -> dict[str, int]:
    values = {each.key: each.value for each in span.attributes}
    return {name: values[f"specedge.{name}"].int_value for name in ("steps", "verified_tokens", "accepted_tokens")}


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
        arguments += ("--speculative-config", json.dumps(config), *ROOM)
        env = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "200"}
        server = start_server(MODEL, tmp_path / "server.log", free_port(), *arguments, env=env)
        asked: list[tuple[str, dict[str, Any]]] = []

        def is_drafted() -> bool:
            """The lookup is compiled while the server starts, and may not be ready yet."""
            asked[:] = [ask(server, received)]
            return totals(asked[0][1]["specedge_request"])["accepted_tokens"] > 0

        try:
            wait_for(server.process, f"{server.url}/health")
            until(is_drafted, "nothing that was copied was accepted")
        finally:
            server.process.stop()
    [(id_, of_name)] = asked
    span = of_name["specedge_request"]
    assert span.trace_id.hex() == of_name["llm_request"].trace_id.hex() == TRACE_ID
    assert span.end_time_unix_nano > span.start_time_unix_nano
    values = {each.key: each.value for each in span.attributes}
    assert id_ in values["gen_ai.request.id"].string_value
    found = totals(span)
    assert found["steps"] == NUM_TOKENS - found["accepted_tokens"]
    for name in ("verified_tokens", "accepted_tokens"):
        of_steps = [value.int_value for value in values[f"specedge.group.{name}"].array_value.values]
        assert (len(of_steps), sum(of_steps)) == (found["steps"], found[name])
