"""A short profile of the model's steps at start-up: what the cost model begins with (stepcost.py)."""

import logging
import time
from typing import Any

from vllm_specedge.policy.step_cost import PROFILED

logger = logging.getLogger("vllm.specedge.profile")

LIMIT_S = 0.6
"""No further size is tried after so long; a large one on a CPU takes about as long again."""


def step_profile(engine: Any, max_tokens: int) -> dict[int, float] | None:
    """Seconds of a forward pass by its number of tokens, or None if it cannot be tried here."""
    if not hasattr(engine, "model_executor"):
        return None
    seconds: dict[int, float] = {}
    started_s = time.monotonic()
    try:
        engine.model_executor.collective_rpc(time_pass, args=(1,))  # the first one allocates
        for size in [size for size in PROFILED if size <= max_tokens]:
            if time.monotonic() - started_s < LIMIT_S:
                seconds[size] = engine.model_executor.collective_rpc(time_pass, args=(size,))[0]
        for size in list(seconds):  # again, and the shorter time counts: others may be starting on the same machine
            took_s = engine.model_executor.collective_rpc(time_pass, args=(size,))[0]
            seconds[size] = min(seconds[size], took_s)
    except Exception:
        logger.exception("Steps are not profiled; what they cost is learnt while serving")
    return seconds or None


def time_pass(worker: Any, size: int) -> float:
    """Seconds of a forward pass of `size` tokens, with the vocabulary's projection of all; runs on every worker."""
    import torch

    runner = worker.model_runner
    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else (lambda: None)
    wait()
    started_s = time.monotonic()
    with torch.inference_mode():
        hidden_states, _ = runner._dummy_run(size)
        runner.model.compute_logits(hidden_states[:size])
    wait()
    return time.monotonic() - started_s
