"""The options of `edge-client`'s commands, in groups that several commands share, and the user's file of defaults."""

import os
import platform
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_type_hints

import typer

from edge_client import settings
from edge_client.drafters import DrafterOptions
from edge_client.gateway_link import Gateway
from vllm_specedge.errors import UserError
from vllm_specedge.option_flags import command_line

app = command_line("Draft tokens for a vLLM server.")
CONNECTION, DRAFT_MODEL, LIMITS, ENDPOINT, OUTPUT = "Connection", "Draft model", "Limits", "Endpoint", "Output"
"""Panels of --help. The most important options are in none of them, and so come first."""

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
    """A secret that can be sent in a header. Raises UserError."""
    secret = text.strip()
    if not (secret.isascii() and secret.isprintable()):
        raise UserError(f"{where} must hold one line of letters and digits: put nothing else into it.")
    return secret


def _configure(context: typer.Context, file: Path | None) -> Path | None:
    """Make the options in the user's file this command's defaults. The command line takes precedence."""
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
    str,
    typer.Option(
        help="Draft model: a directory, a GGUF file, OWNER/NAME or hf:OWNER/NAME/FILE.gguf on the Hugging Face hub, or "
        "'ngram' for prompt lookup."
    ),
]
Role = Annotated[
    str, typer.Option(help="pool: draft for any request; private: only for requests that name this edge's session.")
]
MaxRequests = Annotated[
    int,
    typer.Option(
        help="Maximum concurrent requests to draft for; 0: as many as this machine is fast enough for.",
        min=0,
        max=4096,
        rich_help_panel=LIMITS,
    ),
]
MaxWidth = Annotated[
    int,
    typer.Option(
        help="Maximum draft tokens of a request in one forward pass; 1: no branches; 0: the model's limit.",
        min=0,
        rich_help_panel=LIMITS,
    ),
]
MaxTemperature = Annotated[
    float,
    typer.Option(
        help="Temperature (°C) of the hottest sensor above which to draft less of the time; 0: no limit.",
        min=0.0,
        rich_help_panel=LIMITS,
    ),
]
Wait = Annotated[
    float,
    typer.Option(help="Seconds to keep trying while the gateway cannot be reached.", rich_help_panel=CONNECTION),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.", rich_help_panel=OUTPUT)]


@dataclass(frozen=True)
class ToGateway:
    """How to reach the gateway, and the credentials to use there."""

    url: Annotated[str, typer.Argument(help="The gateway, such as https://gpu.example.org:8100.")]
    token_file: Annotated[Path | None, typer.Option(help=f"File with your token; or set {TOKEN_VARIABLE}.")] = None
    ca_file: Annotated[str, typer.Option(help="Trust this certificate authority (PEM), for --server too.")] = ""
    cert_file: Annotated[
        str,
        typer.Option(
            help="Your own certificate and its key (PEM), if the gateway requires one.", rich_help_panel=CONNECTION
        ),
    ] = ""
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Send the token to another machine without TLS.", rich_help_panel=CONNECTION),
    ] = False
    no_proxy: Annotated[
        bool,
        typer.Option("--no-proxy", help="Ignore proxies set in the environment.", rich_help_panel=CONNECTION),
    ] = False
    name: Annotated[str, typer.Option(help="Name shown to the operator.", rich_help_panel=CONNECTION)] = THIS_MACHINE
    config: Config = None

    def gateway(self) -> Gateway:
        """The gateway. Raises UserError for settings that cannot be used, before a model is loaded."""
        token = _token(self.token_file)
        gateway = Gateway(self.url, token, self.ca_file, self.insecure, self.cert_file, not self.no_proxy)
        gateway.client()
        return gateway


@dataclass(frozen=True)
class DraftWith:
    """How to run the draft model."""

    device: Annotated[str, typer.Option(help="Device: auto, cuda, mps or cpu.", rich_help_panel=DRAFT_MODEL)] = "auto"
    runtime: Annotated[
        str,
        typer.Option(
            help="Runtime: auto (the fastest), int8, transformers, mlx or llama.cpp.", rich_help_panel=DRAFT_MODEL
        ),
    ] = "auto"
    threads: Annotated[
        int,
        typer.Option(help="CPU threads; 0: one for each core that this process may use.", rich_help_panel=DRAFT_MODEL),
    ] = 0
    draft_vocab: Annotated[
        int | None,
        typer.Option(
            help="Draft only with the N most frequent tokens; 0: with all.", min=0, rich_help_panel=DRAFT_MODEL
        ),
    ] = None
    draft_vocab_file: Annotated[
        Path | None,
        typer.Option(
            help="Token ids by frequency; default: draft_vocab.json next to the model.", rich_help_panel=DRAFT_MODEL
        ),
    ] = None

    def options(self, draft: str) -> DrafterOptions:
        """These options for the draft model `draft`."""
        return DrafterOptions(draft, self.device, self.threads, self.draft_vocab, self.draft_vocab_file, self.runtime)


@dataclass(frozen=True)
class ToServer:
    """The OpenAI endpoint of the server."""

    server: Annotated[str, typer.Option(help="The server's OpenAI endpoint, such as https://gpu.example.org/v1.")]
    api_key_file: Annotated[Path | None, typer.Option(help="File with the server's API key.")] = None

    @property
    def key(self) -> str:
        """The endpoint's API key; empty: none. Raises UserError."""
        return _read(self.api_key_file, "key") if self.api_key_file is not None else ""
