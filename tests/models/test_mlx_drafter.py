"""Small random models in MLX, on the CPU: every entry of a tree predicts what transformers does after its chain."""

import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3TextConfig, LlamaConfig, MambaConfig, Qwen2Config

from edge_client.drafters import Part
from edge_client.drafters.mlx import drafter as mlx_drafter
from edge_client.drafters.mlx.drafter import MlxDrafter, load_mlx_drafter
from edge_client.drafters.mlx.passes import MlxPasses
from edge_client.drafters.profile import profile
from edge_client.drafters.slot_contexts import CHUNK
from tests.tree_walk import WIDTH, TreeWalk
from vllm_specedge.errors import UserError

from .test_hf_rollbacks import TINY, WINDOW, fresh_pass, model_of
from .test_hf_trees import PLAIN

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ROPE_BY_KIND = {
    "full_attention": {"rope_type": "default", "rope_theta": 5_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
}
CONFIGS = {
    "norms of heads": PLAIN,
    "biases": Qwen2Config(**TINY, num_hidden_layers=2),
    "stretched positions": LlamaConfig(**TINY, num_hidden_layers=2, rope_parameters=LLAMA_3_ROPE),
    # Its layer for all is each sixth.
    "window and all": Gemma3TextConfig(
        **TINY, num_hidden_layers=6, sliding_window=WINDOW, head_dim=8, rope_parameters=ROPE_BY_KIND
    ),
}


def saved(config: Any, directory: Path) -> Any:
    """The model in transformers; its files for MLX are in `directory`."""
    model = model_of(config)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_branches_say_what_transformers_says_behind_their_chains(name: str, tmp_path: Path) -> None:
    chance, model = random.Random(1), saved(CONFIGS[name], tmp_path)
    drafter = load_mlx_drafter(str(tmp_path), None, "f")
    walk = TreeWalk(drafter.open(), lambda tokens: fresh_pass(model, tokens), range(3, 99), chance, tolerance=2e-3)
    walk.append(chance.choices(range(3, 99), k=60))
    for _ in range(4):
        walk.grow_branches(3)
        walk.decide(with_rest=chance.random() < 0.5)
    walk.run(num_rounds=2)
    assert walk.num_checked > 40


def test_a_long_context_is_read_in_pieces_while_the_cache_grows(tmp_path: Path) -> None:
    model, chance = saved(PLAIN, tmp_path), random.Random(2)
    drafter = load_mlx_drafter(str(tmp_path), None, "f")
    short, long = drafter.open(), drafter.open()
    few, many = [5, 6, 7], chance.choices(range(3, 99), k=2 * CHUNK + 20)
    short.append(few, WIDTH)
    assert long.append(many, WIDTH)[0].token == fresh_pass(model, many)[0].token
    [said], [also] = drafter.branch_together([Part(short, [8], [2], WIDTH), Part(long, [9], [], WIDTH)])
    assert said[0].probability == pytest.approx(fresh_pass(model, [*few, 8])[0].probability, abs=1e-3)
    assert also[0].token == fresh_pass(model, [*many, 9])[0].token


def test_it_is_loaded_in_one_thread_and_drafts_in_another(tmp_path: Path) -> None:
    """As in the client; MLX's streams belong to threads."""
    model = saved(PLAIN, tmp_path)
    drafter = load_mlx_drafter(str(tmp_path), None, "f")
    profile(drafter, time.perf_counter)
    sequence = drafter.open()
    with ThreadPoolExecutor(1) as executor:
        executor.submit(sequence.append, [5, 6, 7], WIDTH).result()
        said = executor.submit(sequence.branch, [8, 9], [2, 2], WIDTH).result()
    for token, row in zip((8, 9), said, strict=True):
        expected = fresh_pass(model, [5, 6, 7, token])[0]
        assert (row[0].token, row[0].probability) == (expected.token, pytest.approx(expected.probability, abs=1e-3))


def test_it_drafts_a_part_of_the_vocabulary(tmp_path: Path) -> None:
    saved(PLAIN, tmp_path)
    kept = [3, 50, 97, 12]
    whole, part = (load_mlx_drafter(str(tmp_path), ids, "f").open().append([5, 6], 99) for ids in (None, kept))
    assert sorted(each.token for each in part) == sorted(kept)
    assert sum(each.probability for each in part) == pytest.approx(1.0)
    order = [each.token for each in whole if each.token in kept]
    assert [each.token for each in part] == order


def test_numbers_that_are_none_stay_with_their_context(tmp_path: Path) -> None:
    model = saved(PLAIN, tmp_path)
    drafter = load_mlx_drafter(str(tmp_path), None, "f")
    embeddings = drafter._passes._model.model.embed_tokens
    sound, ill = drafter.open(), drafter.open()
    sound.append([5, 6], WIDTH)
    before = embeddings.weight
    embeddings.weight = before.at[9].add(float("nan"))
    said = drafter.branch_together([Part(ill, [9], [], WIDTH), Part(sound, [7], [1], WIDTH)])
    embeddings.weight = before
    assert said[0][0][0].probability != said[0][0][0].probability
    expected = pytest.approx(fresh_pass(model, [5, 6, 7])[0].probability, abs=1e-3)
    assert said[1][0][0].probability == expected
    assert drafter.open().append([5, 6, 7], WIDTH)[0].probability == expected


def test_what_it_cannot_draft_with_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no model that MLX can load"):
        load_mlx_drafter(str(tmp_path), None, "f")
    saved(MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=8), tmp_path)
    with pytest.raises(UserError, match="layers with a state"):
        load_mlx_drafter(str(tmp_path), None, "f")
    saved(PLAIN, tmp_path)
    monkeypatch.setattr(MlxPasses, "mask", lambda passes, window: None)
    with pytest.raises(UserError, match="cannot draft trees in MLX"):
        load_mlx_drafter(str(tmp_path), None, "f")
    assert MlxDrafter.max_shared_rows > MlxDrafter.max_width > 1
    assert not mlx_drafter.is_gpu_there()


def test_it_needs_no_torch(tmp_path: Path) -> None:
    saved(PLAIN, tmp_path)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from edge_client.drafters import DrafterOptions\n"
        "from edge_client.drafters.choose import load_drafter\n"
        "from edge_client.drafters.hf import tokenizers\n"
        "tokenizers.tokenizer_fingerprint = lambda name: ('f', 99)\n"
        f"drafter = load_drafter(DrafterOptions({str(tmp_path)!r}, runtime='mlx'))\n"
        "print(len(drafter.open().append([5, 6], 3)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "3", done.stderr


def test_a_missing_package_is_one_sentence(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['mlx'] = None\n"
        "from edge_client.drafters import DrafterOptions\n"
        "from edge_client.drafters.choose import load_drafter\n"
        f"load_drafter(DrafterOptions({str(tmp_path)!r}, runtime='mlx'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "UserError: A model as the draft needs mlx.core: pip install 'vllm-specedge[mlx]'" in done.stderr
