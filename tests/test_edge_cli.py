"""What the edge client prints."""

import asyncio
import errno
import io

import pytest
from rich.console import Console

from edge_client.cli import _announce, _outlived
from edge_client.client import DraftModelError, EdgeClient
from edge_client.drafters.ngram import NgramDrafter
from edge_client.link import Gateway
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
        outlived = asyncio.create_task(_outlived(failing(DraftModelError("It fails: start again."))))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await outlived
        with pytest.raises(UserError, match="vocabulary"):
            await _outlived(failing(UserError("vocabulary")))

    asyncio.run(run())
    assert [record.getMessage() for record in caplog.records] == [
        "It fails: start again. Until then requests are passed on, and nobody drafts for them."
    ]
