"""Small random models of transformers whose caches forget, as drafts: after a rollback they equal a fresh pass."""

import random
from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Lfm2Config, MambaConfig, MistralConfig, Qwen3NextConfig

from edge_client.drafters import Candidate
from edge_client.drafters.hf.chains import HfDrafter
from vllm_specedge.errors import UserError

WINDOW = 16
WIDTH = 3
TINY: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = ["sliding_attention", "full_attention"]
EXPERTS = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
STATE = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
CONFIGS = {
    "window": MistralConfig(**TINY, num_hidden_layers=2, sliding_window=WINDOW),
    "window and all": Gemma3TextConfig(
        **TINY, num_hidden_layers=2, layer_types=MIXED, sliding_window=WINDOW, head_dim=8
    ),
    "convolution": Lfm2Config(**TINY, num_hidden_layers=2, layer_types=["conv", "full_attention"]),
    "state": Qwen3NextConfig(
        **TINY, **EXPERTS, **STATE, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], head_dim=8
    ),
}


def model_of(config: Any) -> Any:
    config = deepcopy(config)  # a model writes into its own
    config.initializer_range = 0.5  # so that its output depends on its input
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


@torch.inference_mode()
def fresh_pass(model: Any, tokens: list[int]) -> list[Candidate]:
    best, ids = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].softmax(-1).topk(WIDTH)
    return [Candidate(*pair) for pair in zip(ids.tolist(), best.tolist(), strict=True)]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_rollback_far_behind_the_window_leaves_what_a_fresh_pass_says(name: str) -> None:
    model = model_of(CONFIGS[name])
    drafter = HfDrafter(model, "", name, None)
    assert drafter.max_width == 1
    sequence, past, chance = drafter.open(), list[int](), random.Random(0)
    for num_kept, num_new in (
        (0, 3 * WINDOW),
        (3 * WINDOW, 1),
        (3 * WINDOW - 2, 2),
        (2 * WINDOW, 5),
        (5, 1),
        (0, 30),
        (29, 9),
    ):
        sequence.keep(num_kept)
        past = past[:num_kept] + chance.choices(range(3, 99), k=num_new)
        said, wanted = sequence.append(past[num_kept:], WIDTH), fresh_pass(model, past)
        assert [each.token for each in said] == [each.token for each in wanted]
        assert [each.probability for each in said] == pytest.approx([each.probability for each in wanted], abs=1e-3)


def test_a_model_that_does_not_go_on_from_keys_and_values_is_refused() -> None:
    config = MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=8)
    with pytest.raises(UserError, match="choose another draft"):
        HfDrafter(model_of(config), "", "mamba", None)
