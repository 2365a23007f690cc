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
    from edge_client.drafters import Drafter, DrafterOptions
    from edge_client.drafters.load import load_drafter
    from edge_client.link import Gateway
    from edge_client.pace import Pace
except ImportError as error:  # the server's installation has the command, but not all that it needs
    sys.exit(f"edge-client: {error.name} is missing: pip install 'vllm-specedge[edge]'")

app = typer.Typer(help="Draft tokens for a vLLM server.", no_args_is_help=True, pretty_exceptions_enable=False)

TOKEN_VARIABLE = "SPECEDGE_TOKEN"  # noqa: S105 - a name, not a secret
THIS_MACHINE = platform.node()
STATUS_S = 0.5
PLAIN_STATUS_S = 10.0


def _token(file: Path | None) -> str:
    return os.environ.get(TOKEN_VARIABLE, "") if file is None else _read(file, "token")


def _read(file: Path, what: str) -> str:
    try:
        return file.read_text().strip()
    except OSError as error:
        raise UserError(f"The {what} file {file} cannot be read: {error.strerror}.") from None


Url = Annotated[str, typer.Argument(help="The gateway, such as https://gpu.example.org:8100.")]
Draft = Annotated[str, typer.Option(help="Draft model: a directory, a Hugging Face name, or 'ngram'.")]
OwnTokenFile = Annotated[Path | None, typer.Option(help=f"File with your token; or set {TOKEN_VARIABLE}.")]
CaFile = Annotated[str, typer.Option(help="Trust this certificate authority (PEM).")]
CertFile = Annotated[str, typer.Option(help="Your certificate and its key (PEM), if the gateway asks.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Send the token without TLS, beyond this machine.")]
Name = Annotated[str, typer.Option(help="What the operator sees.")]
Device = Annotated[str, typer.Option(help="auto, cuda, mps or cpu.")]
Threads = Annotated[int, typer.Option(help="CPU threads for the draft model; 0: torch's choice.")]
DraftVocab = Annotated[int | None, typer.Option(help="Draft with the N most frequent tokens only; 0: with all.", min=0)]
DraftVocabFile = Annotated[
    Path | None, typer.Option(help="Token ids by frequency; default: draft_vocab.json beside the model.")
]
MaxRequests = Annotated[int, typer.Option(help="Draft for so many requests at once.", min=1, max=4096)]
MaxWidth = Annotated[
    int, typer.Option(help="Draft tokens of one pass at most; 1: no branches, 0: as the model can.", min=0)
]
MaxTokensPerS = Annotated[float, typer.Option(help="Draft no faster, on battery say; 0: as fast as it goes.", min=0.0)]
UplinkBytes = Annotated[float, typer.Option(help="Send no more for each token that is generated, on average.", min=8.0)]
ServerUrl = Annotated[str, typer.Option(help="The server's OpenAI endpoint, such as https://gpu.example.org/v1.")]
ApiKeyFile = Annotated[Path | None, typer.Option(help="File with the key that the server asks for.")]
Wait = Annotated[float, typer.Option(help="Keep trying for so many seconds if the gateway is not there yet.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No status line.")]


@app.command()
def connect(
    url: Url,
    draft: Draft,
    token_file: OwnTokenFile = None,
    ca_file: CaFile = "",
    cert_file: CertFile = "",
    insecure: Insecure = False,
    role: Annotated[
        str, typer.Option(help="pool: for any request; private: only for those that name this edge.")
    ] = "pool",
    name: Name = THIS_MACHINE,
    device: Device = "auto",
    threads: Threads = 0,
    draft_vocab: DraftVocab = None,
    draft_vocab_file: DraftVocabFile = None,
    max_requests: MaxRequests = 8,
    max_width: MaxWidth = 0,
    max_tokens_per_s: MaxTokensPerS = 0.0,
    uplink_bytes_per_token: UplinkBytes = 23.0,
    wait: Wait = 0.0,
    quiet: Quiet = False,
) -> None:
    """Connect to a gateway and draft for it until Ctrl-C."""
    gateway = Gateway(url, _token(token_file), ca_file, insecure, cert_file)
    options = DrafterOptions(draft, device, threads, draft_vocab, draft_vocab_file)
    pace = Pace(uplink_bytes_per_token=uplink_bytes_per_token, max_tokens_per_s=max_tokens_per_s)
    console, drafter = _begin(options, quiet)
    client = EdgeClient(gateway, drafter, name[:100], role, max_requests, max_width, pace)
    asyncio.run(_run(client, wait, console, quiet))


