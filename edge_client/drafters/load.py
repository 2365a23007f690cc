"""Which drafter a name gets: prompt lookup, our own runtime for plain Llamas on a CPU, transformers for the rest.

What loads torch is imported only when a model is asked for.
"""

from pathlib import Path

from edge_client.drafters import Drafter, DrafterOptions
from edge_client.drafters.ngram import NgramDrafter
from edge_client.drafters.vocabulary import draft_vocabulary
from vllm_specedge.errors import UserError


def load_drafter(options: DrafterOptions) -> Drafter:
    """Raises UserError."""
    if options.draft == "ngram":
        return NgramDrafter()
    try:
        return _load_model(options)
    except ImportError as error:
        text = f"A model as the draft needs {error.name}: pip install 'vllm-specedge[hf]', or draft with 'ngram'."
        raise UserError(text) from None


def _load_model(options: DrafterOptions) -> Drafter:
    import torch  # noqa: PLC0415

    from edge_client.drafters.hf import choose_device, load_hf_drafter, tokenizer_fingerprint  # noqa: PLC0415
    from edge_client.drafters.llama import LlamaDrafter, is_plain_llama  # noqa: PLC0415

    device = choose_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    name = options.draft
    fingerprint, vocab_size = tokenizer_fingerprint(name)
    kept = draft_vocabulary(name, options.draft_vocab, options.draft_vocab_file, vocab_size)
    if device == "cpu" and is_plain_llama(Path(name)):
        return LlamaDrafter(Path(name), kept, fingerprint)
    return load_hf_drafter(name, device, kept, fingerprint)
