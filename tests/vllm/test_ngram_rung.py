"""Without an edge the server verifies vLLM's own n-gram drafts: the same answers in fewer steps."""

import json
import threading
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
from questions import TEXT
from vllm.v1.spec_decode import ngram_proposer
from vllm.v1.spec_decode.ngram_proposer import NgramProposer

from vllm_specedge.adapter import hooks
from vllm_specedge.adapter.config_rewrite import SCHEDULER
from vllm_specedge.adapter.ngrams import NgramLookup
from vllm_specedge.adapter.proposer import EdgeProposer
from vllm_specedge.adapter.worker import cpu_kernels, sampling

from .conftest import MODEL, Target, assert_same, counting, until
from .test_start import LISTEN, rewritten, run_script

# A warning of numba, about a list in vLLM's code.
pytestmark = pytest.mark.filterwarnings("ignore:(?s).*reflected list")

NUM_TOKENS = 48
FIND = "_find_longest_matched_ngram_and_propose_tokens"
LINES = "\n".join(['{"name":"Anna","age":41}'] * 6)
"""JSON as the servers of these tests write it: without white space."""
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 1}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def repetitive(sentence: int) -> str:
    """A text twice, and the beginning of one of its sentences, whose continuation is in it."""
    words = TEXT.split(". ")[sentence].split()
    return "\n\n".join([TEXT, TEXT, " ".join(words[:7])])


def test_repetitive_prompts_take_fewer_steps(edge_target: Target, plain: Target) -> None:
    """After a slow lookup on a busy machine, lookups are rare for a while: then the requests are repeated."""
    prompts = [repetitive(sentence) for sentence in range(3)]
    want = plain.greedy_all(prompts, NUM_TOKENS)

    def are_few() -> bool:
        with counting(edge_target) as counted:
            assert_same(want, edge_target.greedy_all(prompts, NUM_TOKENS))
            counted.settle(3 * (NUM_TOKENS - 1))
            names = ("steps", "committed_tokens", "ngram_accepted_tokens", "verified_tokens")
            steps, committed, accepted, of_edges = counted.together(*names)
            assert steps == committed - accepted
            assert of_edges == 0
            return steps < 0.6 * committed

    until(are_few, "they take as many steps as others")


def test_sampled_requests_finish(edge_target: Target) -> None:
    sampled = {"temperature": 0.8, "top_p": 0.9, "max_tokens": NUM_TOKENS, "n": 2, "ignore_eos": True}

    def is_copied() -> bool:
        with counting(edge_target) as counted:
            answer = edge_target.post("/v1/completions", {"prompt": repetitive(1), **sampled})
            assert answer["usage"]["completion_tokens"] == 2 * NUM_TOKENS
            counted.settle(2 * (NUM_TOKENS - 1))
            return counted["ngram_accepted_tokens"] > 0

    until(is_copied, "nothing that was copied was right")


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
from questions import TEXT
from vllm import LLM, SamplingParams
from vllm_specedge.adapter import drafting as module
def fail(*args, **kwargs):
    raise OSError("no gateway")
module.start_link = fail
options = {{"method": "edge", "listen": {listen!r}}}
llm = LLM({model!r}, dtype="float32", enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=1 << 28,
          speculative_config=options)
scheduler = llm.llm_engine.engine_core.engine_core.scheduler
drafting = scheduler._drafting
ids = llm.get_tokenizer().encode(TEXT)
near_the_longest_context = (ids * 6)[:490]
def say(is_drafting):
    scheduler._drafting = drafting if is_drafting else None
    prompts = [{{"prompt_token_ids": tokens}} for tokens in (ids * 2 + ids[:20], near_the_longest_context)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True), use_tqdm=False)
    return [tuple(output.outputs[0].token_ids) for output in outputs]
plain, drafted = say(False), say(True)
print("same" if drafted == plain else "different", len(plain[0]), len(plain[1]), len(drafting.driver))
print("accepted", drafting.driver.counters["ngram_accepted_tokens"])
print("rejected", drafting.driver.counters["ngram_verified_tokens"] - drafting.driver.counters["ngram_accepted_tokens"])
"""


def test_in_process_without_a_gateway_and_near_the_longest_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = IN_PROCESS.format(model=str(MODEL), listen=LISTEN)
    out = run_script(script, tmp_path, monkeypatch, in_process=True)
    assert "same 40 22 0" in out
    assert int(out.split("accepted ")[1].split()[0]) > 30
    assert int(out.split("rejected ")[1].split()[0]) < 20


# -- the lookup alone --------------------------------------------------------------------------------------------------


def lookup(shortest: int = 5, longest: int = 5, max_model_len: int = 64) -> NgramLookup:
    """A compiled lookup with one request, "r"."""
    built = NgramLookup(4, shortest, longest, max_model_len)
    for thread in threading.enumerate():
        if thread.name == "specedge-ngram":
            thread.join()
    built.open("r")
    return built


def test_the_lookup_is_vllm_s_own() -> None:
    proposer = NgramProposer(
        SimpleNamespace(
            speculative_config=SimpleNamespace(prompt_lookup_min=2, prompt_lookup_max=4, num_speculative_tokens=4),
            model_config=SimpleNamespace(max_model_len=64),
            scheduler_config=SimpleNamespace(max_num_seqs=8),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
        )
    )
    chance, tokens, built, found = Random(3), [], lookup(2, 4), 0
    while len(tokens) < 64:
        tokens += [chance.randrange(3) for _ in range(chance.randint(1, 3))]
        row = np.zeros((1, 128), np.int32)
        row[0, : len(tokens)] = tokens
        (want,) = proposer.propose(4, [[0]], np.array([len(tokens)], np.int32), row)
        assert built.propose("r", tokens) == want
        found += bool(want)
    assert found > 10


def test_it_follows_each_request_until_it_is_closed() -> None:
    built, tokens = lookup(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4]
    assert built.propose("r", tokens) == [], "four equal tokens are one too few"
    tokens.append(5)
    assert built.propose("r", tokens) == built.propose("r", tokens) == [6, 7, 8, 9]
    assert built.propose("another", tokens) == []
    built.close("r")
    assert built.propose("r", tokens) == []


def test_a_lookup_of_another_shape_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = hooks.Hook("vllm.v1.spec_decode.ngram_proposer:NgramProposer.gone")
    monkeypatch.setitem(hooks.PARTS, hooks.NGRAMS, hooks.Part("Nothing", (gone,)))
    assert lookup().propose("r", [1] * 20) == []


def test_a_lookup_that_cannot_be_compiled_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram_proposer, FIND, lambda *args: 1 / 0)
    monkeypatch.setitem(hooks.PARTS, hooks.NGRAMS, hooks.Part("Nothing", ()))
    assert lookup().propose("r", [1] * 20) == []


def test_the_worker_drafts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "mend", lambda: None)
    monkeypatch.setattr(sampling, "shorten", lambda: None)
    config = SimpleNamespace(model_config=SimpleNamespace(is_hybrid=False))
    assert EdgeProposer(config).propose([[1] * 20, []], "no array", slot_mappings=None) == [[], []]


def test_off_is_said_to_the_engine() -> None:
    args = rewritten("--speculative-config", json.dumps({"method": "edge", "ngram": False, "listen": LISTEN}))
    assert args.additional_config["specedge"] == {"ngram": False, "listen": LISTEN}
    assert args.scheduler_cls == SCHEDULER
