"""Fix for a bug of vLLM's V1 runner with models that keep a state (linear attention, convolutions): a request that is
left out of a step continues from a stale state.

After a step that verified drafts, such a model has a state for each draft position. The runner stores the number of
accepted tokens by batch row, which tells where the request continues. A request that a step leaves out loses its row,
and later gets a new one with a count of 1, the state before all accepted drafts (v1/worker/gpu_input_batch.py,
`add_request`). In plain vLLM this happens if the token budget leaves a running request out; with edges, requests are
held regularly. Here the count is kept by request and restored.
"""

from collections.abc import Collection
from typing import Any

from vllm_specedge.adapter.wrapping import wrap

_KEPT = "_specedge_accepted"
"""Attribute of a runner: accepted tokens of the last step, the bonus token included, by request without a row."""


def mend() -> None:
    """Wrap vLLM's V1 runner in this process. Calling it again is harmless."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    wrap(GPUModelRunner, "_update_states", _remembering)


def _remembering(update_states: Any) -> Any:
    def remembering(self: Any, scheduler_output: Any) -> Any:
        if not self.model_config.is_hybrid:
            return update_states(self, scheduler_output)
        kept: dict[str, int] = self.__dict__.setdefault(_KEPT, {})
        _keep(kept, self, scheduler_output.num_scheduled_tokens.keys())
        for request_id in _begun_anew(scheduler_output):
            kept.pop(request_id, None)
        result = update_states(self, scheduler_output)
        _put_back(kept, self.input_batch)
        return result

    return remembering


def _keep(kept: dict[str, int], runner: Any, scheduled: Collection[str]) -> None:
    """Keep the counts of requests that lose their rows."""
    batch = runner.input_batch
    leaving = batch.req_id_to_index.keys() - scheduled
    if leaving and runner.num_accepted_tokens_event is not None:
        runner.num_accepted_tokens_event.synchronize()  # the counts are copied from the device asynchronously
    for request_id in leaving:
        kept[request_id] = int(batch.num_accepted_tokens_cpu[batch.req_id_to_index[request_id]])


def _begun_anew(scheduler_output: Any) -> set[str]:
    """Requests whose states are gone, or are computed again from the first token."""
    return {
        *scheduler_output.finished_req_ids,
        *(scheduler_output.preempted_req_ids or ()),
        *scheduler_output.scheduled_cached_reqs.resumed_req_ids,
        *(request.req_id for request in scheduler_output.scheduled_new_reqs),
    }


def _put_back(kept: dict[str, int], batch: Any) -> None:
    for request_id in kept.keys() & batch.req_id_to_index.keys():
        batch.num_accepted_tokens_cpu[batch.req_id_to_index[request_id]] = kept.pop(request_id)
