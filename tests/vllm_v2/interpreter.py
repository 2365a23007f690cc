"""vLLM's V2 model runner on a CPU: its Triton kernels run in Triton's interpreter. Must be imported before vLLM."""

import os
import types
from typing import Any

os.environ.update(
    TRITON_INTERPRET="1",
    VLLM_USE_V2_MODEL_RUNNER="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_PLUGINS="",
    HF_HUB_OFFLINE="1",
)


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


def prepare() -> None:
    """Make vLLM use a Triton for CPUs, and replace what the interpreter cannot run."""
    from triton.backends import backends

    backends.setdefault("cpu", types.SimpleNamespace(driver=_Driver))
    import vllm.v1.worker.gpu.sample.sampler as sampler
    import vllm.v1.worker.gpu.sample.states as states
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    def apply_top_k_top_p(logits: Any, k: Any, p: Any, has_topp_only_rows: Any = None) -> Any:
        del has_topp_only_rows
        if k is None and p is None:
            return logits
        return apply_top_k_top_p_pytorch(logits, k, p, allow_cpu_sync=True)

    states.apply_top_k_top_p = sampler.apply_top_k_top_p = apply_top_k_top_p


is_asynchronous = True
"""Scheduling of the next engine. On CPUs vLLM schedules synchronously, as the other way gains nothing there."""


def choose_scheduling() -> None:
    """Let `is_asynchronous` decide, regardless of vLLM's view of the platform."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, config: Any) -> None:
        check(cls, config)
        config.scheduler_config.async_scheduling = is_asynchronous

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def call_extensions() -> None:
    """vLLM 0.33 calls a worker extension's `init_worker_extension`; 0.32 does not know of it."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    if hasattr(WorkerWrapperBase, "_worker_extension_cls"):
        return
    init_device = WorkerWrapperBase.init_device

    def init_and_extend(self: Any) -> None:
        init_device(self)
        extend = getattr(self.worker, "init_worker_extension", None)
        if extend is not None:
            extend()

    WorkerWrapperBase.init_device = init_and_extend
