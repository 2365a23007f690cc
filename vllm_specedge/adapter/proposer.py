"""The worker extension that takes the local proposer's place in vLLM's worker."""

import copy
import threading
from typing import Any

import numpy as np
from vllm.logger import init_logger

from vllm_specedge.adapter import cpu_kernels, hooks
from vllm_specedge.adapter.start import engine_options
from vllm_specedge.config import EdgeOptions

logger = init_logger("vllm.specedge.proposer")


class EdgeProposer:
    """Drafts what vLLM's own n-gram lookup finds, for requests without an edge; the scheduler decides what is verified.

    vLLM builds it by path (method "custom_class", v1/spec_decode/custom_class_proposer.py) and calls `propose` after
    every step, on every tensor-parallel rank. The engine takes the first rank's drafts (v1/executor,
    take_draft_token_ids): the others look nothing up.
    """

    def __init__(self, vllm_config: Any) -> None:
        cpu_kernels.mend()
        self._num_tokens: int = vllm_config.speculative_config.num_speculative_tokens
        self._lookup: Any = None
        options = engine_options(vllm_config)
        if options.ngram and vllm_config.parallel_config.rank == 0:
            self._start(vllm_config, options)

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: Any = None,
        token_ids_cpu: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> list[list[int]]:
        """One list of draft tokens a batch row, often empty."""
        del args, kwargs
        if self._lookup is not None:
            try:
                return self._lookup.propose(self._num_tokens, sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
            except Exception:
                logger.exception("vLLM's n-gram lookup failed and is off; serving goes on without it")
                self._lookup = None
        return [[] for _ in sampled_token_ids]

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """The CPU worker calls this without asking (v1/worker/cpu_model_runner.py); there is no model."""
        del args, kwargs

    def _start(self, vllm_config: Any, options: EdgeOptions) -> None:
        problems = hooks.ngram_problems()
        if problems:
            logger.warning("Serving without n-gram drafts: %s", "; ".join(problems))
            return
        # Not a daemon: a process that ends while numba compiles waits for it rather than crash in it.
        threading.Thread(target=self._compile, args=(vllm_config, options), name="specedge-ngram").start()

    def _compile(self, vllm_config: Any, options: EdgeOptions) -> None:
        """Build the lookup and have it compiled, while the model loads; until then there are no drafts.

        numba compiles with the first request that is looked up, two seconds. vLLM's own warm-up looks up none, so
        that its `ngram` method makes the first request wait (v1/spec_decode/ngram_proposer.py).
        """
        from vllm.v1.spec_decode.ngram_proposer import NgramProposer

        try:
            lookup = NgramProposer(_lookup_config(vllm_config, options))
            lookup.propose(self._num_tokens, [[0]], np.ones(1, np.int32), np.zeros((1, 1), np.int32))
        except Exception:
            logger.exception("Serving without n-gram drafts: vLLM's lookup cannot be started")
        else:
            self._lookup = lookup


def _lookup_config(vllm_config: Any, options: EdgeOptions) -> Any:
    """A VllmConfig with the lookup's window, which vLLM sets to 0 for a custom class (config/speculative.py)."""
    config = copy.copy(vllm_config)
    config.speculative_config = copy.copy(vllm_config.speculative_config)
    config.speculative_config.prompt_lookup_min = options.prompt_lookup_min
    config.speculative_config.prompt_lookup_max = options.prompt_lookup_max
    return config
