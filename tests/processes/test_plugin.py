"""The entry point with any order of importing vLLM's modules, with a package that imitates vLLM."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer.main

from vllm_specedge.adapter.config_rewrite import unreached
from vllm_specedge.cli import app
from vllm_specedge.config import parse_options

ARG_UTILS = """
import argparse, inspect, json, os

if os.environ.get("IS_BROKEN"):
    raise ImportError("not yet")


class EngineArgs:
    @staticmethod
    def add_cli_args(parser):
        parser.add_argument("--speculative-config", type=json.loads)
        return parser

    def create_engine_config(self, usage_context=None):
        return None
"""
PARSE = """
import argparse
from vllm.engine.arg_utils import EngineArgs
parser = EngineArgs.add_cli_args(argparse.ArgumentParser())
print(parser.parse_args(["--speculative-config", "edge"]).speculative_config["method"])
"""
REGISTER = "from vllm_specedge.adapter.plugin import register\nregister()\n"
IMPORT = "import vllm.engine.arg_utils\n"
FAIL = """
import os
os.environ["IS_BROKEN"] = "1"
try:
    import vllm.engine.arg_utils
except ImportError:
    os.environ.pop("IS_BROKEN")
"""
LOOK_AT_SOURCE = """
import inspect, vllm.engine.arg_utils
assert "json.loads" in inspect.getsource(vllm.engine.arg_utils)
assert vllm.engine.arg_utils.__spec__.loader is vllm.engine.arg_utils.__loader__
"""


@pytest.mark.parametrize(
    "code",
    [
        IMPORT + REGISTER,
        REGISTER,
        REGISTER + REGISTER,
        REGISTER + IMPORT + REGISTER,
        REGISTER + FAIL,
        REGISTER + LOOK_AT_SOURCE,
    ],
    ids=["after", "before", "twice before", "before and after", "before a try that fails", "before, and its source"],
)
def test_edge_is_understood_whenever_plugins_were_loaded(tmp_path: Path, code: str) -> None:
    package = tmp_path / "vllm" / "engine"
    package.mkdir(parents=True)
    for directory in (package, package.parent):
        (directory / "__init__.py").touch()
    (package / "arg_utils.py").write_text(ARG_UTILS)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", f"import sys\nsys.path[:0] = [{str(tmp_path)!r}, {str(root)!r}]\n{code}{PARSE}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("edge\n", "")


def config(rank: int, node_rank: int = 0, **options: object) -> SimpleNamespace:
    parallel = SimpleNamespace(data_parallel_rank=rank, node_rank_within_dp=node_rank)
    return SimpleNamespace(parallel_config=parallel, additional_config={"specedge": options})


def test_ranks_that_no_edge_can_draft_for_are_named_at_start() -> None:
    """Most often those of `vllm serve --headless` on another machine."""
    sentence = unreached(config(2))
    assert sentence is not None
    assert "the data-parallel ranks from 2 on" in sentence
    for fine in (config(0), config(2, gateway="tcp://127.0.0.1:8101"), config(2, node_rank=1)):
        assert unreached(fine) is None


def test_what_it_says_to_type_is_taken() -> None:
    sentence = unreached(config(2))
    assert sentence is not None
    command, options = (each for each in sentence.replace("ADDRESS", "192.0.2.7").split("'") if "tcp://" in each)
    parse_options(json.loads("{" + options + "}"))
    program, *words = shlex.split(command)
    assert program == "vllm-specedge"
    typer.main.get_command(app).commands[words[0]].make_context(program, words[1:])  # type: ignore[attr-defined]


def test_registering_imports_nothing_of_vllm_s() -> None:
    """vLLM calls it in every process, workers included."""
    code = f"import sys\n{REGISTER}print([name for name in sys.modules if name.split('.')[0] == 'vllm'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
