"""The entry point in whatever order vLLM's modules are imported: with a package that only looks like vLLM."""

import subprocess
import sys
from pathlib import Path

import pytest

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
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", f"import sys\nsys.path[:0] = [{str(tmp_path)!r}, {str(root)!r}]\n{code}{PARSE}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("edge\n", "")


def test_registering_imports_nothing_of_vllm_s() -> None:
    """vLLM calls it in every process, workers included."""
    code = f"import sys\n{REGISTER}print([name for name in sys.modules if name.split('.')[0] == 'vllm'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
