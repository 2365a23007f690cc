"""The worker's part on vLLM's V2 model runner, where drafts stay on the device: puts there what the scheduler chose.

The V2 runner takes from a SchedulerOutput how many draft tokens a request verifies, and which ones from a tensor on the
device that its speculator filled after the last step (v1/worker/gpu/model_runner.py, `prepare_inputs`). Here the
scheduler has them: they are written there right before the step that verifies them.

Every rank of tensor parallelism gets the same SchedulerOutput, and writes the same.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator


class EdgeSpeculator(BaseSpeculator):
    """Takes the place of vLLM's speculator, and drafts nothing."""

    supports_mm_inputs = False
    draft_logits = None

    def __init__(self, states: Any) -> None:
        self._states = states

    def propose(self, input_batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What is there already, int64 of (requests, most draft tokens)."""
        del args, kwargs
        tokens: torch.Tensor = self._states.draft_tokens[input_batch.idx_mapping]
        return tokens

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """There is no model that runs."""

    def capture(self) -> None:
        """There is no model that runs."""

    def prepare_watermarking(self, *args: Any) -> None:
        """Nothing is drafted that could be marked."""


def mend(runner: Any) -> None:
    """Have a V2 model runner verify what the scheduler chose."""
    runner.speculator = EdgeSpeculator(runner.req_states)
    runner.execute_model = _placing(runner.execute_model, runner.req_states)


def _placing(execute_model: Callable[..., Any], states: Any) -> Callable[..., Any]:
    @wraps(execute_model)
    def wrapped(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if scheduler_output.scheduled_spec_decode_tokens:
            with torch.inference_mode():
                place(states, scheduler_output.scheduled_spec_decode_tokens)
        return execute_model(scheduler_output, *args, **kwargs)

    return wrapped


def place(states: Any, drafts: Mapping[str, Sequence[int]]) -> None:
    """Write draft tokens by request id to the device: one copy and one kernel, whatever their number.

    A request without a slot there has just been freed, and is not in the step either.
    """
    slots = {states.req_id_to_index[id_]: tokens for id_, tokens in drafts.items() if id_ in states.req_id_to_index}
    if not slots:
        return
    width = states.draft_tokens.shape[1]
    rows = np.zeros((len(slots), 1 + width), dtype=np.int64)
    for row, (slot, tokens) in zip(rows, slots.items(), strict=True):
        row[0] = slot
        row[1 : 1 + len(tokens)] = tokens[:width]
    on_device = async_tensor_h2d(rows, device=states.draft_tokens.device)
    states.draft_tokens.index_copy_(0, on_device[:, 0], on_device[:, 1:])
