"""Engines on vLLM's V2 model runner, in this process, on a CPU: one is plain vLLM's, others have scripted edges."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vllm_specedge.policy.stepping import Stepping

from . import interpreter, tiny_model
from .scripted_edges import Oracle, ScriptedEdges

interpreter.prepare()
interpreter.choose_scheduling()
interpreter.call_extensions()

from vllm import LLM, SamplingParams  # noqa: E402 - it looks for Triton when it is imported

MAX_DRAFT = 3
BASE: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "seed": 0,
    "max_logprobs": -1,
    "block_size": 32,
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}
EDGE: dict[str, Any] = {
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": MAX_DRAFT,
        "prompt_lookup_min": 3,
        "prompt_lookup_max": 3,
    },
    "worker_extension_cls": "vllm_specedge.adapter.worker.extension.EdgeWorker",
    "additional_config": {"specedge": {"ngram": False, "mode": "never-wait"}},
}
_all: list[LLM] = []
"""Keeps engines alive: one that ends destroys torch's process groups, which all engines of a process share."""
SYNCHRONOUS, ASYNCHRONOUS = "EdgeScheduler", "EdgeAsyncScheduler"


class Forced(Stepping):
    """Steps as set by a test."""

    def __init__(self, is_synchronous: Callable[[int], bool]) -> None:
        super().__init__()
        self._wanted = is_synchronous
        self._num_planned = 0

    def planned(self, is_useful: bool, gain: float) -> None:
        del is_useful, gain
        self._num_planned += 1
        self.is_synchronous = self._wanted(self._num_planned)


WAYS = {
    "synchronous": lambda: Forced(lambda step: True),
    "asynchronous": lambda: Forced(lambda step: False),
    "switching": lambda: Forced(lambda step: step // 3 % 2 == 0),
    "as the policy says": Stepping,
}


@dataclass
class Engine:
    """An LLM in this process, and its edges."""

    llm: LLM
    edges: ScriptedEdges | None = None
    oracle: Oracle = field(default_factory=Oracle)

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def drafting(self) -> Any:
        return self.core.scheduler._drafting

    @property
    def counters(self) -> dict[str, int]:
        return self.drafting.driver.counters

    def step_as(self, way: str) -> None:
        self.drafting._stepping = WAYS[way]()

    def answers(self, prompts: Sequence[Sequence[int]], params: SamplingParams | list[SamplingParams]) -> list[Any]:
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return self.llm.generate(asked, params, use_tqdm=False)

    def tokens(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | list[SamplingParams]
    ) -> list[list[int]]:
        return [list(choice.token_ids) for answer in self.answers(prompts, params) for choice in answer.outputs]


@dataclass
class PlainEngine(Engine):
    """Plain vLLM, whose answers to the same questions are the same: each is asked once."""

    _said: dict[str, list[Any]] = field(default_factory=dict)

    def answers(self, prompts: Sequence[Sequence[int]], params: SamplingParams | list[SamplingParams]) -> list[Any]:
        each = params if isinstance(params, list) else [params]
        # SamplingParams prints not all of its fields.
        key = repr((list(prompts), [msgspec.structs.asdict(one) for one in each]))
        if key not in self._said:
            self._said[key] = super().answers(prompts, params)
        return self._said[key]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def plain(model: Path) -> Engine:
    """Plain vLLM, asynchronous."""
    return PlainEngine(build(model))


@pytest.fixture(scope="session")
def edge(model: Path) -> Iterator[Engine]:
    """With edges, on an engine that may schedule asynchronously."""
    yield from with_edges(model, ASYNCHRONOUS)


@pytest.fixture
def alike(plain: Engine, edge: Engine) -> Callable[..., list[list[int]]]:
    """Ask plain vLLM, give its answers to the edges, and ask with edges."""

    def compare(
        way: str, prompts: Sequence[Sequence[int]], params: SamplingParams | list[SamplingParams], **draft: Any
    ) -> list[list[int]]:
        said = plain.tokens(prompts, params)
        edge.oracle.__dict__.update(Oracle().__dict__ | draft)
        edge.oracle.answers = {tuple(prompt): answer for prompt, answer in zip(prompts, said, strict=False)}
        edge.step_as(way)
        assert edge.tokens(prompts, params) == said
        return said

    return compare


def build(model: Path, **options: Any) -> LLM:
    return LLM(str(model), **{**BASE, **options})


def with_edges(model: Path, scheduler: str, **options: Any) -> Iterator[Engine]:
    oracle = Oracle()
    edges = ScriptedEdges(oracle)
    interpreter.is_asynchronous = scheduler == ASYNCHRONOUS
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("vllm_specedge.adapter.drafting.start_link", lambda *args, **kwargs: (edges, None))
        llm = build(model, **EDGE, scheduler_cls=f"vllm_specedge.adapter.scheduler.{scheduler}", **options)
    interpreter.is_asynchronous = True
    _all.append(llm)
    yield Engine(llm, edges, oracle)
