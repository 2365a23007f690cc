"""The recipe, step by step, on a tiny target with random weights: every command runs, resumes, and fits the next."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from .conftest import MODEL, ROOT

RECIPE = ROOT / "examples" / "distill_draft"
STEPS_LIMIT_S = 1500


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four Llama layers of width 128 under the real tokenizer."""
    directory = tmp_path_factory.mktemp("target")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(directory)
    return directory


STEPS = """
import json, sys
from typer.testing import CliRunner
import distill
for arguments in json.load(sys.stdin):
    result = CliRunner().invoke(distill.app, arguments, catch_exceptions=False)
    print(json.dumps(result.stdout))
    if result.exit_code:
        sys.exit(result.output)
"""


def run(*steps: Sequence[object]) -> list[str]:
    """Output of each step: commands of `distill.py`, one after the other in a process that loads torch once."""
    result = subprocess.run(
        [sys.executable, "-c", STEPS],
        cwd=RECIPE,
        input=json.dumps([list(map(str, step)) for step in steps]),
        capture_output=True,
        text=True,
        timeout=STEPS_LIMIT_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def num_lines(directory: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in directory.glob("*.jsonl"))


@pytest.mark.timeout(1800)
def test_from_a_target_to_a_draft(target: Path, tmp_path: Path) -> None:
    work, draft, assembled = tmp_path / "work", tmp_path / "draft", tmp_path / "assembled"
    train = ("train", target, work, "--layers", "0,3", "--head-rows", 512)
    *_, trained, _, evaluated, again, _ = run(
        ("ask", target, work, "--count", 5, "--rows", 8),
        ("answer", target, work, "--rows", 8, "--tokens", 1500),
        ("teach", target, work),
        ("hold", target, work, "--count", 2),
        (*train, "--batch", 4, "--tokens", 1500),
        (*train, "--batch", 4, "--tokens", 2500),
        ("export", target, work, draft),
        ("evaluate", target, draft, work / "ordinary.jsonl", "--record"),
        (*train, "--name", "again", "--start", draft, "--tokens", 1),
        ("assemble", target, draft, assembled),
    )
    assert num_lines(work / "prompts") == 5
    assert num_lines(work / "answers") > 0
    assert "agreement ordinary" in trained
    assert "agreement" in evaluated
    assert "agreement ordinary" in again
    metrics = json.loads((draft / "metrics.json").read_text())
    assert metrics["tokens_trained"] >= 2500
    assert metrics["ordinary_int8"]["prompts"] == 2
    assert len(json.loads((draft / "draft_vocab.json").read_text())) == 512
    model = AutoModelForCausalLM.from_pretrained(assembled, dtype=torch.float32)
    assert model.config.num_hidden_layers == 2


@pytest.mark.parametrize("name", ["heldout", "ordinary"])
def test_held_out_answers_are_not_taught(target: Path, tmp_path: Path, name: str) -> None:
    """Their topics and kinds are recognised, so nothing is stored."""
    run(("teach", target, tmp_path, RECIPE / f"{name}.jsonl"))
    assert not list(tmp_path.glob("data/*"))
