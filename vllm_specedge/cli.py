"""`vllm-specedge`: the operator's commands."""

import importlib.util
import logging
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_specedge.config import EdgeOptions, GatewayOptions, check_endpoint, parse_as
from vllm_specedge.errors import UserError
from vllm_specedge.gateway.credentials import TokenFile, expiry_s
from vllm_specedge.gateway.log_format import LogFormat, begin_logging
from vllm_specedge.option_flags import as_table, command_line, run, with_flags
from vllm_specedge.policy.situation import HoldLimits

app = command_line("Edge-drafted speculative decoding for vLLM.")
token_app = typer.Typer(help="Manage the tokens of edges.", no_args_is_help=True)
app.add_typer(token_app, name="token")

DEFAULT_TOKENS_FILE = Path("~/.config/vllm-specedge/tokens.json").expanduser()
LOG_FORMAT_VARIABLE = "SPECEDGE_LOG_FORMAT"
"""Also applies to the gateway that an engine starts, which inherits the engine's environment."""
TokensFile = Annotated[Path, typer.Option(help="The gateway's tokens file.")]


@app.command()
@with_flags
def gateway(
    given: GatewayOptions,
    engines: Annotated[str, typer.Option(help="Endpoint that vLLM engines connect to.")] = "tcp://127.0.0.1:8101",
    log_format: Annotated[
        LogFormat, typer.Option(envvar=LOG_FORMAT_VARIABLE, help="Log lines as text, or as one JSON object each.")
    ] = "text",
    ends_with_stdin: Annotated[bool, typer.Option("--ends-with-stdin", hidden=True)] = False,
) -> None:
    """Run a separate gateway, for one or more vLLM servers that name it as their `gateway`."""
    begin_logging(log_format)
    import uvloop  # noqa: PLC0415 - the other commands run on Windows as well

    from vllm_specedge.gateway.server import serve  # noqa: PLC0415 - nor do they need a web server

    options = parse_as(GatewayOptions, vars(given))
    try:
        check_endpoint(engines, options.insecure)
    except ValueError as error:
        raise UserError(f"--engines: {error}.") from None
    is_renewed = uvloop.run(serve(options, engines, ends_with_stdin))
    # Everything is sent and closed. The web server's threads may still run, and abort the process if Python ends first.
    logging.shutdown()
    if is_renewed:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - the same command again
    os._exit(0)


OPTIONS = """# Options of a server with edges

The keys in addition to `method` and `num_speculative_tokens` in `--speculative-config '{"method": "edge", ...}'`. Those
down to `public_names` belong to the gateway and are also flags of `vllm-specedge gateway`, with hyphens. An unknown
option, or one that conflicts with another, is reported in one sentence at start.
"""


@app.command()
def options() -> None:
    """Print every option of a server with edges, its default and its meaning, as Markdown."""
    print(OPTIONS, as_table(EdgeOptions), sep="\n", end="")  # noqa: T201


