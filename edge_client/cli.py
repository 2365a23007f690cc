"""`edge-client`: what a person with a laptop runs."""

import asyncio
import codecs
import io
import logging
import os
import platform
import stat
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn, get_type_hints

import typer
from rich.console import Console

from edge_client import settings
from edge_client.client import EdgeClient
from edge_client.drafters import DrafterOptions
from edge_client.drafters.choose import own_vocabulary
from edge_client.drafting.pacing import UPLINK_BYTES_PER_TOKEN, Pace
from edge_client.gateway_link import Gateway
from edge_client.temperature import Cooler
from edge_client.terminal import begin, outlived, run, say
from edge_client.ways import checked_server_url
from vllm_specedge import option_flags
from vllm_specedge.errors import UserError
from vllm_specedge.option_flags import command_line, with_flags

app = command_line("Draft tokens for a vLLM server.")

logger = logging.getLogger("edge_client")

TOKEN_VARIABLE = "SPECEDGE_TOKEN"  # noqa: S105 - a name, not a secret
THIS_MACHINE = platform.node()


def _token(file: Path | None) -> str:
    if file is not None:
        return _read(file, "token")
    return _secret(os.environ.get(TOKEN_VARIABLE, ""), f"The environment's {TOKEN_VARIABLE}")


def _read(file: Path, what: str) -> str:
    try:
        return _secret(file.read_bytes().decode(errors="replace"), f"The {what} file {file}")
    except OSError as error:
        raise UserError(f"The {what} file {file} cannot be read: {error.strerror}.") from None


def _secret(text: str, where: str) -> str:
    """What goes into a header. Raises UserError."""
    secret = text.strip()
    if not (secret.isascii() and secret.isprintable()):
        raise UserError(f"{where} holds more than one line of letters and digits: put nothing else into it.")
    return secret


def _shown(name: str) -> str:
    """A name that can be sent: the command line may hold half a letter."""
    return name.encode(errors="replace").decode()[:100]


def _configure(context: typer.Context, file: Path | None) -> Path | None:
    """Make what the user's file says this command's defaults: what its line says comes before them."""
    chosen = file or settings.folder(sys.platform, os.environ, Path.home()) / "edge.toml"
    if file is None and not chosen.exists():
        return None
    functions = {command.callback.__name__: command.callback for command in app.registered_commands if command.callback}
    kinds = {name: get_type_hints(function, include_extras=True) for name, function in functions.items()}
    names = {name: kinds[name].keys() - {"config", "return"} for name in kinds}
    command = str(context.info_name)
    values = settings.options_of(command, settings.read(chosen), names, chosen)
    for name, value in values.items():
        settings.kind_of(kinds[command][name]).check(name, value, chosen)
        is_secret = name in settings.SECRETS.values() and os.name == "posix" and Path(value).exists()
        if is_secret and Path(value).stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            raise UserError(f"In {chosen}, {name} is {value}, which others may read: chmod 600 {value}.")
    if TOKEN_VARIABLE in os.environ:  # the environment comes before the file
        values.pop("token_file", None)
    context.default_map = values
    return file


Config = Annotated[
    Path | None,
    typer.Option(
        help="TOML file with options; default: ~/.config/specedge/edge.toml, on Windows %APPDATA%/specedge/edge.toml.",
        callback=_configure,
        is_eager=True,
    ),
]
Draft = Annotated[
    str, typer.Option(help="Draft model: a directory, GGUF file, OWNER/NAME, hf:OWNER/NAME/FILE.gguf, or 'ngram'.")
]
Role = Annotated[str, typer.Option(help="pool: for any request; private: only for those that name this edge.")]
MaxRequests = Annotated[
    int,
    typer.Option(help="Draft for so many requests at once; 0: as many as it is fast enough for.", min=0, max=4096),
]
MaxWidth = Annotated[
    int, typer.Option(help="Draft tokens of one pass at most; 1: no branches, 0: as the model can.", min=0)
]
MaxTemperature = Annotated[
    float, typer.Option(help="Draft less of the time while the machine's hottest sensor is above; 0: no cap.", min=0.0)
]
Wait = Annotated[float, typer.Option(help="Keep trying for so many seconds if the gateway is not there yet.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing but errors.")]


@dataclass(frozen=True)
class ToGateway:
    """How a gateway is reached, and what this edge shows there."""

    url: Annotated[str, typer.Argument(help="The gateway, such as https://gpu.example.org:8100.")]
    token_file: Annotated[Path | None, typer.Option(help=f"File with your token; or set {TOKEN_VARIABLE}.")] = None
    ca_file: Annotated[str, typer.Option(help="Trust this certificate authority (PEM), for --server too.")] = ""
    cert_file: Annotated[str, typer.Option(help="Your certificate and its key (PEM), if the gateway asks.")] = ""
    insecure: Annotated[bool, typer.Option("--insecure", help="Send the token without TLS, beyond this machine.")] = (
        False
    )
    no_proxy: Annotated[bool, typer.Option("--no-proxy", help="Do without the proxy that the environment names.")] = (
        False
    )
    name: Annotated[str, typer.Option(help="What the operator sees.")] = THIS_MACHINE
    config: Config = None

    def gateway(self) -> Gateway:
        """The gateway. What cannot be used of it is said before a model is loaded: raises UserError."""
        token = _token(self.token_file)
        gateway = Gateway(self.url, token, self.ca_file, self.insecure, self.cert_file, not self.no_proxy)
        gateway.client()
        return gateway


