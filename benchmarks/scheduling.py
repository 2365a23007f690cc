"""`make bench-scheduling`: time of vLLM's scheduler for a step of 64 requests, with and without the plugin.

vLLM's own schedulers for the V2 runner, in this process and without a model: sampled tokens come from a formula, and
only `schedule` and `update_from_output` are timed, in turn. Edges answer while the step is computed, and are wrong in
every third token; what the engine publishes also goes through the real link to a real gateway. What vLLM's own methods
need is shown beside: more where a step verifies, as it decides more.
"""

import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

# These come first: they prepare what vLLM looks for when it is imported.
from tests.vllm_v2 import tiny_model
from tests.vllm_v2.engines import ASYNCHRONOUS, Engine, build, with_edges

# isort: split
from harness.gateways import gateway
from vllm import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from vllm_specedge.engine.gateway_link import EngineLink
from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.engine_frames import Edges

COMPUTED_S = 0.004
"""Seconds in which a step is computed, and the link's thread may run."""
NUM_REQUESTS, NUM_STEPS, NUM_WARM_UP, REPEATS = 64, 60, 8, 5
PROMPT_TOKENS, OUTPUT_TOKENS = 8, 240
OPTIONS = {"max_num_seqs": NUM_REQUESTS, "max_num_batched_tokens": 2048, "num_gpu_blocks_override": 4000}


@dataclass
class Timer:
    """Time spent in some functions."""

    seconds: float = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started_s = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started_s

        return timed


class Took(NamedTuple):
    """Mean milliseconds of scheduling a step and processing its output."""

    all_ms: float
    vllm_ms: float
    """Part of vLLM's own methods."""


def said(number: int, position: int) -> int:
    """The token of an answer at a position."""
    return 2 + (number * 7919 + position * 104729) % (tiny_model.VOCAB_SIZE - 2)


def prompt(number: int) -> list[int]:
    return [2 + (number * 31 + position) % 500 for position in range(PROMPT_TOKENS)]


def sampled(number: int, position: int, draft: Sequence[int]) -> list[int]:
    """Output of a step that verifies this draft."""
    tokens: list[int] = []
    for guess in [*draft, None]:
        tokens.append(said(number, position + len(tokens)))
        if guess != tokens[-1]:
            break
    return tokens


def through(link: EngineLink, engine: Engine) -> Callable[[], None]:
    """Send what an engine publishes through the link, and to its edges when the returned function is called."""
    assert engine.edges is not None
    published: list[Frame] = []
    receive = engine.edges.send

    def send(frames: Iterable[Frame]) -> None:
        sent = list(frames)
        link.send(sent)
        published.extend(sent)

    def answer() -> None:
        receive(published)
        published.clear()

    setattr(engine.edges, "send", send)  # noqa: B010 - a method
    return answer


def measure(engine: Engine, way: str, own: Timer, answer: Callable[[], None] = lambda: None) -> Took:
    scheduler, is_synchronous = engine.core.scheduler, way == "synchronous"
    if engine.edges is not None:
        engine.step_as(way)
        engine.drafting._follow()
        engine.drafting._loop.is_synchronous_step = is_synchronous
    for number in range(NUM_REQUESTS):
        params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
        engine.llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt(number)}, params)
    numbers = {request.request_id: number for number, request in enumerate(scheduler.waiting)}
    in_flight: deque[Any] = deque()
    took_ms = []
    for index in range(NUM_STEPS):
        if index == NUM_WARM_UP:
            own.seconds = 0.0
        started_s = time.perf_counter()
        in_flight.append(scheduler.schedule())
        took_s = time.perf_counter() - started_s
        scheduler.get_grammar_bitmask(in_flight[-1])
        time.sleep(COMPUTED_S)
        answer()
        if engine.edges is not None:
            engine.drafting.shared.wake()  # as the link's thread does then
        if is_synchronous or len(in_flight) == 2:
            step = in_flight.popleft()
            output = outcome(scheduler, step, numbers)
            started_s = time.perf_counter()
            scheduler.update_from_output(step, output)
            took_s += time.perf_counter() - started_s
        took_ms.append(1e3 * took_s)
    scheduler.finish_requests(list(numbers), RequestStatus.FINISHED_ABORTED)
    engine.llm.llm_engine.output_processor.abort_requests(list(numbers), internal=True)
    if engine.edges is not None:
        engine.drafting._started.clear()
    return Took(fmean(took_ms[NUM_WARM_UP:]), 1e3 * own.seconds / (NUM_STEPS - NUM_WARM_UP))


def outcome(scheduler: Any, step: Any, numbers: dict[str, int]) -> ModelRunnerOutput:
    ids = list(step.num_scheduled_tokens)
    drafts = step.scheduled_spec_decode_tokens
    tokens = [sampled(numbers[id_], scheduler.requests[id_].num_tokens, drafts.get(id_, ())) for id_ in ids]
    return ModelRunnerOutput(ids, {id_: index for index, id_ in enumerate(ids)}, tokens)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        model = tiny_model.make(Path(directory))
        plain = Engine(build(model, **OPTIONS))
        alone, drafted = (next(with_edges(model, ASYNCHRONOUS, **OPTIONS)) for _ in range(2))
    own = Timer()
    for name in ("schedule", "update_from_output"):
        setattr(Scheduler, name, own.around(getattr(Scheduler, name)))
    assert alone.edges is not None
    alone.edges._say(Edges(0))
    drafted.oracle.wrong_every = 3
    for number in range(NUM_REQUESTS):
        answer = [said(number, PROMPT_TOKENS + index) for index in range(OUTPUT_TOKENS)]
        drafted.oracle.answers[tuple(prompt(number))] = answer
    arms = {
        "plain": (plain, "asynchronous"),
        "no edges": (alone, "asynchronous"),
        "edges, asynchronous": (drafted, "asynchronous"),
        "edges, synchronous": (drafted, "synchronous"),
    }
    runs: dict[str, list[Took]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as directory, gateway(Path(directory)) as (_, _, link):
        answer = through(link, drafted)
        for _ in range(REPEATS):
            for arm, (engine, way) in arms.items():
                runs[arm].append(measure(engine, way, own, answer))
    plain_ms = median(took.all_ms for took in runs["plain"])
    for arm, took in runs.items():
        all_ms, vllm_ms = [one.all_ms for one in took], median(one.vllm_ms for one in took)
        spread = f"{median(all_ms):.2f} ms ({min(all_ms):.2f}..{max(all_ms):.2f})"
        print(f"{arm:20} {spread}  {median(all_ms) / plain_ms:.2f} of plain; vLLM's own part {vllm_ms:.2f} ms")
    sys.stdout.flush()
    os._exit(0)  # engines of one process share torch's process groups, and cannot be shut down one by one


if __name__ == "__main__":
    main()
