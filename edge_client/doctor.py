"""`edge-client doctor`: tests a machine, its draft model and its gateway, and predicts whether it would help."""

import asyncio
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import httpx2 as httpx
from rich import box
from rich.table import Table
from rich.text import Text

from edge_client.drafters import Drafter, DrafterOptions, DraftSequence, SharingDrafter
from edge_client.drafters.choose import fetched, load_drafter, own_vocabulary
from edge_client.drafters.profile import in_words, profile, requests_at_once
from edge_client.drafting.jobs import run_pass
from edge_client.drafting.pacing import Pace
from edge_client.drafting.speculation import Speculation
from edge_client.forecast import (
    ASSUMED_ACCEPTANCE,
    Knowledge,
    Measured,
    Speeds,
    forecast,
    knowledge,
    verdict,
    would_help,
)
from edge_client.gateway_link import Gateway, Link, LinkError, OtherVocabularyError
from edge_client.link_faults import BROKEN, what_is_wrong
from edge_client.mismatch import fitted
from vllm_specedge import __version__
from vllm_specedge.errors import UserError
from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.frames import PROTOCOL_VERSION, Close, Commit, Hello, Open, Propose, Welcome

NUM_PINGS = 9
SAME_VOCABULARY = "the draft's is the server's"
REHEARSED_PROMPT_TOKENS, REHEARSED_CREDIT, REHEARSED_ROUNDS, MAX_DRAFT = 1200, 16, 12, 5
REHEARSAL_S = 8.0
NUM_TOKENS_SAID = 64
"""Number of distinct token ids that a rehearsal uses."""
DEADLINE_S = 20.0
BYE_S = 1.0


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table: the finding, or what to do."""

    name: str
    is_good: bool
    text: str


@dataclass(frozen=True, slots=True)
class Asked:
    gateway: Gateway
    options: DrafterOptions
    role: str
    name: str
    max_width: int
    """Maximum rows of a pass; 0: the drafter's limit."""
    spec_tokens: int
    acceptance: float | None
    """None: what the server has measured, else ASSUMED_ACCEPTANCE."""


class Reached(NamedTuple):
    model: str
    rtts_s: list[float]


@dataclass(slots=True)
class Diagnosis:
    checks: list[Check] = field(default_factory=list)
    speeds: list[Speeds] = field(default_factory=list)
    verdict: str = ""

    def good(self, name: str, text: str) -> None:
        self.checks.append(Check(name, True, text))

    def bad(self, name: str, text: str) -> None:
        self.checks.append(Check(name, False, text))

    @property
    def is_good(self) -> bool:
        """All checks passed, and the machine would help."""
        return all(check.is_good for check in self.checks) and would_help(self.speeds)


def diagnose(asked: Asked) -> Diagnosis:
    """Run the checks one after the other. Raises UserError for options that cannot be used."""
    asked.gateway.client()  # fails at once on settings that cannot be used
    found = Diagnosis()
    drafter, times = _look_at_draft(asked, found)
    reached = asyncio.run(_look_at_gateway(asked, drafter, found))
    known = asyncio.run(_ask_metrics(asked, found)) if reached is not None else None
    if times is None or reached is None or known is None or known.server is None or not drafter:
        found.verdict = "cannot be judged: fix what failed above first"
        return found
    acceptance = _acceptance(asked, known, found)
    width = min(asked.max_width or drafter.max_width, drafter.max_width)
    rtt_s = statistics.median(reached.rtts_s)
    shared_rows = drafter.max_shared_rows if isinstance(drafter, SharingDrafter) else 0
    max_requests = requests_at_once(times, is_sharing=shared_rows > 0)
    measured = Measured(
        times[1],
        times[max(times)],
        max(times),
        width,
        rtt_s,
        known.server,
        acceptance,
        asked.spec_tokens,
        shared_rows,
        max_requests,
    )
    found.speeds = forecast(measured)
    found.verdict = verdict(measured, found.speeds)
    return found


# -- the draft -----------------------------------------------------------------------------------------------------


