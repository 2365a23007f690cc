"""A vLLM worker for benchmarks only: emits the tokens of a pseudo language model after an accelerator's step time.

    SPECEDGE_EMULATED=a100-14b PYTHONPATH=benchmarks vllm serve MODEL --worker-cls emulated_worker.EmulatedWorker

Engine, scheduler, KV cache manager, front end and wire are vLLM's own. The model is loaded and never run. Steps run one
after the other, as on a device: an engine with asynchronous scheduling gets the output of one while the next waits.
"""

import os
import time
from dataclasses import dataclass
from typing import Any

import torch
from emulation import SERVER_VARIABLE, SLOWER_VARIABLE, Pacer, PseudoModel
from vllm.platforms import current_platform
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_specedge.simulation.models import SERVERS

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:  # the simulated H100, where vLLM schedules asynchronously
    from tests.fake_gpu.worker import Worker

SPIN_S = 0.0003
"""A sleep may end late by about this much."""


@dataclass
class Due(AsyncModelRunnerOutput):
    """The output of a step that ends at a certain time."""

    output: ModelRunnerOutput
    due_s: float
    pacer: Pacer

    def get_output(self) -> ModelRunnerOutput:
        """Wait for the end of the step; vLLM calls this in the engine's thread."""
        time.sleep(max(0.0, self.due_s - time.monotonic() - SPIN_S))
        while time.monotonic() < self.due_s:
            pass
        self.pacer.end(time.monotonic())
        return self.output

    def get_kv_connector_output(self) -> None:
        """None: nothing was transferred."""


class EmulatedWorker(Worker):
    """Replaces the platform's worker; `--worker-cls emulated_worker.EmulatedWorker`."""

    def determine_available_memory(self) -> int:
        """The size given by --kv-cache-memory-bytes, without a pass that measures the rest."""
        return int(self.cache_config.kv_cache_memory_bytes)

    def compile_or_warm_up_model(self) -> Any:
        self._model = PseudoModel()
        self._pacer = Pacer(SERVERS[os.environ[SERVER_VARIABLE]], float(os.environ.get(SLOWER_VARIABLE, "1")))
        self._output: Due | None = None
        # Requested at start-up, for the profile of the cost model.
        self.model_runner._dummy_run = self._emulated_pass
        self.model_runner.model.compute_logits = lambda states: states
        return CompilationTimes(0.0, 0.0)

    def _emulated_pass(self, num_tokens: int, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        del kwargs
        time.sleep(self._pacer.slower * self._pacer.server.step_s(1, num_tokens))
        return torch.zeros(num_tokens, 1), torch.zeros(num_tokens, 1)

    def execute_model(self, scheduler_output: Any) -> ModelRunnerOutput | None:
        now_s = time.monotonic()
        for id_ in scheduler_output.finished_req_ids:
            self._model.close(id_)
        has_more = len(self._model) > 0
        computed = {}
        for new in scheduler_output.scheduled_new_reqs:
            self._model.open(new.req_id, new.prompt_token_ids)
            computed[new.req_id] = new.num_computed_tokens
        cached = scheduler_output.scheduled_cached_reqs
        computed |= zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        scheduled = scheduler_output.num_scheduled_tokens
        if not scheduled:
            return EMPTY_MODEL_RUNNER_OUTPUT
        drafts = scheduler_output.scheduled_spec_decode_tokens
        num_tokens = scheduler_output.total_num_scheduled_tokens
        due_s = self._pacer.start(len(scheduled), num_tokens, bool(drafts), has_more, now_s)
        said = self._model.step(scheduled, computed, drafts)
        output = ModelRunnerOutput(
            req_ids=list(said),
            req_id_to_index={id_: index for index, id_ in enumerate(said)},
            sampled_token_ids=list(said.values()),
        )
        self._output = Due(output, due_s, self._pacer)
        return None

    def sample_tokens(self, grammar_output: Any) -> Due | None:
        del grammar_output
        return self._output

    def take_draft_token_ids(self) -> None:
        """No drafts: it does no prompt lookup."""

    def emulation(self) -> dict[str, float]:
        """Counters for the benchmark, through vLLM's /collective_rpc."""
        return self._pacer.report()