@app.command()
def doctor() -> None:
    """Check whether the vLLM that is installed here can work with edges."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "There is no vLLM in this Python environment: install it, then vllm-specedge into the same environment."
        )
    from vllm_specedge.adapter.hooks import report  # noqa: PLC0415 - loads vLLM

    problems = report(print_line=typer.echo)
    raise typer.Exit(1 if problems else 0)


@app.command()
def simulate(
    server: Annotated[
        str, typer.Option(help="Simulated server: a100-14b, h100-70b-tp4, h100-8b, cpu-135m or custom.")
    ] = "a100-14b",
    requests: Annotated[str, typer.Option(help="Concurrent requests; several with commas.")] = "1,4,16,64",
    rtt_ms: Annotated[str, typer.Option(help="RTT between edges and gateway; several with commas.")] = "20",
    acceptance: Annotated[float, typer.Option(help="Probability that a draft token is right.", min=0, max=1)] = 0.75,
    branch: Annotated[
        float, typer.Option(help="Probability that the second is, if the first is not.", min=0, max=1)
    ] = 0.6,
    pass_ms: Annotated[float, typer.Option(help="Time of a draft model's forward pass.", min=0.01)] = 6.0,
    row_ms: Annotated[float, typer.Option(help="Time of each further row or prompt token of a pass.", min=0)] = 0.0,
    width: Annotated[int, typer.Option(help="Maximum rows of a pass of one request; 1: no branches.", min=1)] = 8,
    shared_rows: Annotated[int, typer.Option(help="Maximum rows of a pass that requests share; 0: none.", min=0)] = 16,
    spec_tokens: Annotated[int, typer.Option(help="Draft tokens per request and step to verify.", min=1)] = 5,
    credit_tokens: Annotated[int, typer.Option(help="Tokens that edges may draft ahead.", min=1, max=64)] = 32,
    uplink_bytes_per_token: Annotated[
        float | None, typer.Option(help="Uplink limit, as edge-client's option.", min=8)
    ] = None,
    jitter_ms: Annotated[float, typer.Option(help="Maximum extra delay each way.", min=0)] = 0.0,
    edge: Annotated[str, typer.Option(help="Kind of edges: good, poor, stalling, dead or half.")] = "good",
    share: Annotated[float, typer.Option(help="Share of the requests that have an edge.", min=0, max=1)] = 1.0,
    requests_per_edge: Annotated[int, typer.Option(help="Requests that one edge drafts for.", min=1)] = 1,
    max_edges: Annotated[int, typer.Option(help="Maximum edges; they share the requests.", min=1)] = 1 << 20,
    hold_limit_ms: Annotated[int, typer.Option(help="Hold limit, as the server's option.", min=0)] = 100,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.", min=2)] = 64,
    output_tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=1)] = 256,
    weights_ms: Annotated[float, typer.Option(help="--server custom: time to read the weights.", min=0)] = 0.0,
    request_us: Annotated[float, typer.Option(help="--server custom: further reading for each request.", min=0)] = 20.0,
    token_us: Annotated[float, typer.Option(help="--server custom: time to compute a token.", min=0)] = 0.0,
    overhead_ms: Annotated[float, typer.Option(help="--server custom: fixed overhead of a step.", min=0)] = 0.5,
    gap_ms: Annotated[float | None, typer.Option(help="Asynchronous engine: overhead of synchronous steps.")] = None,
    draft_step_ms: Annotated[
        float, typer.Option(help="--server custom: time of an in-server draft step.", min=0)
    ] = 0.0,
    all_modes: Annotated[bool, typer.Option("--all-modes", help="Also run the comparison modes.")] = False,
    oracle: Annotated[bool, typer.Option("--oracle", help="Also run a policy that need not learn.")] = False,
    break_even: Annotated[bool, typer.Option(help="Find the RTT up to which edges help, at the first load.")] = True,
    curve: Annotated[Path | None, typer.Option(help="Draw a plot to this .svg or .png file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    seed: Annotated[int, typer.Option(help="Random seed: the same seed prints the same numbers.")] = 0,
) -> None:
    """Predict the gain from edges: the shipping policy on a simulated server, network and draft (docs/simulate.md)."""
    from vllm_specedge.simulation import report  # noqa: PLC0415 - the other commands need no simulator
    from vllm_specedge.simulation.models import SERVERS, RooflineServer  # noqa: PLC0415
    from vllm_specedge.simulation.scenario import EdgeModel, Scenario  # noqa: PLC0415

    custom = RooflineServer(weights_ms / 1e3, request_us / 1e6, token_us / 1e6, overhead_ms / 1e3, draft_step_ms / 1e3)
    chosen = {**SERVERS, "custom": custom}.get(server)
    if chosen is None:
        raise UserError(f"There is no server '{server}': --server takes {', '.join(SERVERS)} or custom.")
    uplink = uplink_bytes_per_token or EdgeModel().uplink_bytes_per_token
    base = Scenario(
        server=chosen,
        jitter_s=jitter_ms / 1e3,
        gap_s=gap_ms / 1e3 if gap_ms is not None else None,
        edge=EdgeModel(pass_ms / 1e3, row_ms / 1e3, acceptance, branch, width, shared_rows, uplink),
        share=share,
        requests_per_edge=requests_per_edge,
        max_edges=max_edges,
        limits=HoldLimits(hold_limit_ms / 1e3),
        spec_tokens=spec_tokens,
        credit_tokens=credit_tokens,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        seed=seed,
    )
    asked = report.Asked(
        _numbers("--requests", requests), _numbers("--rtt-ms", rtt_ms), edge, all_modes, oracle, break_even
    )
    raise typer.Exit(report.show(base, asked, curve, as_json))


@app.command("simulate-overload")
def simulate_overload(
    server: Annotated[
        str, typer.Option(help="Simulated server: a100-14b, h100-70b-tp4, h100-8b or cpu-135m.")
    ] = "cpu-135m",
    times: Annotated[str, typer.Option(help="Load as a multiple of the capacity; several with commas.")] = "1,1.5,2,3",
    edges: Annotated[int, typer.Option(help="Edges, each for one request at a time.", min=0)] = 0,
    max_running: Annotated[int, typer.Option(help="Maximum requests running at once.", min=1)] = 32,
    max_step_tokens: Annotated[int, typer.Option(help="Maximum tokens of a step.", min=16)] = 512,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.", min=2)] = 64,
    output_tokens: Annotated[int, typer.Option(help="Mean tokens of an answer.", min=4)] = 64,
    gold_itl_ms: Annotated[float, typer.Option(help="ITL target of class gold.", min=1)] = 80.0,
    itl_ms: Annotated[float, typer.Option(help="ITL target of the default class.", min=1)] = 160.0,
    seconds: Annotated[float, typer.Option(help="Seconds during which requests arrive.", min=20)] = 60.0,
    seeds: Annotated[int, typer.Option(help="Runs of each case, with different seeds.", min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
) -> None:
    """Simulate the goodput of an overloaded server under several admission policies (docs/simulate.md)."""
    from vllm_specedge.simulation import overload, overload_report  # noqa: PLC0415 - as above
    from vllm_specedge.simulation.models import SERVERS  # noqa: PLC0415
    from vllm_specedge.simulation.scenario import Scenario  # noqa: PLC0415

    chosen = SERVERS.get(server)
    if chosen is None:
        raise UserError(f"There is no server '{server}': --server takes {', '.join(SERVERS)}.")
    scenario = Scenario(
        server=chosen,
        requests=edges,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        max_running=max_running,
        max_step_tokens=max_step_tokens,
        seed=seed,
    )
    gold, default = overload.CLASSES
    classes = (
        replace(gold, target=replace(gold.target, itl_s=gold_itl_ms / 1e3)),
        replace(default, target=replace(default.target, itl_s=itl_ms / 1e3)),
    )
    base = overload.Overload(scenario, classes=classes, duration_s=seconds, warm_up_s=seconds / 4)
    raise typer.Exit(overload_report.show(base, _numbers("--times", times), seeds, as_json))


@app.command("simulate-scaling")
def simulate_scaling(
    days: Annotated[float, typer.Option(help="Simulated days; the first is not counted.", min=1.1)] = 3.0,
    mean: Annotated[float, typer.Option(help="Mean demand in answer tokens per second.", min=1)] = 1000.0,
    capacity: Annotated[float, typer.Option(help="Answer tokens per second of an engine.", min=1)] = 200.0,
    start_s: Annotated[float, typer.Option(help="Seconds that an engine takes to start.", min=0)] = 180.0,
    surges: Annotated[float, typer.Option(help="Surges per day.", min=0.1)] = 8.0,
    ramp_s: Annotated[float, typer.Option(help="Approximate seconds in which a surge rises.", min=1)] = 360.0,
    seeds: Annotated[int, typer.Option(help="Number of traces.", min=1)] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
) -> None:
    """Compare starting engines ahead of demand or when requests wait, in hours and misses (docs/operate.md)."""
    from vllm_specedge.simulation import scaling  # noqa: PLC0415 - as above

    trace = scaling.Trace(days=days, mean=mean, surges_per_day=surges, ramp_s=ramp_s, seed=seed)
    raise typer.Exit(scaling.show(trace, scaling.Fleet(capacity, start_s), seeds, as_json))


def _numbers(option: str, text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0:
        raise UserError(f"{option} takes numbers separated by commas, such as 1,4,16, not '{text:.40}'.")
    return numbers


@token_app.command()
def issue(
    name: Annotated[str, typer.Argument(help="Name of the token, used to revoke it.")],
    role: Annotated[
        str, typer.Option(help="pool: drafts for any request; private: only for requests that name it.")
    ] = "pool",
    days: Annotated[float, typer.Option(help="Days that the token is valid; 0: for ever.")] = 0.0,
    max_edges: Annotated[int, typer.Option(help="Maximum edges that use it at once; 0: any number.", min=0)] = 0,
    tokens_file: TokensFile = DEFAULT_TOKENS_FILE,
) -> None:
    """Issue a token and print it, once."""
    typer.echo(TokenFile(tokens_file).issue(name, role, expiry_s(days, time.time()), max_edges))
    typer.echo(f"Written to {tokens_file}: set the server's tokens_file to it.", err=True)


@token_app.command("list")
def list_tokens(tokens_file: TokensFile = DEFAULT_TOKENS_FILE) -> None:
    """List the tokens, without their secrets."""
    table = Table("name", "role", "expires", "edges")
    for record in TokenFile(tokens_file).records():
        table.add_row(Text(_shown(record.name)), record.role, _end(record.expires_s), str(record.max_edges or "any"))
    Console().print(table)


def _end(expires_s: float) -> str:
    """A token's expiry date as text; an earlier release accepted times that no calendar has."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(expires_s)) if expires_s else "never"
    except (ValueError, OverflowError, OSError):
        return "never" if expires_s > 0 else "long ago"


def _shown(name: str) -> str:
    """A name without control characters, which an earlier release accepted and editors may write."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


@token_app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="Name that the token was issued with.")],
    tokens_file: TokensFile = DEFAULT_TOKENS_FILE,
) -> None:
    """Revoke a token: edges that use it are disconnected within seconds, and none can connect with it any more."""
    TokenFile(tokens_file).revoke(name)


def main() -> NoReturn:
    """The console script."""
    run(app, "vllm-specedge")


if __name__ == "__main__":
    main()
