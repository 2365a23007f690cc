"""The proposer that replaces a local draft model in vLLM's worker."""

from typing import Any

from vllm_specedge.adapter.worker import (
    coupling,
    cpu_kernels,
    cpu_states,
    discards,
    held_states,
    sampling,
    verification,
)


class EdgeProposer:
    """Drafts nothing: the scheduler has the drafts, from edges and from the n-gram lookup (ngrams.py).

    vLLM constructs it by its path (method "custom_class", v1/spec_decode/custom_class_proposer.py) and calls `propose`
    after every step. Its presence makes the worker verify drafts.
    """

    def __init__(self, vllm_config: Any) -> None:
        if vllm_config.model_config.is_hybrid:
            held_states.mend()
            cpu_states.mend()
        cpu_kernels.mend()
        discards.mend()
        sampling.shorten()
        coupling.couple_v1()
        verification.mend()

    def propose(self, sampled_token_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        """An empty list of draft tokens for each batch row."""
        del args, kwargs
        return [[] for _ in sampled_token_ids]

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """The CPU worker calls this unconditionally (v1/worker/cpu_model_runner.py); there is no model."""
        del args, kwargs
