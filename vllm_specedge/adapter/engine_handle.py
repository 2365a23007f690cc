"""A handle of the EngineCore that owns a scheduler, since vLLM gives its schedulers no reference to it."""

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
"""Time after which no further size is profiled; a large one on a CPU takes about as long again."""


class EngineHandle:
    """A handle of an EngineCore, or of none: then nothing can be profiled, and the engine never parks."""

    def __init__(self, core: Any) -> None:
        self._core = core

    @property
    def has_loop(self) -> bool:
        """False in a process without a busy loop (LLM without multiprocessing)."""
        return hasattr(self._core, "input_queue")

    def is_running(self) -> bool:
        """Whether its loop goes on."""
        return bool(self._core.is_running())

    def wake(self) -> None:
        """Make its loop check for work again. Any thread may call this."""
        self._core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))

    @property
    def num_in_flight(self) -> int:
        """Scheduled steps whose outcome is not processed yet."""
        return len(getattr(self._core, "batch_queue", None) or ())

    def replace_step(self, make_step: Callable[[Any], Callable[[], Any]]) -> bool:
        """Replace the engine's step function by the one that `make_step` returns. False: the engine cannot."""
        if not hasattr(self._core, "step_fn") or getattr(self._core, "batch_queue", None) is None:
            return False
        self._core.step_fn = make_step(self._core)
        return True

    def skip_draft_poll(self) -> None:
        """Do not ask workers for drafts after a step: they have none, and all would wait for the round trip."""
        if self._core is not None:
            self._core.check_for_draft_tokens = False

    def step_profile(self, max_tokens: int) -> dict[int, float] | None:
        """Measured seconds of a forward pass by its number of tokens, the cost model's prior (policy/step_cost.py);
        None if that is not possible here."""
        if self._core is None:
            return None
        seconds: dict[int, float] = {}
        started_s = time.monotonic()
        try:
            self._time_pass(1)  # the first one allocates
            for size in [size for size in PROFILED if size <= max_tokens]:
                if time.monotonic() - started_s < LIMIT_S:
                    seconds[size] = self._time_pass(size)
            for size in list(seconds):  # twice, and the shorter time counts: other processes may be starting
                seconds[size] = min(seconds[size], self._time_pass(size))
        except Exception:
            logger.exception("Steps are not profiled; their cost is learnt while serving")
        return seconds or None

    def _time_pass(self, size: int) -> float:
        return float(self._core.model_executor.collective_rpc(time_pass, args=(size,))[0])


def time_pass(worker: Any, size: int) -> float:
    """Seconds of a forward pass of `size` tokens, with the logits of all of them; runs on every worker."""
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
    """The engine that is constructing the calling scheduler, a few stack frames up (v1/engine/core.py, __init__)."""
    for depth in range(1, _FRAMES):
        try:
            owner = sys._getframe(depth).f_locals.get("self")
        except ValueError:
            break
        if hasattr(owner, "model_executor"):
            return EngineHandle(owner)
    return EngineHandle(None)
