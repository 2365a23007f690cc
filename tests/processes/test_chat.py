"""`edge-client chat` in front of a toy server; tests/vllm/test_serve.py has a real one."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from stack import BIN
from starlette.types import Receive, Send

from edge_client.chat import Chunk, Colours, chunk_of
from edge_client.cli import _shown
from edge_client.naming import NOBODY
from tests.processes.gateways import Running
from tests.processes.test_serve import Toy, served
from tests.processes.test_settings import edge_client
from vllm_specedge.errors import UserError

GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


def event(text: str | None = None, *tokens: bytes, **more: Any) -> str:
    logprobs = {"content": [{"token": repr(token), "bytes": list(token)} for token in tokens]}
    return f"data: {json.dumps({'choices': [{'delta': {'content': text, **more}, 'logprobs': logprobs}]})}\n\n"


class Talker(Toy):
    """Answers a question with a given stream of events."""

    events: tuple[str, ...] = ()

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        body = "".join(self.events).encode() if scope.get("method") == "POST" else b'{"data": [{"id": "toy"}]}'
        self.answer = 200, {"content-type": "text/event-stream"}, body
        await super().__call__(scope, receive, send)

    @property
    def bodies(self) -> list[Any]:
        return [json.loads(body) for path, _, body in self.asked if path.endswith("chat/completions")]


pytestmark = pytest.mark.usefixtures("engine")


def chat(gateway: Running, talker: Talker, *asked: str, stdin: bytes = b"", **env: str) -> tuple[int, str, str]:
    """Status and output of a chat with this server, with questions from the command line or standard input."""
    with served(talker) as url:
        command = [str(BIN / "edge-client"), "chat", gateway.url, "--server", f"{url}/v1"]
        options = [part for question in asked for part in ("--ask", question)]
        clean = {name: value for name, value in os.environ.items() if not name.endswith(("_PROXY", "_proxy"))}
        both = {**clean, **env}
        done = subprocess.run([*command, *options], input=stdin, capture_output=True, timeout=60, check=False, env=both)
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


# -- what is said --------------------------------------------------------------------------------------------------


def test_what_is_shown_and_sent_back_is_the_answer_s_text(gateway: Running) -> None:
    talker = Talker()
    talker.events = (
        event(None, b"Hmm", reasoning="Hmm"),
        event("I am", b"</think>", b"I", b" am"),
        event(".", b".", b"<|im_end|>"),
        "data: [DONE]\n\n",
    )
    status, said, errors = chat(gateway, talker, "Who?", "And?", FORCE_COLOR="1", TERM="xterm")
    assert (status, "Traceback" in errors) == (0, False), errors
    assert "<|im_end|>" not in said
    assert "</think>" not in said
    assert [piece.partition(PLAIN)[0] for piece in said.split(GREEN)[1:3]] == ["I", "."]
    assert talker.bodies[1]["messages"] == [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "I am."},
        {"role": "user", "content": "And?"},
    ]


def test_no_edge_but_this_one_reads_what_is_said(gateway: Running) -> None:
    talker = Talker()
    talker.events = (event("Me.", b"Me."),)
    chat(gateway, talker, "Who?", "/alone", "/again")
    helped, alone = [body["vllm_xargs"]["specedge"] for body in talker.bodies]
    assert alone == NOBODY
    assert len(helped) > len(NOBODY)


def test_an_error_in_the_middle_of_a_stream_is_said(gateway: Running) -> None:
    talker = Talker()
    error = {"error": {"message": "The engine is gone.", "type": "InternalServerError", "code": 500}}
    talker.events = (event("I am", b"I", b" am"), f"data: {json.dumps(error)}\n\n", "data: [DONE]\n\n")
    status, _, errors = chat(gateway, talker, "Who?")
    assert status == 2
    assert "The server ended its answer: The engine is gone." in errors
    _, said, _ = chat(gateway, talker, stdin=b"Who?\nAnd?\n/quit\n")
    assert said.count("The server ended its answer: The engine is gone.") == 2
    assert talker.bodies[-1]["messages"] == [{"role": "user", "content": "And?"}]


@pytest.mark.parametrize("line", ["data: {", "data: []", "data: 7", 'data: {"choices": 7}', "data: " + "[" * 200_000])
def test_a_stream_that_is_none_is_one_sentence(line: str) -> None:
    with pytest.raises(UserError, match="correct --server"):
        chunk_of(line)


@pytest.mark.parametrize("line", ["", ": ping", "event: x", "data: [DONE]", 'data: {"choices": []}', event("").strip()])
def test_what_adds_nothing_is_passed_over(line: str) -> None:
    assert chunk_of(line) is None


def test_text_without_logprobs_is_text() -> None:
    line = 'data: {"choices": [{"delta": {"content": "a\\ud800", "reasoning_content": "b"}}]}'
    assert chunk_of(line) == Chunk((), "a?", "b")


# -- colours -------------------------------------------------------------------------------------------------------


def test_each_letter_has_the_colour_of_the_token_that_ends_it() -> None:
    colours = Colours()
    colours.add([b"I", b" am", b" h"])
    assert colours.of("I am h") == [("I am", True), (" h", False)]
    colours.add([b"\xf0\x9f"])  # half a letter: no text yet
    assert colours.of("") == []
    colours.add([b"\x98\x80", b"!"])
    assert colours.of("\N{GRINNING FACE}!") == [("\N{GRINNING FACE}", True), ("!", False)]


def test_tokens_that_are_in_no_text_are_passed_over() -> None:
    colours = Colours()
    colours.add([b"<think>", b"a", b"</think>", b"b"])
    assert colours.of("a") == [("a", True)]
    assert colours.of("b") == [("b", False)]
    colours.add([b"c", b"d", b"<|im_end|>"])
    assert colours.of("cd") == [("cd", True)]


def test_a_text_that_is_in_no_token_is_no_draft() -> None:
    colours = Colours()
    colours.add([b"x", b"y"])
    assert colours.of("called") == [("called", False)]
    assert colours.of("xy") == [("x", True), ("y", False)]


def test_no_more_is_kept_of_tokens_without_text_than_may_be() -> None:
    colours = Colours()
    for _ in range(100):
        colours.add([b"x" * 1000])
    assert len(colours._bytes) == len(colours._is_draft) == 4096


# -- letters of other systems --------------------------------------------------------------------------------------

LOCALES = [
    {"LC_ALL": "C"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONIOENCODING": "utf-8"},
]


@pytest.mark.parametrize("env", LOCALES)
def test_no_letter_ends_a_chat(gateway: Running, tmp_path: Path, env: dict[str, str]) -> None:
    talker = Talker()
    talker.events = (event("Größe \N{GRINNING FACE}", "Größe".encode(), b" \xf0\x9f\x98\x80"),)
    status, said, errors = chat(gateway, talker, stdin="Größe?\n".encode() + b"\xff\xfe?\n/quit\n", **env)
    assert (status, "Traceback" in errors) == (0, False), errors
    assert len(talker.bodies) == 2, said + errors
    status, said, errors = chat(gateway, talker, "Größe?", **env)
    assert (status, "Traceback" in errors) == (0, False), errors
    assert "Gr" in said


@pytest.mark.parametrize("secret", [b"\xff\xfe", "Größe".encode(), b"one\ntwo"])
def test_a_secret_that_is_none_is_one_sentence(tmp_path: Path, secret: bytes) -> None:
    file = tmp_path / "token"
    file.write_bytes(secret)
    status, said = edge_client(tmp_path, "connect", "http://127.0.0.1:1", "--draft", "ngram", "--token-file", str(file))
    assert (status, said.count("\n")) == (2, 1), said
    assert f"The token file {file} must hold one line" in said


def test_a_name_that_is_no_text_stops_nothing() -> None:
    assert _shown("a\udcff" + "b" * 200) == "a?" + "b" * 98
