"""Convert a GGUF file into an ordinary Hugging Face checkpoint, which vLLM and transformers load like any other.

    python examples/checkpoints.py FILE.gguf DIRECTORY [--dtype bfloat16] [--tie]

`pairs.py` runs it as a separate process for each file, so that its memory is freed afterwards.
"""

import functools
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def convert(
    gguf: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    directory: Annotated[Path, typer.Argument(file_okay=False)],
    dtype: Annotated[str, typer.Option(help="Number format of the weights: float32 or bfloat16.")] = "float32",
    tie: Annotated[bool, typer.Option(help="Use the output head as the embedding too, as the original does.")] = False,
) -> None:
    """Dequantize the weights and copy the tokenizer, without the tokens that only fill its vocabulary."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gguf as gguf_package
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # transformers reads the file three times; its 450,000 strings of tokens and merges take most of the time.
    gguf_package.GGUFReader = functools.cache(gguf_package.GGUFReader)
    source: dict[str, Any] = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, quantization_config=GgufConfig(dequantize=True), dtype=getattr(torch, dtype), **source
    )
    if tie:
        model.get_input_embeddings().weight = model.get_output_embeddings().weight
        model.config.tie_word_embeddings = True
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(directory)
    drop_fillers(directory / "tokenizer.json")


def drop_fillers(file: Path) -> None:
    """Remove `[PADn]` from a tokenizer.json: GGUF adds them for ids that the model has but its tokenizer has not."""
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: id_ for token, id_ in vocabulary.items() if token != f"[PAD{id_}]"}
    tokenizer["added_tokens"] = [
        added for added in tokenizer["added_tokens"] if added["content"] != f"[PAD{added['id']}]"
    ]
    file.write_text(json.dumps(tokenizer, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(typer.run(convert))
