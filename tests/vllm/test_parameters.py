"""Parameters of requests with drafts: supported by vLLM's verification, fixed here, or left alone."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
from vllm import SamplingParams

from vllm_specedge.adapter.parameters import TREATMENTS, Treatment, treatment, unknown_parameters

from .conftest import VOCAB_SIZE, Completion, Target, counting, replay, running_edge

NUM_TOKENS = 24
ROUNDS = 8
REPEATING = "I like rivers. I like rivers. I like rivers. I like"

Body = dict[str, Any]


def ask(target: Target, body: Body) -> Body:
    """The whole answer to a completion request."""
    said = {"max_tokens": NUM_TOKENS, "temperature": 0, "return_token_ids": True, **body}
    [choice] = target.post("/v1/completions", said)["choices"]
    return choice


def ask_together(target: Target, bodies: Sequence[Body]) -> list[Body]:
    with ThreadPoolExecutor(len(bodies)) as executor:
        return list(executor.map(lambda body: ask(target, body), bodies))


def completion(choice: Body) -> Completion:
    return Completion(tuple(choice["prompt_token_ids"]), tuple(choice["token_ids"]), (), choice["finish_reason"])


@contextmanager
def drafting(target: Target, choices: Sequence[Body], accuracy: float = 0.7) -> Iterator[None]:
    """An edge that knows only these answers, with the given accuracy."""
    with running_edge(target, replay([completion(choice) for choice in choices], accuracy)):
        yield


def same(want: Body, have: Body) -> bool:
    return all(want[key] == have[key] for key in ("text", "token_ids", "finish_reason", "stop_reason"))


# -- the table -----------------------------------------------------------------------------------------------------


def test_the_table_has_every_parameter_of_this_vllm() -> None:
    assert unknown_parameters(SamplingParams) == []


@pytest.mark.parametrize(
    ("parameters", "how"),
    [
        ({}, Treatment.DRAFTED),
        ({"logprobs": 3, "seed": 1, "min_p": 0.1, "bad_words": ["a"]}, Treatment.DRAFTED),
        ({"thinking_token_budget": 8}, Treatment.UNDRAFTED),
        ({"logprob_token_ids": [1]}, Treatment.ALONE),
        ({"logprob_token_ids": [1], "thinking_token_budget": 8}, Treatment.ALONE),
    ],
)
def test_a_request_is_treated_by_its_most_careful_parameter(parameters: Body, how: Treatment) -> None:
    assert treatment(SamplingParams(**parameters)) is how


def test_what_is_not_in_the_table_is_served_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Newer:
        __struct_fields__ = ("temperature", "novelty", "_private")

        def __init__(self, novelty: float = 1.0) -> None:
            self.temperature, self.novelty, self._private = 0.0, novelty, object()
            self.thinking_token_budget = self.logprob_token_ids = None

    assert "novelty" not in TREATMENTS
    assert treatment(Newer()) is Treatment.DRAFTED
    assert treatment(Newer(0.5)) is Treatment.ALONE


# -- one by one ----------------------------------------------------------------------------------------------------


def test_chosen_logprobs_beside_drafts_and_logprobs(plain: Target, edge_target: Target) -> None:
    """Two requests that crashed the engine within a step."""
    ordinary = {"prompt": REPEATING, "max_tokens": 64, "logprobs": 1, "ignore_eos": True}
    chosen = {"messages": [{"role": "user", "content": "Repeat: I like rivers. I like rivers."}], "max_tokens": 64}
    chosen |= {"logprobs": True, "logprob_token_ids": [1, 2, 3], "temperature": 0, "return_token_ids": True}

    def scored(target: Target) -> Body:
        return target.post("/v1/chat/completions", chosen)["choices"][0]

    want, want_scored = ask(plain, ordinary), scored(plain)
    with drafting(edge_target, [want], 1.0), ThreadPoolExecutor(2) as executor:
        for _ in range(3):
            both = executor.submit(ask, edge_target, ordinary), executor.submit(scored, edge_target)
            have, have_scored = both[0].result(), both[1].result()
            assert same(want, have)
            assert have["logprobs"]["tokens"] == want["logprobs"]["tokens"]
            assert have_scored["token_ids"] == want_scored["token_ids"]
            assert [token["token"] for token in have_scored["logprobs"]["content"]] == [
                token["token"] for token in want_scored["logprobs"]["content"]
            ]


def test_others_are_drafted_for_again_when_it_has_gone(plain: Target, edge_target: Target) -> None:
    body = {"prompt": REPEATING, "max_tokens": 32, "ignore_eos": True}
    want = ask(plain, body)
    ask(edge_target, {"prompt": "The sea", "logprobs": 0, "logprob_token_ids": [5], "max_tokens": 4})
    with drafting(edge_target, [want], 1.0), counting(edge_target) as counted:
        assert same(want, ask(edge_target, body))
        counted.settle(31)
        assert counted["accepted_tokens"] > 0


@pytest.mark.parametrize("seed", [1, 2])
def test_a_seed_on_a_prompt_that_is_computed_in_chunks(plain: Target, edge_target: Target, seed: int) -> None:
    """The first server computes the prompt at once, the second 512 tokens at a time. A first token is not drafted."""
    words = Random(seed).choices(range(1000, 9000), k=700)
    body = {"prompt": words, "max_tokens": 1, "temperature": 1.0, "seed": seed}
    assert ask(edge_target, body)["token_ids"] == ask(plain, body)["token_ids"]


def test_a_bias_is_in_what_is_drafted_too(plain: Target, edge_target: Target) -> None:
    free = ask(plain, {"prompt": REPEATING, "ignore_eos": True})
    biases = {str(token): -3.0 for token in set(free["token_ids"])}
    body = {"prompt": REPEATING, "ignore_eos": True, "logit_bias": biases}
    want = ask(plain, body)
    assert want["token_ids"] != free["token_ids"]
    for known in (want, free | {"prompt_token_ids": want["prompt_token_ids"]}):
        with drafting(edge_target, [known], 1.0), counting(edge_target) as counted:
            assert same(want, ask(edge_target, body))
            counted.settle(NUM_TOKENS - 1)
            assert counted["verified_tokens"] > 0
            assert (counted["accepted_tokens"] > NUM_TOKENS / 2) == (known is want)


def test_min_p_leaves_only_the_most_probable_token(plain: Target, edge_target: Target) -> None:
    """At 1 it is greedy decoding by another name, drafts or not."""
    want = ask(plain, {"prompt": REPEATING, "ignore_eos": True})
    wrong = want | {"token_ids": want["token_ids"][::-1]}
    body = {"prompt": REPEATING, "ignore_eos": True, "temperature": 2.0, "min_p": 1.0}
    for known in (want, wrong):
        with drafting(edge_target, [known], 1.0), counting(edge_target) as counted:
            assert ask(edge_target, body)["token_ids"] == want["token_ids"]
            counted.settle(NUM_TOKENS - 1)
            assert counted["verified_tokens"] > 0


def test_thinking_ends_where_it_has_to_beside_drafts(plain: Target, edge_target: Target) -> None:
    """Several budgets at once, with requests that are drafted for, and alone."""
    thinking = [
        {"prompt": f"{shape}<|im_start|>", "thinking_token_budget": budget, "ignore_eos": True}
        for shape, budget in (("What is a moon?", 5), ("Add 2 and 3.", 9), ("Name a bird.", 2))
    ]
    bodies = [{"prompt": REPEATING, "ignore_eos": True}, *thinking]
    want = ask_together(plain, bodies)
    assert all("</think>" in choice["text"] for choice in want[1:])
    assert all(same(*pair) for pair in zip(want, ask_together(edge_target, bodies), strict=True))
    with drafting(edge_target, want, 0.9):
        assert all(same(*pair) for pair in zip(want, ask_together(edge_target, bodies), strict=True))


# -- all together --------------------------------------------------------------------------------------------------


def random_parameters(random: Random) -> Body:
    """Some of the parameters that change a greedy request's output or its end, each with probability one half."""
    tokens = [str(random.randrange(VOCAB_SIZE)) for _ in range(20)]
    choices: Body = {
        "presence_penalty": random.uniform(-1, 2),
        "frequency_penalty": random.uniform(-1, 2),
        "repetition_penalty": random.uniform(0.8, 1.5),
        "bad_words": random.sample([" the", " a", " and", " of", ".", " I like", " is", " it"], 3),
        "allowed_token_ids": sorted(random.sample(range(VOCAB_SIZE), 5000)),
        "logit_bias": {token: random.uniform(-8, 8) for token in tokens},
        "logprobs": random.choice([0, 1, 5]),
        "stop_token_ids": random.sample(range(200, 3000), 60),
        "stop": random.sample([" it", " you", "\n\n", "e t"], 2),
    }
    chosen = {name: value for name, value in choices.items() if random.random() < 0.4}
    if random.random() < 0.5:
        chosen |= {"min_tokens": random.randint(1, NUM_TOKENS)}
    else:
        chosen |= {"ignore_eos": True}
    return chosen


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_eight_requests_of_random_parameters(plain: Target, edge_target: Target, prompts: list[str], seed: int) -> None:
    """An edge drafts for some of them, mostly correctly."""
    random = Random(seed)
    bodies = [{"prompt": prompt, **random_parameters(random)} for prompt in random.sample(prompts, 8)]
    want = ask_together(plain, bodies)
    with drafting(edge_target, random.sample(want, 5)):
        have = ask_together(edge_target, bodies)
    for body, wanted, got in zip(bodies, want, have, strict=True):
        assert same(wanted, got), (body, wanted, got)


# -- between requests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "paths",
    [("pause?mode=keep", "resume"), ("reset_prefix_cache?reset_running_requests=true",)],
    ids=["pause", "reset"],
)
def test_what_is_said_to_the_server_meanwhile(plain: Target, edge_target: Target, paths: tuple[str, ...]) -> None:
    """While a request has drafts and is held: its output is the same, and it completes."""
    body = {"prompt": REPEATING, "max_tokens": 200, "ignore_eos": True}
    want = ask(plain, body)
    with drafting(edge_target, [want], 0.8), ThreadPoolExecutor(1) as executor:
        for _ in range(3):
            answer = executor.submit(ask, edge_target, body)
            for path in paths:
                said = edge_target.http.post(f"{edge_target.server.url}/{path}")
                assert said.status_code == 200, said.text
            assert same(want, answer.result())
