"""All vLLM names that this package relies on, checked when an engine starts: a missing one turns off what needs it."""

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


@dataclass(frozen=True, slots=True)
class Part:
    """The vLLM names that one part of this package needs."""

    without: str
    """The effect if any is missing."""
    hooks: tuple[Hook, ...]
    sources: tuple[tuple[str, str], ...] = ()
    """Functions whose source must mention a name, for attributes, which cannot be checked otherwise."""


_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_CORE = "vllm.v1.engine.core:EngineCore"
_REJECTION = "vllm.v1.sample.rejection_sampler"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_RUNNER_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
DRAFTING, V1, V2, EXTENSION = "drafting", "V1 runner", "V2 runner", "worker extension"
NGRAMS, TRACING, SAMPLING, VERIFICATION, VERIFICATION_V2, DISCARDS, COUPLING, COUPLING_V2, NOISE_V2, HYBRIDS = (
    "n-grams",
    "tracing",
    "sampling",
    "verification",
    "V2 verification",
    "discards",
    "coupling",
    "V2 coupling",
    "V2 noise",
    "hybrid models",
)
CLASSES = "classes of requests"
PARTS = {
    DRAFTING: Part(
        "Edges cannot be used",
        (
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
        ),
        (
            (f"{_SCHEDULER}.schedule", "next_decode_eligible_step"),
            (f"{_SCHEDULER}.schedule", "spec_token_ids"),
            (f"{_SCHEDULER}.__init__", "max_num_scheduled_tokens"),
            (f"{_SCHEDULER}.__init__", "max_num_running_reqs"),
            (f"{_SCHEDULER}.__init__", "self.block_size"),
            (f"{_SCHEDULER}.__init__", "self.kv_cache_config"),
            ("vllm.v1.core.kv_cache_manager:KVCacheManager.__init__", "block_pool"),
            ("vllm.v1.core.block_pool:BlockPool.__init__", "self.num_gpu_blocks"),
            ("vllm.v1.request:Request.__init__", "next_decode_eligible_step"),
            ("vllm.v1.request:Request.__init__", "num_output_placeholders"),
            ("vllm.v1.engine.core:EngineCoreProc.__init__", "input_queue"),
            (f"{_CORE}.post_step", "check_for_draft_tokens"),
        ),
    ),
    V1: Part(
        "Edges cannot be used on the V1 model runner",
        (Hook("vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer", ("vllm_config",)),),
    ),
    V2: Part(
        "Edges cannot be used on the V2 model runner",
        (
            Hook("vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule", ("scheduler_output",)),
            Hook(f"{_CORE}.step"),
            Hook(f"{_CORE}.step_with_batch_queue"),
            Hook(f"{_RUNNER_V2}.execute_model", ("scheduler_output",)),
            Hook("vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator.propose", ("input_batch",)),
            Hook("vllm.utils.torch_utils:async_tensor_h2d", ("data", "device")),
        ),
        (
            ("vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule", "num_output_placeholders"),
            ("vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule", "num_spec_tokens_to_schedule"),
            (f"{_CORE}.__init__", "self.step_fn"),
            (f"{_CORE}.__init__", "self.batch_queue"),
            ("vllm.v1.engine.core:EngineCoreProc._process_engine_step", "self.step_fn()"),
            (f"{_RUNNER_V2}.__init__", "self.speculator"),
            (f"{_RUNNER_V2}.__init__", "self.req_states"),
            (f"{_RUNNER_V2}.prepare_inputs", "self.req_states.draft_tokens"),
            ("vllm.v1.worker.gpu.states:RequestState.__init__", "self.draft_tokens"),
            ("vllm.v1.worker.gpu.states:RequestState.__init__", "self.req_id_to_index"),
        ),
    ),
    EXTENSION: Part(
        "Servers stay on the V1 model runner",
        (),
        (("vllm.v1.worker.worker_base:WorkerWrapperBase.init_device", "init_worker_extension"),),
    ),
    # Importing this loads numba: half a second, 65 MB.
    NGRAMS: Part(
        "No n-gram drafts",
        (
            Hook(
                "vllm.v1.spec_decode.ngram_proposer:_find_longest_matched_ngram_and_propose_tokens.py_func",
                ("origin_tokens", "min_ngram", "max_ngram", "max_model_len", "k"),
            ),
        ),
    ),
    TRACING: Part(
        "No traces of drafts",
        (
            Hook("vllm.config:ObservabilityConfig.otlp_traces_endpoint"),
            Hook("vllm.tracing:extract_trace_context", ("headers",)),
            Hook("vllm.tracing:instrument_manual", ("span_name", "start_time", "attributes", "context")),
        ),
    ),
    SAMPLING: Part(
        "No shorter sampling",
        (Hook(f"{_REJECTION}:RejectionSampler.forward", ("metadata", "draft_probs", "logits", "sampling_metadata")),),
        (
            (f"{_REJECTION}:RejectionSampler.forward", "metadata.max_spec_len"),
            (f"{_REJECTION}:RejectionSampler.forward", "self.sampler("),
        ),
    ),
    VERIFICATION: Part(
        "Requests with min_p or logit_bias are refused",
        (
            Hook(f"{_REJECTION}:RejectionSampler.apply_logits_processors", ("logits", "sampling_metadata", "metadata")),
            Hook(f"{_REJECTION}:apply_sampling_constraints", ("logits", "cu_num_draft_tokens", "sampling_metadata")),
            Hook("vllm:SamplingParams._validate_spec_decode", ("speculative_config",)),
            Hook(
                "vllm.v1.worker.gpu_model_runner:build_logitsprocs",
                ("vllm_config", "device", "is_pin_memory", "is_pooling_model", "custom_logitsprocs"),
            ),
            Hook("vllm.v1.sample.logits_processor:BUILTIN_LOGITS_PROCESSORS"),
        ),
        (
            (f"{_REJECTION}:RejectionSampler.forward", "apply_sampling_constraints("),
            (
                f"{_REJECTION}:RejectionSampler.apply_logits_processors",
                "isinstance(processor, MinTokensLogitsProcessor)",
            ),
            ("vllm.v1.sample.logits_processor:LogitBiasLogitsProcessor.apply", "self.biases"),
            ("vllm.v1.sample.logits_processor:MinPLogitsProcessor.apply", "self.min_p_count"),
            ("vllm.v1.sample.logits_processor:MinPLogitsProcessor.update_state", "self.min_p.unsqueeze_(1)"),
        ),
    ),
    VERIFICATION_V2: Part(
        "Requests with min_p or logit_bias are refused on the V2 model runner",
        (Hook("vllm:SamplingParams._validate_spec_decode", ("speculative_config",)),),
        (
            (
                "vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler",
                "self.sampler.apply_sampling_params(",
            ),
            (
                "vllm.v1.worker.gpu.sample.sampler:Sampler.apply_sampling_params",
                "apply_min_p(logits, expanded_idx_mapping",
            ),
            ("vllm.v1.worker.gpu.sample.sampler:Sampler.__init__", "LogitBiasState"),
        ),
    ),
    DISCARDS: Part(
        "A seed on a long prompt may end an engine on CPUs",
        (Hook(f"{_RUNNER}._sample"), Hook(f"{_RUNNER}._bookkeeping_sync")),
        (
            (f"{_RUNNER}._bookkeeping_sync", "self.discard_request_mask.np"),
            (f"{_RUNNER}._bookkeeping_sync", "self.input_batch.generators"),
        ),
    ),
    COUPLING: Part(
        "A seed gives other tokens with edges than without",
        (
            Hook(f"{_REJECTION}:RejectionSampler.forward", ("metadata", "draft_probs", "logits", "sampling_metadata")),
            Hook(
                f"{_REJECTION}:rejection_sample",
                (
                    "draft_token_ids",
                    "num_draft_tokens",
                    "max_spec_len",
                    "cu_num_draft_tokens",
                    "draft_probs",
                    "target_logits",
                    "bonus_token_ids",
                    "sampling_metadata",
                ),
            ),
        ),
        (
            (f"{_REJECTION}:RejectionSampler.__init__", "self.use_fp64_gumbel"),
            (f"{_REJECTION}:RejectionSampler.forward", "self.sampler("),
            ("vllm.v1.sample.ops.topk_topp_sampler:TopKTopPSampler.forward_cpu", "fused_gumbel_argmax(logits_f32"),
            ("vllm.v1.sample.ops.topk_topp_sampler:TopKTopPSampler.forward_cpu", "0, 2**31, (1,), generator=gen"),
        ),
    ),
    COUPLING_V2: Part(
        "A seed gives other tokens with edges than without on the V2 model runner",
        (
            Hook(
                "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils:rejection_sample",
                (
                    "target_logits",
                    "draft_logits",
                    "draft_sampled",
                    "cu_num_logits",
                    "pos",
                    "idx_mapping",
                    "expanded_idx_mapping",
                    "expanded_local_pos",
                    "temperature",
                    "seed",
                    "num_speculative_steps",
                    "use_fp64",
                    "watermark_key",
                ),
            ),
            Hook(
                "vllm.v1.worker.gpu.sample.gumbel:gumbel_sample",
                ("logits", "expanded_idx_mapping", "temperature", "seed", "pos", "apply_temperature", "is_drafting"),
            ),
            Hook("vllm.v1.worker.gpu.sample.states:SamplingStates.add_request", ("req_idx", "sampling_params")),
        ),
        (("vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler._verify", "rejection_sample("),),
    ),
    CLASSES: Part(
        "No classes of requests by header or key",
        (Hook("vllm.entrypoints.generate.base.serving:PRIORITY_HEADER"),),
        (("vllm.entrypoints.generate.base.serving:GenerateBaseServing._get_priority", "headers.get(PRIORITY_HEADER)"),),
    ),
    HYBRIDS: Part(
        "Models with linear attention are refused",
        (
            Hook(f"{_RUNNER}._update_states", ("scheduler_output",)),
            Hook(
                "vllm.model_executor.layers.mamba.ops.cpu.gdn_attention:_spec_forward",
                ("layer", "attn_metadata_i", "mixed_qkv_spec", "b_spec", "a_spec", "conv_buf", "ssm_state", "width"),
            ),
        ),
        (
            ("vllm.v1.worker.gpu_input_batch:InputBatch.add_request", "self.num_accepted_tokens_cpu[req_index] = 1"),
            (f"{_RUNNER}._prepare_inputs", "zero_draft_decode_mask"),
            (f"{_RUNNER}._update_states", "unscheduled_req_ids"),
            (f"{_RUNNER}.__init__", "self.num_accepted_tokens_event"),
        ),
    ),
    NOISE_V2: Part(
        "Edges draft for sampled requests without their noise",
        (),
        (
            ("vllm.v1.worker.gpu.sample.states:SamplingStates.add_request", "self.seeds.np[req_idx] = seed"),
            ("vllm.v1.worker.gpu.sample.sampler:Sampler", "input_batch.positions[input_batch.logits_indices]"),
            ("vllm.v1.worker.gpu.sample.gumbel:murmur3_hash32.fn", "_murmur3_mix(h, (pos & 0xFFFFFFFF)"),
            ("vllm.v1.worker.gpu.sample.gumbel:gumbel_noised_argmax.fn", "u = murmur3_uniform32(seed, pos, keys)"),
        ),
    ),
}


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
        return None if name in inspect.getsource(_resolve(path)) else f"{path} lacks {name}"  # type: ignore[arg-type]
    except (ImportError, AttributeError, OSError, TypeError):
        return f"{path} is missing"


