"""The drafter for a name: prompt lookup, llama.cpp for a GGUF file, for other models the fastest runtime available.

If several runtimes can run a model, on a GPU or the CPU, each is timed. Modules that load torch, MLX or llama.cpp are
imported only when a model needs them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from edge_client.drafters import Drafter, DrafterOptions
from edge_client.drafters.cores import usable_cores
from edge_client.drafters.devices import choose_device
from edge_client.drafters.hub import fetch, is_hub_name
from edge_client.drafters.ngram import NgramDrafter
from edge_client.drafters.profile import Clock, profile
from edge_client.drafters.vocabulary import draft_vocabulary
from vllm_specedge.errors import UserError

GGUF_SUFFIX = ".gguf"
LLAMA_CPP, INT8, TRANSFORMERS, MLX = RUNTIMES = ("llama.cpp", "int8", "transformers", "mlx")
TYPICAL_ROWS = 4

Say = Callable[[str], None]
"""Receives the lines that say what was chosen, and why."""


def fetched(options: DrafterOptions, is_quiet: bool) -> DrafterOptions:
    """The same options with a local draft: a model on the hub is downloaded first. Raises UserError."""
    if options.draft == "ngram" or not is_hub_name(options.draft):
        return options
    try:
        return replace(options, draft=str(fetch(options.draft, is_quiet)))
    except ImportError as error:
        text = f"A draft from the hub needs {error.name}: pip install 'vllm-specedge[hf]', or name a local draft."
        raise UserError(text) from None


class Runtime(NamedTuple):
    """A runtime that can run a model here."""

    name: str
    where: str
    """The device, and why it was chosen."""
    load: Callable[[], Drafter]


def load_drafter(options: DrafterOptions, say: Say = lambda line: None) -> Drafter:
    """Load the drafter that fits the options. Raises UserError."""
    if options.runtime not in ("auto", *RUNTIMES):
        raise UserError(f"There is no runtime '{options.runtime}': choose auto, {', '.join(RUNTIMES)}.")
    if options.draft == "ngram":
        say("Drafting by prompt lookup: no model, no device.")
        return NgramDrafter()
    is_gguf = options.draft.lower().endswith(GGUF_SUFFIX)
    if is_gguf != (options.runtime == LLAMA_CPP) and options.runtime != "auto":
        takes = f"runs only in {LLAMA_CPP}" if is_gguf else f"does not run in {LLAMA_CPP}, which takes GGUF files"
        raise UserError(f"'{options.draft}' {takes}: leave --runtime out.")
    try:
        return _load_gguf(options, say) if is_gguf else fastest(_runtimes(options), say, time.perf_counter)
    except ImportError as error:
        what, extra = ("GGUF file", "gguf") if is_gguf else ("model", "mlx" if options.runtime == MLX else "hf")
        text = f"A {what} as the draft needs {error.name}: pip install 'vllm-specedge[{extra}]', or draft with 'ngram'."
        raise UserError(text) from None


def fastest(there: Sequence[Runtime], say: Say, clock: Clock) -> Drafter:
    """The drafter of the runtime with the shortest passes for a chain and a tree; timed only if there is a choice.

    A runtime that fails is skipped while there is another. Raises UserError, and whatever loading the last one raises.
    """
    best: tuple[float, Runtime, Drafter] | None = None
    for number, runtime in enumerate(there):
        is_last = best is None and number == len(there) - 1
        try:
            drafter = runtime.load()
            took_s = _took_s(drafter, clock) if len(there) > 1 else 0.0
        except Exception as error:
            if is_last:
                raise
            say(f"{runtime.name} cannot run it: {error!s:.160}")
            continue
        if len(there) > 1:
            say(f"{runtime.name} on {runtime.where}: {1e3 * took_s:.1f} ms per draft token.")
        if best is None or took_s < best[0]:
            best = (took_s, runtime, drafter)
    assert best is not None, "there is at least one runtime"
    say(f"Drafting on {best[1].where}, with {_SHOWN[best[1].name]}.")
    return best[2]


def _took_s(drafter: Drafter, clock: Clock) -> float:
    """Seconds per draft token, if half of the tokens come from passes of one row and half from passes of a tree."""
    times = profile(drafter, clock)
    rows = max(rows for rows in times if rows <= TYPICAL_ROWS)
    return (times[1] + times[rows] / rows) / 2


_SHOWN = {INT8: "the int8 runtime", TRANSFORMERS: "transformers", MLX: "MLX"}


def _load_gguf(options: DrafterOptions, say: Say) -> Drafter:
    from edge_client.drafters.gguf import GgufDrafter, check_gguf, devices_of_llama_cpp  # noqa: PLC0415

    file = Path(options.draft)
    check_gguf(file)
    if options.draft_vocab or options.draft_vocab_file:
        raise UserError(
            "The vocabulary of a GGUF file cannot be reduced: leave --draft-vocab and --draft-vocab-file out."
        )
    device, why = choose_device(options.device, devices_of_llama_cpp())
    say(f"Drafting on {device} ({why}), with llama.cpp: a GGUF file.")
    return GgufDrafter(file, device, options.threads)


def _runtimes(options: DrafterOptions) -> list[Runtime]:
    """The runtimes that can run a model here, at least one. Raises UserError, and ImportError."""
    there = _of_mlx(options)
    if options.runtime != MLX and (find_spec("torch") is not None or not there):
        there += _of_torch(options)
    if not there:
        raise UserError(f"'{options.draft}' does not run in {options.runtime} on this machine: leave --runtime out.")
    return there


def _of_mlx(options: DrafterOptions) -> list[Runtime]:
    """MLX, if it has a GPU or was asked for."""
    is_asked = options.runtime == MLX
    if not is_asked and (options.runtime != "auto" or options.device not in ("auto", "mps") or not find_spec("mlx_lm")):
        return []
    try:
        from edge_client.drafters.mlx.drafter import is_gpu_there, load_mlx_drafter  # noqa: PLC0415 - loads MLX
    except ImportError:  # outside of Macs mlx-lm comes without MLX
        if is_asked:
            raise
        return []
    if not is_asked and not is_gpu_there():
        return []
    name = options.draft
    fingerprint, kept = _vocabulary_of(options)
    where = "the GPU" if is_gpu_there() else "the CPU (set by --runtime)"
    return [Runtime(MLX, where, lambda: load_mlx_drafter(name, kept, fingerprint))]


def _of_torch(options: DrafterOptions) -> list[Runtime]:
    """Torch runtimes on the device asked for, else on the best one; next to a GPU also the int8 runtime on the CPU."""
    import torch  # noqa: PLC0415

    from edge_client.drafters.hf.drafter import devices_of_torch, load_hf_drafter  # noqa: PLC0415
    from edge_client.drafters.llama.drafter import LlamaDrafter, is_of_llama_family  # noqa: PLC0415

    torch.set_num_threads(options.threads or min(torch.get_num_threads(), usable_cores()))
    device, why = choose_device(options.device, devices_of_torch())
    name = options.draft
    fingerprint, kept = _vocabulary_of(options)
    is_for_int8 = options.runtime in ("auto", INT8) and is_of_llama_family(Path(name))
    int8 = Runtime(INT8, f"cpu ({why})", lambda: LlamaDrafter(Path(name), kept, fingerprint))
    hf = Runtime(TRANSFORMERS, f"{device} ({why})", lambda: load_hf_drafter(name, device, kept, fingerprint))
    if device.partition(":")[0] == "cpu":
        # If both can run it, int8 is always faster: a quarter of the bytes, and little Python (docs/edge.md).
        return [int8] if is_for_int8 else [hf] * (options.runtime != INT8)
    beside = [int8._replace(where="cpu")] * (is_for_int8 and options.device == "auto")
    return [hf] * (options.runtime != INT8) + beside


def _vocabulary_of(options: DrafterOptions) -> tuple[str, list[int] | None]:
    """A model's fingerprint, and the token ids to draft with; None: all."""
    from edge_client.drafters.hf.tokenizers import tokenizer_fingerprint  # noqa: PLC0415 - loads transformers

    fingerprint, vocab_size = tokenizer_fingerprint(options.draft)
    return fingerprint, draft_vocabulary(options.draft, options.draft_vocab, options.draft_vocab_file, vocab_size)


def own_vocabulary(options: DrafterOptions) -> dict[str, int]:
    """A draft's tokens and their ids; empty for prompt lookup. Raises UserError, and ImportError as loading would.

    A drafter only holds its fingerprint: 150,000 tokens take 20 MB, and drafting does not need them.
    """
    if options.draft == "ngram":
        return {}
    draft = fetched(options, is_quiet=True).draft
    if draft.lower().endswith(GGUF_SUFFIX):
        from edge_client.drafters.gguf import gguf_vocabulary  # noqa: PLC0415 - loads llama.cpp

        return gguf_vocabulary(Path(draft))
    from edge_client.drafters.hf.tokenizers import tokenizer_vocabulary  # noqa: PLC0415 - loads transformers

    return tokenizer_vocabulary(draft)
