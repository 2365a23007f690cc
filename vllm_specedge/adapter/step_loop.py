"""How an asynchronous engine's steps follow each other: vLLM's own two ways, chosen anew for each step.

vLLM's EngineCore has `step`, which waits for the outcome of what it scheduled, and `step_with_batch_queue`, which
schedules a step while the one before is computed; it calls whichever `step_fn` names (v1/engine/core.py).
"""

from collections.abc import Callable
from typing import Any


class StepLoop:
    """Takes the place of an EngineCore's `step_fn`."""

    def __init__(self, core: Any, is_synchronous: Callable[[], bool]) -> None:
        self.is_draining = False
        """The outcome of a step is waited for before anything else is scheduled: the scheduler has no requests."""
        self.is_synchronous_step = False
        """The step that is scheduled now is waited for."""
        self._core = core
        self._is_synchronous = is_synchronous

    def step(self) -> tuple[Any, bool]:
        """As EngineCore.step: outputs by client, and whether the model was run."""
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
        return outputs, True  # else vLLM sleeps a millisecond, as if there were nothing to do
