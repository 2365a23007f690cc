"""Which drafter a name gets: prompt lookup, llama.cpp for a GGUF file, our own runtime for Llama and Qwen models on a
CPU, transformers for the rest.

What loads torch or llama.cpp is imported only when a model is asked for.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from edge_client.drafters import Drafter, DrafterOptions
from edge_client.drafters.cores import usable_cores
from edge_client.drafters.devices import choose_device
from edge_client.drafters.hub import fetch, is_hub_name
from edge_client.drafters.ngram import NgramDrafter
from edge_client.drafters.vocabulary import draft_vocabulary
from vllm_specedge.errors import UserError

GGUF_SUFFIX = ".gguf"

Say = Callable[[str], None]
"""What to do with the line that says what was chosen, and why."""


def fetched(options: DrafterOptions, is_quiet: bool) -> DrafterOptions:
    """The same with a draft that is on this machine: what is on the hub is downloaded. Raises UserError."""
    if options.draft == "ngram" or not is_hub_name(options.draft):
        return options
    try:
        return replace(options, draft=str(fetch(options.draft, is_quiet)))
    except ImportError as error:
        text = f"A draft from the hub needs {error.name}: pip install 'vllm-specedge[hf]', or name a local draft."
        raise UserError(text) from None


def load_drafter(options: DrafterOptions, say: Say = lambda line: None) -> Drafter:
    """Raises UserError."""
    if options.draft == "ngram":
        say("Drafting by prompt lookup: no model, no device.")
        return NgramDrafter()
    is_gguf = options.draft.lower().endswith(GGUF_SUFFIX)
    try:
        return _load_gguf(options, say) if is_gguf else _load_model(options, say)
    except ImportError as error:
        what, extra = ("GGUF file", "gguf") if is_gguf else ("model", "hf")
        text = f"A {what} as the draft needs {error.name}: pip install 'vllm-specedge[{extra}]', or draft with 'ngram'."
        raise UserError(text) from None


def _load_gguf(options: DrafterOptions, say: Say) -> Drafter:
    from edge_client.drafters.gguf import GgufDrafter, check_gguf, devices_of_llama_cpp  # noqa: PLC0415

    file = Path(options.draft)
    check_gguf(file)
    if options.draft_vocab or options.draft_vocab_file:
        raise UserError("A GGUF file is drafted with as it is: do without --draft-vocab and --draft-vocab-file.")
    device, why = choose_device(options.device, devices_of_llama_cpp())
    say(f"Drafting on {device} ({why}), with llama.cpp: a GGUF file.")
    return GgufDrafter(file, device, options.threads)


def _load_model(options: DrafterOptions, say: Say) -> Drafter:
    import torch  # noqa: PLC0415

    from edge_client.drafters.hf import devices_of_torch, load_hf_drafter, tokenizer_fingerprint  # noqa: PLC0415
    from edge_client.drafters.llama.drafter import LlamaDrafter, is_of_llama_family  # noqa: PLC0415

    device, why = choose_device(options.device, devices_of_torch())
    torch.set_num_threads(options.threads or min(torch.get_num_threads(), usable_cores()))
    name = options.draft
    fingerprint, vocab_size = tokenizer_fingerprint(name)
    kept = draft_vocabulary(name, options.draft_vocab, options.draft_vocab_file, vocab_size)
    if device == "cpu" and is_of_llama_family(Path(name)):
        say(f"Drafting on {device} ({why}), with the int8 runtime: a model of the Llama family.")
        return LlamaDrafter(Path(name), kept, fingerprint)
    say(f"Drafting on {device} ({why}), with transformers.")
    return load_hf_drafter(name, device, kept, fingerprint)


def own_vocabulary(options: DrafterOptions) -> dict[str, int]:
    """A draft's own tokens and their ids; none for prompt lookup. Raises UserError, and ImportError as loading would.

    A drafter holds its fingerprint and no more: 150,000 tokens take 20 MB, and drafting has no use for them.
    """
    if options.draft == "ngram":
        return {}
    draft = fetched(options, is_quiet=True).draft
    if draft.lower().endswith(GGUF_SUFFIX):
        from edge_client.drafters.gguf import gguf_vocabulary  # noqa: PLC0415 - loads llama.cpp

        return gguf_vocabulary(Path(draft))
    from edge_client.drafters.hf import tokenizer_vocabulary  # noqa: PLC0415 - loads torch

    return tokenizer_vocabulary(draft)
