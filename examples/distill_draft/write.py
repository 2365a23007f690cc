"""Generate answers with vLLM: a stream of prompts in, answers out as they finish, stopped where they begin to loop."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from shards import loop_start

CACHE_BYTES = 1 << 30
LOOP_CHECK_EVERY = 16
WORTH_COMPILING = 64
"""Batch size from which the minute that vLLM takes to compile the model pays off (a fifth more tokens per second)."""


@dataclass(frozen=True)
class Asked:
    """A prompt and the sampling of its answer; temperature 0 is greedy."""

    prompt: list[int]
    temperature: float
    most_tokens: int


@dataclass(frozen=True)
class Written:
    asked: Asked
    answer: list[int]


class Writer:
    """A vLLM engine in this process, kept filled from a stream of prompts."""

    def __init__(
        self, model: Path, rows: int, context: int, dtype: str = "bfloat16", stops: Collection[int] = ()
    ) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLMEngine
        from vllm.engine.arg_utils import EngineArgs

        arguments = EngineArgs(
            model=str(model),
            dtype=dtype,  # type: ignore[arg-type]
            max_model_len=context,
            max_num_seqs=rows,
            max_num_batched_tokens=2048,
            enable_prefix_caching=True,
            enforce_eager=rows < WORTH_COMPILING,
            disable_log_stats=True,
            kv_cache_memory_bytes=CACHE_BYTES,
        )
        self._engine = LLMEngine.from_engine_args(arguments)
        self._rows = rows
        self._stops = stops

    def answers(self, asked: Iterator[Asked], stop_loops: bool = True) -> Iterator[Written]:
        """Yield answers as they finish, until `asked` is exhausted."""
        live: dict[str, Asked] = {}
        number = 0
        while True:
            while len(live) < self._rows and (one := next(asked, None)) is not None:
                number += 1
                live[str(number)] = one
                self._add(str(number), one)
            if not live:
                return
            for output in self._engine.step():
                answer = list(output.outputs[0].token_ids)  # type: ignore[union-attr]
                name = output.request_id
                if name not in live:
                    continue
                looping = stop_loops and len(answer) % LOOP_CHECK_EVERY == 0 and loop_start(answer[-160:]) is not None
                if looping and not output.finished:
                    self._engine.abort_request([name])
                if looping or output.finished:
                    yield Written(live.pop(name), answer)

    def _add(self, name: str, asked: Asked) -> None:
        from vllm import SamplingParams

        parameters = SamplingParams(
            temperature=asked.temperature,
            max_tokens=asked.most_tokens,
            stop_token_ids=list(self._stops),
            detokenize=False,
        )
        self._engine.add_request(name, {"prompt_token_ids": asked.prompt}, parameters)  # type: ignore[typeddict-item]
