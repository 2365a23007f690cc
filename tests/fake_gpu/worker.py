"""vLLM's GPU worker with its V1 or V2 model runner, on the CPU's memory."""

from typing import Any

import torch
import vllm.v1.sample.ops.topk_topp_sampler as top_k_top_p
import vllm.v1.worker.gpu_worker as gpu_worker
from vllm.logger import init_logger
from vllm.utils.mem_utils import MemorySnapshot

logger = init_logger("vllm.tests.fake_gpu")


def apply_top_k_top_p(logits: torch.Tensor, k: Any, p: Any, **options: Any) -> torch.Tensor:
    """In plain torch, as Triton's interpreter cannot run the kernel."""
    del options
    return top_k_top_p.apply_top_k_top_p_pytorch(logits, k, p, allow_cpu_sync=True)


top_k_top_p.apply_top_k_top_p_triton = apply_top_k_top_p
gpu_worker.kernel_warmup = lambda *args, **kwargs: None


class Worker(gpu_worker.Worker):
    """The GPU worker, except for its initial device."""

    def init_device(self) -> None:
        self.device = torch.device("cpu")
        gpu_worker.init_worker_distributed_environment(
            self.vllm_config, self.rank, self.distributed_init_method, self.local_rank, "gloo"
        )
        gpu_worker.set_random_seed(self.model_config.seed)
        self.init_snapshot = MemorySnapshot(device=self.device)
        self.requested_memory = gpu_worker.request_memory(self.init_snapshot, self.cache_config)
        self._init_workspace_and_model_runner()
        logger.info("The model runner is %s", type(self.model_runner).__module__)


class Extension:
    """A user's own worker extension."""
