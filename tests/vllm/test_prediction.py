"""Predicted outputs on the real server: OpenAI's own client predicts answers, correctly and wrongly."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai import OpenAI
from stack import MODEL_NAME

from .conftest import Completion, Target, assert_same, counting, replay, running_edge

QUESTION = [{"role": "user", "content": "Write a short story about a lost dog."}]
NUM_TOKENS = 96


@pytest.fixture(scope="module")
def client(edge_target: Target) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{edge_target.server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def ask(client: OpenAI, predicted: Any = openai.NOT_GIVEN, **more: Any) -> Any:
    prediction = {"type": "content", "content": predicted} if isinstance(predicted, str) else predicted
    body = {"model": MODEL_NAME, "messages": QUESTION, "max_tokens": NUM_TOKENS, "temperature": 0, **more}
    return client.chat.completions.create(**body, prediction=prediction)


@pytest.fixture(scope="module")
def answer(plain: Target) -> str:
    """The answer of the server without speculation."""
    with OpenAI(base_url=f"{plain.server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        return ask(client).choices[0].message.content


def test_an_answer_that_was_predicted_takes_few_steps(client: OpenAI, edge_target: Target, answer: str) -> None:
    with counting(edge_target) as counted:
        got = ask(client, answer)
        assert got.choices[0].message.content == answer
        counted.settle(NUM_TOKENS)
        assert counted["prediction_accepted_tokens"] >= 0.6 * NUM_TOKENS
        assert counted["steps"] <= 0.4 * NUM_TOKENS
    details = got.usage.completion_tokens_details
    assert got.usage.completion_tokens == NUM_TOKENS
    assert details.accepted_prediction_tokens >= NUM_TOKENS - 2
    assert details.rejected_prediction_tokens <= 2


def test_an_edited_text_is_followed_and_the_answer_is_the_server_s_own(
    client: OpenAI, edge_target: Target, answer: str
) -> None:
    words = answer.split(" ")
    predicted = " ".join("zebra" if number % 20 == 10 else word for number, word in enumerate(words))
    with counting(edge_target) as counted:
        parts = [{"type": "text", "text": text} for text in (predicted[:50], predicted[50:])]
        got = ask(client, {"type": "content", "content": parts})
        assert got.choices[0].message.content == answer
        counted.settle(NUM_TOKENS)
        assert counted["steps"] < 0.7 * NUM_TOKENS
    details = got.usage.completion_tokens_details
    assert details.accepted_prediction_tokens > 0.6 * NUM_TOKENS
    assert details.rejected_prediction_tokens >= len(words) // 20


def test_a_stream_says_in_its_last_usage_what_became_of_it(client: OpenAI, answer: str) -> None:
    chunks = list(ask(client, answer, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == answer
    assert chunks[-1].usage.completion_tokens_details.accepted_prediction_tokens >= NUM_TOKENS - 2


def test_what_is_no_prediction_is_refused_as_openai_does(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="prediction must be"):
        ask(client, {"type": "content", "content": 7})


@pytest.mark.parametrize(
    "predicted",
    ["nothing of this is in the answer " * 20, "", [1, 2, 3] * 100, [-1], [10**9], [0.5], ["x"], 7, "x" * 2_000_000],
    ids=["wrong", "empty", "wrong ids", "negative", "past the vocabulary", "no ids", "text", "a number", "very long"],
)
def test_whatever_is_predicted_the_answer_is_the_server_s_own(client: OpenAI, answer: str, predicted: Any) -> None:
    got = ask(client, extra_body={"vllm_xargs": {"specedge_prediction": predicted}})
    assert got.choices[0].message.content == answer


def test_many_at_once_beside_an_edge(edge_target: Target, prompts: list[str], expected: list[Completion]) -> None:
    """Half of them have right predictions, each a different one; the others only at the beginning."""

    def one(number: int) -> Completion:
        ids = list(expected[number].token_ids)
        predicted = ids if number % 2 else [*ids[:8], *ids[12:]]
        return edge_target.greedy(prompts[number], vllm_xargs={"specedge_prediction": predicted})

    with (
        running_edge(edge_target, replay(expected, accuracy=0.7)),
        counting(edge_target) as counted,
        ThreadPoolExecutor(8) as executor,
    ):
        assert_same(expected, list(executor.map(one, range(len(prompts)))))
        counted.settle(sum(len(each.token_ids) for each in expected))
        assert counted["prediction_accepted_tokens"] > 0
        assert counted["accepted_tokens"] > 0


def test_sampled_answers_may_be_predicted_too(client: OpenAI, answer: str) -> None:
    greedy, sampled = (ask(client, answer, **more) for more in ({}, {"temperature": 0.9, "n": 2}))
    assert len({choice.message.content for choice in sampled.choices}) == 2
    predicted, of_both = (
        details.accepted_prediction_tokens + details.rejected_prediction_tokens
        for details in (each.usage.completion_tokens_details for each in (greedy, sampled))
    )
    assert of_both == 2 * predicted, "every token of the prediction is accepted or rejected, for each answer"