def _look_at_draft(asked: Asked, found: Diagnosis) -> tuple[Drafter | None, dict[int, float] | None]:
    chosen: list[str] = []
    try:
        started_s = time.monotonic()
        drafter = load_drafter(fetched(asked.options, is_quiet=False), chosen.append)
    except UserError as error:
        found.bad("draft model", str(error))
        return None, None
    took_s = time.monotonic() - started_s
    found.good("device", " ".join(chosen))
    found.good("draft model", f"{drafter.description}; loaded in {took_s:.1f} s")
    try:
        times = profile(drafter, time.perf_counter)
        num_tokens = rehearse(drafter, time.perf_counter)
    except Exception as error:  # noqa: BLE001 - a model's code may raise anything; it cannot draft then
        found.bad("forward pass", f"A forward pass fails ({error!s:.120}): choose another draft or --device cpu.")
        return drafter, None
    found.good("forward pass", in_words(times))
    found.good("whole request", f"{num_tokens} tokens, with branches and rollbacks")
    return drafter, times


def rehearse(drafter: Drafter, clock: Callable[[], float]) -> int:
    """Draft for a request of realistic length, whose answer follows the trunk, a branch and neither in turn.

    Returns the request's number of tokens; a slow draft stops early. Raises what the draft model's code raises, and
    NotFiniteError.
    """
    num_prompt = max(1, min(REHEARSED_PROMPT_TOKENS, drafter.max_context_tokens - 4 * REHEARSED_CREDIT))
    tokens = [1 + position % NUM_TOKENS_SAID for position in range(num_prompt)]
    speculation = Speculation(drafter.max_context_tokens, drafter.max_width, pace=Pace(rtt_s=1.0))
    speculation.receive(Open(0, num_prompt, MAX_DRAFT, REHEARSED_CREDIT, ""), 0.0)
    frames = speculation.receive(Commit(0, 0, tuple(tokens)), 0.0)
    sequence, started_s = drafter.open(), clock()
    for number in range(REHEARSED_ROUNDS):
        frames += _drafted(speculation, sequence)
        runs = [run for frame in frames if isinstance(frame, Propose) for run in frame.runs]
        drafts = [draft[:MAX_DRAFT] for base, run in runs if (draft := run[max(0, len(tokens) - base) :])]
        said = drafts[number % 3] if number % 3 < min(2, len(drafts)) else (1,)
        frames = speculation.receive(Commit(0, len(tokens), said), 0.0)
        if any(isinstance(frame, Close) for frame in frames) or clock() > started_s + REHEARSAL_S:
            break
        tokens += said
    return len(tokens)


def _drafted(speculation: Speculation, sequence: DraftSequence) -> list[Frame]:
    """All frames that are sent before the next commit."""
    frames: list[Frame] = []
    while jobs := speculation.next_pass():
        frames += speculation.drafted(jobs, run_pass(jobs, [sequence]), 0.001, 0.0)
    return frames + (speculation.poll(speculation.due_s) if speculation.due_s is not None else [])


# -- the gateway ---------------------------------------------------------------------------------------------------


async def _look_at_gateway(asked: Asked, drafter: Drafter | None, found: Diagnosis) -> Reached | None:
    try:
        answer = await _get(asked.gateway, "/healthz")
    except LinkError as error:
        found.bad("gateway", f"{asked.gateway.url} cannot be used: {str(error).rstrip('.')}.")
        return None
    found.good("gateway", f"{asked.gateway.url} answers")
    if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        found.bad("server", "No vLLM server is connected to this gateway: start one.")
        return None
    try:
        # Without a vocabulary first: a refusal is then about the token, the role or the protocol version.
        reached = await _reach(asked, "")
    except (LinkError, UserError) as error:
        found.bad("admission", _sentence(error))
        return None
    rtt_ms = 1e3 * statistics.median(reached.rtts_s)
    token = "the token is accepted" if asked.gateway.token else "no token is needed"
    found.good("admission", f"{token}; it serves {reached.model}")
    found.good("round trip", f"{rtt_ms:.1f} ms, median of {len(reached.rtts_s)}")
    if drafter is None:
        return reached
    if not drafter.fingerprint:
        found.good("vocabulary", "prompt lookup takes any")
        return reached
    try:
        await _reach(asked, drafter.fingerprint)
    except OtherVocabularyError as refusal:
        return await _fit(refusal, asked, found, reached)
    except (LinkError, UserError) as error:
        found.bad("vocabulary", _sentence(error))
        return None
    found.good("vocabulary", SAME_VOCABULARY)
    return reached


