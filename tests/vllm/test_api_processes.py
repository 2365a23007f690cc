"""Two API processes of one server admit together as much as one would, and each refusal is counted once."""

import asyncio
import json
from collections import Counter
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
from stack import start_server, wait_for

from tests.ports import free_port

from .conftest import MODEL, MODEL_NAME, ROOM, until

KEY = "se-key-of-this-test"
SLO = {"default": {"ttft_ms": 3000, "itl_ms": 1000}, "gold": {"itl_ms": 1000, "priority": -1}}
NUM_ASKED, TOKENS, MAX_SEQS = 64, 50, 4


async def ask_all(url: str, key: str) -> list[httpx.Response]:
    """Send each request on its own connection, so that the system distributes them over both processes."""
    limits = httpx.Limits(max_keepalive_connections=0)
    body = {"model": MODEL_NAME, "prompt": "The sea", "max_tokens": TOKENS, "ignore_eos": True}
    async with httpx.AsyncClient(trust_env=False, timeout=300, limits=limits) as client:
        headers = {"authorization": f"Bearer {key}"}
        asked = [client.post(f"{url}/v1/completions", json=body, headers=headers) for _ in range(NUM_ASKED)]
        return list(await asyncio.gather(*asked))


@pytest.mark.timeout(600)
def test_what_both_refuse_is_what_the_gateway_says(tmp_path: Path) -> None:
    gateway_port = free_port()
    config = {"method": "edge", "listen": f"127.0.0.1:{gateway_port}", "slo": SLO, "slo_by": "header"}
    middleware = ("--middleware", "vllm_specedge.admission.AdmissionMiddleware", "--api-server-count", "2")
    arguments = ("--max-model-len", "2048", "--max-num-seqs", str(MAX_SEQS), "--api-key", KEY, *middleware, *ROOM)
    speculation = ("--speculative-config", json.dumps(config))
    server = start_server(
        MODEL, tmp_path / "server.log", free_port(), *arguments, *speculation, gateway_port=gateway_port
    )
    try:
        wait_for(server.process, f"{server.url}/health")
        wait_for(server.process, f"{server.gateway_url}/healthz", "engines", 1)
        assert {answer.status_code for answer in asyncio.run(ask_all(server.url, "none"))} == {401}
        counted = Counter[int]()
        for _ in range(3):  # in doubt all are admitted, until the engine has reported its room
            answers = asyncio.run(ask_all(server.url, KEY))
            counted += Counter(answer.status_code for answer in answers)
            refused = [answer for answer in answers if answer.status_code == 429]
            assert all(1 <= int(answer.headers["retry-after"]) <= 30 for answer in refused)
        assert counted.keys() == {200, 429}, "some come in, and some would wait for too long"

        def is_counted() -> bool:
            said = server.metrics()
            return (
                said.get('specedge_refused_requests_total{class="default"}') == counted[429]
                and said.get('specedge_admitted_requests_total{class="default"}') == counted[200]
            )

        until(is_counted, f"the gateway does not say {counted}")
        with openai.OpenAI(
            base_url=f"{server.url}/v1", api_key=KEY, max_retries=20, default_headers={"x-slo-class": "gold"}
        ) as client:
            answer = client.completions.create(model=MODEL_NAME, prompt="The sea", max_tokens=4)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 4
        until(
            lambda: server.metrics().get('specedge_admitted_requests_total{class="gold"}', 0) == 1,
            "its class is not counted",
        )
        assert server.metrics()['specedge_engine_start_seconds{engine="0"}'] > 1.0
    finally:
        server.process.stop()
