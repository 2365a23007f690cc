"""`make bench-deciding`: what the policy costs the engine, without a model: microseconds a running request a step.

    python benchmarks/deciding.py [--requests 1 --requests 256]

The shipping StepDriver with requests that all have edges; seven of ten get a new draft each step. `deciding` is
planning a step (goal: 15 microseconds a request a step at 256 requests); taking in a proposal, and ending a step, which
commits and publishes, are shown too. `allocated` is the most that planning held at once, which must not grow with the
context.
"""

import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vllm_specedge.engine.driver import StepDriver
from vllm_specedge.engine.plan import RequestOutcome, Row, Step, StepPlan
from vllm_specedge.policy.situation import HoldLimits, Load
from vllm_specedge.policy.step_cost import StepCost
from vllm_specedge.wire.engine_frames import Assign, Edges
from vllm_specedge.wire.frames import Propose

VOCAB_SIZE, SPEC_TOKENS = 50_000, 5
PROFILE = {1: 0.022, 64: 0.023, 128: 0.026, 256: 0.03, 1024: 0.11}
"""Seconds of a step by its tokens, as of a 14B model on an accelerator."""
ACCEPTANCE, PROPOSED = 0.75, 0.7
STEP_S = 0.03


@dataclass
class Engine:
    """Requests that get drafts and verify them, as fast as the driver goes."""

    num_requests: int
    context: int
    chance: Random = field(default_factory=lambda: Random(0))
    seconds: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    now_s: float = 1.0

    def __post_init__(self) -> None:
        self.driver = StepDriver(VOCAB_SIZE, SPEC_TOKENS, HoldLimits(), StepCost(PROFILE))
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
                frame = Propose(number, len(tokens) - 1, (tokens[-1], *self.some(SPEC_TOKENS)))
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
        outcomes = []
        for id_, tokens in self.tokens.items():
            if id_ not in plan.holds:
                draft = plan.drafts.get(id_, [])
                wrong = (at for at in range(len(draft)) if self.chance.random() >= ACCEPTANCE)
                tokens += [*draft[: next(wrong, len(draft))], *self.some(1)]
                outcomes.append(RequestOutcome(id_, 1 + len(draft), len(draft)))
        with self.timed("ending"):
            self.driver.end(plan, outcomes, Step(started_s, self.now_s))

    def allocated_bytes(self) -> int:
        """The most that planning one step holds at once."""
        self.propose()
        tracemalloc.start()
        self.plan()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak


def main(
    requests: Annotated[list[int], typer.Option(help="Running requests.")] = [1, 16, 64, 256],  # noqa: B006
    contexts: Annotated[list[int], typer.Option(help="Tokens of each.")] = [500, 8000],  # noqa: B006
    steps: Annotated[int, typer.Option(help="Measured.")] = 60,
) -> None:
    result = Table(
        "requests",
        "context",
        "deciding, us a request a step",
        "a proposal, us",
        "ending a step, us a request",
        "learning, us a request a step",
        "allocated, kB",
    )
    for num_requests in requests:
        for context in contexts:
            engine = Engine(num_requests, context)
            for _ in range(steps):
                engine.step()
            deciding, ending, learning = (
                engine.seconds[what] / steps / num_requests for what in ("deciding", "ending", "learning")
            )
            proposal = engine.seconds["proposal"] / engine.calls["proposal"]
            times = [f"{1e6 * seconds:.1f}" for seconds in (deciding, proposal, ending, learning)]
            result.add_row(str(num_requests), str(context), *times, f"{engine.allocated_bytes() / 1000:.0f}")
    Console().print(result)


if __name__ == "__main__":
    typer.run(main)
