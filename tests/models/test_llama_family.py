"""The int8 runtime's forward pass against transformers' own, for small random models of each supported family."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from edge_client.drafters import Candidate, DraftSequence
from edge_client.drafters.llama.drafter import FastLlama, is_of_llama_family
from edge_client.drafters.llama.weights import Shape, load_llama

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 300,
    "max_position_embeddings": 256,
}
WIDTH = 4
VARIANTS = [(family, is_tied, theta) for family in FAMILIES for is_tied, theta in ((True, 1e6), (False, 1e4))]


def make(family: str, directory: Path, is_tied: bool = True, theta: float = 1e4, **extra: Any) -> Any:
    """A model in which every weight matters: those that start as zeros or ones are random too."""
    config_class, model_class = FAMILIES[family]
    extra |= {"head_dim": 32} if family == "qwen3" else {}  # not hidden_size / num_attention_heads
    rope = {"rope_type": "default", "rope_theta": theta}
    config = config_class(**SHAPE, tie_word_embeddings=is_tied, rope_parameters=rope, **extra)
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.5 if name.endswith("bias") or "norm" in name else 0.2
            weight.copy_(torch.randn_like(weight) * scale + ("norm" in name))
    model.save_pretrained(directory)
    return model


@torch.inference_mode()
def expected(model: Any, tokens: list[int]) -> list[Candidate]:
    """Candidates of transformers after these tokens."""
    best, ids = model(torch.tensor([tokens])).logits[0, -1].softmax(-1).topk(WIDTH)
    return [Candidate(*pair) for pair in zip(ids.tolist(), best.tolist(), strict=True)]


def assert_same(said: list[Candidate], wanted: list[Candidate]) -> None:
    assert [candidate.token for candidate in said] == [candidate.token for candidate in wanted]
    assert [c.probability for c in said] == pytest.approx([c.probability for c in wanted], abs=1e-4)


@pytest.mark.parametrize(("family", "is_tied", "theta"), VARIANTS)
def test_chains_rollbacks_and_branches_are_transformers_own(
    family: str, is_tied: bool, theta: float, tmp_path: Path
) -> None:
    model = make(family, tmp_path, is_tied, theta)
    tokens = random.Random(1).choices(range(SHAPE["vocab_size"]), k=60)
    sequence: DraftSequence = FastLlama(load_llama(tmp_path), "float32").open()
    assert_same(sequence.append(tokens[:40], WIDTH), expected(model, tokens[:40]))
    assert_same(sequence.append(tokens[40:41], WIDTH), expected(model, tokens[:41]))
    sequence.keep(30)
    assert_same(sequence.append(tokens[50:], WIDTH), expected(model, tokens[:30] + tokens[50:]))
    past = tokens[:30] + tokens[50:]
    left, right = sequence.branch([7, 8], [len(past) - 1, len(past) - 2], WIDTH)
    assert_same(left, expected(model, [*past, 7]))
    assert_same(right, expected(model, [*past[:-1], 8]))


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_is_close(family: str, tmp_path: Path) -> None:
    model = make(family, tmp_path)
    chance = random.Random(2)
    texts = [chance.choices(range(SHAPE["vocab_size"]), k=30) for _ in range(40)]
    int8 = FastLlama(load_llama(tmp_path), "int8")
    said = [int8.open().append(text, 1)[0] for text in texts]
    wanted = [expected(model, text) for text in texts]
    num_same = sum(ours.token == theirs[0].token for ours, theirs in zip(said, wanted, strict=True))
    assert num_same > 0.75 * len(texts)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_stored_in_bfloat16_is_computed_in_float32(family: str, tmp_path: Path) -> None:
    make(family, tmp_path).bfloat16().save_pretrained(tmp_path)
    model = FAMILIES[family][1].from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = random.Random(3).choices(range(SHAPE["vocab_size"]), k=30)
    said = FastLlama(load_llama(tmp_path), "float32").open().append(tokens, WIDTH)
    assert_same(said, expected(model, tokens))


def test_which_directories_it_takes(tmp_path: Path) -> None:
    make("qwen2", tmp_path)
    assert is_of_llama_family(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    refused: list[dict[str, Any]] = [
        {"model_type": "gemma3"},
        {"use_sliding_window": True},
        {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
    ]
    for change in refused:
        with pytest.raises(ValueError, match="supported"):
            Shape.from_config(config | change)
    (tmp_path / "model.safetensors").unlink()
    assert not is_of_llama_family(tmp_path)
