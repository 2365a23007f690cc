"""The extension that vLLM makes a base class of its workers, on servers with the V2 model runner."""

import logging
from typing import Any

from vllm_specedge.adapter import hooks

logger = logging.getLogger("vllm.specedge.worker")


class EdgeWorker:
    """For vLLM's `--worker-extension-cls`; `--speculative-config edge` sets it."""

    model_runner: Any
    """vLLM's attribute."""

    def init_worker_extension(self) -> None:
        """vLLM calls this when it has created the runner, before the model is loaded (v1/worker/worker_base.py)."""
        problems = hooks.drafting_problems(hooks.V2)
        if problems:  # the scheduler finds them too, and sends no drafts
            logger.warning("This worker verifies no edge drafts: %s", "; ".join(problems))
            return
        from vllm_specedge.adapter.worker import coupling, placing

        placing.mend(self.model_runner)
        coupling.couple_v2()
