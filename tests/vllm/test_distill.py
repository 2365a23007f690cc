"""The recipe, step by step, on a tiny target with random weights: every command runs, resumes, and fits the next."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from .conftest import MODEL, ROOT

RECIPE = ROOT / "examples" / "distill_draft" / "distill.py"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four Llama layers of width 64 under the real tokenizer."""
    directory = tmp_path_factory.mktemp("target")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(directory)
    return directory


def run(*arguments: object) -> str:
    command = [sys.executable, str(RECIPE), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def test_from_a_target_to_a_draft(target: Path, tmp_path: Path) -> None:
    work, draft, assembled = tmp_path / "work", tmp_path / "draft", tmp_path / "assembled"
    answers = tmp_path / "answers.jsonl"
    lines = (ROOT / "examples" / "distill_draft" / "heldout.jsonl").read_text().splitlines()[:6]
    answers.write_text("\n".join(lines) + "\n")
    run("teach", target, work, answers)
    run("generate", target, work, "--tokens", 500, "--rows", 24, "--threads", 2)
    run("hold", target, work, "--count", 4, "--threads", 2)
    train = ("train", target, work, "--layers", "0,3", "--head-rows", 512, "--threads", 2)
    run(*train, "--tokens", 1500)
    assert "agreement on all" in run(*train, "--tokens", 2500)
    run("export", target, work, draft)
    said = run("evaluate", target, draft, work / "heldout.jsonl", "--record")
    assert "agreement_greedy" in said
    metrics = json.loads((draft / "metrics.json").read_text())
    assert metrics["tokens_trained"] >= 2500
    assert len(json.loads((draft / "draft_vocab.json").read_text())) == 512
    run("assemble", target, draft, assembled)
    model = AutoModelForCausalLM.from_pretrained(assembled, dtype=torch.float32)
    assert model.config.num_hidden_layers == 2
