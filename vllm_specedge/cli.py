"""`vllm-specedge`: the operator's commands."""

import asyncio
import importlib.util
import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from vllm_specedge import __version__
from vllm_specedge.config import check_endpoint, parse_options
from vllm_specedge.errors import UserError
from vllm_specedge.supervisor import USER_ERROR_STATUS
from vllm_specedge.tokens import TokenFile

app = typer.Typer(
    help="Edge-drafted speculative decoding for vLLM.", no_args_is_help=True, pretty_exceptions_enable=False
)
token_app = typer.Typer(help="Who may connect as an edge.", no_args_is_help=True)
app.add_typer(token_app, name="token")

DEFAULT_TOKENS_FILE = Path("~/.config/vllm-specedge/tokens.json").expanduser()
TokensFile = Annotated[Path, typer.Option(help="The gateway's tokens file.")]


@app.command()
def gateway(
    engines: Annotated[str, typer.Option(help="Where vLLM engines dial in.")] = "tcp://127.0.0.1:8101",
    listen: Annotated[str, typer.Option(help="Where edges connect, HOST:PORT.")] = "127.0.0.1:8100",
    tokens_file: Annotated[str, typer.Option(help="Made by 'vllm-specedge token issue'.")] = "",
    tls_cert: Annotated[str, typer.Option(help="PEM certificate chain.")] = "",
    tls_key: Annotated[str, typer.Option(help="PEM private key, PKCS#8.")] = "",
    insecure: Annotated[bool, typer.Option("--insecure", help="Beyond loopback without TLS or tokens.")] = False,
    credit_tokens: Annotated[int, typer.Option(help="How far past the last commit edges may draft.")] = 32,
    max_edges: Annotated[int, typer.Option(help="Edges at once.")] = 256,
    max_requests_per_edge: Annotated[int, typer.Option(help="Requests an edge at once.")] = 32,
    ends_with_stdin: Annotated[bool, typer.Option("--ends-with-stdin", hidden=True)] = False,
) -> None:
    """Run a gateway by itself, for one or more vLLM servers that name it as their `gateway`."""
    values = {name: value for name, value in locals().items() if name not in ("engines", "ends_with_stdin")}
    logging.basicConfig(
        level=logging.INFO, format="%(levelname)s %(asctime)s [gateway] %(message)s", datefmt="%m-%d %H:%M:%S"
    )
    from vllm_specedge.gateway import serve  # noqa: PLC0415 - the other commands need no web server

    options = parse_options(values)
    try:
        check_endpoint(engines, options.insecure)
    except ValueError as error:
        raise UserError(f"--engines: {error}.") from None
    asyncio.run(serve(options, engines, ends_with_stdin))
    # All is said and closed. The web server's threads may still be at work, and abort the process if Python ends first.
    logging.shutdown()
    os._exit(0)


@app.command()
def doctor() -> None:
    """Say whether the vLLM that is installed here can work with edges."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("There is no vLLM in this Python environment: install one, then vllm-specedge beside it.")
    from vllm_specedge.adapter.hooks import report  # noqa: PLC0415 - loads vLLM

    problems = report(print_line=typer.echo)
    raise typer.Exit(1 if problems else 0)


@token_app.command()
def issue(
    name: Annotated[str, typer.Argument(help="A name to revoke it by.")],
    role: Annotated[
        str, typer.Option(help="pool: drafts for anyone; private: only for requests that name it.")
    ] = "pool",
    days: Annotated[float, typer.Option(help="Valid for so long; 0: for ever.")] = 0.0,
    tokens_file: TokensFile = DEFAULT_TOKENS_FILE,
) -> None:
    """Make a token and print it, once."""
    typer.echo(TokenFile(tokens_file).issue(name, role, time.time() + days * 86400 if days else 0.0))
    typer.echo(f"Written to {tokens_file}: name it to the server as its tokens_file.", err=True)


@token_app.command("list")
def list_tokens(tokens_file: TokensFile = DEFAULT_TOKENS_FILE) -> None:
    """Show the tokens there are, not their secrets."""
    table = Table("name", "role", "expires")
    for record in TokenFile(tokens_file).records():
        expires = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.expires_s)) if record.expires_s else "never"
        table.add_row(record.name, record.role, expires)
    Console().print(table)


@token_app.command()
def revoke(name: str, tokens_file: TokensFile = DEFAULT_TOKENS_FILE) -> None:
    """Take a token back: no edge can connect with it any more."""
    TokenFile(tokens_file).revoke(name)


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
        print(f"vllm-specedge: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(USER_ERROR_STATUS)
    sys.exit(0)


if __name__ == "__main__":
    main()
