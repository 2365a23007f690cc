"""More than one engine, or more than one worker: tensor parallel, data parallel, and servers that share a gateway."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2 as httpx
import psutil
import pytest
import torch
from stack import BIN, EDGE_CORE, SERVER_CORE, Process, start, start_server, wait_for
from transformers import LlamaConfig, LlamaForCausalLM

from tests.ports import free_port
from vllm_specedge.frontend.load_file import LOAD_VARIABLE

from .conftest import (
    IMPATIENT,
    MIDDLEWARES,
    MODEL,
    ROOM,
    VOCAB_SIZE,
    Completion,
    Target,
    assert_same,
    counting,
    replay,
    running_edge,
    until,
)

GATEWAY_PORT = free_port()
NUM_TOKENS = 48
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights with the embedded model's tokenizer: its output is nonsense, but deterministic."""
    directory = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, **shape, **heads)).save_pretrained(directory)
    for name in TOKENIZER:
        if (MODEL / name).exists():
            shutil.copy(MODEL / name, directory)
    return directory


@contextmanager
def server(
    model: Path, logs: Path, *arguments: str, cores: str = str(SERVER_CORE), **config: object
) -> Iterator[Target]:
    """A server that has been started; `wait_healthy` waits until it answers."""
    # Two engines of this model leave an edge little of two cores: long holds, or hardly a draft is in time.
    edge = {"method": "edge", "num_speculative_tokens": 4, "ngram": False, "mode": "wait", "hold_limit_ms": 2000}
    shared = ("--max-model-len", "512", "--max-num-seqs", "8", "--speculative-config", json.dumps(edge | config), *ROOM)
    env = {"VLLM_CPU_OMP_THREADS_BIND": cores}
    port = free_port()
    running = start_server(model, logs / f"{port}.log", port, *shared, *arguments, gateway_port=GATEWAY_PORT, env=env)
    target = Target(running)
    try:
        yield target
    finally:
        target.http.close()
        running.process.stop()


def wait_healthy(*targets: Target) -> None:
    for target in targets:
        wait_for(target.server.process, f"{target.server.url}/health")


def use_drafts(target: Target, expected: list[Completion], prompts: list[str]) -> None:
    """The answers are the same, and drafts were accepted on the way (by either engine; the other has no requests).

    The tiny model may finish before an edge that shares its cores has answered once, and no request is held before
    that. So the requests are repeated until an edge was in time.
    """
    num_rounds = 0
    with counting(target) as counted:

        def is_drafted() -> bool:
            nonlocal num_rounds
            num_rounds += 1
            assert_same(expected, target.greedy_all(prompts, NUM_TOKENS))
            counted.settle(num_rounds * len(prompts) * NUM_TOKENS)
            return counted["accepted_tokens"] > len(prompts)

        until(is_drafted, "no edge was in time")
        accepted, verified = counted.together("accepted_tokens", "verified_tokens")
        assert accepted == verified


@pytest.mark.parametrize("kind", ["tensor", "data"])
def test_two_ranks_are_lossless_and_use_drafts(tiny: Path, tmp_path: Path, prompts: list[str], kind: str) -> None:
    some = prompts[:8]
    num_engines = 2 if kind == "data" else 1
    options = (f"--{kind}-parallel-size", "2", *MIDDLEWARES)
    config = {"listen": f"127.0.0.1:{GATEWAY_PORT}", "slo": {str(IMPATIENT): {"itl_ms": 1e-3}}}
    with server(tiny, tmp_path, *options, cores=f"{SERVER_CORE}|{EDGE_CORE}", **config) as target:
        wait_healthy(target)
        wait_for(target.server.process, f"{target.server.gateway_url}/healthz", "engines", num_engines)
        expected = target.greedy_all(some, NUM_TOKENS)
        assert any(len(set(completion.token_ids)) > 1 for completion in expected)
        with running_edge(target, replay(expected)):
            use_drafts(target, expected, some)
        check_admission(target, num_engines)


def check_admission(target: Target, num_engines: int) -> None:
    """Each engine reports to the front end, which refuses what none of them could serve in time."""
    server = psutil.Process(target.server.process.popen.pid)
    directories = {each.environ().get(LOAD_VARIABLE) for each in server.children(recursive=True)} - {None}
    [directory] = map(str, directories)
    reports = {path.name for path in Path(directory).glob("*.json")}
    assert reports == {f"{engine}.json" for engine in range(num_engines)}
    body = {"model": target.server.model, "prompt": "The sea", "max_tokens": 64, "ignore_eos": True}

    def is_refused() -> bool:
        """Only recent reports count, so an admitted request is sent before each that is to be refused."""
        url = f"{target.server.url}/v1/completions"
        assert target.http.post(url, json=body).status_code == 200
        return target.http.post(url, json=body | {"priority": IMPATIENT}).status_code == 503

    until(is_refused, "what no engine could serve in time is let in")


@contextmanager
def gateway(directory: Path) -> Iterator[tuple[Process, str]]:
    """A gateway that runs separately, and its endpoint for engines."""
    endpoint = f"ipc://{directory}/engines"
    command = [str(BIN / "vllm-specedge"), "gateway", "--engines", endpoint, "--listen", f"127.0.0.1:{GATEWAY_PORT}"]
    process = start(command, directory / "gateway.log")
    try:
        yield process, endpoint
    finally:
        process.stop()


def test_two_servers_share_a_gateway_and_one_is_killed_and_comes_back(
    tiny: Path, tmp_path: Path, prompts: list[str]
) -> None:
    some = prompts[:4]
    with gateway(tmp_path) as (process, endpoint), ExitStack() as first_stack, ExitStack() as stack:
        url = f"http://127.0.0.1:{GATEWAY_PORT}/healthz"
        first = first_stack.enter_context(server(tiny, tmp_path, gateway=endpoint))
        second = stack.enter_context(server(tiny, tmp_path, gateway=endpoint))
        wait_healthy(first, second)
        wait_for(process, url, "engines", 2)
        expected = first.greedy_all(some, NUM_TOKENS)
        stack.enter_context(running_edge(second, replay(expected)))
        use_drafts(first, expected, some)
        use_drafts(second, expected, some)
        first.server.process.popen.kill()
        first_stack.close()
        use_drafts(second, expected, some)
        again = stack.enter_context(server(tiny, tmp_path, gateway=endpoint))
        wait_healthy(again)
        use_drafts(again, expected, some)
        use_drafts(second, expected, some)
        assert httpx.get(url, trust_env=False).json()["edges"] == 1
