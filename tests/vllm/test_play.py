"""`make play`, as described in docs/demo.md: the status page, and a chat whose drafts are coloured."""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx2 as httpx

from tests.ports import free_port

ROOT = Path(__file__).parents[2]
LIMIT_S = 480
DRAFTED = "\x1b[32m"


def test_a_server_to_look_at_and_to_chat_with() -> None:
    command = [sys.executable, str(ROOT / "examples" / "play.py"), "--pair", "smollm2"]
    command += ["--port", str(free_port()), "--gateway-port", str(free_port())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        deadline = threading.Timer(LIMIT_S, process.kill)
        deadline.start()
        said = ""
        for line in process.stdout:
            said += line
            if "Ctrl-C" in line:
                break
        page = re.search(r"Status page: (\S+)", said)
        chat = re.search(r"Chat, in another terminal: (.+)", said)
        assert page, said
        assert chat, said
        assert "<title>vLLM-SpecEdge</title>" in httpx.get(page[1], trust_env=False).text
        # Whether a draft pays depends on what else this machine does; now and then one is tried all the same.
        while DRAFTED not in (asked := ask(chat[1])):
            assert deadline.is_alive(), f"no token was an accepted draft: {asked}"
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        deadline.cancel()
    assert process.returncode == 0


def ask(chat: str) -> str:
    """Output of the offered chat command for a question."""
    done = subprocess.run(
        [*shlex.split(chat), "--ask", "Why is the sky blue?", "--temperature", "0", "--max-tokens", "64"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
