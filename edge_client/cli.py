"""`edge-client`: the command line of an edge machine."""

import asyncio
import codecs
import io
import os
import sys
from contextlib import suppress
from functools import partial
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from edge_client.client import EdgeClient
from edge_client.drafters.choose import own_vocabulary
from edge_client.drafting.pacing import UPLINK_BYTES_PER_TOKEN, Pace
from edge_client.flags import (
    ENDPOINT,
    LIMITS,
    OUTPUT,
    Draft,
    DraftWith,
    MaxRequests,
    MaxTemperature,
    MaxWidth,
    Quiet,
    Role,
    ToGateway,
    ToServer,
    Wait,
    app,
)
from edge_client.temperature import Cooler
from edge_client.terminal import begin, outlived, run, say
from edge_client.ways import checked_server_url
from vllm_specedge import option_flags
from vllm_specedge.option_flags import with_flags


def _shown(name: str) -> str:
    """A name that can be sent: the command line may hold lone surrogates."""
    return name.encode(errors="replace").decode()[:100]


@app.command()
@with_flags
def connect(
    draft: Draft,
    to: ToGateway,
    draft_with: DraftWith,
    role: Role = "pool",
    max_requests: MaxRequests = 0,
    max_width: MaxWidth = 0,
    max_tokens_per_s: Annotated[
        float,
        typer.Option(
            help="Limit on draft tokens per second, on battery for instance; 0: no limit.",
            min=0.0,
            rich_help_panel=LIMITS,
        ),
    ] = 0.0,
    max_temperature_c: MaxTemperature = 0.0,
    uplink_bytes_per_token: Annotated[
        float,
        typer.Option(help="Limit on the average bytes sent for each generated token.", min=8.0, rich_help_panel=LIMITS),
    ] = UPLINK_BYTES_PER_TOKEN,
    wait: Wait = 0.0,
    quiet: Quiet = False,
) -> None:
    """Draft for a server until Ctrl-C."""
    gateway, options, cooler = to.gateway(), draft_with.options(draft), Cooler(max_temperature_c)
    console, drafter, pass_s, fast_enough_for = begin(options, quiet)
    pace = Pace(pass_s, uplink_bytes_per_token=uplink_bytes_per_token, max_tokens_per_s=max_tokens_per_s)
    client = EdgeClient(gateway, drafter, _shown(to.name), role, max_requests or fast_enough_for, max_width, pace)
    client.own_vocabulary = partial(own_vocabulary, options)
    asyncio.run(run(client, client.run(wait), console, quiet, cooler))


@app.command()
@with_flags
def serve(
    to_server: ToServer,
    to: ToGateway,
    draft_with: DraftWith,
    draft: Draft = "ngram",
    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=ENDPOINT)] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535, rich_help_panel=ENDPOINT)] = 11435,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Let web pages of this origin use the endpoint, not only this machine's; may be repeated.",
            rich_help_panel=ENDPOINT,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Accept requests for this host name too, '*' for any; may be repeated.", rich_help_panel=ENDPOINT
        ),
    ] = None,
    max_requests: MaxRequests = 0,
    max_temperature_c: MaxTemperature = 0.0,
    wait: Wait = 0.0,
    quiet: Quiet = False,
) -> None:
    """Run an OpenAI endpoint on this machine: it forwards requests to the server and drafts for these requests only."""
    gateway, server, key = to.gateway(), to_server.server, to_server.key
    from edge_client import serve as endpoint  # noqa: PLC0415 - `connect` needs no web server

    client_of_server = partial(endpoint.server_client, checked_server_url(server), not to.no_proxy, to.ca_file)
    client_of_server()  # fails before a model is loaded
    with endpoint.listening(host, port) as listener:  # first: a taken port fails before a model is loaded
        options = draft_with.options(draft)
        console, drafter, pass_s, fast_enough_for = begin(options, quiet)
        client = EdgeClient(
            gateway, drafter, _shown(to.name), "private", max_requests or fast_enough_for, pace=Pace(pass_s)
        )
        client.own_vocabulary = partial(own_vocabulary, options)
        is_opened, names = endpoint.names_here(listener)
        hosts = [host, *names, *(allow_host or ())]
        web = endpoint.make_app(
            server, client.open_session, key, allow_origin or (), hosts, is_opened, client_of_server
        )
        if not quiet:
            say(console, f"OpenAI endpoint: http://{f'[{host}]' if ':' in host else host}:{port}/v1")
        drafting = run(client, outlived(client.run(wait)), console, quiet, Cooler(max_temperature_c))
        asyncio.run(endpoint.serve_beside(web, listener, drafting))


