"""Our own Llama runtime for drafts on a CPU against transformers, on the real model."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from edge_client.drafters import DrafterOptions
from edge_client.drafters.hf import load_hf_drafter
from edge_client.drafters.llama import FastLlama, LlamaDrafter
from edge_client.drafters.llama_weights import load_llama
from edge_client.drafters.load import load_drafter
from edge_client.drafters.vocabulary import draft_vocabulary
from vllm_specedge.errors import UserError

from .conftest import MODEL, VOCAB_SIZE


@pytest.fixture(scope="module")
def text() -> list[int]:
    """Ordinary English, and something said before."""
    from transformers import AutoTokenizer

    words = "The lamp of the lighthouse could be seen from far away. Every evening she climbed the steps to light it. "
    return AutoTokenizer.from_pretrained(MODEL)(words * 8)["input_ids"]


@pytest.fixture(scope="module")
def logits(text: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor([text])).logits[0]


def walk(extend: FastLlama, text: list[int], chance: random.Random) -> list[tuple[int, int]]:
    """Through the text in passes of all sizes, with rollbacks: (position, what the draft says next there)."""
    sequence, said = extend.open(), []
    while sequence.length < len(text):
        if sequence.length > 5 and chance.random() < 0.3:
            sequence.truncate(sequence.length - chance.randint(1, 5))
        size = chance.choice([1, 1, 2, 5, 40, 300])
        said.append((0, sequence.extend(text[sequence.length : sequence.length + size])))
        said[-1] = (sequence.length - 1, said[-1][1])
    return said


def test_in_float32_it_says_what_transformers_says(text: list[int], logits: torch.Tensor) -> None:
    said = walk(FastLlama(load_llama(MODEL), "float32"), text, random.Random(0))
    assert [token for _, token in said] == [int(logits[position].argmax()) for position, _ in said]


def test_in_int8_it_nearly_always_does(text: list[int], logits: torch.Tensor) -> None:
    """And where it does not, the target's own logits of the two are close."""
    said = walk(FastLlama(load_llama(MODEL)), text, random.Random(1))
    best = logits.max(-1).values
    gaps = [float(best[position] - logits[position, token]) for position, token in said]
    assert sum(gap == 0 for gap in gaps) > 0.85 * len(gaps)
    assert max(gaps) < 3


@pytest.mark.parametrize("runtime", ["llama", "hf"])
def test_a_reduced_vocabulary_says_the_best_of_what_it_has(runtime: str, text: list[int], logits: torch.Tensor) -> None:
    kept = sorted(random.Random(2).sample(range(VOCAB_SIZE), 4000))
    if runtime == "llama":
        sequence = FastLlama(load_llama(MODEL), "float32", torch.tensor(kept)).open()
    else:
        sequence = load_hf_drafter(str(MODEL), "cpu", kept, "").open()
    for end in (10, 11, 40):
        start = {10: 0, 11: 10, 40: 11}[end]
        token = sequence.extend(text[start:end])
        assert token == kept[int(logits[end - 1][torch.tensor(kept)].argmax())]


def test_a_plain_llama_on_the_cpu_gets_the_fast_runtime() -> None:
    drafter = load_drafter(DrafterOptions(str(MODEL), device="cpu"))
    assert isinstance(drafter, LlamaDrafter)
    assert len(drafter.fingerprint) == 64
    assert "int8" in drafter.description


def test_vocabulary_files(tmp_path: Path) -> None:
    (tmp_path / "draft_vocab.json").write_text(json.dumps([9, 3, 7, 1]))
    assert draft_vocabulary(str(tmp_path), None, None, 10) == [1, 3, 7, 9]
    assert draft_vocabulary(str(tmp_path), 2, None, 10) == [3, 9]
    assert draft_vocabulary(str(tmp_path), 0, None, 10) is None
    assert draft_vocabulary("/nowhere", None, None, 10) is None
    with pytest.raises(UserError, match="can be at most that"):
        draft_vocabulary(str(tmp_path), 5, None, 10)
    with pytest.raises(UserError, match="token ids below 9"):
        draft_vocabulary(str(tmp_path), None, None, 9)
    with pytest.raises(UserError, match="cannot be read"):
        draft_vocabulary("/nowhere", 5, None, 10)
