"""An edge while it runs, on a terminal or into a log: what is loaded, a panel or lines, and how it ends."""

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
    """What an edge starts with."""

    console: Console
    """Where to say things."""
    drafter: Drafter
    pass_times: PassTimes
    """Of the draft model, measured here."""
    max_requests: int
    """As many as its passes are fast enough for."""


def begin(options: DrafterOptions, quiet: bool) -> Begun:
    """Load a draft model and time its forward passes. Raises UserError."""
    console = Console(stderr=True, highlight=False)
    # A panel that is drawn in place moves down for what is logged, if it is logged through the same console.
    plain = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    logging.basicConfig(
        level=logging.ERROR if quiet else logging.WARNING,
        format="edge-client: %(message)s",
        handlers=[plain if console.is_terminal else logging.StreamHandler(sys.stderr)],
    )
    lines: list[str] = []
    options = fetched(options, is_quiet=quiet)  # it shows a bar of its own
    with console.status(f"Loading {options.draft} ...") if console.is_terminal and not quiet else nullcontext():
        drafter = load_drafter(options, lines.append)
        try:
            times = profile(drafter, time.perf_counter)
        except Exception as error:  # whatever a model's code does: it cannot draft
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
    """Drafting for an endpoint, which goes on passing requests on where the draft model cannot go on."""
    try:
        await drafting
    except DraftModelError as error:
        logger.error("%s Until then requests are passed on, and nobody drafts for them.", error)
        await asyncio.Event().wait()


async def run(
    client: EdgeClient, drafting: Coroutine[None, None, None], console: Console, quiet: bool, cooler: Cooler
) -> None:
    """Draft until it ends by itself, or is told to."""
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
    """A panel that changes in place on a terminal; a line now and then elsewhere."""
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
    """A change of state; a private edge says what requests must name to be drafted for by it."""
    if not console.is_terminal:
        say(console, status_line(client, 0.0))
    if client.state == "connected" and client.role == "private":
        say(console, f'Requests for this edge carry "vllm_xargs": {{"specedge": "{client.session}"}}')


def say(console: Console, line: str | Text) -> None:
    """Nothing stops drafting because it cannot be written down: the disk of a log is full, a terminal is gone."""
    with suppress(OSError):
        console.print(line, soft_wrap=True)
