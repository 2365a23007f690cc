"""A Hugging Face model as the draft: its KV cache survives any rollback, and a target accepts its own tokens."""

import random
from pathlib import Path

import pytest
import torch
from stack import edge_client
from transformers import AutoModelForCausalLM

from edge_client.drafters.hf import choose_device, load_hf_drafter
from vllm_specedge.errors import UserError

from .conftest import MODEL, Completion, Target, assert_same, counting


def test_rollbacks_leave_what_a_fresh_pass_gives(expected: list[Completion]) -> None:
    drafter = load_hf_drafter(str(MODEL), "cpu", None, "")
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    chance = random.Random(0)
    text = [*expected[0].prompt_ids, *expected[0].token_ids]
    sequence, held = drafter.open(), []
    for _ in range(12):
        keep = chance.randrange(len(held) + 1)
        sequence.truncate(keep)
        held = held[:keep]
        new = chance.choice([text[keep : keep + 9] or text[:3], [chance.randrange(1000)]])
        got = sequence.extend(new)
        held += new
        with torch.inference_mode():
            assert got == int(model(torch.tensor([held])).logits[0, -1].argmax())


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
    assert choose_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == "cuda"
    with pytest.raises(UserError, match="There is no device 'tpu' here"):
        choose_device("tpu")