@app.command()
@with_flags
def chat(
    to_server: ToServer,
    to: ToGateway,
    draft_with: DraftWith,
    draft: Draft = "ngram",
    model: Annotated[str, typer.Option(help="Model to chat with; default: the server's first.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens of an answer.", min=1, rich_help_panel=OUTPUT)] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(help="Sampling temperature; default: the server's.", min=0, max=2, rich_help_panel=OUTPUT),
    ] = None,
    ask: Annotated[
        list[str] | None,
        typer.Option(help="Send this question instead of reading input; may be repeated.", rich_help_panel=OUTPUT),
    ] = None,
    wait: Wait = 0.0,
) -> None:
    """Chat in the terminal, with accepted drafts in green and the speed of the answer."""
    from edge_client.chat import Chat, Server, chat_beside  # noqa: PLC0415 - `connect` has no use for it

    gateway, options, url = to.gateway(), draft_with.options(draft), checked_server_url(to_server.server)
    asked = Server(url, to_server.key, model, max_tokens, temperature, to.ca_file, not to.no_proxy)
    _, drafter, pass_s, _ = begin(options, quiet=False)
    client = EdgeClient(gateway, drafter, _shown(to.name), "private", max_requests=1, pace=Pace(pass_s))
    client.own_vocabulary = partial(own_vocabulary, options)
    talk = Chat(asked, client.open_session, Console(highlight=False))
    with suppress(KeyboardInterrupt):
        asyncio.run(chat_beside(talk, ask or (), client, wait))
    sys.stdout.flush()
    os._exit(0)  # a thread may still wait for a line, and Python would wait for it


@app.command()
@with_flags
def doctor(
    to: ToGateway,
    draft_with: DraftWith,
    draft: Draft = "ngram",
    role: Role = "pool",
    max_width: MaxWidth = 0,
    acceptance: Annotated[
        float | None,
        typer.Option(help="Assumed acceptance rate; default: what the server has measured, else 0.6.", min=0, max=1),
    ] = None,
    spec_tokens: Annotated[int, typer.Option(help="The server's --spec-tokens.", min=1, max=64)] = 5,
) -> None:
    """Check this machine, its draft model and the gateway, and predict whether it would help. Exit 0 if so, else 1."""
    from edge_client import doctor as examination  # noqa: PLC0415 - the other commands need no simulator

    options = draft_with.options(draft)
    asked = examination.Asked(to.gateway(), options, role, _shown(to.name), max_width, spec_tokens, acceptance)
    errors, console = Console(stderr=True), Console(highlight=False)
    if errors.is_terminal:
        errors.print("Measuring; this takes some seconds ...")
    found = examination.diagnose(asked)
    for table in examination.tables(found):
        console.print(table)
    console.print(f"This machine {found.verdict}.", soft_wrap=True)
    raise typer.Exit(0 if found.is_good else 1)


def _take_any_letter() -> None:
    """Read and write any text, whatever the terminal can show: a character that it cannot show becomes a ?."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            is_ascii = codecs.lookup(stream.encoding).name == "ascii"  # a locale that names no encoding, as Python does
            stream.reconfigure(encoding="utf-8" if is_ascii else None, errors="replace")


def main() -> NoReturn:
    """The console script."""
    _take_any_letter()
    option_flags.run(app, "edge-client")


if __name__ == "__main__":
    main()
