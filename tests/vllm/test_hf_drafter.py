"""A Hugging Face model as the draft: its KV cache survives any rollback, and a target accepts its own tokens."""

import random
from pathlib import Path

import pytest
import torch
from stack import edge_client
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from edge_client.drafters import Candidate
from edge_client.drafters.entries import Entries
from edge_client.drafters.hf import HfDrafter, devices_of_torch, load_hf_drafter

from .conftest import MODEL, Completion, Target, assert_same, counting
from .tree_walk import WIDTH, TreeWalk


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def text() -> list[int]:
    from transformers import AutoTokenizer

    words = "The lamp of the lighthouse could be seen from far away. Every evening she climbed the steps to light it."
    return AutoTokenizer.from_pretrained(MODEL)(words)["input_ids"]


@torch.inference_mode()
def fresh_pass(model: PreTrainedModel, tokens: list[int]) -> list[Candidate]:
    """What the model says without any cache or mask."""
    best, ids = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].softmax(-1).topk(WIDTH)
    return [Candidate(*pair) for pair in zip(ids.tolist(), best.tolist(), strict=True)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_branches_say_what_their_chains_say_alone(attention: str, model: PreTrainedModel, text: list[int]) -> None:
    drafter = load_hf_drafter(str(MODEL), "cpu", None, "")
    drafter._model.set_attn_implementation(attention)
    assert drafter.max_width == 4
    tree = TreeWalk(drafter.open(), lambda tokens: fresh_pass(model, tokens), text, random.Random(0))
    tree.run(num_rounds=2)
    assert tree.num_checked > 12


TINY = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("config", "width"),
    [
        (Qwen3Config(**TINY, intermediate_size=64, num_key_value_heads=2, head_dim=8), 4),
        (GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0), 4),
        (MistralConfig(**TINY, intermediate_size=64, num_key_value_heads=2, sliding_window=16), 1),
        (BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4), 1),
    ],
    ids=["plain", "learned positions", "sliding window", "distances in the mask"],
)
def test_models_that_cannot_branch_draft_chains(config: PreTrainedConfig, width: int) -> None:
    config.initializer_range = 1.0  # so that its say depends on what it sees
    torch.manual_seed(0)
    drafter = HfDrafter(AutoModelForCausalLM.from_config(config).eval(), "", "tiny", None)
    assert drafter.max_width == width
    sequence = drafter.open()
    sequence.append([1, 2, 3, 4], 1)
    sequence.keep(2)
    said, alone = sequence.append([5], 1)[0], drafter.open().append([1, 2, 5], 1)[0]
    assert said.token == alone.token


def test_a_model_that_overlooks_positions_or_masks_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = load_hf_drafter(str(MODEL), "cpu", None, "")
    with monkeypatch.context() as patch:
        patch.setattr(Entries, "position", lambda entries, entry: entry)
        assert not drafter._can_branch()
    with monkeypatch.context() as patch:
        patch.setattr(Entries, "seen", lambda entries, entry: [True] * (len(entries) - entries.trunk))
        assert not drafter._can_branch()
    assert drafter._can_branch()


def test_rollbacks_leave_what_a_fresh_pass_gives(model: PreTrainedModel, text: list[int]) -> None:
    drafter = load_hf_drafter(str(MODEL), "cpu", None, "")
    chance = random.Random(0)
    sequence, held = drafter.open(), []
    for _ in range(12):
        keep = chance.randrange(len(held) + 1)
        sequence.keep(keep)
        held = held[:keep]
        new = chance.choice([text[keep : keep + 9] or text[:3], [chance.randrange(1000)]])
        got = sequence.append(new, 1)[0]
        held += new
        assert got.token == fresh_pass(model, held)[0].token


def test_a_target_accepts_its_own_tokens(
    edge_target: Target, prompts: list[str], expected: list[Completion], tmp_path: Path
) -> None:
    """The same model on both sides, in int8 on the edge: fingerprints match, and what is in time is mostly right."""
    with (
        edge_client(edge_target.server.gateway_url, str(MODEL), tmp_path / "edge.log"),
        counting(edge_target) as counted,
    ):
        assert_same(expected[:2], [edge_target.greedy(prompt) for prompt in prompts[:2]])
        counted.settle(2 * 63)
        assert counted["proposals_kept"] + counted["proposals_late"] > 5
        assert counted["accepted_tokens"] >= 0.25 * counted["verified_tokens"]


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices_of_torch() == ["cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices_of_torch() == ["cuda", "cpu"]