def problems(*parts: str) -> list[str]:
    """The hooks of these parts that the installed vLLM lacks; empty if none."""
    found: list[str | None] = []
    for part in (PARTS[name] for name in parts):
        found += map(_problem, part.hooks)
        found += (_source_problem(*source) for source in part.sources)
    return [problem for problem in found if problem is not None]


def version_problem() -> str | None:
    """A sentence if the installed vLLM is of an untested version; else None."""
    import vllm

    if vllm.__version__.startswith(TESTED_VERSIONS):
        return None
    return f"vLLM {vllm.__version__} has not been tried ({', '.join(v + 'x' for v in TESTED_VERSIONS)} have)"


def drafting_problems(runner: str) -> list[str]:
    """Why an engine on this runner (V1 or V2) serves without drafts; empty if it does not."""
    untried = version_problem()
    return problems(DRAFTING, runner) + ([untried] if untried else [])


def report(print_line: Callable[[str], None]) -> list[str]:
    """Check all hooks and print one line per problem. Returns the problems that prevent any use of edges."""
    import vllm

    print_line(f"vLLM {vllm.__version__}")
    found = drafting_problems(V1)
    for problem in found:
        print_line(f"problem: {problem}")
    for name, part in PARTS.items():
        if name not in (DRAFTING, V1):
            for problem in problems(name):
                print_line(f"{part.without}: {problem}")
    num_checked = sum(len(PARTS[name].hooks) + len(PARTS[name].sources) for name in (DRAFTING, V1))
    print_line("Edges cannot be used with it." if found else f"All {num_checked} hooks are there.")
    return found
