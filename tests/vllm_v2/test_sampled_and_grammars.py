"""On the V2 runner sampled answers and those of a grammar are plain vLLM's; a separate file, to share out the time."""

import json
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from vllm_specedge.adapter import hooks
from vllm_specedge.adapter.worker import verification

from .engines import WAYS, Engine
from .test_same_tokens import PROMPTS, Alike, every_way, greedy

SAMPLED = {
    "temperature": {"temperature": 0.8},
    "top-k and top-p": {"temperature": 1.0, "top_k": 20, "top_p": 0.9},
    "penalties, bias": {"temperature": 1.3, "presence_penalty": 0.8, "repetition_penalty": 1.2, "logit_bias": {7: 5.0}},
    "nearly greedy, logprobs": {"temperature": 0.1, "logprobs": 2},
    "two choices": {"temperature": 0.9, "n": 2},
}


@pytest.mark.parametrize(
    ("way", "options"),
    [*[("switching", options) for options in SAMPLED.values()], *[(way, SAMPLED["temperature"]) for way in WAYS]],
    ids=str,
)
def test_a_seed_says_the_same_with_edges_and_without(
    alike: Alike, edge: Engine, way: str, options: dict[str, Any]
) -> None:
    """Whatever was drafted; also for a greedy request in the same batch."""
    verification.admit(edge.core.vllm_config.speculative_config, hooks.V2)
    accepted = edge.counters["accepted_tokens"]
    sampled = SamplingParams(max_tokens=24, ignore_eos=True, seed=1234, **options)
    other = SamplingParams(max_tokens=24, ignore_eos=True, seed=-5, **{**options, "n": 1})
    alike(way, [*PROMPTS, [9, 9, 9]], [other, greedy(24), sampled], wrong_every=4)
    if way not in ("asynchronous", "as the policy says"):
        assert edge.counters["accepted_tokens"] > accepted + 10


@every_way
def test_a_grammar(alike: Alike, way: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}}}
    schema |= {"required": ["a", "b"], "additionalProperties": False}
    params = SamplingParams(
        temperature=0.0, max_tokens=48, structured_outputs=StructuredOutputsParams(json=json.dumps(schema))
    )
    alike(way, PROMPTS, params, wrong_every=4)


@every_way
def test_a_request_with_a_grammar_beside_one_without(alike: Alike, way: str) -> None:
    choice = SamplingParams(
        temperature=0.0, max_tokens=24, structured_outputs=StructuredOutputsParams(choice=["red wine", "blue sky"])
    )
    alike(way, PROMPTS, [choice, greedy(40)])
