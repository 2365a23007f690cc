"""The shipped draft matches its figures, in both ways of using it."""

import json
from pathlib import Path

import pytest
from stack import answering, start_server

from edge_client.drafters import DrafterOptions
from edge_client.drafters.choose import load_drafter
from edge_client.drafters.llama.drafter import LlamaDrafter
from tests.ports import free_port

from .conftest import CACHE, MODEL, ROOM, ROOT, Completion, Target, assert_same, counting, running_edge

DRAFT = CACHE / "smollm2-draft"
SHIPPED = ROOT / "examples" / "distill_draft" / "smollm2"
HELD_OUT = ROOT / "examples" / "distill_draft"
TOLERANCE = 0.05
"""Tolerance of the agreement on a part of the held-out answers; the stated figure is for all of them."""


@pytest.fixture(scope="module")
def draft() -> LlamaDrafter:
    assert (DRAFT / "config.json").exists(), "make the draft first: make model"
    drafter = load_drafter(DrafterOptions(str(DRAFT), device="cpu", threads=1))
    assert isinstance(drafter, LlamaDrafter)
    return drafter


def test_it_fits_the_repository() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 20_000_000


@pytest.mark.parametrize(("name", "least"), [("heldout", 0.6), ("ordinary", 0.55)])
def test_it_agrees_with_the_target_as_often_as_stated(draft: LlamaDrafter, name: str, least: float) -> None:
    """On topics and, for half of the prompts, in templates never trained on; on ordinary questions of other kinds.

    By the runtime that edges use, on every other answer.
    """
    assert "12288 of 49152 tokens" in draft.description
    stated = json.loads((SHIPPED / "metrics.json").read_text())[f"{name}_int8"]["agreement"]
    num_right = num_tokens = 0
    for line in (HELD_OUT / f"{name}.jsonl").read_text().splitlines()[::2]:
        answer = json.loads(line)
        sequence = draft.open()
        said = sequence.append(answer["prompt_ids"], 1)
        for token in answer["answer_ids"][:-1]:
            said += sequence.append([token], 1)
        num_right += sum(ours.token == theirs for ours, theirs in zip(said, answer["answer_ids"], strict=True))
        num_tokens += len(said)
    print(f"{name}: agreement {num_right / num_tokens:.3f} on {num_tokens} tokens; stated {stated}")
    assert stated >= least
    assert abs(num_right / num_tokens - stated) < TOLERANCE


def questions(plain: Target) -> list[Completion]:
    lines = (HELD_OUT / "heldout.jsonl").read_text().splitlines()[:4]
    return plain.greedy_all([json.loads(line)["prompt_ids"] for line in lines])


def test_a_server_accepts_its_tokens_from_an_edge(edge_target: Target, plain: Target, draft: LlamaDrafter) -> None:
    expected = questions(plain)
    with running_edge(edge_target, draft), counting(edge_target) as counted:
        assert_same(expected, [edge_target.greedy(list(answer.prompt_ids)) for answer in expected])
        counted.settle(4 * 63)
        print(f"{counted['accepted_tokens']:.0f} of {counted['verified_tokens']:.0f} accepted")
        # In a chain of five tokens, each right half of the time, one is accepted on average.
        accepted, verified = counted.together("accepted_tokens", "verified_tokens")
        assert accepted > 0.08 * verified > 2


def test_vllm_s_own_draft_model_method_takes_it(plain: Target, tmp_path: Path) -> None:
    expected = questions(plain)
    config = json.dumps({"method": "draft_model", "model": str(DRAFT), "num_speculative_tokens": 3})
    arguments = ("--max-model-len", "2048", "--speculative-config", config, *ROOM)
    with answering(start_server(MODEL, tmp_path / "server.log", free_port(), *arguments)) as server:
        target = Target(server)
        try:
            assert_same(expected, target.greedy_all([list(answer.prompt_ids) for answer in expected]))
            text = target.http.get(f"{server.url}/metrics").text
        finally:
            target.http.close()
    names = [line for line in text.splitlines() if line.startswith("vllm:spec_decode_num_accepted_tokens_total")]
    assert float(names[0].split()[-1]) > 10
