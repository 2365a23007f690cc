"""Our own Llama runtime for drafts on a CPU against transformers, on the real model."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from edge_client.drafters import Candidate, DrafterOptions
from edge_client.drafters.choose import load_drafter
from edge_client.drafters.hf.drafter import load_hf_drafter
from edge_client.drafters.llama import drafter as llama
from edge_client.drafters.llama.drafter import FastLlama, LlamaDrafter
from edge_client.drafters.llama.weights import load_llama
from edge_client.drafters.vocabulary import draft_vocabulary
from tests.tree_walk import WIDTH, TreeWalk
from vllm_specedge.errors import UserError

from .conftest import MODEL, VOCAB_SIZE


@pytest.fixture(scope="module")
def text() -> list[int]:
    """Ordinary English, with a repetition."""
    from transformers import AutoTokenizer

    words = "The lamp of the lighthouse could be seen from far away. Every evening she climbed the steps to light it. "
    return AutoTokenizer.from_pretrained(MODEL)(words * 8)["input_ids"]


@pytest.fixture(scope="module")
def logits(text: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor([text])).logits[0]


@pytest.fixture(scope="module")
def float32() -> FastLlama:
    return FastLlama(load_llama(MODEL), "float32")


def walk(model: FastLlama, text: list[int], chance: random.Random) -> list[tuple[int, Candidate]]:
    """Read the text in passes of all sizes, with rollbacks: (position, the draft's prediction there)."""
    sequence, said, length = model.open(), [], 0
    while length < len(text):
        if length > 5 and chance.random() < 0.3:
            length -= chance.randint(1, 5)
            sequence.keep(length)
        size = min(chance.choice([1, 1, 2, 5, 40, 300]), len(text) - length)
        [candidate] = sequence.append(text[length : length + size], 1)
        length += size
        said.append((length - 1, candidate))
    return said


def test_in_float32_it_says_what_transformers_says(text: list[int], logits: torch.Tensor, float32: FastLlama) -> None:
    said = walk(float32, text, random.Random(0))
    shares = logits.softmax(-1)
    assert [candidate.token for _, candidate in said] == [int(logits[position].argmax()) for position, _ in said]
    expected = [float(shares[position].max()) for position, _ in said]
    assert [candidate.probability for _, candidate in said] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_branches_say_what_their_chains_say_alone(
    seed: int, text: list[int], float32: FastLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "CACHE_STEP", 8)  # so that it grows while there are branches
    tree = TreeWalk(float32.open(), lambda tokens: float32.open().append(tokens, WIDTH), text, random.Random(seed))
    tree.run(num_rounds=2)
    assert tree.num_checked > 12


def test_entries_that_moved_are_as_if_they_had_been_appended(text: list[int], float32: FastLlama) -> None:
    tree, chain = float32.open(), float32.open()
    tree.append(text[:20], 1)
    tree.branch([7, text[20], 9], [19, 19, 18], 1)
    tree.branch([11, text[21]], [20, 21], 1)
    tree.keep(20, [21, 24])
    chain.append(text[:22], 1)
    for ours, theirs in zip(tree._cache, chain._cache, strict=True):
        assert torch.allclose(ours[:, :22], theirs[:, :22], atol=1e-3)
    assert tree.append(text[22:24], 1)[0].token == chain.append(text[22:24], 1)[0].token


def test_a_context_is_as_long_as_its_longest_branch(text: list[int]) -> None:
    sequence = FastLlama(load_llama(MODEL), "float32", context=12).open()
    sequence.append(text[:10], 1)
    sequence.branch(text[:4], [9] * 4, 1)
    sequence.branch(text[:4], [10, 11, 12, 13], 1)
    with pytest.raises(ValueError, match="13 tokens do not fit a context of 12"):
        sequence.branch(text[:1], [14], 1)
    sequence.keep(10, [10, 14])
    with pytest.raises(ValueError, match="13 tokens do not fit a context of 12"):
        sequence.append(text[:1], 1)
    with pytest.raises(ValueError, match="by at least one token"):
        sequence.append([], 1)


def test_in_int8_it_nearly_always_does(text: list[int], logits: torch.Tensor) -> None:
    """And if it does not, the target's own logits of the two are close."""
    said = walk(FastLlama(load_llama(MODEL)), text, random.Random(1))
    best = logits.max(-1).values
    gaps = [float(best[position] - logits[position, candidate.token]) for position, candidate in said]
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
        best, ids = logits[end - 1][torch.tensor(kept)].softmax(-1).topk(2)
        said = sequence.append(text[start:end], 2)
        assert [candidate.token for candidate in said] == [kept[index] for index in ids.tolist()]
        assert [candidate.probability for candidate in said] == pytest.approx(best.tolist(), abs=1e-3)


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
