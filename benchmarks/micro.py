"""`make bench-micro`: what each piece of the hot paths takes, in microseconds a call. No vLLM, no model, no network.

    python benchmarks/micro.py [--rounds 15]

Each piece is called until a round has lasted long enough; printed are the median over the rounds and their range. The
policy and the engine's hooks at many requests: `make bench-deciding`. The whole way between processes: `make
bench-overhead`.
"""

import statistics
import time
from collections.abc import Callable
from random import Random
from typing import Annotated

import typer

from vllm_specedge.engine.driver import StepDriver
from vllm_specedge.engine.plan import RequestOutcome, Step, StepPlan
from vllm_specedge.engine.proposal_tree import ProposalTree
from vllm_specedge.gateway.known import ROLES, RouterLimits
from vllm_specedge.gateway.router import Router
from vllm_specedge.policy.situation import HoldLimits
from vllm_specedge.policy.step_cost import StepCost
from vllm_specedge.wire.codec import Frame, FrameReader, encode
from vllm_specedge.wire.engine_frames import Assign, Edges, EngineHello, EngineOpen, EngineWelcome
from vllm_specedge.wire.frames import PROTOCOL_VERSION, Commit, Hello, Propose

VOCAB_SIZE, K = 49_152, 5
ROUND_S = 0.05
CHANCE = Random(0)
DRAFT = tuple(CHANCE.randrange(VOCAB_SIZE) for _ in range(1 + K))
BRANCHED = Propose(7, 1000, (*DRAFT, *(CHANCE.randrange(VOCAB_SIZE) for _ in range(9))), (1, 3, 2, 3, 4, 3))
COMMIT = Commit(7, 1000, DRAFT[:2])


def encoding(frame: Frame) -> Callable[[], object]:
    return lambda: encode(frame)


def decoding(frame: Frame) -> Callable[[], object]:
    data = encode(frame)
    return lambda: FrameReader().feed(data)


def tree_round() -> Callable[[], object]:
    """A proposal comes, three of its tokens are decided, one of them the target's own."""
    tokens = [1]
    tree = ProposalTree(1)

    def act() -> None:
        proposal = Propose(0, len(tokens) - 1, (tokens[-1], *DRAFT[1:]))
        tree.insert(proposal.runs, tokens)
        decided = (*DRAFT[1:3], 5)
        tokens.extend(decided)
        tree.advance(decided)

    return act


def driver_round() -> Callable[[], object]:
    """One request: a proposal is taken in, a step's tokens are committed and told."""
    driver = StepDriver(VOCAB_SIZE, K, HoldLimits(), StepCost({1: 0.02, 64: 0.03}))
    tokens = [1, 2, 3]
    driver.receive(EngineWelcome(PROTOCOL_VERSION), 0.0)
    driver.receive(Edges(1), 0.0)
    for frame in driver.open("r", tokens, ""):
        assert isinstance(frame, Frame)
    driver.receive(Assign(0, 1), 0.0)

    def act() -> None:
        driver.receive(Propose(0, len(tokens) - 1, (tokens[-1], *DRAFT[1:])), 0.0)
        tokens.extend(DRAFT[1:3])
        driver.end(StepPlan(), [RequestOutcome("r", 2, 1)], Step(0.0, 0.0))
        driver.learn()

    return act


def routed(kind: str) -> Callable[[], object]:
    """One frame through the gateway's decisions: a commit on its way down, a proposal on its way up."""
    router, engine = Router(RouterLimits(max_context_tokens=1 << 30, max_total_tokens=1 << 31)), b"engine"
    router.from_engine(engine, EngineHello(PROTOCOL_VERSION, "toy", "f", VOCAB_SIZE))
    router.edge_hello(1, Hello(PROTOCOL_VERSION, "bench", "x", "pool", "f", 4), "s", frozenset(ROLES))
    router.from_engine(engine, EngineOpen(0, 2, K, ""))
    router.from_engine(engine, Commit(0, 0, (1, 2)))
    known = [2]

    def commit() -> None:
        router.from_engine(engine, Commit(0, known[0], (5, 6)))
        known[0] += 2

    def propose() -> None:
        router.from_edge(1, Propose(0, known[0] - 1, DRAFT))

    return commit if kind == "commit" else propose


def observing() -> Callable[[], object]:
    cost, sizes = StepCost({1: 0.02, 64: 0.03}), [1, 4, 16, 48, 64, 200]
    return lambda: cost.observe(4, CHANCE.choice(sizes), 4000, 0.02, 0, is_verifying=True)


PIECES: dict[str, Callable[[], Callable[[], object]]] = {
    "encode a commit of 2 tokens": lambda: encoding(COMMIT),
    "decode a commit of 2 tokens": lambda: decoding(COMMIT),
    "encode a proposal of 5 tokens and 3 branches": lambda: encoding(BRANCHED),
    "decode a proposal of 5 tokens and 3 branches": lambda: decoding(BRANCHED),
    "tree: insert a proposal, advance by three tokens": tree_round,
    "engine: take in a proposal, commit a step": driver_round,
    "engine: learn from a step": observing,
    "gateway: route a commit": lambda: routed("commit"),
    "gateway: route a proposal": lambda: routed("propose"),
}


def timed_us(act: Callable[[], object], rounds: int) -> list[float]:
    """Microseconds a call, a number a round."""
    count, took_s = 1, 0.0
    while took_s < ROUND_S:
        count = max(2 * count, 1)
        started_s = time.perf_counter()
        for _ in range(count):
            act()
        took_s = time.perf_counter() - started_s
    found = []
    for _ in range(rounds):
        started_s = time.perf_counter()
        for _ in range(count):
            act()
        found.append((time.perf_counter() - started_s) / count * 1e6)
    return found


def main(rounds: Annotated[int, typer.Option(help="Of each piece.", min=1)] = 15) -> None:
    """What each piece of the hot paths takes."""
    print("| piece | us a call | range |\n| --- | ---: | ---: |")
    for name, make in PIECES.items():
        found = timed_us(make(), rounds)
        print(f"| {name} | {statistics.median(found):.1f} | {min(found):.1f}..{max(found):.1f} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
