"""`edge-client`: what a person with a laptop runs."""

import asyncio
import logging
import os
import platform
import signal
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from vllm_specedge import __version__
from vllm_specedge.errors import UserError

try:
    from edge_client.client import EdgeClient
    from edge_client.drafters import DrafterOptions
    from edge_client.drafters.load import load_drafter
    from edge_client.link import Gateway
    from edge_client.pace import Pace
except ImportError as error:  # the server's installation has the command, but not all that it needs
    sys.exit(f"edge-client: {error.name} is missing: pip install 'vllm-specedge[edge]'")

app = typer.Typer(help="Draft tokens for a vLLM server.", no_args_is_help=True, pretty_exceptions_enable=False)

TOKEN_VARIABLE = "SPECEDGE_TOKEN"  # noqa: S105 - a name, not a secret
STATUS_S = 0.5
PLAIN_STATUS_S = 10.0


def _token(file: Path | None) -> str:
    if file is None:
        return os.environ.get(TOKEN_VARIABLE, "")
    try:
        return file.read_text().strip()
    except OSError as error:
        raise UserError(f"The token file {file} cannot be read: {error.strerror}.") from None


@app.command()
def connect(
    url: Annotated[str, typer.Argument(help="The gateway, such as https://gpu.example.org:8100.")],
    draft: Annotated[str, typer.Option(help="Draft model: a directory, a Hugging Face name, or 'ngram'.")],
    token_file: Annotated[Path | None, typer.Option(help=f"File with your token; or set {TOKEN_VARIABLE}.")] = None,
    ca_file: Annotated[str, typer.Option(help="Trust this certificate authority (PEM).")] = "",
    cert_file: Annotated[str, typer.Option(help="Your certificate and its key (PEM), if the gateway asks.")] = "",
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Send the token without TLS, beyond this machine.")
    ] = False,
    role: Annotated[
        str, typer.Option(help="pool: for any request; private: only for those that name this edge.")
    ] = "pool",
    name: Annotated[str, typer.Option(help="What the operator sees.")] = platform.node(),
    device: Annotated[str, typer.Option(help="auto, cuda, mps or cpu.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads for the draft model; 0: torch's choice.")] = 0,
    draft_vocab: Annotated[
        int | None, typer.Option(help="Draft with the N most frequent tokens only; 0: with all.", min=0)
    ] = None,
    draft_vocab_file: Annotated[
        Path | None, typer.Option(help="Token ids by frequency; default: draft_vocab.json beside the model.")
    ] = None,
    max_requests: Annotated[int, typer.Option(help="Draft for so many requests at once.", min=1, max=4096)] = 8,
    max_width: Annotated[
        int, typer.Option(help="Draft tokens of one pass at most; 1: no branches, 0: as the model can.", min=0)
    ] = 0,
    max_tokens_per_s: Annotated[
        float, typer.Option(help="Draft no faster, on battery say; 0: as fast as it goes.", min=0.0)
    ] = 0.0,
    uplink_bytes_per_token: Annotated[
        float, typer.Option(help="Send no more for each token that is generated, on average.", min=8.0)
    ] = 23.0,
    wait: Annotated[float, typer.Option(help="Keep trying for so many seconds if the gateway is not there yet.")] = 0.0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No status line.")] = False,
) -> None:
    """Connect to a gateway and draft for it until Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="edge-client: %(message)s", stream=sys.stderr)
    console = Console(stderr=True)
    gateway = Gateway(url, _token(token_file), ca_file, insecure, cert_file)
    with console.status(f"Loading {draft} ...") if console.is_terminal and not quiet else nullcontext():
        drafter = load_drafter(DrafterOptions(draft, device, threads, draft_vocab, draft_vocab_file))
    pace = Pace(uplink_bytes_per_token=uplink_bytes_per_token, max_tokens_per_s=max_tokens_per_s)
    client = EdgeClient(gateway, drafter, name[:100], role, max_requests, max_width, pace)
    asyncio.run(_run(client, wait, console, quiet))


async def _run(client: EdgeClient, wait_s: float, console: Console, quiet: bool) -> None:
    loop = asyncio.get_running_loop()
    running = asyncio.create_task(client.run(wait_s))
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, running.cancel)
    status = asyncio.create_task(_show(client, console)) if not quiet else None
    try:
        with suppress(asyncio.CancelledError):
            await running
    finally:
        if status is not None:
            status.cancel()
            await asyncio.gather(status, return_exceptions=True)
            _say(console, summary(client))


async def _show(client: EdgeClient, console: Console) -> None:
    """One line that changes in place on a terminal; a line now and then elsewhere."""
    before, before_s = 0, time.monotonic()
    client.on_change = lambda: _announce(client, console)
    if not console.is_terminal:
        while True:
            await asyncio.sleep(PLAIN_STATUS_S)
            now, now_s = client.speculation.stats.accepted_tokens, time.monotonic()
            _say(console, status_line(client, max(0, now - before) / (now_s - before_s)))
            before, before_s = now, now_s
    with Live(status_line(client, 0.0), console=console, refresh_per_second=1 / STATUS_S) as live:
        while True:
            await asyncio.sleep(STATUS_S)
            now, now_s = client.speculation.stats.accepted_tokens, time.monotonic()
            live.update(status_line(client, max(0, now - before) / (now_s - before_s)))
            before, before_s = now, now_s


def _announce(client: EdgeClient, console: Console) -> None:
    """A change of state; a private edge says what requests must name to be drafted for by it."""
    if not console.is_terminal:
        _say(console, status_line(client, 0.0))
    if client.state == "connected" and client.role == "private":
        _say(console, f'Requests for this edge carry "vllm_xargs": {{"specedge": "{client.session}"}}')


def _say(console: Console, line: str | Text) -> None:
    """Nothing stops drafting because it cannot be written down: the disk of a log is full, a terminal is gone."""
    with suppress(OSError):
        console.print(line, soft_wrap=True)


def status_line(client: EdgeClient, accepted_per_s: float) -> Text:
    """Who is served with what, how well, and how far away it is."""
    stats = client.speculation.stats
    acceptance = "-" if stats.acceptance is None else f"{stats.acceptance:.0%}"
    rtt = "-" if client.rtt_s is None else f"{client.rtt_s * 1000:.1f} ms"
    return Text(
        f"{client.state} {client.model} | {client.drafter.description} | {len(client.speculation)} requests | "
        f"acceptance {acceptance} | {accepted_per_s:.0f} accepted tokens/s | RTT {rtt}",
        no_wrap=True,
        overflow="ellipsis",
    )


def summary(client: EdgeClient) -> str:
    """What this run came to."""
    totals = client.totals
    num_requests = sum(stats.num_requests for stats in totals)
    proposed = sum(stats.proposed_tokens for stats in totals)
    accepted = sum(stats.accepted_tokens for stats in totals)
    return f"Drafted for {num_requests} requests: {proposed} tokens proposed, {accepted} accepted."


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    pass


def main() -> NoReturn:
    """The console script: a user's fault is one sentence and status 2."""
    try:
        app()
    except UserError as error:
        print(f"edge-client: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    sys.exit(0)


if __name__ == "__main__":
    main()
