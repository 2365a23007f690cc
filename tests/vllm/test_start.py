"""Starting a server with edges, and its messages if it cannot start."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stack import BIN
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.ports import free_port
from vllm_specedge.adapter import hooks
from vllm_specedge.adapter.config_rewrite import PROPOSER, SCHEDULER, rewrite
from vllm_specedge.errors import UserError

from .conftest import MODEL

LISTEN = f"127.0.0.1:{free_port()}"


def parsed(*arguments: str) -> AsyncEngineArgs:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", str(MODEL), *arguments]))


def rewritten(*arguments: str) -> AsyncEngineArgs:
    args = parsed(*arguments)
    assert rewrite(args)
    return args


@pytest.mark.parametrize(
    ("arguments", "num_tokens", "options"),
    [
        (["--speculative-config", "edge"], 5, {}),
        (["-sc", "edge", "--spec-tokens", "9"], 9, {}),
        (["--spec-method", "edge", "--spec-tokens", "3"], 3, {}),
        (
            ["--speculative-config", json.dumps({"method": "edge", "num_speculative_tokens": 4, "listen": LISTEN})],
            4,
            {"listen": LISTEN},
        ),
        (["--speculative-config.method", "edge", "--speculative-config.hold_limit_ms", "20"], 5, {"hold_limit_ms": 20}),
    ],
)
def test_what_a_person_types(arguments: list[str], num_tokens: int, options: dict[str, object]) -> None:
    args = rewritten(*arguments)
    assert args.speculative_config["model"] == PROPOSER
    assert args.scheduler_cls == SCHEDULER
    assert args.additional_config["specedge"] == options
    assert num_tokens in (args.spec_tokens, args.speculative_config.get("num_speculative_tokens"))
    before = dict(vars(args))
    assert rewrite(args), "a second API server rewrites again"
    assert vars(args) == before


def test_other_methods_are_left_alone() -> None:
    args = parsed("--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}')
    assert not rewrite(args)
    assert args.speculative_config == {"method": "ngram", "num_speculative_tokens": 3}
    assert args.scheduler_cls is None
    assert not rewrite(parsed())


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ('{"method": "edge", "lissten": "x"}', "no option 'lissten'"),
        ('{"method": "edge", "listen": "8100"}', "HOST:PORT"),
        ('{"method": "edge", "listen": "0.0.0.0:8100"}', "needs tls_cert"),
        ('{"method": "edge", "num_speculative_tokens": 0}', "must be 1 to 128"),
        ('{"method": "edge", "hold_limit_ms": -1}', "hold_limit_ms"),
    ],
)
def test_wrong_options_end_the_parsing_with_a_sentence(
    value: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed("--speculative-config", value)
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"async_scheduling": True}, "--async-scheduling"),
        ({"pipeline_parallel_size": 2}, "--tensor-parallel-size"),
        ({"scheduler_cls": "mine.Scheduler"}, "--scheduler-cls"),
        ({"spec_model": "small"}, "--draft"),
        ({"distributed_executor_backend": "external_launcher"}, "external_launcher"),
        ({"spec_tokens": 500}, "must be 1 to 128"),
        ({"speculative_config": {"method": "edge", "num_speculative_tokens": 3}, "spec_tokens": 4}, "once"),
    ],
)
def test_impossible_combinations(changes: dict[str, Any], sentence: str) -> None:
    args = EngineArgs(model=str(MODEL), **{"speculative_config": {"method": "edge"}, **changes})
    with pytest.raises(UserError, match=sentence):
        rewrite(args)


def test_the_second_model_runner_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(UserError, match="V1 model runner"):
        rewrite(EngineArgs(model=str(MODEL), speculative_config={"method": "edge"}))


def test_what_only_the_whole_configuration_shows() -> None:
    args = EngineArgs(
        model=str(MODEL), speculative_config={"method": "edge", "listen": LISTEN}, enable_lora=True, max_lora_rank=8
    )
    with pytest.raises(ValueError, match="LoRA needs vLLM"):
        args.create_engine_config(UsageContext.LLM_CLASS)


def test_a_port_in_use_ends_a_server_with_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        listen = f"127.0.0.1:{server.getsockname()[1]}"
        args = EngineArgs(model=str(MODEL), speculative_config={"method": "edge", "listen": listen})
        with pytest.raises(SystemExit, match=f"vllm-specedge: The edge gateway cannot listen on {listen}"):
            args.create_engine_config(UsageContext.OPENAI_API_SERVER)


def test_vllm_serve_refuses_as_typed() -> None:
    command = [str(BIN / "vllm"), "serve", str(MODEL), "--speculative-config", '{"method": "edge", "lissten": 1}']
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert "no option 'lissten'" in result.stderr.splitlines()[-1]


def test_all_hooks_are_there() -> None:
    assert hooks.drafting_problems(hooks.V1) == []


def test_a_missing_hook_and_an_untried_version_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    part = hooks.PARTS[hooks.DRAFTING]
    one, other = (hooks.Hook("vllm.v1.request:Request.gone"), part.hooks[0]), ((part.sources[0][0], "no_such_name"),)
    monkeypatch.setitem(hooks.PARTS, hooks.DRAFTING, hooks.Part("Nothing", one, other))
    monkeypatch.setattr(hooks, "TESTED_VERSIONS", ("9.",))
    gone, unknown, untried = hooks.drafting_problems(hooks.V1)
    assert "Request.gone is missing" in gone
    assert "no_such_name" in unknown
    assert "has not been tried" in untried


IN_PROCESS = """
import sys
from stack import edge_client
from vllm import LLM, SamplingParams
from vllm_specedge.adapter import hooks
{before}
llm = LLM({model!r}, dtype="float32", enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=1 << 28, {arguments})
def say():
    prompts = ["one two three four one two three four one two", "Repeat: a b c d e f a b c d e f a b"]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
    return [tuple(output.outputs[0].token_ids) for output in outputs]
