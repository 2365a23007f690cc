"""`edge-client`: what a person with a laptop runs."""

import asyncio
import codecs
import io
import logging
import os
import platform
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn, get_type_hints

import typer
from rich.console import Console

from edge_client import settings
from edge_client.client import EdgeClient
from edge_client.drafters import DrafterOptions
from edge_client.drafters.own_vocabulary import own_vocabulary
from edge_client.drafting.pacing import UPLINK_BYTES_PER_TOKEN, Pace
from edge_client.gateway_link import Gateway
from edge_client.temperature import Cooler
from edge_client.terminal import begin, outlived, run, say
from edge_client.ways import checked_server_url
from vllm_specedge import __version__
from vllm_specedge.errors import UserError

app = typer.Typer(help="Draft tokens for a vLLM server.", no_args_is_help=True, pretty_exceptions_enable=False)

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
        if name in settings.SECRETS.values() and os.name == "posix" and Path(value).exists():
            settings.check_secret(name, Path(value), Path(value).stat().st_mode, chosen)
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
Url = Annotated[str, typer.Argument(help="The gateway, such as https://gpu.example.org:8100.")]
Draft = Annotated[
    str,
    typer.Option(help="Draft model: a directory, GGUF file, OWNER/NAME, hf:OWNER/NAME/FILE.gguf, or 'ngram'."),
]
OwnTokenFile = Annotated[Path | None, typer.Option(help=f"File with your token; or set {TOKEN_VARIABLE}.")]
CaFile = Annotated[str, typer.Option(help="Trust this certificate authority (PEM), for --server too.")]
CertFile = Annotated[str, typer.Option(help="Your certificate and its key (PEM), if the gateway asks.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Send the token without TLS, beyond this machine.")]
NoProxy = Annotated[bool, typer.Option("--no-proxy", help="Do without the proxy that the environment names.")]
Role = Annotated[str, typer.Option(help="pool: for any request; private: only for those that name this edge.")]
Name = Annotated[str, typer.Option(help="What the operator sees.")]
Device = Annotated[str, typer.Option(help="auto, cuda, mps or cpu.")]
Threads = Annotated[
    int, typer.Option(help="CPU threads for the draft model; 0: one for each core that this process may use.")
]
DraftVocab = Annotated[int | None, typer.Option(help="Draft with the N most frequent tokens only; 0: with all.", min=0)]
DraftVocabFile = Annotated[
    Path | None, typer.Option(help="Token ids by frequency; default: draft_vocab.json beside the model.")
]
MaxRequests = Annotated[int, typer.Option(help="Draft for so many requests at once.", min=1, max=4096)]
MaxWidth = Annotated[
    int, typer.Option(help="Draft tokens of one pass at most; 1: no branches, 0: as the model can.", min=0)
]
MaxTokensPerS = Annotated[float, typer.Option(help="Draft no faster, on battery say; 0: as fast as it goes.", min=0.0)]
MaxTemperature = Annotated[
    float, typer.Option(help="Draft less of the time while the machine's hottest sensor is above; 0: no cap.", min=0.0)
]
UplinkBytes = Annotated[float, typer.Option(help="Send no more for each token that is generated, on average.", min=8.0)]
ServerUrl = Annotated[str, typer.Option(help="The server's OpenAI endpoint, such as https://gpu.example.org/v1.")]
ApiKeyFile = Annotated[Path | None, typer.Option(help="File with the key that the server asks for.")]
Wait = Annotated[float, typer.Option(help="Keep trying for so many seconds if the gateway is not there yet.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing but errors.")]


