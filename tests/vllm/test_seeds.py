"""The same seed, the same text: with edges that are right, with others, with one that dies, and without."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import psutil
import pytest
import torch

from edge_client.drafters.hf.drafter import load_hf_drafter
from edge_client.drafters.profile import profile
from edge_client.drafting.pacing import Pace
from edge_client.drafting.pass_times import PassTimes

from .conftest import MODEL, Target, counting, running_edge, said_while_an_edge_dies, until
from .test_parameters import Body, ask_together, drafting, random_parameters, same

NUM_REQUESTS = 8
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def sampled(random: Random, prompts: list[str]) -> list[Body]:
    """Requests of mixed parameters, each with a seed."""
    bodies = []
    for prompt in random.sample(prompts, NUM_REQUESTS):
        body: Body = {"prompt": prompt, "seed": random.randrange(2**31), "temperature": random.uniform(0.3, 1.5)}
        limits = {"top_p": random.uniform(0.5, 1.0), "top_k": random.randint(2, 100), "min_p": random.uniform(0, 0.2)}
        body |= {name: value for name, value in limits.items() if random.random() < 0.4}
        if random.random() < 0.15:
            body |= {"structured_outputs": {"json": SCHEMA}, "max_tokens": 40}
        else:
            body |= random_parameters(random)
        bodies.append(body)
    return bodies


@pytest.mark.parametrize("chance", range(20))
def test_an_edge_that_is_mostly_right(plain: Target, edge_target: Target, prompts: list[str], chance: int) -> None:
    """It drafts for some of the requests, and the others are alone."""
    random = Random(chance)
    bodies = sampled(random, prompts)
    want = ask_together(plain, bodies)
    with (
        drafting(edge_target, random.sample(want, 6), random.choice([0.5, 0.8, 1.0])),
        counting(edge_target) as counted,
    ):
        have = ask_together(edge_target, bodies)
        counted.settle(NUM_REQUESTS)
        assert counted["accepted_tokens"] > 0
    for body, wanted, got in zip(bodies, want, have, strict=True):
        assert same(wanted, got), (body, wanted, got)


@pytest.mark.parametrize("chance", [100, 101])
def test_without_an_edge(plain: Target, edge_target: Target, prompts: list[str], chance: int) -> None:
    bodies = sampled(Random(chance), prompts)
    for wanted, got in zip(ask_together(plain, bodies), ask_together(edge_target, bodies), strict=True):
        assert same(wanted, got)


@pytest.mark.parametrize("chance", [200, 201])
def test_an_edge_that_is_always_wrong(plain: Target, edge_target: Target, prompts: list[str], chance: int) -> None:
    bodies = sampled(Random(chance), prompts)
    want = ask_together(plain, bodies)
    backwards = [choice | {"token_ids": choice["token_ids"][::-1]} for choice in want]
    with drafting(edge_target, backwards, 1.0), counting(edge_target) as counted:
        for wanted, got in zip(want, ask_together(edge_target, bodies), strict=True):
            assert same(wanted, got)
        until(lambda: counted["verified_tokens"] > 0, "nothing was verified")


def test_an_edge_that_is_killed_in_the_middle(
    plain: Target, edge_target: Target, prompts: list[str], tmp_path: Path
) -> None:
    bodies = sampled(Random(300), prompts)
    for body in bodies:
        body["temperature"] = 0.3  # so that prompt lookup is sometimes right
    want = ask_together(plain, bodies)
    for have in said_while_an_edge_dies(edge_target, lambda: ask_together(edge_target, bodies), "verified", tmp_path):
        assert all(same(*pair) for pair in zip(want, have, strict=True))


def test_several_choices(plain: Target, edge_target: Target, prompts: list[str]) -> None:
    """Each has its own seed, derived from the request's."""
    body: Body = {"prompt": prompts[0], "seed": 5, "temperature": 1.0, "n": 2, "max_tokens": 24, "ignore_eos": True}
    body |= {"return_token_ids": True}
    want = plain.post("/v1/completions", body)["choices"]
    assert want[0]["token_ids"] != want[1]["token_ids"]
    known = [choice | {"prompt_token_ids": want[0]["prompt_token_ids"]} for choice in want]
    with drafting(edge_target, known, 0.9), counting(edge_target) as counted:
        have = edge_target.post("/v1/completions", body)["choices"]
        until(lambda: counted["accepted_tokens"] > 0, "nothing was accepted")
    assert [choice["token_ids"] for choice in have] == [choice["token_ids"] for choice in want]


@contextmanager
def slowed(target: Target) -> Iterator[None]:
    """Run its worker a third of the time: a draft of the target's own size is as slow as the target, and otherwise
    always late."""
    processes = psutil.Process(target.server.process.popen.pid).children(recursive=True)
    [worker] = [process for process in processes if "VLLM::Worker" in " ".join(process.cmdline())]
    is_over = threading.Event()

    def pause() -> None:
        while not is_over.wait(0.02):
            worker.suspend()
            is_over.wait(0.04)
            worker.resume()

    thread = threading.Thread(target=pause)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@pytest.mark.parametrize("seed", [None, 17], ids=["no seed", "a seed"])
def test_an_edge_whose_draft_is_the_target_foresees_what_is_sampled(
    edge_target: Target, prompts: list[str], seed: int | None
) -> None:
    """It receives the seed, even if the server chose it; only its most probable tokens matter.

    Not every token is foreseen: an edge takes its target to be more certain than its draft (`SHARPNESS`).
    """
    torch.set_num_threads(1)  # like an edge with its own core
    drafter = load_hf_drafter(str(MODEL), "cpu", None, "")
    pace = Pace(PassTimes(profile(drafter, time.perf_counter)))
    body = {"prompt": prompts[0], "temperature": 1.0, "top_k": 50, "max_tokens": 24, "ignore_eos": True, "seed": seed}
    with slowed(edge_target), running_edge(edge_target, drafter, pace), counting(edge_target) as counted:
        texts = {edge_target.post("/v1/completions", body)["choices"][0]["text"] for _ in range(2)}
        counted.settle(48)
        verified, accepted = counted.together("verified_tokens", "accepted_tokens")
    print(f"{accepted} of {verified} accepted")
    assert len(texts) == (2 if seed is None else 1), "a seed of the server's is another one each time"
    assert verified > 10
    assert accepted > 0.6 * verified
