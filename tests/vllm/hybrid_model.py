"""A tiny random model with gated delta nets and attention (Qwen3-Next's architecture), for vLLM's CPU backend.

python -m tests.vllm.hybrid_model DIRECTORY
"""

import shutil
import sys
from pathlib import Path

import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from .conftest import MODEL, VOCAB_SIZE

HEAD_DIM = 64
"""Head size of the delta nets' keys and values; vLLM's CPU operators support 64 and 128."""
CONV_WIDTH = 4


def save(directory: Path) -> None:
    """Write the model, with SmolLM2's tokenizer."""
    config = Qwen3NextConfig(
        architectures=["Qwen3NextForCausalLM"],
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_experts=2,
        num_experts_per_tok=2,  # all of them: with a choice, a last bit could change the answer
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=HEAD_DIM,
        linear_value_head_dim=HEAD_DIM,
        linear_conv_kernel_dim=CONV_WIDTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.15,  # so that its output depends on its states
        bos_token_id=0,
        eos_token_id=1,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(7)
    Qwen3NextForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    for file in MODEL.glob("tokenizer*"):
        shutil.copy(file, directory)


if __name__ == "__main__":
    save(Path(sys.argv[1]))
