"""Load by vLLM's own benchmark (`vllm bench serve`, as a library)."""

import asyncio
import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from vllm.benchmarks.datasets import SampleRequest
from vllm.benchmarks.serve import TaskType, benchmark

from harness.servers import Target

ENDPOINTS = {"openai": "completions", "openai-chat": "chat/completions"}
PERCENTILES = (50, 95, 99)


def asked_by_vllm(
    target: Target,
    samples: Sequence[SampleRequest],
    logs: Path,
    endpoint: str = "openai",
    at_once: int | None = None,
    per_s: float = math.inf,
    body: Mapping[str, Any] | None = None,
    seed: int = 0,
    ignore_eos: bool = False,
) -> dict[str, Any]:
    """Its result for these requests: at most `at_once` in flight (None: no limit), `per_s` Poisson arrivals per second.

    Raises StackError if any fails.
    """
    url, model = target.server.url, target.server.model
    np.random.seed(seed)  # vLLM draws arrivals from it
    with (logs / "vllm-bench.log").open("a") as log, contextlib.redirect_stdout(log):
        result: dict[str, Any] = asyncio.run(
            benchmark(
                task_type=TaskType.GENERATION,
                endpoint_type=endpoint,
                api_url=f"{url}/v1/{ENDPOINTS[endpoint]}",
                base_url=url,
                model_id=model,
                model_name=model,
                tokenizer=None,
                input_requests=list(samples),
                logprobs=None,
                request_rate=per_s,
                burstiness=1.0,
                disable_tqdm=True,
                num_warmups=0,
                profile=False,
                selected_percentile_metrics=["ttft", "itl", "e2el"],
                selected_percentiles=list(PERCENTILES),
                ignore_eos=ignore_eos,
                goodput_config_dict={},
                max_concurrency=at_once,
                lora_modules=None,
                extra_headers=None,
                extra_body=dict(body or {}),
                ready_check_timeout_sec=0,
            )
        )
    if result["failed"]:
        raise target.server.process.fail(f"vllm bench serve: {result['failed']} failed, {result.get('errors')}")
    target.num_asked += result["total_output_tokens"]
    return result
