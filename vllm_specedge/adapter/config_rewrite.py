"""Rewriting of `edge` to arguments of stock vLLM, and start-up errors, in one sentence each, for what cannot work."""

import atexit
import logging
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vllm_specedge.adapter import hooks, hybrids
from vllm_specedge.adapter.demand_report import note_start
from vllm_specedge.adapter.start import ENDPOINT_VARIABLE, engine_options, new_endpoint
from vllm_specedge.config import DEFAULT_SPEC_TOKENS, MAX_SPEC_TOKENS, EdgeOptions, parse_options
from vllm_specedge.errors import UserError
from vllm_specedge.frontend.load_file import CLASSES, LOAD_VARIABLE
from vllm_specedge.frontend.request_classes import RequestClasses, read_key_groups
from vllm_specedge.gateway.startup_checks import check_start

logger = logging.getLogger("vllm.specedge.config")

METHOD = "edge"
_ANY_BATCH = 1 << 20
PROPOSER = "vllm_specedge.adapter.proposer.EdgeProposer"
SCHEDULER = "vllm_specedge.adapter.scheduler.EdgeScheduler"
ASYNC_SCHEDULER = "vllm_specedge.adapter.scheduler.EdgeAsyncScheduler"
WORKER = "vllm_specedge.adapter.worker.extension.EdgeWorker"


def parse_value(value: str, parse_json: Callable[[str], Any]) -> Any:
    """The value of `--speculative-config`: the bare word `edge`, or vLLM's JSON, with our options checked."""
    parsed = {"method": METHOD} if value.strip() == METHOD else parse_json(value)
    if isinstance(parsed, Mapping) and parsed.get("method") == METHOD:
        _split(parsed)
    return parsed


def _split(config: Mapping[str, Any]) -> tuple[int | None, dict[str, Any]]:
    """The number of speculative tokens, if given, and our own options, both checked."""
    ours = {key.replace("-", "_"): value for key, value in config.items()}
    num_tokens = ours.pop("num_speculative_tokens", None)
    ours.pop("method", None)
    parse_options(ours)
    _check_num_tokens(num_tokens)
    return num_tokens, ours


def _check_num_tokens(num_tokens: object) -> None:
    if num_tokens is None:
        return
    if not isinstance(num_tokens, int) or isinstance(num_tokens, bool) or not 1 <= num_tokens <= MAX_SPEC_TOKENS:
        raise UserError(
            f"num_speculative_tokens (--spec-tokens) must be 1 to {MAX_SPEC_TOKENS}, not {num_tokens!r:.50}."
        )


def rewrite(args: Any) -> bool:
    """Rewrite an EngineArgs with `edge` to arguments of stock vLLM. Returns whether it had `edge`, now or before.

    Idempotent: with several API servers vLLM calls it again in every child process.
    """
    config = args.speculative_config
    if config == METHOD or getattr(args, "spec_method", None) == METHOD:
        config = {**(config if isinstance(config, Mapping) else {}), "method": METHOD}
    if not isinstance(config, Mapping):
        return False
    if config.get("method") != METHOD:
        return args.scheduler_cls in (SCHEDULER, ASYNC_SCHEDULER)
    num_tokens, ours = _split(config)
    _check_args(args, num_tokens)
    args.spec_method = None
    args.speculative_config = {}
    if args.spec_tokens is None:
        args.speculative_config["num_speculative_tokens"] = num_tokens or DEFAULT_SPEC_TOKENS
    args.additional_config = {**(args.additional_config or {}), "specedge": ours}
    reason = why_v1(args)
    if reason is None:
        _use_v2(args)
    else:
        use_v1(args, reason)
    _prepare(parse_options(ours))
    return True


# -- which of vLLM's model runners ---------------------------------------------------------------------------------


def why_v1(args: Any) -> str | None:
    """Why a server stays on the V1 model runner, as far as is known before vLLM has checked its configuration."""
    from vllm.triton_utils import HAS_TRITON

    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0":
        return "VLLM_USE_V2_MODEL_RUNNER is 0"
    problems = hooks.problems(hooks.EXTENSION)
    if problems:
        return problems[0]
    if not HAS_TRITON:
        return "Triton is not installed"
    return "of --worker-extension-cls" if args.worker_extension_cls else None


def is_v2(args: Any) -> bool:
    """Whether rewritten arguments are for the V2 model runner."""
    return bool(args.worker_extension_cls == WORKER)


