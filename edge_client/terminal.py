"""The output of a running edge, on a terminal or in a log: what it loaded, a panel or status lines, and a summary."""

import asyncio
import logging
import signal
import sys
import time
from collections.abc import Coroutine
from contextlib import nullcontext, suppress
from typing import NamedTuple

from rich.console import Console
from rich.live import Live
from rich.logging import RichHandler
from rich.text import Text

from edge_client.client import DraftModelError, EdgeClient
from edge_client.drafters import Drafter, DrafterOptions, SharingDrafter
from edge_client.drafters.choose import fetched, load_drafter
from edge_client.drafters.profile import in_words, profile, requests_at_once
from edge_client.drafting.pass_times import PassTimes
from edge_client.temperature import Cooler
from edge_client.view import AcceptedRate, heat, panel, status_line, summary
from vllm_specedge.errors import UserError

logger = logging.getLogger("edge_client")

STATUS_S = 0.5
PLAIN_STATUS_S = 10.0


class Begun(NamedTuple):
    """What `begin` has set up."""

    console: Console
    """Where messages go."""
    drafter: Drafter
    pass_times: PassTimes
    """Forward pass times of the draft model, measured on this machine."""
    max_requests: int
    """Requests that these passes are fast enough for."""


def begin(options: DrafterOptions, quiet: bool) -> Begun:
    """Load a draft model and time its forward passes. Raises UserError."""
    console = Console(stderr=True, highlight=False)
    # Log through the panel's console: then the panel, which is drawn in place, moves below each log line.
    plain = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    logging.basicConfig(
        level=logging.ERROR if quiet else logging.WARNING,
        format="edge-client: %(message)s",
        handlers=[plain if console.is_terminal else logging.StreamHandler(sys.stderr)],
    )
    lines: list[str] = []
    options = fetched(options, is_quiet=quiet)  # it shows its own progress bar
    with console.status(f"Loading {options.draft} ...") if console.is_terminal and not quiet else nullcontext():
        drafter = load_drafter(options, lines.append)
        try:
            times = profile(drafter, time.perf_counter)
        except Exception as error:  # a model's code may raise anything; it cannot draft then
            text = f"A forward pass of {options.draft} fails ({error!s:.120}): choose another draft or --device cpu."
            raise UserError(text) from error
    if drafter.max_width > 1:
        lines.append(f"A forward pass takes {in_words(times)}.")
    max_requests = requests_at_once(times, isinstance(drafter, SharingDrafter))
    if options.draft != "ngram":
        lines.append(f"It takes requests of up to {drafter.max_context_tokens:,} tokens.")
    for line in lines if not quiet else ():
        say(console, line)
    return Begun(console, drafter, PassTimes(times), max_requests)


async def outlived(drafting: Coroutine[None, None, None]) -> None:
    """Draft for an endpoint. If the draft model fails for good, wait for ever: the endpoint still forwards requests."""
    try:
        await drafting
    except DraftModelError as error:
        logger.error("%s Until then requests are forwarded without drafts.", error)
        await asyncio.Event().wait()


async def run(
    client: EdgeClient, drafting: Coroutine[None, None, None], console: Console, quiet: bool, cooler: Cooler
) -> None:
    """Run `drafting` until it ends, or until SIGINT or SIGTERM."""
    loop = asyncio.get_running_loop()
    running = asyncio.create_task(drafting)
    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(NotImplementedError):  # on Windows, where Ctrl-C cancels this coroutine
            loop.add_signal_handler(number, running.cancel)
    beside = [asyncio.create_task(cooler.run(client.pace))]
    if not quiet:
        beside.append(asyncio.create_task(_show(client, console, cooler)))
    try:
        with suppress(asyncio.CancelledError):
            await running
    finally:
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        if not quiet:
            say(console, summary(client))


async def _show(client: EdgeClient, console: Console, cooler: Cooler) -> None:
    """Show a panel that is updated in place on a terminal, and a status line every PLAIN_STATUS_S elsewhere."""
    rate = AcceptedRate(time.monotonic())
    client.on_change = lambda: _announce(client, console)
    if not console.is_terminal:
        while True:
            await asyncio.sleep(PLAIN_STATUS_S)
            say(console, status_line(client, rate(client, time.monotonic())))
    with Live(panel(client, 0.0), console=console, refresh_per_second=1 / STATUS_S) as live:
        while True:
            await asyncio.sleep(STATUS_S)
            warmth = heat(cooler.temperature_c, cooler.cap_c, client.pace.share)
            live.update(panel(client, rate(client, time.monotonic()), warmth))


def _announce(client: EdgeClient, console: Console) -> None:
    """Print a change of state. A private edge prints the session that requests must name."""
    if not console.is_terminal:
        say(console, status_line(client, 0.0))
    if client.state == "connected" and client.role == "private":
        say(console, f'Requests for this edge carry "vllm_xargs": {{"specedge": "{client.session}"}}')


def say(console: Console, line: str | Text) -> None:
    """Print a line. A failure to write (a full disk, a closed terminal) is ignored, so that drafting goes on."""
    with suppress(OSError):
        console.print(line, soft_wrap=True)
