"""`vllm serve` of the CUDA wheel, from its start to answers, on a simulated H100 (h100.py)."""

import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from stack import BIN, answering, start_server, wait_for

from benchmarks.harness.replay import Accuracy, Recording, ReplayDrafter
from tests.fake_gpu.environment import simulated_h100
from tests.ports import free_port
from tests.vllm.conftest import Target, counting, running_edge
from tests.vllm_v2 import tiny_model

PROMPTS = [[5, 6, 7, 8, 9], [50, 16, 17, 8, 9, 3, 4]]
NUM_TOKENS = 24
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total{"
OPTIONS = [
    *("--max-model-len", "256", "--max-num-seqs", "4", "--max-num-batched-tokens", "64"),
    *("--kv-cache-memory-bytes", str(16 << 20), "--attention-backend", "TRITON_ATTN"),
]
V1, V2 = "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"


@dataclass(frozen=True)
class Way:
    """Options of a server, and its expected start-up messages."""

    runner: str
    scheduler: str
    says: str
    options: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


WAYS = {
    "by default": Way(V2, "EdgeAsyncScheduler", "V2 model runner; while drafts do not pay"),
    "synchronous": Way(V2, "EdgeScheduler", "V2 model runner", ("--no-async-scheduling",)),
    "two ranks": Way(V2, "EdgeAsyncScheduler", "V2 model runner", ("--data-parallel-size", "2")),
    "the first runner": Way(
        V1,
        "EdgeScheduler",
        "V1 model runner and synchronous scheduling, because VLLM_USE_V2_MODEL_RUNNER is 0",
        environment=(("VLLM_USE_V2_MODEL_RUNNER", "0"),),
    ),
    "a user's extension": Way(
        V1,
        "EdgeScheduler",
        "V1 model runner and synchronous scheduling, because of --worker-extension-cls",
        ("--worker-extension-cls", "tests.fake_gpu.worker.Extension"),
    ),
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return simulated_h100(tmp_path_factory.mktemp("site"))


@contextmanager
def serving(model: Path, log: Path, way: Way, environment: dict[str, str]) -> Iterator[Target]:
    gateway_port = free_port()
    # Verify everything: in Triton's interpreter each draft token makes a step longer, and the default would skip them.
    edge = {"method": "edge", "listen": f"127.0.0.1:{gateway_port}", "mode": "wait"}
    options = (*OPTIONS, "--speculative-config", json.dumps(edge), *way.options)
    environment = environment | dict(way.environment)
    server = start_server(model, log, free_port(), *options, gateway_port=gateway_port, env=environment)
    with answering(server):
        wait_for(server.process, f"{server.gateway_url}/healthz", "engines", 1)
        target = Target(server)
        with target.http:
            yield target


def ask(target: Target) -> list[Recording]:
    """Greedy answers to all prompts at once."""

    def one(prompt: list[int]) -> Recording:
        more = {"ignore_eos": True, "return_token_ids": True}
        answer = client.completions.create(
            model=target.server.model, prompt=prompt, max_tokens=NUM_TOKENS, temperature=0, extra_body=more
        )
        return Recording(tuple(prompt), tuple(answer.choices[0].token_ids))

    with (
        openai.OpenAI(base_url=f"{target.server.url}/v1", api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(len(PROMPTS)) as executor,
    ):
        return list(executor.map(one, PROMPTS))


@pytest.mark.parametrize("name", WAYS)
def test_answers_with_an_edge_are_those_without(
    model: Path, environment: dict[str, str], tmp_path: Path, name: str
) -> None:
    way, log = WAYS[name], tmp_path / "server.log"
    with serving(model, log, way, environment) as target:
        said = log.read_text()
        assert f"Edge drafting uses vLLM's {way.says}" in said
        assert f"The model runner is {way.runner}\n" in said
        assert f"custom scheduler class vllm_specedge.adapter.scheduler.{way.scheduler}." in said
        with counting(target) as counted:
            expected = ask(target)
            counted.settle(len(PROMPTS) * NUM_TOKENS)
            assert not counted["waited_steps"]
        drafter = ReplayDrafter(expected, Accuracy(first=0.8), vocab_size=tiny_model.VOCAB_SIZE)
        with running_edge(target, drafter), counting(target) as counted:
            assert ask(target) == expected
            counted.settle(len(PROMPTS) * NUM_TOKENS)
            assert (counted["waited_steps"] > 0) == (way.scheduler == "EdgeAsyncScheduler")
            assert counted["verified_tokens"] > counted["accepted_tokens"] > NUM_TOKENS // 2
        metrics = target.http.get(f"{target.server.url}/metrics").text
        accepted = (line.rpartition(" ")[2] for line in metrics.splitlines() if line.startswith(ACCEPTED))
        assert sum(map(float, accepted)) > NUM_TOKENS // 2


def test_pipeline_parallelism_is_refused_in_one_sentence(model: Path, environment: dict[str, str]) -> None:
    command = [str(BIN / "vllm"), "serve", str(model), "--speculative-config", "edge", "--pipeline-parallel-size", "2"]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1
    assert "Edge drafting does not work with pipeline parallelism: use --tensor-parallel-size" in done.stderr
    assert "Traceback" not in done.stderr
