"""On the V2 runner the tokens are plain vLLM's, however steps are scheduled and whatever edges propose."""

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from vllm import SamplingParams

from vllm_specedge.adapter import hooks
from vllm_specedge.adapter.worker import verification

from .engines import WAYS, Engine
from .tiny_model import VOCAB_SIZE

PROMPTS = [[5, 6, 7, 8, 9], [50, 16, 17, 8, 9, 3, 4]]
GREEDY = {"temperature": 0.0, "ignore_eos": True}
every_way = pytest.mark.parametrize("way", WAYS)

Alike = Callable[..., list[list[int]]]


def greedy(num_tokens: int = 32, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, **{**GREEDY, **options})


def long_prompt(seed: int, length: int) -> list[int]:
    chance = Random(seed)
    return [chance.randrange(2, VOCAB_SIZE) for _ in range(length)]


@every_way
def test_greedy_answers(alike: Alike, edge: Engine, way: str) -> None:
    before, accepted = edge.counters["verified_tokens"], edge.counters["accepted_tokens"]
    steps, waited = edge.counters["engine_steps"], edge.counters["waited_steps"]
    alike(way, PROMPTS, greedy())
    assert edge.edges is not None
    assert not edge.edges.num_open
    verified, waited = edge.counters["verified_tokens"] - before, edge.counters["waited_steps"] - waited
    if way == "asynchronous":
        assert not verified
        assert not waited
    elif way != "as the policy says":
        assert verified > 10
        assert edge.counters["accepted_tokens"] - accepted > 8
        steps = edge.counters["engine_steps"] - steps
        assert waited < steps if way == "switching" else steps - waited <= 1, "the first one is not planned yet"


@pytest.mark.parametrize("way", ["synchronous", "asynchronous"])
def test_a_plan_knows_whether_its_step_is_waited_for(
    alike: Alike, edge: Engine, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """If it is, the gap is not part of a draft's cost."""
    driver, seen = edge.drafting.driver, list[bool]()
    begin = driver.begin
    monkeypatch.setattr(
        driver, "begin", lambda rows, now_s, load: (seen.append(load.is_synchronous), begin(rows, now_s, load))[1]
    )
    alike(way, PROMPTS, greedy(16))
    assert set(seen[2:]) == {way == "synchronous"}


def test_the_policy_verifies_where_drafts_are_right(alike: Alike, edge: Engine) -> None:
    switches = edge.counters["verified_tokens"]
    alike("as the policy says", PROMPTS, greedy(64), wrong_every=0)
    assert edge.counters["verified_tokens"] > switches


@every_way
def test_drafts_that_are_wrong(alike: Alike, way: str) -> None:
    alike(way, PROMPTS, greedy(), wrong_every=1)


@every_way
def test_an_answer_ends_in_the_middle_of_a_draft(alike: Alike, way: str) -> None:
    for num_tokens in range(1, 8):
        alike(way, PROMPTS, greedy(num_tokens), wrong_every=0)


@every_way
def test_it_stops_at_a_token_in_the_middle_of_a_draft(alike: Alike, plain: Engine, way: str) -> None:
    whole = plain.tokens(PROMPTS, greedy())[0]
    params = greedy(stop_token_ids=[whole[9]])
    assert len(alike(way, PROMPTS, params, wrong_every=0)[0]) == 10


@every_way
def test_penalties(alike: Alike, way: str) -> None:
    alike(way, PROMPTS, greedy(presence_penalty=1.5, frequency_penalty=0.7, repetition_penalty=1.3), wrong_every=4)


@every_way
def test_bad_words_bias_and_min_tokens(alike: Alike, plain: Engine, way: str) -> None:
    whole = plain.tokens(PROMPTS[:1], greedy())[0]
    params = SamplingParams(temperature=0.0, max_tokens=24, min_tokens=20, stop_token_ids=whole[3:5])
    alike(way, PROMPTS[:1], params)


@every_way
@pytest.mark.parametrize(
    "options",
    [{"min_p": 1.0, "temperature": 1.5}, {"logit_bias": {7: 20.0, 9: -30.0}}],
    ids=["min_p leaves only the best", "logit_bias"],
)
def test_parameters_that_vllm_refuses_beside_its_own_methods(
    alike: Alike, edge: Engine, way: str, options: dict[str, Any]
) -> None:
    verification.admit(edge.core.vllm_config.speculative_config, hooks.V2)
    alike(way, PROMPTS, greedy(24, **options))


@every_way
def test_logprobs(plain: Engine, edge: Engine, alike: Alike, way: str) -> None:
    params = greedy(logprobs=2)
    alike(way, PROMPTS, params)
    for one, other in zip(plain.answers(PROMPTS, params), edge.answers(PROMPTS, params), strict=True):
        for expected, said in zip(one.outputs[0].logprobs, other.outputs[0].logprobs, strict=True):
            assert expected.keys() == said.keys()
            for token, value in expected.items():
                assert said[token].logprob == pytest.approx(value.logprob, abs=1e-4)


@every_way
def test_a_prompt_that_is_computed_in_chunks(alike: Alike, way: str) -> None:
    alike(way, [long_prompt(1, 150), PROMPTS[0], long_prompt(2, 90)], greedy(24))


@every_way
def test_a_prompt_that_is_in_the_prefix_cache(alike: Alike, way: str) -> None:
    for _ in range(2):
        alike(way, [long_prompt(3, 100), long_prompt(3, 120)], greedy(16))


@every_way
def test_more_requests_than_run_at_once(alike: Alike, way: str) -> None:
    prompts = [long_prompt(seed, 5 + seed) for seed in range(9)]
    alike(way, prompts, [greedy(4 + 3 * number) for number in range(9)])