@dataclass(frozen=True)
class DraftWith:
    """How a draft model is run."""

    device: Annotated[str, typer.Option(help="auto, cuda, mps or cpu.")] = "auto"
    runtime: Annotated[str, typer.Option(help="auto, int8, transformers, mlx or llama.cpp.")] = "auto"
    threads: Annotated[
        int, typer.Option(help="CPU threads for the draft model; 0: one for each core that this process may use.")
    ] = 0
    draft_vocab: Annotated[
        int | None, typer.Option(help="Draft with the N most frequent tokens only; 0: with all.", min=0)
    ] = None
    draft_vocab_file: Annotated[
        Path | None, typer.Option(help="Token ids by frequency; default: draft_vocab.json beside the model.")
    ] = None

    def options(self, draft: str) -> DrafterOptions:
        """The same with the name of the draft."""
        return DrafterOptions(draft, self.device, self.threads, self.draft_vocab, self.draft_vocab_file, self.runtime)


@dataclass(frozen=True)
class ToServer:
    """An OpenAI endpoint to be asked."""

    server: Annotated[str, typer.Option(help="The server's OpenAI endpoint, such as https://gpu.example.org/v1.")]
    api_key_file: Annotated[Path | None, typer.Option(help="File with the key that the server asks for.")] = None

    @property
    def key(self) -> str:
        """What the endpoint asks for; empty: nothing. Raises UserError."""
        return _read(self.api_key_file, "key") if self.api_key_file is not None else ""


@app.command()
@with_flags
def connect(
    to: ToGateway,
    draft: Draft,
    draft_with: DraftWith,
    role: Role = "pool",
    max_requests: MaxRequests = 0,
    max_width: MaxWidth = 0,
    max_tokens_per_s: Annotated[
        float, typer.Option(help="Draft no faster, on battery say; 0: as fast as it goes.", min=0.0)
    ] = 0.0,
    max_temperature_c: MaxTemperature = 0.0,
    uplink_bytes_per_token: Annotated[
        float, typer.Option(help="Send no more for each token that is generated, on average.", min=8.0)
    ] = UPLINK_BYTES_PER_TOKEN,
    wait: Wait = 0.0,
    quiet: Quiet = False,
) -> None:
    """Connect to a gateway and draft for it until Ctrl-C."""
    gateway, options, cooler = to.gateway(), draft_with.options(draft), Cooler(max_temperature_c)
    console, drafter, pass_s, fast_enough_for = begin(options, quiet)
    pace = Pace(pass_s, uplink_bytes_per_token=uplink_bytes_per_token, max_tokens_per_s=max_tokens_per_s)
    client = EdgeClient(gateway, drafter, _shown(to.name), role, max_requests or fast_enough_for, max_width, pace)
    client.own_vocabulary = partial(own_vocabulary, options)
    asyncio.run(run(client, client.run(wait), console, quiet, cooler))


@app.command()
@with_flags
def serve(
    to: ToGateway,
    to_server: ToServer,
    draft_with: DraftWith,
    draft: Draft = "ngram",
    host: Annotated[str, typer.Option(help="Where this machine's programs find it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The same.", min=1, max=65535)] = 11435,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Pages of this origin may use it, beside this machine's; again.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Programs may call it by this name, beside its own; * is any; again.")
    ] = None,
    max_requests: MaxRequests = 0,
    max_temperature_c: MaxTemperature = 0.0,
    wait: Wait = 0.0,
    quiet: Quiet = False,
) -> None:
    """An OpenAI endpoint on this machine: passes on to the server, and drafts for its own requests only."""
    gateway, server, key = to.gateway(), to_server.server, to_server.key
    from edge_client import serve as endpoint  # noqa: PLC0415 - `connect` needs no web server

    client_of_server = partial(endpoint.server_client, checked_server_url(server), not to.no_proxy, to.ca_file)
    client_of_server()  # what cannot be used is said before a model is loaded
    with endpoint.listening(host, port) as listener:  # first: a port that is taken is said before a model is loaded
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
    to: ToGateway,
    to_server: ToServer,
    draft_with: DraftWith,
    draft: Draft = "ngram",
    model: Annotated[str, typer.Option(help="Of those that the server has; default: its first.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Of an answer.", min=1)] = 512,
    temperature: Annotated[float | None, typer.Option(help="Default: as the server likes.", min=0, max=2)] = None,
    ask: Annotated[list[str] | None, typer.Option(help="Ask this instead of reading from the terminal; again.")] = None,
    wait: Wait = 0.0,
) -> None:
    """A chat that shows which tokens were accepted drafts, and how fast they come."""
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
        typer.Option(help="How often a draft token is right; default: as the server has seen.", min=0, max=1),
    ] = None,
    spec_tokens: Annotated[int, typer.Option(help="The server's --spec-tokens.", min=1, max=64)] = 5,
) -> None:
    """Check this machine, its draft and the gateway, and say whether it would help. Ends with 0 if so, else with 1."""
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
    """Any text is read and written, whatever a terminal can show: a letter that cannot be is a ?."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            is_ascii = codecs.lookup(stream.encoding).name == "ascii"  # a locale that says nothing, as Python does
            stream.reconfigure(encoding="utf-8" if is_ascii else None, errors="replace")


def main() -> NoReturn:
    """The console script."""
    _take_any_letter()
    option_flags.run(app, "edge-client")


if __name__ == "__main__":
    main()
