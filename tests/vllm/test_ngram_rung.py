"""Without an edge the server verifies vLLM's own n-gram drafts: the same answers in fewer steps."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from demo import TEXT

from vllm_specedge.adapter import cpu_kernels, hooks
from vllm_specedge.adapter.proposer import EdgeProposer
from vllm_specedge.adapter.rewrite import SCHEDULER

from .conftest import MODEL, Target, assert_same, counting
from .test_start import LISTEN, rewritten, run_script

# numba's, about a list in vLLM's code.
pytestmark = pytest.mark.filterwarnings("ignore:(?s).*reflected list")

NUM_TOKENS = 48
LINES = "\n".join(['{"name": "Anna", "age": 41}'] * 6)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 1}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def repetitive(sentence: int) -> str:
    """A text twice, and the beginning of one of its sentences: what comes next is in it."""
    words = TEXT.split(". ")[sentence].split()
    return "\n\n".join([TEXT, TEXT, " ".join(words[:7])])


def test_repetitive_prompts_take_fewer_steps(edge_target: Target, plain: Target) -> None:
    prompts = [repetitive(sentence) for sentence in range(3)]
    want = plain.greedy_all(prompts, NUM_TOKENS)
    with counting(edge_target) as counted:
        assert_same(want, edge_target.greedy_all(prompts, NUM_TOKENS))
        counted.settle(3 * (NUM_TOKENS - 1))
        # The workers are asked seldom at first: the tests before have shown that it brings nothing.
        assert counted["steps"] < 0.7 * counted["committed_tokens"]
        assert counted["steps"] == counted["committed_tokens"] - counted["ngram_accepted_tokens"]
        assert counted["verified_tokens"] == 0, "those are an edge's"


def test_sampled_requests_finish(edge_target: Target) -> None:
    sampled = {"temperature": 0.8, "top_p": 0.9, "max_tokens": NUM_TOKENS, "n": 2, "ignore_eos": True}
    with counting(edge_target) as counted:
        answer = edge_target.post("/v1/completions", {"prompt": repetitive(1), **sampled})
        counted.settle(2 * (NUM_TOKENS - 1))
        assert counted["ngram_accepted_tokens"] > 0
    assert answer["usage"]["completion_tokens"] == 2 * NUM_TOKENS


def test_drafts_follow_the_grammar(edge_target: Target, plain: Target) -> None:
    body = {
        "messages": [{"role": "user", "content": f"Repeat the first line of these.\n{LINES}"}],
        "temperature": 0,
        "max_tokens": 60,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": SCHEMA, "strict": True},
        },
    }
    want, have = (target.post("/v1/chat/completions", body)["choices"][0] for target in (plain, edge_target))
    assert have["message"]["content"] == want["message"]["content"]
    assert json.loads(have["message"]["content"])["age"] > 0


IN_PROCESS = """
from demo import TEXT
from vllm import LLM, SamplingParams
from vllm_specedge.adapter import scheduler as module
def fail(*args, **kwargs):
    raise OSError("no gateway")
module.start_link = fail
options = {{"method": "edge", "listen": {listen!r}}}
llm = LLM({model!r}, dtype="float32", enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=1 << 28,
          speculative_config=options)
scheduler = llm.llm_engine.engine_core.engine_core.scheduler
ids = llm.get_tokenizer().encode(TEXT)
near_the_longest_context = (ids * 6)[:490]
def say(drafting):
    scheduler._is_drafting = drafting
    prompts = [{{"prompt_token_ids": tokens}} for tokens in (ids * 2 + ids[:20], near_the_longest_context)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True), use_tqdm=False)
    return [tuple(output.outputs[0].token_ids) for output in outputs]
plain, drafted = say(False), say(True)
print("same" if drafted == plain else "different", len(plain[0]), len(plain[1]), len(scheduler.book))
print("accepted", scheduler.book.counters["ngram_accepted_tokens"])
print("rejected", scheduler.book.counters["ngram_verified_tokens"] - scheduler.book.counters["ngram_accepted_tokens"])
"""


def test_in_process_without_a_gateway_and_near_the_longest_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last steps before max_model_len vLLM replaces everyone's drafts by zeros: those are not verified."""
    script = IN_PROCESS.format(model=str(MODEL), listen=LISTEN)
    out = run_script(script, tmp_path, monkeypatch, in_process=True)
    assert "same 40 22 0" in out
    assert int(out.split("accepted ")[1].split()[0]) > 30
    assert int(out.split("rejected ")[1].split()[0]) < 20


# -- the worker's part alone -------------------------------------------------------------------------------------------


def proposer(monkeypatch: pytest.MonkeyPatch, rank: int = 0, **options: Any) -> EdgeProposer:
    """As a worker of this rank builds it, once it has been compiled."""
    monkeypatch.setattr(cpu_kernels, "mend", lambda: None)
    config = SimpleNamespace(
        # A custom class gets no window from vLLM.
        speculative_config=SimpleNamespace(prompt_lookup_min=0, prompt_lookup_max=0, num_speculative_tokens=4),
        model_config=SimpleNamespace(max_model_len=64),
        scheduler_config=SimpleNamespace(max_num_seqs=8),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, rank=rank),
        additional_config={"specedge": options},
    )
    built = EdgeProposer(config)
    for thread in threading.enumerate():
        if thread.name == "specedge-ngram":
            thread.join()
    return built


def drafts_of(built: EdgeProposer, *rows: list[int]) -> list[list[int]]:
    """What it drafts for a step that ended each row with its last token; an empty row is a chunk of a prompt."""
    tokens, num_tokens = np.zeros((8, 64), np.int32), np.zeros(8, np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
        num_tokens[index] = len(row)
    return built.propose([row[-1:] for row in rows], num_tokens, tokens, slot_mappings=None)


def test_the_lookup_is_vllm_s_own_with_its_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    built = proposer(monkeypatch)
    assert drafts_of(built, [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5], []) == [[6, 7, 8, 9], []]
    assert drafts_of(built, [2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5]) == [[]], "four equal tokens are one too few"


def test_the_window_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drafts_of(proposer(monkeypatch, prompt_lookup_max=2), [1, 2, 7, 8, 1, 2]) == [[7, 8, 1, 2]]


@pytest.mark.parametrize(("rank", "options"), [(0, {"ngram": False}), (1, {})])
def test_off_or_not_the_first_rank(monkeypatch: pytest.MonkeyPatch, rank: int, options: dict[str, Any]) -> None:
    assert drafts_of(proposer(monkeypatch, rank, **options), [1] * 20, [2] * 20) == [[], []]


def test_a_lookup_of_another_shape_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "NGRAM_HOOKS", (hooks.Hook("vllm.v1.spec_decode.ngram_proposer:NgramProposer.gone"),))
    assert drafts_of(proposer(monkeypatch), [1] * 20) == [[]]


def test_a_lookup_that_fails_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    built = proposer(monkeypatch)
    assert built.propose([[1]], "no array", "no array") == [[]]
    assert drafts_of(built, [1] * 20) == [[]]


def test_off_is_said_to_engine_and_worker() -> None:
    args = rewritten("--speculative-config", json.dumps({"method": "edge", "ngram": False, "listen": LISTEN}))
    assert args.additional_config["specedge"] == {"ngram": False, "listen": LISTEN}
    assert args.scheduler_cls == SCHEDULER
