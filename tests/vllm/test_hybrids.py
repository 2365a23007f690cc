"""A model with linear attention: edges change no answer, whatever is drafted, held, preempted or aborted.

vLLM's CPU operators for it support only bfloat16, in which another batch rounds differently: answers diverge at
near-ties. So each answer is judged by plain vLLM, which reads it as a prompt: every token is the best there, or nearly.
"""

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
from stack import start_server, wait_for

from tests.ports import free_port

from . import hybrid_model
from .conftest import ROOM, Completion, Target, counting, replay, running_edge
from .test_requests import preemptions

NUM_RUNS = 200
NUM_TOKENS = 32
CONCURRENCY = 8
MAX_FURTHER = 0.4
"""Mean log probability by which the tokens of an answer may be further from plain vLLM's best ones than in the worst
of its own answers. A stale state makes all tokens after it wrong, by 7 without the plugin's fixes."""
K = 5
KV_BYTES = 97 * 65_536
"""Pages: five contexts of 256 tokens have 19 each, and one more each when they grow."""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Target, Target]]:
    """A server without speculation, and one that accepts edges, has little memory and prefills in chunks."""
    model, logs = tmp_path_factory.mktemp("hybrid"), tmp_path_factory.mktemp("logs")
    hybrid_model.save(model)
    gateway_port = free_port()
    config = {"method": "edge", "num_speculative_tokens": K, "listen": f"127.0.0.1:{gateway_port}"}
    config |= {"mode": "wait", "hold_limit_ms": 500}
    shared = ("--max-model-len", "512", "--max-num-seqs", str(CONCURRENCY))
    edge = ("--speculative-config", json.dumps(config), "--max-num-batched-tokens", "128")
    edge += ("--kv-cache-memory-bytes", str(KV_BYTES))
    with ExitStack() as stack:
        targets = []
        for name, options in (("plain", ROOM), ("edge", edge)):
            log = logs / f"{name}.log"
            server = start_server(
                model, log, free_port(), *shared, *options, gateway_port=gateway_port, dtype="bfloat16"
            )
            stack.callback(server.process.stop)
            targets.append(Target(server))
            stack.callback(targets[-1].http.close)
        for target in targets:
            wait_for(target.server.process, f"{target.server.url}/health")
        wait_for(targets[1].server.process, f"{targets[1].server.gateway_url}/healthz", "engines", 1)
        yield targets[0], targets[1]


@pytest.fixture(scope="module")
def asked() -> list[str]:
    chance, words = random.Random(3), ("river", "moon", "bread", "dog", "chess", "winter", "bee", "sea", "stone")
    return [" ".join(chance.choices(words, k=chance.choice((3, 60, 238, 238)))) for _ in range(NUM_RUNS)]


def distances(plain: Target, answer: Completion) -> list[float]:
    """By how much plain vLLM finds the tokens of an answer less probable than the best ones."""
    body = {"prompt": [*answer.prompt_ids, *answer.token_ids], "max_tokens": 1, "prompt_logprobs": 1, "temperature": 0}
    told = plain.post("/v1/completions", body)["choices"][0]["prompt_logprobs"][-len(answer.token_ids) :]
    of_token = [each[str(token)]["logprob"] for each, token in zip(told, answer.token_ids, strict=True)]
    best = [max(other["logprob"] for other in each.values()) for each in told]
    return [a - b for a, b in zip(best, of_token, strict=True)]


def assert_plain(plain: Target, answers: list[Completion], said: list[Completion]) -> None:
    """`said`: plain vLLM's own answers, which are not its best tokens everywhere either, as prefill rounds differently
    from decoding."""
    num_same = sum(a.token_ids == b.token_ids for a, b in zip(answers, said, strict=True))
    far, own = (sorted(float(np.mean(distances(plain, each))) for each in some) for some in (answers, said))
    print(f"{num_same} of {len(answers)} as plain; the worst are {far[-3:]} from its best tokens, its own {own[-3:]}")
    assert far[-1] < own[-1] + MAX_FURTHER


def ask_all(target: Target, prompts: list[str]) -> list[Completion]:
    with ThreadPoolExecutor(CONCURRENCY) as executor:
        return list(executor.map(lambda prompt: target.greedy(prompt, NUM_TOKENS), prompts))


@pytest.fixture(scope="module")
def said(both: tuple[Target, Target], asked: list[str]) -> list[Completion]:
    """Plain vLLM's answers."""
    return ask_all(both[0], asked)


def test_without_an_edge_answers_are_plain(
    both: tuple[Target, Target], asked: list[str], said: list[Completion]
) -> None:
    """In plain vLLM 0.32 with any speculation they are not, from the second token on."""
    assert_plain(both[0], ask_all(both[1], asked[:24]), said[:24])


def test_drafts_of_all_lengths_change_nothing(
    both: tuple[Target, Target], asked: list[str], said: list[Completion]
) -> None:
    """With other requests that are aborted, and prefilled in chunks."""
    plain, target = both
    before = preemptions(target)
    with running_edge(target, replay(said, accuracy=0.7)), counting(target) as counted, ThreadPoolExecutor(1) as beside:
        giving_up = beside.submit(_give_up, target, asked[::10])
        answers = ask_all(target, asked)
        giving_up.result()
        counted.settle(NUM_RUNS * (NUM_TOKENS - 1) // 2)
        assert counted["accepted_tokens"] > NUM_RUNS // 10  # answers diverge from those that the edge knows
    assert preemptions(target) > before
    assert_plain(plain, answers, said)


def _give_up(target: Target, prompts: list[str]) -> None:
    """Send requests, and abort them after a few tokens."""
    url, options = f"{target.server.url}/v1/completions", {"max_tokens": 200, "stream": True, "ignore_eos": True}
    for prompt in prompts:
        body = {"model": target.server.model, "prompt": prompt, **options}
        with target.http.stream("POST", url, json=body) as answer:
            for number, _ in enumerate(answer.iter_lines()):
                if number > 8:
                    break
