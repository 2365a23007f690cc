"""A Hugging Face model as the draft: its KV cache survives any rollback, and a target accepts its own tokens."""

import random
from pathlib import Path

import pytest
import torch
from stack import edge_client
from transformers import AutoModelForCausalLM, PreTrainedModel

from edge_client.drafters import Candidate
from edge_client.drafters.hf.drafter import devices_of_torch, load_hf_drafter
from edge_client.drafters.hf.trees import SlotDrafter
from tests.tree_walk import WIDTH, TreeWalk

from .conftest import MODEL, Completion, Target, assert_same, counting


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
    """Candidates of the model without any cache or mask."""
    best, ids = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].softmax(-1).topk(WIDTH)
    return [Candidate(*pair) for pair in zip(ids.tolist(), best.tolist(), strict=True)]


def test_branches_say_what_their_chains_say_alone(model: PreTrainedModel, text: list[int]) -> None:
    drafter = load_hf_drafter(str(MODEL), "cpu", None, "")
    assert isinstance(drafter, SlotDrafter)
    tree = TreeWalk(drafter.open(), lambda tokens: fresh_pass(model, tokens), text, random.Random(0))
    tree.run(num_rounds=2)
    assert tree.num_checked > 12


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
    """The same model on both sides, in int8 on the edge: fingerprints match, and drafts in time are mostly right."""
    with (
        edge_client(edge_target.server.gateway_url, str(MODEL), tmp_path / "edge.log"),
        counting(edge_target) as counted,
    ):
        assert_same(expected[:2], [edge_target.greedy(prompt) for prompt in prompts[:2]])
        counted.settle(2 * 63)
        assert counted["proposals_kept"] + counted["proposals_late"] > 5
        accepted, verified = counted.together("accepted_tokens", "verified_tokens")
        assert accepted >= 0.25 * verified


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices_of_torch() == ["cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices_of_torch() == ["cuda", "cpu"]
