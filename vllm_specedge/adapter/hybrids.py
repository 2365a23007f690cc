"""Hybrid models, which have layers with a state: which of them can be verified, where, and with which settings.

vLLM keeps a state for each draft position, and continues from that of the last accepted token. docs/design.md, "Models
with a state", describes which state a step reads and where that was wrong.
"""

import logging
from typing import Any

from vllm_specedge.adapter import hooks
from vllm_specedge.adapter.start import engine_options
from vllm_specedge.errors import UserError

logger = logging.getLogger("vllm.specedge.hybrids")

GATED_DELTA_NETS = {
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
}
"""Architectures whose drafts vLLM's CPU backend can verify."""
WITHOUT_DRAFT_STATES = {"JambaForCausalLM", "JambaForSequenceClassification"}
"""Architectures with Mamba-1 layers, which keep no state per draft position in vLLM
(v1/attention/backends/mamba1_attn.py)."""


def check(config: Any) -> None:
    """Raises UserError for a model whose drafts cannot be verified, or for which that is untested."""
    from vllm.platforms import current_platform

    model = config.model_config
    if model.is_attention_free:
        raise UserError("Edge drafting does not work with models without attention (Mamba): serve without it.")
    if not model.is_hybrid:
        return
    kind = model.architecture
    problems = hooks.problems(hooks.HYBRIDS)
    if problems:
        raise UserError(f"Edge drafting does not work with {kind} on this vLLM, as {problems[0]}: serve without it.")
    if kind in WITHOUT_DRAFT_STATES:
        raise UserError(
            f"Edge drafting does not work with {kind}: vLLM keeps no state of its Mamba-1 layers for each draft token. "
            "Serve without it."
        )
    if current_platform.is_cpu():
        _check_on_cpu(config, kind)
    elif engine_options(config).hybrid:
        logger.warning("Edge drafting with %s is untested on GPUs: compare its answers before you rely on them", kind)
    else:
        raise UserError(
            f"Edge drafting with {kind} has not been tried on GPUs, where states of linear attention are handled "
            'differently than on CPUs: serve without it, or try it with "hybrid": true.'
        )


def _check_on_cpu(config: Any, kind: str) -> None:
    if kind not in GATED_DELTA_NETS:
        raise UserError(
            f"Edge drafting does not work with {kind} on CPUs: vLLM's Mamba-2 and convolution layers there forget how "
            "many drafts were accepted. Serve without it."
        )
    if str(config.model_config.dtype) != "torch.bfloat16":
        raise UserError(f"vLLM runs {kind} on CPUs in bfloat16 only: add --dtype bfloat16.")


def drop_prefix_caching(args: Any, config: Any, is_asked: bool) -> bool:
    """Turn off prefix caching if vLLM's CPU backend cannot combine it with speculation for this model. Returns whether
    it was turned off.

    Prefix caching stores states at block borders with Triton kernels that have no other implementation. Raises
    UserError if the user asked for it.
    """
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    is_cached = config.model_config.is_hybrid and config.cache_config.enable_prefix_caching
    if not is_cached or not current_platform.is_cpu() or HAS_TRITON:
        return False
    if is_asked:
        raise UserError(
            "Edge drafting works with this model on CPUs only without prefix caching, which needs Triton there: "
            "leave --enable-prefix-caching out."
        )
    args.enable_prefix_caching = False
    logger.info("Prefix caching is off: with this model and drafts it needs Triton")
    return True
