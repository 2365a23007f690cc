"""Answers of plain vLLM and of one with edges if two workers share a model: `python -m tests.vllm_v2.two_ranks MODEL`.

It is a separate process, because its workers are forked from it with all changes of `interpreter`, and engines of one
process share torch's process groups.
"""

import json
import os
import sys
from pathlib import Path

from .engines import ASYNCHRONOUS, WAYS, Engine, build, with_edges
from .test_same_tokens import PROMPTS, greedy

SAID = greedy(20)
TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


def main(model: Path) -> None:
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    plain = Engine(build(model, **TWO))
    said = plain.tokens(PROMPTS, SAID)
    plain.core.shutdown()
    got, num_accepted = {}, 0
    for engine in with_edges(model, ASYNCHRONOUS, **TWO):
        engine.oracle.answers = {tuple(prompt): answer for prompt, answer in zip(PROMPTS, said, strict=True)}
        for way in WAYS:
            engine.step_as(way)
            got[way] = engine.tokens(PROMPTS, SAID)
        num_accepted = engine.counters["accepted_tokens"]
        engine.core.shutdown()
    print(json.dumps({"plain": said, "edge": got, "num_accepted": num_accepted}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
