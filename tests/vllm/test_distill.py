"""The recipe, step by step, on a tiny target with random weights: every command runs, resumes, and fits the next."""

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from .conftest import MODEL, ROOT

RECIPE = ROOT / "examples" / "distill_draft"

pytestmark = pytest.mark.filterwarnings("ignore")  # as where a command is run


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


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., str]]:
    """Runs a command of `distill.py`, and gives what it says. All in this process, which has loaded torch already."""

    def invoke(*arguments: object) -> str:
        result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == 0, result.output[-2000:]
        return result.stdout

    num_threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RECIPE)
        app = importlib.import_module("distill").app
        yield invoke
    torch.set_num_threads(num_threads)


def num_lines(directory: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in directory.glob("*.jsonl"))


@pytest.mark.timeout(1800)
def test_from_a_target_to_a_draft(run: Callable[..., str], target: Path, tmp_path: Path) -> None:
    work, draft, assembled = tmp_path / "work", tmp_path / "draft", tmp_path / "assembled"
    run("ask", target, work, "--count", 5, "--rows", 8)
    assert num_lines(work / "prompts") == 5
    run("answer", target, work, "--rows", 8, "--tokens", 1500)
    assert num_lines(work / "answers") > 0
    run("teach", target, work)
    run("hold", target, work, "--count", 2)
    train = ("train", target, work, "--layers", "0,3", "--head-rows", 512, "--batch", 4)
    run(*train, "--tokens", 1500)
    assert "agreement ordinary" in run(*train, "--tokens", 2500)
    run("export", target, work, draft)
    assert "agreement" in run("evaluate", target, draft, work / "ordinary.jsonl", "--record")
    metrics = json.loads((draft / "metrics.json").read_text())
    assert metrics["tokens_trained"] >= 2500
    assert metrics["ordinary_int8"]["prompts"] == 2
    assert len(json.loads((draft / "draft_vocab.json").read_text())) == 512
    again = ("train", target, work, "--layers", "0,3", "--head-rows", 512, "--name", "again", "--start", draft)
    assert "agreement ordinary" in run(*again, "--tokens", 1)
    run("assemble", target, draft, assembled)
    model = AutoModelForCausalLM.from_pretrained(assembled, dtype=torch.float32)
    assert model.config.num_hidden_layers == 2


@pytest.mark.parametrize("name", ["heldout", "ordinary"])
def test_held_out_answers_are_not_taught(run: Callable[..., str], target: Path, tmp_path: Path, name: str) -> None:
    """Their topics and kinds are recognised: nothing is left to store."""
    run("teach", target, tmp_path, RECIPE / f"{name}.jsonl")
    assert not list(tmp_path.glob("data/*"))
