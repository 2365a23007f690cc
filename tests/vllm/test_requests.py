"""Every kind of request is right with an edge attached."""

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import OpenAI
from scipy.stats import chi2_contingency
from stack import MODEL_NAME

from .conftest import Completion, Target, assert_same, counting, replay, running_edge, until

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "maximum": 120, "minimum": 1},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


PERSON = {
    "messages": [{"role": "user", "content": "Invent a person."}],
    "max_tokens": 128,
    "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}},
}


@pytest.fixture(scope="module")
def person(plain: Target) -> Completion:
    """The target's answer without speculation."""
    said = plain.post("/v1/chat/completions", {**PERSON, "temperature": 0, "return_token_ids": True})
    [choice] = said["choices"]
    return Completion(tuple(said["prompt_token_ids"]), tuple(choice["token_ids"]), (), choice["finish_reason"])


@pytest.fixture(scope="module")
def target(edge_target: Target, expected: list[Completion], person: Completion) -> Iterator[Target]:
    """The server with an edge that drafts well for the known prompts, and nothing or noise for others."""
    with running_edge(edge_target, replay([*expected, person], accuracy=0.9)):
        yield edge_target


@pytest.fixture(scope="module")
def client(target: Target) -> OpenAI:
    return OpenAI(base_url=f"{target.server.url}/v1", api_key="none", max_retries=0)


def ask(client: OpenAI, prompt: str, **parameters: Any) -> Any:
    return client.completions.create(model=MODEL_NAME, prompt=prompt, **parameters)


def test_parameters_of_sampled_requests(client: OpenAI, prompts: list[str]) -> None:
    sampled = {"max_tokens": 24, "temperature": 0.8, "top_p": 0.9, "extra_body": {"ignore_eos": True}}
    assert ask(client, prompts[0], **sampled).usage.completion_tokens == 24
    assert ask(client, prompts[0], **sampled, seed=7).usage.completion_tokens == 24
    both = ask(client, prompts[1], n=2, **sampled).choices
    assert [choice.index for choice in both] == [0, 1]
    logprobs = ask(client, prompts[2], logprobs=3, **sampled).choices[0].logprobs
    assert len(logprobs.token_logprobs) == len(logprobs.tokens)
    assert all(value <= 0 for value in logprobs.token_logprobs)


def test_stop_string_ends_the_answer_where_it_does_without_an_edge(
    client: OpenAI, plain: Target, prompts: list[str]
) -> None:
    body = {"prompt": prompts[16], "max_tokens": 48, "temperature": 0, "stop": [" I like"]}
    want = plain.post("/v1/completions", body)["choices"][0]
    have = ask(client, prompts[16], max_tokens=48, temperature=0, stop=[" I like"]).choices[0]
    assert (have.text, have.finish_reason) == (want["text"], want["finish_reason"])


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7])
def test_max_tokens_is_exact(target: Target, expected: list[Completion], prompts: list[str], max_tokens: int) -> None:
    got = target.greedy(prompts[3], max_tokens)
    assert got.token_ids == expected[3].token_ids[:max_tokens]
    assert got.finish_reason == "length"


def test_json_schema(target: Target, person: Completion) -> None:
    """Any sampled answer ends in time: without white space a person is short."""
    people: list[dict[str, Any]] = []

    def is_drafted() -> bool:
        """A short answer may be complete before its edge has sent anything."""
        with counting(target) as counted:
            greedy = target.post("/v1/chat/completions", {**PERSON, "temperature": 0, "return_token_ids": True})
            assert tuple(greedy["choices"][0]["token_ids"]) == person.token_ids
            sampled = target.post("/v1/chat/completions", {**PERSON, "temperature": 1, "n": 8})
            people.extend(json.loads(each["message"]["content"]) for each in greedy["choices"] + sampled["choices"])
            counted.settle(greedy["usage"]["completion_tokens"] + sampled["usage"]["completion_tokens"] - 9)
            return counted["accepted_tokens"] > 0

    until(is_drafted, "no draft was accepted")
    assert all(each.keys() == {"name", "age"} and 1 <= each["age"] <= 120 for each in people)


def test_streamed_chat_is_the_same(client: OpenAI, plain: Target) -> None:
    messages = [{"role": "user", "content": "Say hello in three languages."}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 40}
    want = plain.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    stream = client.chat.completions.create(model=MODEL_NAME, stream=True, **body)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == want


