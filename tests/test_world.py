"""A world in virtual time, whatever its edges and links do: requests complete in few steps, and drafts offered to the
target were proposed for exactly the request's tokens. That outputs are the target's: tests/vllm/test_lossless.py."""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any
from zlib import crc32

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_client.drafters import Candidate
from tests.helpers import Guess, HostileEdge, Trouble, World, virtual_edge
from vllm_specedge.engine.driver import StepDriver
from vllm_specedge.engine.plan import StepPlan
from vllm_specedge.errors import ByeCode
from vllm_specedge.gateway.known import RouterLimits
from vllm_specedge.gateway.router import Router
from vllm_specedge.policy.situation import MODES, HoldLimits
from vllm_specedge.simulation.edge import VirtualEdge

VOCAB_SIZE = 6
K = 5


def choose(tokens: Sequence[int]) -> int:
    """The target: a fixed function of the last few tokens and the position."""
    return crc32(bytes([*tokens[-3:], len(tokens) % 251])) % VOCAB_SIZE


def plain(prompt: Sequence[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(choose(tokens))
    return tokens


def guesser(quality: float, seed: int, second: float = 0.5) -> Guess:
    """Right with probability `quality`; where it is not, its second candidate is with probability `second`."""
    random = Random(seed)

    def guess(tokens: Sequence[int]) -> list[Candidate]:
        right, others = choose(tokens), [token for token in range(VOCAB_SIZE) if token != choose(tokens)]
        random.shuffle(others)
        if random.random() < quality:
            ranked = [right, *others]
        elif random.random() < second:
            ranked = [others[0], right, *others[1:]]
        else:
            ranked = others
        claims = (quality, (1 - quality) * second, 0.01)
        said = [Candidate(token, claim) for token, claim in zip(ranked, claims, strict=False)]
        return said if quality == 1.0 or random.random() < 0.95 else []

    return guess


def edge_for(
    world: World,
    quality: float,
    seed: int = 0,
    max_context_tokens: int = 1000,
    max_width: int = 4,
    second: float = 0.5,
) -> VirtualEdge:
    guess = guesser(quality, seed, second)
    rtt_s = 2 * world.edge_trouble.delay_s
    return virtual_edge(world.time, guess, 0.001, max_context_tokens, max_width, rtt_s)


def serve(world: World, prompts: Mapping[str, Sequence[int]], num_tokens: int) -> None:
    """Serve the requests: all complete, each offered draft was proposed for its past (asserted by World), and nothing
    is left."""
    for request_id, prompt in prompts.items():
        world.submit(request_id, prompt, num_tokens)
    world.run()
    for request_id, prompt in prompts.items():
        assert world.finished[request_id].tokens == plain(prompt, num_tokens)
    assert not world.served
    assert len(world.driver) == 0


NO_TROUBLE = Trouble()
troubles = st.sampled_from(
    [
        NO_TROUBLE,
        Trouble(delay_s=0.002),
        Trouble(doubling=0.2),
        Trouble(loss=0.01),
        Trouble(jitter_s=0.002),
        Trouble(delay_s=0.02, doubling=0.1),
        Trouble(jitter_s=0.05, loss=0.05, doubling=0.2),
        Trouble(loss=0.3),
    ]
)
EDGES = ["perfect", "good", "random", "hostile", "rude"]


@settings(max_examples=60)
@example(  # a branch after a rejected end of the trunk that happens to begin with the committed tokens
    seed=3324,
    engine_trouble=Trouble(delay_s=0.02, doubling=0.1),
    edge_trouble=Trouble(delay_s=0.0005),
    edges=["hostile"],
    hold_limits=HoldLimits(0.1, "wait"),
    max_width=1,
    credit_tokens=K,
    has_ngram=False,
    token_s=0.0,
    joins_and_leaves=[],
)
@given(
    seed=st.integers(0, 10_000),
    engine_trouble=troubles,
    edge_trouble=troubles,
    edges=st.lists(st.sampled_from(EDGES), min_size=1, max_size=3),
    hold_limits=st.builds(HoldLimits, st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from(MODES)),
    max_width=st.sampled_from([1, 2, 8]),
    credit_tokens=st.sampled_from([1, K, 32]),
    has_ngram=st.booleans(),
    token_s=st.sampled_from([0.0, 0.001, 0.02]),
    joins_and_leaves=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), max_size=4),
)
def test_requests_complete_and_only_what_was_proposed_is_offered_whatever_happens(
    seed: int,
    engine_trouble: Trouble,
    edge_trouble: Trouble,
    edges: list[str],
    hold_limits: HoldLimits,
    max_width: int,
    credit_tokens: int,
    has_ngram: bool,
    token_s: float,
    joins_and_leaves: list[tuple[int, int]],
) -> None:
    random = Random(seed)
    world = World(
        choose,
        VOCAB_SIZE,
        K,
        seed=seed,
        engine_trouble=engine_trouble,
        edge_trouble=edge_trouble,
        hold_limits=hold_limits,
        router=Router(RouterLimits(credit_tokens=credit_tokens)),
        token_s=token_s,
        suggest=lambda tokens: [random.choice([choose(tokens), 0]), *tokens[-2:]] if has_ngram else [],
    )

    def join(id_: int, kind: str) -> None:
        if kind in ("hostile", "rude"):
            world.join(id_, HostileEdge(random, VOCAB_SIZE, is_rude=kind == "rude"))
        else:
            quality = {"perfect": 1.0, "good": 0.8, "random": 0.0}[kind]
            world.join(id_, edge_for(world, quality, seed + id_, max_context_tokens=80, max_width=max_width))

    def rejoin(at: int, index: int) -> None:
        world.leave(index)
        join(100 + at, edges[index % len(edges)])

    for id_, kind in enumerate(edges):
        join(id_, kind)
    for at, (index, ticks) in enumerate(joins_and_leaves):
        world.time.after(ticks * 0.01, lambda at=at, index=index: rejoin(at, index))  # type: ignore[misc]
    prompts = {f"r{i}": [random.randrange(VOCAB_SIZE) for _ in range(random.randint(1, 20))] for i in range(5)}
    serve(world, prompts, num_tokens=40)


