"""Every vLLM name that this package relies on, checked when an engine starts: a missing one turns drafts off."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

TESTED_VERSIONS = ("0.32.", "0.33.")


@dataclass(frozen=True, slots=True)
class Hook:
    """`path` (module:qualified.name) must exist and, if it is a function, take `parameters`."""

    path: str
    parameters: tuple[str, ...] = ()


_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
HOOKS = (
    Hook(f"{_SCHEDULER}.schedule", ("throttle_prefills",)),
    Hook(f"{_SCHEDULER}.update_from_output", ("scheduler_output", "model_runner_output")),
    Hook(f"{_SCHEDULER}.get_grammar_bitmask", ("scheduler_output",)),
    Hook(f"{_SCHEDULER}.update_draft_token_ids", ("draft_token_ids",)),
    Hook(f"{_SCHEDULER}.add_request", ("request",)),
    Hook(f"{_SCHEDULER}._free_request", ("request", "delay_free_blocks")),
    Hook(f"{_SCHEDULER}.has_requests"),
    Hook(f"{_SCHEDULER}.shutdown"),
    Hook("vllm.v1.core.sched.interface:PauseState.UNPAUSED"),
    Hook("vllm.v1.core.block_pool:BlockPool.get_num_free_blocks"),
    Hook("vllm.v1.engine:EngineCoreRequestType.WAKEUP"),
    Hook("vllm.v1.outputs:DraftTokenIds", ("req_ids", "draft_token_ids")),
    Hook("vllm.v1.request:RequestStatus.RUNNING"),
    Hook("vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer", ("vllm_config",)),
)
NGRAM_HOOKS = (
    Hook(
        "vllm.v1.spec_decode.ngram_proposer:_find_longest_matched_ngram_and_propose_tokens.py_func",
        ("origin_tokens", "min_ngram", "max_ngram", "max_model_len", "k"),
    ),
)
"""What the n-gram drafts need beside; without it only they are off. Importing it loads numba: half a second, 65 MB."""
TRACING_HOOKS = (
    Hook("vllm.config:ObservabilityConfig.otlp_traces_endpoint"),
    Hook("vllm.tracing:extract_trace_context", ("headers",)),
    Hook("vllm.tracing:instrument_manual", ("span_name", "start_time", "attributes", "context")),
)
"""What spans of requests need beside; without it only they are off."""
_REJECTION = "vllm.v1.sample.rejection_sampler"
SAMPLING_HOOKS = (
    Hook(f"{_REJECTION}:RejectionSampler.forward", ("metadata", "draft_probs", "logits", "sampling_metadata")),
    Hook(
        f"{_REJECTION}:sample_recovered_tokens",
        ("max_spec_len", "num_draft_tokens", "cu_num_draft_tokens", "draft_token_ids", "draft_probs", "target_probs"),
    ),
)
"""What sampling.py wraps; without it nothing is left out, and drafts are used all the same."""
SAMPLING_SOURCES = (
    (f"{_REJECTION}:RejectionSampler.forward", "metadata.max_spec_len"),
    (f"{_REJECTION}:RejectionSampler.forward", "self.sampler("),
    (f"{_REJECTION}:sample_recovered_tokens", "sampling_metadata.generators"),
)
VERIFICATION_HOOKS = (
    Hook(f"{_REJECTION}:RejectionSampler.apply_logits_processors", ("logits", "sampling_metadata", "metadata")),
    Hook(f"{_REJECTION}:apply_sampling_constraints", ("logits", "cu_num_draft_tokens", "sampling_metadata")),
    Hook("vllm:SamplingParams._validate_spec_decode", ("speculative_config",)),
    Hook(
        "vllm.v1.worker.gpu_model_runner:build_logitsprocs",
        ("vllm_config", "device", "is_pin_memory", "is_pooling_model", "custom_logitsprocs"),
    ),
    Hook("vllm.v1.sample.logits_processor:BUILTIN_LOGITS_PROCESSORS"),
)
"""What verification.py wraps; without it requests with `min_p` or `logit_bias` are refused, as by vLLM alone."""
VERIFICATION_SOURCES = (
    (f"{_REJECTION}:RejectionSampler.forward", "apply_sampling_constraints("),
    (f"{_REJECTION}:RejectionSampler.apply_logits_processors", "isinstance(processor, MinTokensLogitsProcessor)"),
    ("vllm.v1.sample.logits_processor:LogitBiasLogitsProcessor.apply", "self.biases"),
    ("vllm.v1.sample.logits_processor:MinPLogitsProcessor.apply", "self.min_p_count"),
    ("vllm.v1.sample.logits_processor:MinPLogitsProcessor.update_state", "self.min_p.unsqueeze_(1)"),
)
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
DISCARD_HOOKS = (Hook(f"{_RUNNER}._sample"), Hook(f"{_RUNNER}._bookkeeping_sync"))
"""What discards.py wraps; without it a seed on a long prompt ends an engine on CPUs, as it does with vLLM alone."""
DISCARD_SOURCES = (
    (f"{_RUNNER}._bookkeeping_sync", "self.discard_request_mask.np"),
    (f"{_RUNNER}._bookkeeping_sync", "self.input_batch.generators"),
)
SOURCES = (
    ("vllm.v1.core.sched.scheduler:Scheduler.schedule", "next_decode_eligible_step"),
    ("vllm.v1.core.sched.scheduler:Scheduler.schedule", "spec_token_ids"),
    ("vllm.v1.core.sched.scheduler:Scheduler.__init__", "max_num_scheduled_tokens"),
    ("vllm.v1.core.sched.scheduler:Scheduler.__init__", "max_num_running_reqs"),
    ("vllm.v1.core.sched.scheduler:Scheduler.__init__", "self.block_size"),
    ("vllm.v1.core.sched.scheduler:Scheduler.__init__", "self.kv_cache_config"),
    ("vllm.v1.core.kv_cache_manager:KVCacheManager.__init__", "block_pool"),
    ("vllm.v1.request:Request.__init__", "next_decode_eligible_step"),
    ("vllm.v1.engine.core:EngineCoreProc.__init__", "input_queue"),
    ("vllm.v1.engine.core:EngineCore.post_step", "check_for_draft_tokens"),
)
"""Functions that must still mention a name: where vLLM offers an attribute rather than a method to rely on."""


def _resolve(path: str) -> object:
    module, _, name = path.partition(":")
    value: object = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _problem(hook: Hook) -> str | None:
    try:
        value = _resolve(hook.path)
    except (ImportError, AttributeError):
        return f"{hook.path} is missing"
    if not hook.parameters:
        return None
    missing = set(hook.parameters) - set(inspect.signature(value).parameters)  # type: ignore[arg-type]
    return f"{hook.path} does not take {', '.join(sorted(missing))}" if missing else None


def _source_problem(path: str, name: str) -> str | None:
    try:
        return None if name in inspect.getsource(_resolve(path)) else f"{path} knows no {name}"  # type: ignore[arg-type]
    except (ImportError, AttributeError, OSError, TypeError):
        return f"{path} is missing"


def problems() -> list[str]:
    """What stands between this package and the vLLM that is installed; empty when nothing does."""
    import vllm

    found = [_problem(hook) for hook in HOOKS] + [_source_problem(path, name) for path, name in SOURCES]
    if not vllm.__version__.startswith(TESTED_VERSIONS):
        found.append(f"vLLM {vllm.__version__} has not been tried ({', '.join(v + 'x' for v in TESTED_VERSIONS)} have)")
    return [problem for problem in found if problem is not None]


def ngram_problems() -> list[str]:
    """What stands between the n-gram drafts and the vLLM that is installed; empty when nothing does."""
    return [problem for problem in map(_problem, NGRAM_HOOKS) if problem is not None]


def tracing_problems() -> list[str]:
    """What stands between spans of requests and the vLLM that is installed; empty when nothing does."""
    return [problem for problem in map(_problem, TRACING_HOOKS) if problem is not None]


def sampling_problems() -> list[str]:
    """What stands between shorter sampling and the vLLM that is installed; empty when nothing does."""
    found = [*map(_problem, SAMPLING_HOOKS), *(_source_problem(*source) for source in SAMPLING_SOURCES)]
    return [problem for problem in found if problem is not None]


def verification_problems() -> list[str]:
    """What stands between requests with `min_p` or `logit_bias` and drafts; empty when nothing does."""
    found = [*map(_problem, VERIFICATION_HOOKS), *(_source_problem(*source) for source in VERIFICATION_SOURCES)]
    return [problem for problem in found if problem is not None]


def discard_problems() -> list[str]:
    """What stands between a seed on a long prompt and a CPU; empty when nothing does."""
    found = [*map(_problem, DISCARD_HOOKS), *(_source_problem(*source) for source in DISCARD_SOURCES)]
    return [problem for problem in found if problem is not None]


def report(print_line: Callable[[str], None]) -> list[str]:
    """Check, and say so a line each."""
    import vllm

    print_line(f"vLLM {vllm.__version__}")
    found = problems()
    for problem in found:
        print_line(f"problem: {problem}")
    for problem in ngram_problems():
        print_line(f"No n-gram drafts: {problem}")
    for problem in tracing_problems():
        print_line(f"No traces of drafts: {problem}")
    for problem in sampling_problems():
        print_line(f"No shorter sampling: {problem}")
    for problem in verification_problems():
        print_line(f"Requests with min_p or logit_bias are refused: {problem}")
    for problem in discard_problems():
        print_line(f"A seed on a long prompt may end an engine on CPUs: {problem}")
    print_line("Edges cannot be used with it." if found else f"All {len(HOOKS) + len(SOURCES)} hooks are there.")
    return found
