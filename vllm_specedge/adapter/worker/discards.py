"""Fix for a bug of vLLM's CPU backend that ends the engine: a `seed` on a prompt that is computed in chunks.

A step that computes a part of a prompt samples a token for it anyway, and discards it. This must not use up a seeded
request's random numbers, so vLLM sets its generator back, by an offset that generators on CPUs do not have
(v1/worker/gpu_model_runner.py, `_bookkeeping_sync`): `set_offset` raises, which ends the engine, in plain vLLM too.
Here the generator's whole state is restored instead.
"""

import logging
from typing import Any

import torch

from vllm_specedge.adapter import hooks
from vllm_specedge.adapter.wrapping import wrap

logger = logging.getLogger("vllm.specedge.discards")


def mend() -> None:
    """Wrap vLLM's worker in this process, if it runs on a CPU. Calling it again is harmless."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or _has_offsets():
        return
    problems = hooks.problems(hooks.DISCARDS)
    if problems:
        logger.warning("A seed on a long prompt would end the engine: %s", "; ".join(problems))
        return
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    wrap(GPUModelRunner, "_sample", _restoring)
    wrap(GPUModelRunner, "_bookkeeping_sync", _without_offsets)


def _has_offsets() -> bool:
    try:
        torch.Generator().get_offset()
    except RuntimeError:
        return False
    return True


def _discarded(runner: Any) -> dict[int, torch.Generator]:
    """The generators, by row, of requests whose token of this step is discarded."""
    batch = runner.input_batch
    is_discarded = runner.discard_request_mask.np
    return {row: generator for row, generator in batch.generators.items() if is_discarded[row]}


def _restoring(sample: Any) -> Any:
    def restored(self: Any, *args: Any, **kwargs: Any) -> Any:
        states = [(generator, generator.get_state()) for generator in _discarded(self).values()]
        output = sample(self, *args, **kwargs)
        for generator, state in states:
            generator.set_state(state)
        return output

    return restored


def _without_offsets(bookkeeping: Any) -> Any:
    def kept(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch, discarded = self.input_batch, _discarded(self)
        for row in discarded:
            del batch.generators[row]
        try:
            return bookkeeping(self, *args, **kwargs)
        finally:
            batch.generators.update(discarded)

    return kept
