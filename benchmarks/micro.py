"""Cost of the hot paths in microseconds, without vLLM, model or network.

    python benchmarks/micro.py pieces [--rounds 15]
    python benchmarks/micro.py deciding [--requests 1 --requests 256]

`pieces` (`make bench-micro`): calls each piece until a round has lasted long enough, and prints the median over the
rounds and their range. `deciding` (`make bench-deciding`): cost of the policy in the engine at many requests, per
running request and step. For the whole path between processes: `make bench-overhead`.
"""

import statistics
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Annotated

import typer
from harness.results import Column, table

from vllm_specedge.engine.driver import StepDriver
from vllm_specedge.engine.plan import Row, Step, StepOutcome, StepPlan
from vllm_specedge.engine.proposal_tree import ProposalTree
from vllm_specedge.gateway.known import ROLES, RouterLimits
from vllm_specedge.gateway.router import Router
from vllm_specedge.policy.situation import HoldLimits, Load
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
PROFILE = {1: 0.022, 64: 0.023, 128: 0.026, 256: 0.03, 1024: 0.11}
"""Seconds of a step by its number of tokens, as for a 14B model on an accelerator."""
ACCEPTANCE, PROPOSED = 0.75, 0.7
STEP_S = 0.03

app = typer.Typer(add_completion=False)

# -- pieces ----------------------------------------------------------------------------------------------------------


def encoding(frame: Frame) -> Callable[[], object]:
    return lambda: encode(frame)


def decoding(frame: Frame) -> Callable[[], object]:
    data = encode(frame)
    return lambda: FrameReader().feed(data)


def tree_round() -> Callable[[], object]:
    """A proposal arrives, then three tokens are committed, one of them the target's own."""
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
    """One request: a proposal is inserted, a step's tokens are committed and published."""
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
        driver.end(StepPlan(), StepOutcome({"r": 2}, {"r": 1}), Step(0.0, 0.0))
        driver.learn()

    return act


def routed(kind: str) -> Callable[[], object]:
    """One frame through the gateway's decisions: a commit down or a proposal up."""
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
    """Microseconds per call of each round."""
    count = 1
    while round_s(act, count) < ROUND_S:
        count *= 2
    return [1e6 * round_s(act, count) / count for _ in range(rounds)]


def round_s(act: Callable[[], object], count: int) -> float:
    started_s = time.perf_counter()
    for _ in range(count):
        act()
    return time.perf_counter() - started_s


@app.command()
def pieces(rounds: Annotated[int, typer.Option(help="Rounds per piece.", min=1)] = 15) -> None:
    """Measure each piece of the hot paths."""
    print("| piece | us per call | range |\n| --- | ---: | ---: |")
    for name, make in PIECES.items():
        found = timed_us(make(), rounds)
        print(f"| {name} | {statistics.median(found):.1f} | {min(found):.1f}..{max(found):.1f} |", flush=True)


# -- deciding --------------------------------------------------------------------------------------------------------


@dataclass
class Engine:
    """Requests that all have edges, receive drafts and verify them, as fast as the shipping driver can."""

    num_requests: int
    context: int
    chance: Random = field(default_factory=lambda: Random(0))
    seconds: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    now_s: float = 1.0

    def __post_init__(self) -> None:
        self.driver = StepDriver(VOCAB_SIZE, K, HoldLimits(), StepCost(PROFILE))
        self.driver.receive(Edges(64), 0.0)
        self.tokens = {f"r{number}": self.some(self.context) for number in range(self.num_requests)}
        for number, (id_, tokens) in enumerate(self.tokens.items()):
            self.driver.open(id_, tokens, "")
            self.driver.receive(Assign(number, 1 + number % 64), 0.0)

    def some(self, count: int) -> list[int]:
        return [self.chance.randrange(VOCAB_SIZE) for _ in range(count)]

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        started_s = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - started_s  # type: ignore[assignment]
        self.calls[what] += 1

    def propose(self) -> None:
        for number, tokens in enumerate(self.tokens.values()):
            if self.chance.random() < PROPOSED:
                frame = Propose(number, len(tokens) - 1, (tokens[-1], *self.some(K)))
                with self.timed("proposal"):
                    self.driver.receive(frame, self.now_s)

    def plan(self) -> StepPlan:
        rows = [Row(id_, 100) for id_ in self.tokens]
        with self.timed("deciding"):
            plan = self.driver.begin(rows, self.now_s, Load(context=self.num_requests * self.context))
            self.driver.start(plan)
        return plan

    def step(self) -> None:
        self.propose()
        plan = self.plan()
        with self.timed("learning"):
            self.driver.learn()
        started_s, self.now_s = self.now_s, self.now_s + STEP_S
        drafts = {id_: plan.drafts.get(id_, []) for id_ in self.tokens if id_ not in plan.holds}
        for id_, draft in drafts.items():
            wrong = (at for at in range(len(draft)) if self.chance.random() >= ACCEPTANCE)
            self.tokens[id_] += [*draft[: next(wrong, len(draft))], *self.some(1)]
        num_verified = {id_: len(draft) for id_, draft in drafts.items() if draft}
        outcome = StepOutcome({id_: 1 + len(draft) for id_, draft in drafts.items()}, num_verified)
        with self.timed("ending"):
            self.driver.end(plan, outcome, Step(started_s, self.now_s))

    def each_us(self, what: str) -> float:
        return 1e6 * self.seconds[what] / self.calls[what]

    def allocated_bytes(self) -> int:
        """Peak memory of planning one step."""
        self.propose()
        tracemalloc.start()
        self.plan()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak


COLUMNS = (
    Column("requests", "requests"),
    Column("context", "context"),
    Column("deciding, us per request and step", "deciding", ".1f"),
    Column("a proposal, us", "proposal", ".1f"),
    Column("ending a step, us per request", "ending", ".1f"),
    Column("learning, us per request and step", "learning", ".1f"),
    Column("allocated, kB", "allocated", ".0f"),
)


def measured(requests: int, context: int, steps: int) -> dict[str, float]:
    """One row of the table."""
    engine = Engine(requests, context)
    for _ in range(steps):
        engine.step()
    times = {what: engine.each_us(what) / requests for what in ("deciding", "ending", "learning")}
    sizes = {"requests": requests, "context": context, "allocated": engine.allocated_bytes() / 1000}
    return {**times, "proposal": engine.each_us("proposal"), **sizes}


@app.command()
def deciding(
    requests: Annotated[list[int], typer.Option(help="Running requests.")] = [1, 16, 64, 256],  # noqa: B006
    contexts: Annotated[list[int], typer.Option(help="Tokens per request.")] = [500, 8000],  # noqa: B006
    steps: Annotated[int, typer.Option(help="Measured.")] = 60,
) -> None:
    """Measure the cost of the policy in the engine, per running request and step.

    Seven of ten requests get a new draft each step. `deciding` is planning a step (goal: 15 microseconds per request
    and step at 256 requests); inserting a proposal, and ending a step, which commits and publishes, are shown too.
    `allocated` is the peak memory of planning, which must not grow with the context.
    """
    print(table(COLUMNS, [measured(number, context, steps) for number in requests for context in contexts]))


if __name__ == "__main__":
    app()
