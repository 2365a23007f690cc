"""A draft model with another tokenizer, at a real server: it changes no token, and its drafts are accepted."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stack import edge_client
from transformers import AutoTokenizer

from .conftest import CACHE, Completion, Target, assert_same, counting

DRAFT = CACHE / "smollm2-draft"
LACKING = 20
"""The other tokenizer lacks one of this many tokens: too many for the same family."""
MIN_ACCEPTED = 0.2
"""Least share of accepted tokens among verified ones: the shipped draft itself has about 0.4 on these prompts."""


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped draft with fewer tokens, under other ids: it spells the missing ones in pieces, by its merges."""
    directory = tmp_path_factory.mktemp("other")
    config = json.loads((DRAFT / "config.json").read_text())
    tokenizer = json.loads((DRAFT / "tokenizer.json").read_text())
    model, special = tokenizer["model"], {each["content"] for each in tokenizer["added_tokens"]}
    kept = [token for token, id_ in model["vocab"].items() if token in special or len(token) == 1 or id_ % LACKING]
    kept = sorted(
        kept, key=lambda token: model["vocab"][token] if token in special else 1_000_000 - model["vocab"][token]
    )
    rows = torch.tensor([model["vocab"][token] for token in kept])
    model["vocab"] = {token: id_ for id_, token in enumerate(kept)}
    model["merges"] = [[a, b] for a, b in model["merges"] if {a, b, a + b} <= model["vocab"].keys()]
    weights = load_file(DRAFT / "model.safetensors")
    is_embedding = {name for name, weight in weights.items() if weight.shape[0] == config["vocab_size"]}
    assert is_embedding
    save_file(
        {name: weight[rows] if name in is_embedding else weight for name, weight in weights.items()},
        directory / "model.safetensors",
    )
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": len(kept)}))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_bytes((DRAFT / "tokenizer_config.json").read_bytes())
    return directory


def test_it_is_another_tokenizer(other: Path) -> None:
    text = "The keeper of the lighthouse climbed the steps every evening."
    there, here = (AutoTokenizer.from_pretrained(each) for each in (DRAFT, other))
    assert here.decode(here(text)["input_ids"]) == text
    assert len(here(text)["input_ids"]) >= len(there(text)["input_ids"])
    assert set(here(text)["input_ids"]).isdisjoint(there(text)["input_ids"])


def test_a_draft_of_another_tokenizer_changes_no_token_and_is_accepted(
    edge_target: Target, prompts: list[str], expected: list[Completion], other: Path, tmp_path: Path
) -> None:
    log = tmp_path / "edge.log"
    with (
        edge_client(edge_target.server.gateway_url, str(other), log, "--device", "cpu"),
        counting(edge_target) as counted,
    ):
        assert_same(expected, edge_target.greedy_all(prompts))
        counted.settle(len(prompts) * 63)
        print(f"{counted['accepted_tokens']} of {counted['verified_tokens']} accepted")
        accepted, verified = counted.together("accepted_tokens", "verified_tokens")
        assert accepted >= MIN_ACCEPTED * verified > 0
    assert "its tokens are translated" in log.read_text()
