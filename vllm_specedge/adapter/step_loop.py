"""The choice between synchronous and asynchronous steps of an asynchronous engine, made anew for each step.

vLLM's EngineCore has `step`, which waits for the outcome of what it scheduled, and `step_with_batch_queue`, which
schedules a step while the previous one is computed. It calls the one in `step_fn` (v1/engine/core.py).
"""

from collections.abc import Callable
from typing import Any


class StepLoop:
    """Replaces an EngineCore's `step_fn`."""

    def __init__(self, core: Any, is_synchronous: Callable[[], bool]) -> None:
        self.is_draining = False
        """Whether the engine waits for a running step before it schedules anything: the scheduler reports no requests.
        """
        self.is_synchronous_step = False
        """Whether the step that is being scheduled is synchronous."""
        self._core = core
        self._is_synchronous = is_synchronous

    def step(self) -> tuple[Any, bool]:
        """Like EngineCore.step. Returns the outputs by client, and whether the model ran."""
        core = self._core
        if not self._is_synchronous():
            return core.step_with_batch_queue()  # type: ignore[no-any-return]
        if core.batch_queue:
            return self._drain()
        self.is_synchronous_step = True
        try:
            return core.step()  # type: ignore[no-any-return]
        finally:
            self.is_synchronous_step = False

    def _drain(self) -> tuple[Any, bool]:
        self.is_draining = True
        try:
            outputs, _ = self._core.step_with_batch_queue()
        finally:
            self.is_draining = False
        return outputs, True  # with False vLLM would sleep a millisecond, as if there were nothing to do