without = say()
{between}
"""
WITH_EDGE = """
import pathlib
with edge_client("http://{listen}", "ngram", pathlib.Path(sys.argv[1])):
    with_edge = say()
    driver = llm.llm_engine.engine_core.engine_core.scheduler._drafting.driver if {in_process} else None
    # Nobody is held before an edge has answered once, and short answers may be over by then: ask until it was in time.
    while driver is not None and with_edge == without and driver.counters["accepted_tokens"] <= 10:
        with_edge = say()
print("same" if with_edge == without else "different")
print("accepted", driver.counters["accepted_tokens"] if driver is not None else "unknown")
"""
WITHOUT_DRAFTS = """
scheduler = llm.llm_engine.engine_core.engine_core.scheduler
print("drafting", scheduler._drafting, scheduler._services)
"""


def run_script(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: bool) -> str:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "examples"), prepend=os.pathsep)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0" if in_process else "1")
    path = tmp_path / "script.py"
    path.write_text("if __name__ == '__main__':\n" + "\n".join("    " + line for line in script.splitlines()))
    result = subprocess.run(
        [sys.executable, str(path), str(tmp_path / "edge.log")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_offline_with_the_method_in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = f'"method": "edge", "listen": "{LISTEN}", "mode": "wait", "hold_limit_ms": 5000, "ngram": False'
    arguments = f"speculative_config={{{options}}}"
    between = WITH_EDGE.format(listen=LISTEN, in_process=True)
    script = IN_PROCESS.format(before="", model=str(MODEL), arguments=arguments, between=between)
    out = run_script(script, tmp_path, monkeypatch, in_process=True)
    assert "same" in out
    assert int(out.split("accepted ")[1].split()[0]) > 10


def test_offline_with_dotted_names_and_no_patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "none")
    arguments = (
        f'speculative_config={{"model": "{PROPOSER}", "num_speculative_tokens": 5}}, scheduler_cls="{SCHEDULER}", '
        f'additional_config={{"specedge": {{"listen": "{LISTEN}", "mode": "never-wait"}}}}'
    )
    between = WITH_EDGE.format(listen=LISTEN, in_process=False)
    script = IN_PROCESS.format(before="", model=str(MODEL), arguments=arguments, between=between)
    assert "same" in run_script(script, tmp_path, monkeypatch, in_process=False)


def test_a_missing_hook_turns_drafts_off_and_the_engine_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = f'speculative_config={{"method": "edge", "listen": "{LISTEN}"}}'
    before = 'hooks.PARTS[hooks.DRAFTING] = hooks.Part("Nothing", (hooks.Hook("vllm:gone"),))'
    script = IN_PROCESS.format(before=before, model=str(MODEL), arguments=arguments, between=WITHOUT_DRAFTS)
    assert "drafting None None" in run_script(script, tmp_path, monkeypatch, in_process=True)


def test_an_unknown_draft_model_is_one_sentence() -> None:
    command = [str(BIN / "edge-client"), "connect", "http://127.0.0.1:1", "--draft", "/no/such/model"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert "edge-client: '/no/such/model' is not a model directory" in result.stderr