def _use_v2(args: Any) -> None:
    """Configure the V2 runner. It has no custom proposer, so we use one of vLLM's own methods that needs no model."""
    config = args.speculative_config
    config |= {"method": "ngram", "prompt_lookup_min": 3, "prompt_lookup_max": 3}
    num_tokens = args.spec_tokens or config["num_speculative_tokens"]
    lengths = sorted({num_tokens, (num_tokens + 1) // 2, 1, 0}, reverse=True)
    # So that vLLM captures full CUDA graphs for each of these numbers of draft tokens per request, and for none.
    if args.data_parallel_size == 1 and (args.max_num_seqs is None or args.max_num_seqs >= len(lengths)):
        ends = [*range(1, len(lengths)), _ANY_BATCH]
        config["num_speculative_tokens_per_batch_size"] = [
            (start, end, length) for start, end, length in zip(range(1, len(ends) + 1), ends, lengths, strict=True)
        ]
    args.scheduler_cls, args.worker_extension_cls = ASYNC_SCHEDULER, WORKER
    logger.info("Edge drafting uses vLLM's V2 model runner; while drafts do not pay, scheduling is vLLM's own")


def use_v1(args: Any, reason: str) -> None:
    """Configure the V1 runner, with our proposer class and synchronous scheduling. Raises UserError."""
    if args.async_scheduling is True:
        raise UserError(
            f"Edge drafting needs synchronous scheduling here, because {reason}: leave --async-scheduling out."
        )
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        raise UserError(
            f"Edge drafting needs vLLM's V1 model runner here, because {reason}: unset VLLM_USE_V2_MODEL_RUNNER."
        )
    config = args.speculative_config
    kept = {key: config[key] for key in ("num_speculative_tokens",) if key in config}
    args.speculative_config = {"method": "custom_class", "model": PROPOSER, **kept}
    args.scheduler_cls = SCHEDULER
    if args.worker_extension_cls == WORKER:
        args.worker_extension_cls = ""
    logger.info("Edge drafting uses vLLM's V1 model runner and synchronous scheduling, because %s", reason)


def _check_args(args: Any, num_tokens: int | None) -> None:
    if args.spec_tokens is not None and num_tokens is not None:
        raise UserError("Give the number of draft tokens once: --spec-tokens or num_speculative_tokens.")
    _check_num_tokens(args.spec_tokens)
    if getattr(args, "spec_model", None):
        raise UserError("Edge drafting takes no --spec-model: each edge chooses its own draft model with --draft.")
    if args.scheduler_cls not in (None, SCHEDULER, ASYNC_SCHEDULER):
        raise UserError("Edge drafting brings its own scheduler: leave --scheduler-cls out.")
    if args.pipeline_parallel_size > 1:
        raise UserError("Edge drafting does not work with pipeline parallelism: use --tensor-parallel-size instead.")
    if args.distributed_executor_backend == "external_launcher":  # every rank would have its own engine and edges
        raise UserError("Edge drafting does not work with external_launcher: leave --distributed-executor-backend out.")


def _prepare(options: EdgeOptions) -> None:
    """In the API server's main process only: choose the engines' socket, and fail early if the port is taken."""
    if multiprocessing.parent_process() is not None:
        return
    note_start()
    if options.slo:
        classes = _classes(options)
        os.environ[LOAD_VARIABLE] = directory = tempfile.mkdtemp(prefix="specedge-load-")
        classes.write(Path(directory) / CLASSES)
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
    if not options.gateway:
        check_start(options)
        os.environ[ENDPOINT_VARIABLE] = endpoint = new_endpoint()
        atexit.register(shutil.rmtree, Path(endpoint.removeprefix("ipc://")).parent, ignore_errors=True)


def _classes(options: EdgeOptions) -> RequestClasses:
    """The classes of requests, for the API processes. Raises UserError."""
    priorities = options.slo_priorities
    missing = hooks.problems(hooks.CLASSES) if options.slo_by != "priority" else []
    if missing:
        raise UserError(f"This vLLM does not read a priority from a header ({missing[0]}): leave slo_by out.")
    keys = read_key_groups(Path(options.slo_keys_file), priorities) if options.slo_by == "key" else {}
    return RequestClasses(priorities, options.slo_by, options.slo_header, keys)


def check_config(config: Any) -> None:
    """Check what only the finished VllmConfig shows. Raises UserError."""
    import vllm

    model = config.model_config
    if config.speculative_config.num_speculative_tokens > MAX_SPEC_TOKENS:
        raise UserError(f"--spec-tokens must be 1 to {MAX_SPEC_TOKENS}.")
    hybrids.check(config)
    if model.runner_type != "generate" or model.is_encoder_decoder or getattr(model, "is_diffusion", False):
        raise UserError("Edge drafting only works with models that generate text token by token: serve without it.")
    if config.lora_config is not None and vllm.__version__.startswith("0.32."):
        raise UserError("Edge drafting with LoRA needs vLLM 0.33: update vLLM or leave --enable-lora out.")
    if config.parallel_config.data_parallel_size > 1 and model.is_moe:
        raise UserError("Edge drafting does not work with data parallelism of mixture-of-experts models yet.")
    if config.kv_transfer_config is not None:
        raise UserError("Edge drafting has not been tried with KV connectors: leave --kv-transfer-config out.")


def unreached(config: Any) -> str | None:
    """Why no edge can draft for the engines that this process starts, and what to do; None if edges can.

    A server's gateway is started by its first data-parallel rank, and only reachable through a socket on that machine.
    """
    parallel, options = config.parallel_config, engine_options(config)
    if options.gateway or parallel.data_parallel_rank == 0 or parallel.node_rank_within_dp > 0:
        return None
    return (
        f"Edges do not draft for the data-parallel ranks from {parallel.data_parallel_rank} on, which run here: the "
        "gateway is on the first rank's machine. Run 'vllm-specedge gateway --engines tcp://ADDRESS:8101 --insecure' "
        "where all can reach it, on a closed network, and give every machine "
        """'"gateway": "tcp://ADDRESS:8101", "insecure": true'."""
    )
