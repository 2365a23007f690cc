"""Every command of ours in the documents is run as written, against a real server; only names are replaced."""

import signal
import subprocess
import threading
from collections.abc import Sequence
from itertools import filterfalse
from pathlib import Path

import pytest
import trustme
from certificates import write_certificate
from stack import BIN
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.ports import free_port
from tests.test_documents import Command, of

from .conftest import MODEL, Target

try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
except ModuleNotFoundError:  # where it was before
    from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args

DRAFT = MODEL.parent / "smollm2-draft"
PAIR = {"Qwen/Qwen2.5-Coder-1.5B-Instruct": MODEL, "Qwen/Qwen2.5-Coder-0.5B-Instruct": DRAFT}
"""Local replacements for the pair that the documents name."""
LIMIT_S = 120
ENDLESS = {
    ("edge-client", "connect"): "connected",
    ("edge-client", "serve"): "connected",
    ("vllm-specedge", "gateway"): "Gateway listens",
}
"""Output of commands that run until stopped; after it they are terminated."""
WHOLE = [command for command in of("edge-client", "vllm-specedge") if command.is_whole]


def asks_a_server(command: Command) -> bool:
    return any(word.startswith(("http://", "https://")) for word in command.words)


def filled(command: Command, of_server: dict[str, str], directory: Path) -> list[str]:
    """Its words, with this machine's names in place of the document's."""
    names = {
        **of_server,
        **{name: str(path) for name, path in PAIR.items()},
        "DRAFT_MODEL": str(DRAFT),
        "MODEL": str(DRAFT),
        "ipc:///run/specedge/engines": f"ipc://{directory}/engines",
        "tcp://192.0.2.7:8101": f"tcp://127.0.0.1:{free_port()}",
        "127.0.0.1:8100": f"127.0.0.1:{free_port()}",
        "results.json": str(Path(__file__).parents[2] / "benchmarks" / "results" / "never-slower.json"),
    }
    program, *words = [names.get(word, word) for word in command.words]
    return [str(BIN / program), *words]


@pytest.mark.parametrize("command", filter(asks_a_server, WHOLE), ids=str)
def test_a_command_of_ours_does_what_it_says(command: Command, edge_target: Target, tmp_path: Path) -> None:
    server = edge_target.server
    of_server = {
        "https://gpu.example.org:8100": server.gateway_url,
        "http://127.0.0.1:8100": server.gateway_url,
        "https://gpu.example.org/v1": f"{server.url}/v1",
    }
    run(command, filled(command, of_server, tmp_path), tmp_path)


@pytest.mark.parametrize("command", filterfalse(asks_a_server, WHOLE), ids=str)
def test_a_command_that_asks_no_server_does_what_it_says(command: Command, tmp_path: Path) -> None:
    run(command, filled(command, {}, tmp_path), tmp_path)


def run(command: Command, words: Sequence[str], tmp_path: Path) -> None:
    """Run the command with these words and the files that it names; it must succeed."""
    write_certificate(tmp_path, trustme.CA())
    (tmp_path / "token").write_text("a-token")
    sign = ENDLESS.get((command.words[0], command.words[1]))
    if command.words[1:3] in (["token", "list"], ["token", "revoke"]):
        issue = [words[0], "token", "issue", "anna", "--tokens-file", "tokens.json"]
        subprocess.run(issue, cwd=tmp_path, capture_output=True, timeout=LIMIT_S, check=True)
    if sign is not None:
        run_until(words, sign, tmp_path)
        return
    done = subprocess.run(
        words, cwd=tmp_path, input="", capture_output=True, text=True, timeout=5 * LIMIT_S, check=False
    )
    # A machine may not help, and a simulation may be off: both also report that by their exit status.
    is_verdict = words[1] == "doctor" or "--compare" in words
    assert done.returncode in ((0, 1) if is_verdict else (0,)), done.stderr
    assert done.stdout
    assert "Traceback" not in done.stderr


def run_until(words: Sequence[str], sign: str, directory: Path) -> None:
    """Run until `sign` is printed; then it is interrupted, and must exit cleanly."""
    with subprocess.Popen(words, cwd=directory, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        deadline = threading.Timer(LIMIT_S, process.kill)
        deadline.start()
        said = []
        for line in process.stderr:
            said.append(line)
            if sign in line:
                break
        process.send_signal(signal.SIGINT)
        said.append(process.stderr.read())
        deadline.cancel()
    assert sign in "".join(said)
    assert "Traceback" not in "".join(said)
    assert process.returncode == 0


@pytest.mark.parametrize("command", of("vllm"), ids=str)
def test_a_server_s_command_is_one_that_vllm_takes(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    """Parsed by vLLM's own parser; other tests run servers with such options."""
    program, what, *words = command.words
    assert (program, what) == ("vllm", "serve")
    load_general_plugins()
    try:
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(
            [str(MODEL) if word == "MODEL" or word in PAIR else word for word in words]
        )
    except SystemExit:
        raise AssertionError(capsys.readouterr().err) from None
    validate_parsed_serve_args(args)
    config = args.speculative_config
    assert config.get("method") == "edge" or config["model"].endswith("EdgeProposer")