@pytest.mark.parametrize("trouble", [NO_TROUBLE, Trouble(delay_s=0.005), Trouble(jitter_s=0.004)])
def test_a_perfect_draft_needs_one_step_for_all_it_drafts_and_one_token_more(trouble: Trouble) -> None:
    """A draft that arrives late or in parts costs some more steps by chance, so this is the mean of a few runs."""
    num_tokens, num_steps = 120, []
    for seed in range(4):
        world = World(choose, VOCAB_SIZE, K, seed=seed, edge_trouble=trouble, hold_limits=HoldLimits(1.0))
        world.join(0, edge_for(world, quality=1.0))
        serve(world, {"r": [1, 2, 3]}, num_tokens)
        num_steps.append(world.finished["r"].num_steps)
    least = num_tokens // (K + 1)
    assert least <= min(num_steps)
    assert sum(num_steps) / len(num_steps) <= least + 8


@pytest.mark.parametrize("trouble", [NO_TROUBLE, Trouble(jitter_s=0.05, loss=0.05, doubling=0.2)])
def test_a_draft_that_nobody_proposed_is_noticed(monkeypatch: pytest.MonkeyPatch, trouble: Trouble) -> None:
    """An engine that offers arbitrary drafts completes too, with the same tokens."""
    begin, random = StepDriver.begin, Random(1)

    def offering_one_that_nobody_proposed(*arguments: Any) -> StepPlan:
        plan = begin(*arguments)
        for draft in plan.drafts.values():
            draft[-1] = random.randrange(VOCAB_SIZE)
        return plan

    monkeypatch.setattr(StepDriver, "begin", offering_one_that_nobody_proposed)
    world = World(choose, VOCAB_SIZE, K, edge_trouble=trouble)
    world.join(0, edge_for(world, quality=1.0))
    with pytest.raises(AssertionError, match="'r', "):
        serve(world, {"r": [1, 2, 3]}, 120)


def test_without_edges_every_token_is_a_step() -> None:
    world = World(choose, VOCAB_SIZE, K)
    serve(world, {"r": [1, 2, 3]}, 50)
    assert world.finished["r"].num_steps == 50


def test_a_better_draft_needs_fewer_steps() -> None:
    num_steps = []
    for quality in (0.0, 0.6, 0.9):
        world = World(choose, VOCAB_SIZE, K, hold_limits=HoldLimits(1.0))
        world.join(0, edge_for(world, quality))
        serve(world, {"r": [1, 2, 3]}, 150)
        num_steps.append(world.finished["r"].num_steps)
    assert num_steps[0] > num_steps[1] > num_steps[2]