async def _fit(refusal: OtherVocabularyError, asked: Asked, found: Diagnosis, reached: Reached) -> Reached | None:
    try:
        fit = await fitted(refusal, asked.gateway, lambda: own_vocabulary(asked.options))
    except UserError as error:
        found.bad("vocabulary", str(error))
        return None
    found.good("vocabulary", str(fit.mismatch) if fit.mismatch.found else SAME_VOCABULARY)
    return reached


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"The connection fails ({error}): try again."


async def _get(gateway: Gateway, path: str) -> httpx.Response:
    """The gateway's answer to a GET. Raises LinkError."""
    try:
        async with gateway.client() as client:
            return await client.get(path)
    except BROKEN as error:
        raise LinkError(what_is_wrong(error, is_answered=False)) from None


async def _reach(asked: Asked, fingerprint: str) -> Reached:
    """Connect as an edge that takes no requests, measure some round trips and leave. Raises LinkError or UserError."""
    models, rtts_s, is_done = list[str](), list[float](), asyncio.Event()

    def on_frame(frame: Frame) -> None:
        if isinstance(frame, Welcome):
            models.append(frame.model)

    def on_pong(rtt_s: float) -> None:
        rtts_s.append(rtt_s)
        if len(rtts_s) < NUM_PINGS:
            link.ping()
        else:
            is_done.set()

    hello = Hello(PROTOCOL_VERSION, f"edge-client/{__version__}", asked.name, asked.role, fingerprint, 0)
    link = Link(asked.gateway, hello, on_frame, on_pong)
    running, waiting = asyncio.create_task(link.run()), asyncio.create_task(is_done.wait())
    try:
        await asyncio.wait({running, waiting}, timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()  # it raises
        if not waiting.done():
            raise LinkError(f"{NUM_PINGS} round trips took more than {DEADLINE_S:.0f} s")
        link.close()
        await asyncio.wait({running}, timeout=BYE_S)
    finally:
        for task in (running, waiting):
            task.cancel()
        await asyncio.gather(running, waiting, return_exceptions=True)
    return Reached(models[0], rtts_s)


async def _ask_metrics(asked: Asked, found: Diagnosis) -> Knowledge | None:
    known = None
    with suppress(LinkError, ValueError):
        known = knowledge((await _get(asked.gateway, "/metrics")).text)
    if known is None or known.server is None:
        found.bad("server", "The server has not measured its steps yet: send it a request, and try again.")
        return None
    step_ms = 1e3 * known.server.step_s(1, 1)
    verifying_ms = 1e3 * known.server.step_s(1, 1 + asked.spec_tokens, is_verifying=True)
    text = f"a step takes {step_ms:.1f} ms, one that verifies {asked.spec_tokens} tokens {verifying_ms:.1f} ms"
    found.good("server", text)
    return known


def _acceptance(asked: Asked, known: Knowledge, found: Diagnosis) -> float:
    if asked.acceptance is not None:
        acceptance, source = asked.acceptance, "set by --acceptance"
    elif known.acceptance is not None:
        acceptance, source = known.acceptance, "measured by this server on its edges so far"
    else:
        acceptance, source = ASSUMED_ACCEPTANCE, "assumed: change it with --acceptance"
    found.good("acceptance", f"{acceptance:.2f}, {source}")
    return acceptance


# -- output --------------------------------------------------------------------------------------------------------


def tables(found: Diagnosis) -> list[Table]:
    """The checks, and tokens per second with and without this machine."""
    checks = Table("check", "", "found", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for check in found.checks:
        checks.add_row(check.name, "ok" if check.is_good else "[red]FAILED[/]", Text(check.text))
    if not found.speeds:
        return [checks]
    speeds = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for title in ("requests", "tokens/s without", "with this machine", "times"):
        speeds.add_column(title, justify="right")
    for each in found.speeds:
        speeds.add_row(str(each.requests), f"{each.plain:.1f}", f"{each.edge:.1f}", f"{each.ratio:.2f}")
    return [checks, speeds]
