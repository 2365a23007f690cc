"""vLLM's CPU worker, which also records the start and end of each step, for timeline.py.

SPECEDGE_TRACE=steps.jsonl PYTHONPATH=benchmarks vllm serve MODEL --worker-cls traced_worker.TracedWorker
"""

import json
import os
import time
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

TRACE_VARIABLE = "SPECEDGE_TRACE"


class TracedWorker(CPUWorker):
    """Writes one line of JSON per step, with times of the monotonic clock, which all processes of a machine share."""

    def compile_or_warm_up_model(self) -> Any:
        self._trace = open(os.environ[TRACE_VARIABLE], "a", buffering=1)  # noqa: SIM115 - as long as the process lives
        return super().compile_or_warm_up_model()

    def execute_model(self, scheduler_output: Any) -> Any:
        drafts = scheduler_output.scheduled_spec_decode_tokens.values()
        self._step = {
            "start_s": time.monotonic(),
            "requests": len(scheduler_output.num_scheduled_tokens),
            "tokens": scheduler_output.total_num_scheduled_tokens,
            "verified": sum(map(len, drafts)),
        }
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        made = sum(map(len, output.sampled_token_ids)) if output is not None else 0
        self._trace.write(json.dumps({**self._step, "end_s": time.monotonic(), "made": made}) + "\n")
        return output