def test_an_edge_that_is_far_too_slow_is_not_waited_for() -> None:
    world = World(choose, VOCAB_SIZE, K, edge_trouble=Trouble(delay_s=0.5), hold_limits=HoldLimits(0.1))
    world.join(0, edge_for(world, quality=1.0))
    serve(world, {"r": [1, 2, 3]}, 200)
    assert world.time.now_s <= 200 * world.step_s + 2 * 0.1 + 1e-6


def test_an_edge_that_falls_silent_costs_two_holds_at_most() -> None:
    world = World(choose, VOCAB_SIZE, K, hold_limits=HoldLimits(0.1))
    edge = edge_for(world, quality=1.0)
    world.join(0, edge)
    world.time.after(0.2, lambda: setattr(edge, "send", lambda frame: None))
    serve(world, {"r": [1, 2, 3]}, 200)
    assert world.driver.counters["missed_holds"] <= 2
    assert world.driver.counters["accepted_tokens"] > 0


def test_an_edge_that_joins_in_mid_generation_takes_over() -> None:
    world = World(choose, VOCAB_SIZE, K, hold_limits=HoldLimits(1.0))
    world.time.after(0.3, lambda: world.join(0, edge_for(world, quality=1.0)))
    serve(world, {"r": [1, 2, 3]}, 120)
    assert world.finished["r"].num_steps <= 31 + 90 // (K + 1) + 5


def test_edges_that_join_and_leave_without_end_leave_nothing_behind() -> None:
    world = World(choose, VOCAB_SIZE, K)
    for id_ in range(20):
        world.time.after(0.03 * id_, lambda id_=id_: world.join(id_, edge_for(world, quality=0.8)))  # type: ignore[misc]
        world.time.after(0.03 * id_ + 0.02, lambda id_=id_: world.leave(id_))  # type: ignore[misc]
    serve(world, {f"r{i}": [i] for i in range(6)}, 60)
    world.time.run(1e4, lambda: False)
    assert world.router.num_requests == 0
    assert world.router.edges == {}


def test_an_edge_that_lies_about_tokens_is_sent_away_and_nothing_else_happens() -> None:
    world = World(choose, VOCAB_SIZE, K)
    world.join(0, HostileEdge(Random(1), VOCAB_SIZE, is_rude=True))
    serve(world, {"r": [1, 2, 3]}, 60)
    assert [bye.code for bye in world.byes] == [ByeCode.TOKEN_ID]
    assert world.router.edges == {}


def num_steps(max_width: int = 4, second: float = 0.8, credit_tokens: int = 32, delay_s: float = 0.004) -> int:
    """Steps of five requests one after the other, with an edge that is right three times of four."""
    world = World(
        choose, VOCAB_SIZE, K, edge_trouble=Trouble(delay_s=delay_s), hold_limits=HoldLimits(mode="never-wait")
    )
    world.max_running = 1
    world.router.limits = RouterLimits(credit_tokens=credit_tokens)
    world.join(0, edge_for(world, quality=0.75, max_width=max_width, second=second))
    serve(world, {f"r{i}": [i, 1, 2] for i in range(5)}, 150)
    return sum(served.num_steps for served in world.finished.values())


def test_a_branch_that_is_often_right_saves_steps() -> None:
    assert num_steps(max_width=4) < 0.9 * num_steps(max_width=1)
    assert num_steps(second=0.8) < num_steps(second=0.0)


def test_an_edge_that_may_draft_further_ahead_saves_steps_where_the_way_is_long() -> None:
    assert num_steps(credit_tokens=32, delay_s=0.01) < 0.95 * num_steps(credit_tokens=K, delay_s=0.01)


def test_a_draft_that_loses_overtakes_and_doubles_by_a_fifth_of_a_second_changes_nothing() -> None:
    for seed in range(10):
        trouble = Trouble(delay_s=0.01, jitter_s=0.2, loss=0.1, doubling=0.1)
        world = World(choose, VOCAB_SIZE, K, seed=seed, edge_trouble=trouble)
        world.join(0, edge_for(world, quality=0.9, seed=seed))
        serve(world, {"a": [1, 2], "b": [3]}, 100)
