"""vLLM's own CUDA platform, except for the location of its tensors."""

from typing import Any

from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.cuda import NonNvmlCudaPlatform


class H100Platform(NonNvmlCudaPlatform):
    """Has the worker of these tests, which puts its tensors into the CPU's memory."""

    device_type = "cpu"
    dist_backend = "gloo"
    dispatch_key = "CPU"

    @classmethod
    def import_kernels(cls) -> None:
        CpuPlatform.import_kernels()

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return False

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        if vllm_config.parallel_config.worker_cls == "auto":
            vllm_config.parallel_config.worker_cls = "tests.fake_gpu.worker.Worker"
        super().check_and_update_config(vllm_config)

    @classmethod
    def device_count(cls) -> int:
        return 2
