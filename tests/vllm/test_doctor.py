"""A GGUF draft and `edge-client doctor` at a real server."""

import subprocess
from pathlib import Path

import pytest
import torch
from stack import BIN, EDGE_CORE, edge_client
from transformers import AutoModelForCausalLM, AutoTokenizer

from edge_client.drafters.gguf import GgufDrafter
from edge_client.drafters.hf.tokenizers import tokenizer_fingerprint
from tests.models.test_gguf_drafter import GGUF

from .conftest import MODEL, Completion, Target, assert_same, counting

MIN_AGREEMENT = 0.9
"""The draft has 4-bit weights and 8-bit activations; the target has the same weights, dequantized."""


def test_a_gguf_file_says_mostly_what_its_unpacked_weights_say() -> None:
    words = "The lamp of the lighthouse could be seen from far away. Every evening she climbed the steps to light it. "
    words += "Bread is made of flour, water, salt and yeast; it is kneaded, left to rise, and baked in a hot oven."
    text: list[int] = AutoTokenizer.from_pretrained(MODEL)(words)["input_ids"]
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()(torch.tensor([text])).logits[0]
    drafter = GgufDrafter(GGUF, "cpu", threads=1)
    assert drafter.fingerprint == tokenizer_fingerprint(str(MODEL))[0]
    sequence = drafter.open()
    said = [sequence.append([token], 1)[0] for token in text]
    same = [candidate.token == int(row.argmax()) for candidate, row in zip(said, logits, strict=True)]
    print(f"{sum(same)} of {len(same)} argmaxes agree")
    assert sum(same) >= MIN_AGREEMENT * len(same)
    shares = logits.softmax(-1).max(-1).values.tolist()
    close = [candidate.probability for candidate, is_same in zip(said, same, strict=True) if is_same]
    expected = [share for share, is_same in zip(shares, same, strict=True) if is_same]
    assert close == pytest.approx(expected, abs=0.1)


def test_a_gguf_draft_changes_no_token_and_is_accepted(
    edge_target: Target, prompts: list[str], expected: list[Completion], tmp_path: Path
) -> None:
    with (
        edge_client(edge_target.server.gateway_url, str(GGUF), tmp_path / "edge.log", "--device", "cpu"),
        counting(edge_target) as counted,
    ):
        assert_same(expected[:4], [edge_target.greedy(prompt) for prompt in prompts[:4]])
        counted.settle(4 * 63)
        assert counted["proposals_kept"] + counted["proposals_late"] > 10
        # It is the target itself, in four bits.
        accepted, verified = counted.together("accepted_tokens", "verified_tokens")
        assert accepted >= 0.5 * verified


def test_the_doctor_at_a_real_server(edge_target: Target, prompts: list[str]) -> None:
    edge_target.greedy(prompts[0])
    command = [str(BIN / "edge-client"), "doctor", edge_target.server.gateway_url, "--draft", str(GGUF)]
    command += ["--device", "cpu", "--threads", "1", "--acceptance", "0.8"]
    with counting(edge_target) as counted:
        done = subprocess.run(
            ["taskset", "-c", str(EDGE_CORE), *command], capture_output=True, text=True, timeout=300, check=False
        )
        assert counted["proposed_tokens"] == 0, "it drafts for nobody"
    print(done.stdout)
    said = " ".join(done.stdout.split())
    assert "FAILED" not in said, done.stdout
    for name in (
        "device",
        "draft model",
        "forward pass",
        "whole request",
        "gateway",
        "admission",
        "round trip",
        "vocabulary",
        "server",
    ):
        assert f"{name} ok" in said
    # Whether it would help depends on what else this machine does; the status says the same as the words.
    assert ("This machine would help: about" in said) == (done.returncode == 0)
    assert ("This machine would not help:" in said) == (done.returncode == 1)