def test_sampled_tokens_have_the_target_s_distribution(edge_target: Target, plain: Target) -> None:
    """Drafted with the greedy answer, so that drafts are accepted and rejected; six allowed tokens fill the cells."""
    prompt = "The weather today is"
    allowed = sorted({*plain.greedy(prompt, 4).token_ids, *plain.greedy("She was very", 4).token_ids})[:6]
    likely = plain.greedy(prompt, 12, allowed_token_ids=allowed)
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0.9, "allowed_token_ids": allowed, "ignore_eos": True}

    def sample(target: Target, num_requests: int, n: int) -> Counter[tuple[int, ...]]:
        """The last three of twelve tokens: by then the edge has caught up.

        Without a seed: the answers of one request with n and a seed have the seeds after it, which others share.
        """

        def one() -> list[tuple[int, ...]]:
            answer = target.post("/v1/completions", {**body, "n": n, "return_token_ids": True})
            return [tuple(choice["token_ids"][-3:]) for choice in answer["choices"]]

        return Counter(ids for _ in range(num_requests) for ids in one())

    without = sample(plain, 16, 16)
    with running_edge(edge_target, replay([likely])), counting(edge_target) as counted:
        with_edge = sample(edge_target, 16, 16)
        counted.settle(16 * 16 * 11)
        assert counted["accepted_tokens"] > 50
        accepted, verified = counted.together("accepted_tokens", "verified_tokens")
        assert verified - accepted > 50
    cells = [ids for ids in without.keys() | with_edge.keys() if without[ids] + with_edge[ids] >= 10]
    rest = [sum(counts.values()) - sum(counts[ids] for ids in cells) for counts in (without, with_edge)]
    table = [
        [*(counts[ids] for ids in cells), left + 1] for counts, left in zip((without, with_edge), rest, strict=True)
    ]
    result = chi2_contingency(table)
    print(f"{len(cells)} cells, chi-square {result.statistic:.1f}, p = {result.pvalue:.3f}")
    assert len(cells) > 5
    assert result.pvalue > 1e-4


def test_near_the_longest_context(target: Target, plain: Target) -> None:
    prompt = plain.greedy("Once upon a time", 1).prompt_ids * 1000
    long = list(prompt[:2030])
    want, have = plain.greedy(long, 18), target.greedy(long, 18)
    assert_same([want], [have])
    assert len(have.token_ids) == 18


def test_chunked_prefill_and_prefix_hits(target: Target, plain: Target) -> None:
    """1,500 tokens are prefilled in three chunks; asked again, most of them come from the prefix cache."""
    words = " ".join(f"word{number}" for number in range(440))
    prompt = list(plain.greedy(words, 1).prompt_ids[:1500])
    assert len(prompt) == 1500
    want = plain.greedy(prompt, 32)
    with running_edge(target, replay([want], accuracy=0.8)):
        assert_same([want, want], [target.greedy(prompt, 32), target.greedy(prompt, 32)])
        # A prompt that is cached except for its last token: the case that vLLM pads with -1 drafts.
        cached = prompt[:1281]
        want_cached = plain.greedy(cached, 16)
        assert_same([want_cached] * 2, [target.greedy(cached, 16), target.greedy(cached, 16)])


def test_preemption(edge_target: Target, plain: Target) -> None:
    """Eight contexts of 560 tokens do not fit the KV memory together: some are preempted and resumed."""
    ids = plain.greedy(" ".join(f"item {number}," for number in range(300)), 1).prompt_ids
    prompts = [list(ids[start : start + 500]) for start in range(0, 80, 10)]
    want = plain.greedy_all(prompts, 60)
    with running_edge(edge_target, replay(want, accuracy=0.8)):
        before = preemptions(edge_target)
        got = edge_target.greedy_all(prompts, 60)
        assert preemptions(edge_target) > before
    assert_same(want, got)


def preemptions(target: Target) -> float:
    text = target.http.get(f"{target.server.url}/metrics").text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:num_preemptions_total"))


def test_aborted_requests_leave_nothing_behind(target: Target, prompts: list[str], expected: list[Completion]) -> None:
    def abort(prompt: str) -> None:
        body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": 500, "stream": True, "ignore_eos": True}
        with target.http.stream("POST", f"{target.server.url}/v1/completions", json=body) as response:
            next(response.iter_lines())

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(abort, prompts[:8]))
    assert_same(expected[:4], target.greedy_all(prompts[:4]))
    until(lambda: target.server.metrics()["specedge_requests"] == 0, "the gateway still has requests")