@app.command()
def serve(
    url: Url,
    server: ServerUrl,
    draft: Draft = "ngram",
    host: Annotated[str, typer.Option(help="Where this machine's programs find it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The same.", min=1, max=65535)] = 11435,
    api_key_file: ApiKeyFile = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Pages of this origin may use it, beside this machine's; again.")
    ] = None,
    token_file: OwnTokenFile = None,
    ca_file: CaFile = "",
    cert_file: CertFile = "",
    insecure: Insecure = False,
    name: Name = THIS_MACHINE,
    device: Device = "auto",
    threads: Threads = 0,
    draft_vocab: DraftVocab = None,
    draft_vocab_file: DraftVocabFile = None,
    max_requests: MaxRequests = 8,
    wait: Wait = 0.0,
    quiet: Quiet = False,
) -> None:
    """An OpenAI endpoint on this machine: passes on to the server, and drafts for its own requests only."""
    gateway = Gateway(url, _token(token_file), ca_file, insecure, cert_file)
    key = _read(api_key_file, "key") if api_key_file is not None else ""
    console, drafter = _begin(DrafterOptions(draft, device, threads, draft_vocab, draft_vocab_file), quiet)
    client = EdgeClient(gateway, drafter, name[:100], "private", max_requests)
    from edge_client.serve import listening, make_app, serve_beside  # noqa: PLC0415 - `connect` needs no web server

    endpoint = make_app(server, lambda: client.session if client.model else "", key, allow_origin or ())
    with listening(host, port) as listener:
        if not quiet:
            _say(console, f"OpenAI endpoint: http://{host}:{port}/v1")
        asyncio.run(serve_beside(endpoint, listener, _run(client, wait, console, quiet)))


@app.command()
def chat(
    url: Url,
    server: ServerUrl,
    draft: Draft = "ngram",
    model: Annotated[str, typer.Option(help="Of those that the server has; default: its first.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Of an answer.", min=1)] = 512,
    temperature: Annotated[float | None, typer.Option(help="Default: as the server likes.", min=0, max=2)] = None,
    ask: Annotated[list[str] | None, typer.Option(help="Ask this instead of reading from the terminal; again.")] = None,
    api_key_file: ApiKeyFile = None,
    token_file: OwnTokenFile = None,
    ca_file: CaFile = "",
    cert_file: CertFile = "",
    insecure: Insecure = False,
    name: Name = THIS_MACHINE,
    device: Device = "auto",
    threads: Threads = 0,
    draft_vocab: DraftVocab = None,
    draft_vocab_file: DraftVocabFile = None,
    wait: Wait = 0.0,
) -> None:
    """A chat that shows which tokens were accepted drafts, and how fast they come."""
    from edge_client.chat import Chat, Server, chat_beside  # noqa: PLC0415 - `connect` has no use for it

    gateway = Gateway(url, _token(token_file), ca_file, insecure, cert_file)
    key = _read(api_key_file, "key") if api_key_file is not None else ""
    asked = Server(server, key, model, max_tokens, temperature)
    _, drafter = _begin(DrafterOptions(draft, device, threads, draft_vocab, draft_vocab_file), quiet=False)
    client = EdgeClient(gateway, drafter, name[:100], "private")
    talk = Chat(asked, lambda: client.session if client.model else "", Console(highlight=False))

    async def run() -> None:
        connected = asyncio.Event()
        client.on_change = lambda: connected.set() if client.state == "connected" else None
        drafting = asyncio.create_task(client.run(wait))
        connecting = asyncio.create_task(connected.wait())
        await asyncio.wait({drafting, connecting}, return_when=asyncio.FIRST_COMPLETED)
        connecting.cancel()
        await chat_beside(talk, ask or (), drafting)

    with suppress(KeyboardInterrupt):
        asyncio.run(run())
    sys.stdout.flush()
    os._exit(0)  # a thread may still wait for a line, and Python would wait for it


def _begin(options: DrafterOptions, quiet: bool) -> tuple[Console, Drafter]:
    logging.basicConfig(level=logging.WARNING, format="edge-client: %(message)s", stream=sys.stderr)
    console = Console(stderr=True)
    with console.status(f"Loading {options.draft} ...") if console.is_terminal and not quiet else nullcontext():
        return console, load_drafter(options)


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