@app.command()
def connect(
    url: Url,
    draft: Draft,
    token_file: OwnTokenFile = None,
    ca_file: CaFile = "",
    cert_file: CertFile = "",
    insecure: Insecure = False,
    no_proxy: NoProxy = False,
    role: Role = "pool",
    name: Name = THIS_MACHINE,
    device: Device = "auto",
    threads: Threads = 0,
    draft_vocab: DraftVocab = None,
    draft_vocab_file: DraftVocabFile = None,
    max_requests: MaxRequests = 8,
    max_width: MaxWidth = 0,
    max_tokens_per_s: MaxTokensPerS = 0.0,
    max_temperature_c: MaxTemperature = 0.0,
    uplink_bytes_per_token: UplinkBytes = UPLINK_BYTES_PER_TOKEN,
    wait: Wait = 0.0,
    quiet: Quiet = False,
    config: Config = None,
) -> None:
    """Connect to a gateway and draft for it until Ctrl-C."""
    gateway = _checked(Gateway(url, _token(token_file), ca_file, insecure, cert_file, not no_proxy))
    options = DrafterOptions(draft, device, threads, draft_vocab, draft_vocab_file)
    cooler = Cooler(max_temperature_c)
    pace = Pace(uplink_bytes_per_token=uplink_bytes_per_token, max_tokens_per_s=max_tokens_per_s)
    console, drafter = begin(options, quiet)
    client = EdgeClient(gateway, drafter, _shown(name), role, max_requests, max_width, pace)
    client.own_vocabulary = partial(own_vocabulary, options)
    asyncio.run(run(client, client.run(wait), console, quiet, cooler))


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
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Programs may call it by this name, beside its own; * is any; again.")
    ] = None,
    token_file: OwnTokenFile = None,
    ca_file: CaFile = "",
    cert_file: CertFile = "",
    insecure: Insecure = False,
    no_proxy: NoProxy = False,
    name: Name = THIS_MACHINE,
    device: Device = "auto",
    threads: Threads = 0,
    draft_vocab: DraftVocab = None,
    draft_vocab_file: DraftVocabFile = None,
    max_requests: MaxRequests = 8,
    max_temperature_c: MaxTemperature = 0.0,
    wait: Wait = 0.0,
    quiet: Quiet = False,
    config: Config = None,
) -> None:
    """An OpenAI endpoint on this machine: passes on to the server, and drafts for its own requests only."""
    gateway = _checked(Gateway(url, _token(token_file), ca_file, insecure, cert_file, not no_proxy))
    key = _read(api_key_file, "key") if api_key_file is not None else ""
    from edge_client import serve as endpoint  # noqa: PLC0415 - `connect` needs no web server

    client_of_server = partial(endpoint.server_client, checked_server_url(server), not no_proxy, ca_file)
    client_of_server()  # what cannot be used is said before a model is loaded
    with endpoint.listening(host, port) as listener:  # first: a port that is taken is said before a model is loaded
        options = DrafterOptions(draft, device, threads, draft_vocab, draft_vocab_file)
        console, drafter = begin(options, quiet)
        client = EdgeClient(gateway, drafter, _shown(name), "private", max_requests)
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
    no_proxy: NoProxy = False,
    name: Name = THIS_MACHINE,
    device: Device = "auto",
    threads: Threads = 0,
    draft_vocab: DraftVocab = None,
    draft_vocab_file: DraftVocabFile = None,
    wait: Wait = 0.0,
    config: Config = None,
) -> None:
    """A chat that shows which tokens were accepted drafts, and how fast they come."""
    from edge_client.chat import Chat, Server, chat_beside  # noqa: PLC0415 - `connect` has no use for it

    gateway = _checked(Gateway(url, _token(token_file), ca_file, insecure, cert_file, not no_proxy))
    key = _read(api_key_file, "key") if api_key_file is not None else ""
    asked = Server(checked_server_url(server), key, model, max_tokens, temperature, ca_file, not no_proxy)
    options = DrafterOptions(draft, device, threads, draft_vocab, draft_vocab_file)
    _, drafter = begin(options, quiet=False)
    client = EdgeClient(gateway, drafter, _shown(name), "private")
    client.own_vocabulary = partial(own_vocabulary, options)
    talk = Chat(asked, client.open_session, Console(highlight=False))

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


@app.command()
def doctor(
    url: Url,
    draft: Draft = "ngram",
    token_file: OwnTokenFile = None,
    ca_file: CaFile = "",
    cert_file: CertFile = "",
    insecure: Insecure = False,
    no_proxy: NoProxy = False,
    role: Role = "pool",
    name: Name = THIS_MACHINE,
    device: Device = "auto",
    threads: Threads = 0,
    draft_vocab: DraftVocab = None,
    draft_vocab_file: DraftVocabFile = None,
    max_width: MaxWidth = 0,
    acceptance: Annotated[
        float | None,
        typer.Option(help="How often a draft token is right; default: as the server has seen.", min=0, max=1),
    ] = None,
    spec_tokens: Annotated[int, typer.Option(help="The server's --spec-tokens.", min=1, max=64)] = 5,
    config: Config = None,
) -> None:
    """Check this machine, its draft and the gateway, and say whether it would help. Ends with 0 if so, else with 1."""
    from edge_client import doctor as examination  # noqa: PLC0415 - the other commands need no simulator

    gateway = _checked(Gateway(url, _token(token_file), ca_file, insecure, cert_file, not no_proxy))
    options = DrafterOptions(draft, device, threads, draft_vocab, draft_vocab_file)
    asked = examination.Asked(gateway, options, role, _shown(name), max_width, spec_tokens, acceptance)
    errors, console = Console(stderr=True), Console(highlight=False)
    if errors.is_terminal:
        errors.print("Measuring; this takes some seconds ...")
    found = examination.diagnose(asked)
    for table in examination.tables(found):
        console.print(table)
    console.print(f"This machine {found.verdict}.", soft_wrap=True)
    raise typer.Exit(0 if found.is_good else 1)


def _checked(gateway: Gateway) -> Gateway:
    """The same. What cannot be used of it is said before a model is loaded: raises UserError."""
    gateway.client()
    return gateway


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    pass


def _take_any_letter() -> None:
    """Any text is read and written, whatever a terminal can show: a letter that cannot be is a ?."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            is_ascii = (
                codecs.lookup(stream.encoding).name == "ascii"
            )  # a locale that says nothing, as Python itself does
            stream.reconfigure(encoding="utf-8" if is_ascii else None, errors="replace")


def main() -> NoReturn:
    """The console script: a user's fault is one sentence and status 2."""
    _take_any_letter()
    try:
        app()
    except UserError as error:
        print(f"edge-client: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    sys.exit(0)


if __name__ == "__main__":
    main()
