"""The worker's part on vLLM's V2 model runner, which reads drafts on the device: writes the scheduler's drafts there.

The V2 runner gets the number of draft tokens of a request from the SchedulerOutput, and the tokens themselves from a
tensor on the device that its speculator filled after the last step (v1/worker/gpu/model_runner.py, `prepare_inputs`).
Here the scheduler has the tokens: they are written to the tensor right before the step that verifies them.

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
    """Replaces vLLM's speculator, and drafts nothing."""

    supports_mm_inputs = False
    draft_logits = None

    def __init__(self, states: Any) -> None:
        self._states = states

    def propose(self, input_batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The present draft tokens, unchanged: int64 [requests, most draft tokens]."""
        del args, kwargs
        tokens: torch.Tensor = self._states.draft_tokens[input_batch.idx_mapping]
        return tokens

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Do nothing: there is no draft model."""

    def capture(self) -> None:
        """Do nothing: there is no draft model."""

    def prepare_watermarking(self, *args: Any) -> None:
        """Do nothing: there are no drafts to mark."""


def mend(runner: Any) -> None:
    """Make a V2 model runner verify the scheduler's drafts."""
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
    """Write draft tokens, by request id, to the device, with one copy and one kernel for any number of them.

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
