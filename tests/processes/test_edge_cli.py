"""Output of the edge client."""

import asyncio
import errno
import io
import signal
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from rich.console import Console
from stack import BIN, start
from starlette.types import Receive, Send

from edge_client import terminal
from edge_client.client import DraftModelError, EdgeClient
from edge_client.drafters.ngram import NgramDrafter
from edge_client.gateway_link import Gateway
from edge_client.terminal import _announce
from edge_client.view import status_line
from tests.ports import free_port
from tests.processes.gateways import running_gateway, wait_for_port
from tests.processes.test_serve import DEADLINE_S, Toy, ask_raw, served
from tests.processes.test_settings import edge_client
from vllm_specedge.errors import UserError


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("role", ["pool", "private"])
def test_a_log_that_cannot_be_written_stops_nothing(role: str) -> None:
    client = EdgeClient(Gateway("http://localhost:1"), NgramDrafter(), "edge", role)
    client.state, client.session = "connected", "a-session"
    console = Console(file=FullDisk())
    with pytest.raises(OSError, match="No space"):
        console.print("as it is without care")
    client.on_change = lambda: _announce(client, console)
    client._change("connected")


def test_a_private_edge_says_what_requests_must_name() -> None:
    client = EdgeClient(Gateway("http://localhost:1"), NgramDrafter(), "edge", "private")
    client.state, client.session = "connected", "a-session"
    said = io.StringIO()
    _announce(client, Console(file=said, width=40))
    assert '"vllm_xargs": {"specedge": "a-session"}' in said.getvalue()


async def failing(error: Exception) -> None:
    raise error


def test_an_endpoint_outlives_its_draft_model_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        outlived = asyncio.create_task(terminal.outlived(failing(DraftModelError("It fails: start again."))))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await outlived
        with pytest.raises(UserError, match="vocabulary"):
            await terminal.outlived(failing(UserError("vocabulary")))

    asyncio.run(run())
    assert [record.getMessage() for record in caplog.records] == [
        "It fails: start again. Until then requests are forwarded without drafts."
    ]


class Endless(Toy):
    """Starts an answer and sends nothing more."""

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
            while (await receive())["type"] != "http.disconnect":
                pass
            self.is_left.set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle_of_a_stream_ends_an_endpoint_in_silence(tmp_path: Path, number: int) -> None:
    endless, port, log = Endless(), free_port(), tmp_path / "edge.log"
    with served(endless) as server, running_gateway(tmp_path) as gateway:
        command = [str(BIN / "edge-client"), "serve", gateway.url, "--server", f"{server}/v1", "--wait", "60"]
        process = start([*command, "--port", str(port)], log)
        try:
            wait_for_port(process, port)
            url = f"http://127.0.0.1:{port}/v1/completions"
            with httpx.stream("POST", url, json={}, trust_env=False, timeout=DEADLINE_S) as answer:
                chunks = answer.iter_raw()  # hangs up when it is garbage-collected
                assert next(chunks)
                process.popen.send_signal(number)
                assert process.popen.wait(DEADLINE_S) == 0
            assert endless.is_left.wait(DEADLINE_S)
        finally:
            process.stop()
    states = ("Not connected", "connecting | ")  # how many depends on how long it took
    said = [line for line in log.read_text().splitlines() if not any(state in line for state in states)]
    assert [line.partition(":")[0] for line in said] == [
        "Drafting by prompt lookup",
        "OpenAI endpoint",
        "Drafted for 0 requests",
    ]


def test_an_endpoint_is_opened_on_the_command_line(tmp_path: Path) -> None:
    port = free_port()
    with served(Toy()) as server:
        command = [str(BIN / "edge-client"), "serve", "http://127.0.0.1:1", "--server", f"{server}/v1", "--wait", "600"]
        more = ["--host", "0.0.0.0", "--port", str(port), "--allow-host", "edge", "--quiet"]
        process = start([*command, *more], tmp_path / "edge.log")
        try:
            wait_for_port(process, port)
            url = f"http://127.0.0.1:{port}"
            for host, status in (("edge", b"200"), (f"192.0.2.7:{port}", b"200"), ("evil.example.org", b"400")):
                assert ask_raw(url, "/v1/models", host).split()[1] == status
        finally:
            process.stop()


@pytest.mark.parametrize(("host", "shown"), [("::1", "http://[::1]:"), ("127.0.0.1", "http://127.0.0.1:")])
def test_the_endpoint_that_is_said_is_an_address(tmp_path: Path, host: str, shown: str) -> None:
    port = str(free_port())
    more = ["--server", "http://127.0.0.1:1/v1", "--host", host, "--port", port]
    status, said = edge_client(tmp_path, "serve", "http://127.0.0.1:1", *more)
    if "cannot listen" in said:
        pytest.skip("there is no IPv6 here")
    assert (status, f"OpenAI endpoint: {shown}{port}/v1" in said) == (2, True), said


def test_without_a_model_there_is_no_gap() -> None:
    client = EdgeClient(Gateway("http://localhost:1"), NgramDrafter(), "edge")
    client.state = "reconnecting"
    assert status_line(client, 0.0).plain.startswith("reconnecting | ")
