"""The EngineCore around a scheduler, to which vLLM gives a scheduler no reference: all that is asked of it."""

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from vllm.v1.engine import EngineCoreRequestType

from vllm_specedge.policy.step_cost import PROFILED

logger = logging.getLogger("vllm.specedge.engine")

_FRAMES = 12
LIMIT_S = 0.6
"""No further size is profiled after this long; a large one on a CPU takes about as long again."""


class EngineHandle:
    """An EngineCore, or none: then nothing can be profiled, and nobody parks."""

    def __init__(self, core: Any) -> None:
        self._core = core

    @property
    def has_loop(self) -> bool:
        """False in a process without a busy loop (LLM without multiprocessing)."""
        return hasattr(self._core, "input_queue")

    def is_running(self) -> bool:
        """Whether its loop is not about to end."""
        return bool(self._core.is_running())

    def wake(self) -> None:
        """Make its loop look again. Any thread may call this."""
        self._core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))

    @property
    def num_in_flight(self) -> int:
        """Steps that are scheduled and whose outcome is not taken in."""
        return len(getattr(self._core, "batch_queue", None) or ())

    def replace_step(self, make_step: Callable[[Any], Callable[[], Any]]) -> bool:
        """Have each of the engine's steps made by what `make_step` returns for it; whether the engine can."""
        if not hasattr(self._core, "step_fn") or getattr(self._core, "batch_queue", None) is None:
            return False
        self._core.step_fn = make_step(self._core)
        return True

    def skip_draft_poll(self) -> None:
        """Workers draft nothing here, and asking them after a step costs a round trip, for all to wait."""
        if self._core is not None:
            self._core.check_for_draft_tokens = False

    def step_profile(self, max_tokens: int) -> dict[int, float] | None:
        """Seconds of a forward pass by its number of tokens, or None if it cannot be tried here: what the cost model
        begins with (policy/step_cost.py)."""
        if self._core is None:
            return None
        seconds: dict[int, float] = {}
        started_s = time.monotonic()
        try:
            self._time_pass(1)  # the first one allocates
            for size in [size for size in PROFILED if size <= max_tokens]:
                if time.monotonic() - started_s < LIMIT_S:
                    seconds[size] = self._time_pass(size)
            for size in list(seconds):  # again, and the shorter time counts: others may be starting on this machine
                seconds[size] = min(seconds[size], self._time_pass(size))
        except Exception:
            logger.exception("Steps are not profiled; what they cost is learnt while serving")
        return seconds or None

    def _time_pass(self, size: int) -> float:
        return float(self._core.model_executor.collective_rpc(time_pass, args=(size,))[0])


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


def find_engine() -> EngineHandle:
    """The engine that is building the scheduler which calls this: a few frames up (v1/engine/core.py, __init__)."""
    for depth in range(1, _FRAMES):
        try:
            owner = sys._getframe(depth).f_locals.get("self")
        except ValueError:
            break
        if hasattr(owner, "model_executor"):
            return EngineHandle(owner)
    return EngineHandle(None)
