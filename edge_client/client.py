"""The edge's tasks: the link, drafting, and reconnecting after a lost connection."""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from edge_client.drafters import CacheFullError, Drafter, SharingDrafter
from edge_client.drafters.retokenized import Retokenization, retokenized
from edge_client.drafters.translated import translated
from edge_client.drafting.jobs import Job, NotFiniteError, Sequences, Together, one_by_one, run_pass
from edge_client.drafting.pacing import Pace
from edge_client.drafting.speculation import MAX_KEPT, Speculation, SpeculationStats
from edge_client.gateway_link import Gateway, Link, LinkError, OtherVocabularyError
from edge_client.mismatch import OwnVocabulary, fitted
from vllm_specedge import __version__
from vllm_specedge.backoff import Backoff
from vllm_specedge.errors import UserError
from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.frames import PROTOCOL_VERSION, Hello, Propose, Welcome

logger = logging.getLogger("edge_client")

MAX_CLIENT = 120
"""Maximum length of the Hello's client description, which may hold a long file name."""
BYE_S = 1.0


class DraftModelError(UserError):
    """The draft model can no longer draft for any request."""


@dataclass(slots=True)
class EdgeClient:
    """Drafts for one gateway, over one connection at a time."""

    gateway: Gateway
    drafter: Drafter
    name: str
    role: str = "pool"
    max_requests: int = 8
    max_width: int = 0
    """Maximum rows of a forward pass; 1: no branches, 0: the drafter's limit."""
    pace: Pace = field(default_factory=Pace)
    """Measurements, which outlive a connection."""
    on_change: Callable[[], None] = lambda: None
    pause_s: Callable[[float], float] = lambda limit_s: random.uniform(0.0, limit_s)
    """Seconds to wait before reconnecting, given the limit. Random, because many edges reconnect at the same time."""
    own_vocabulary: OwnVocabulary = dict
    """The draft model's vocabulary, for the report of differences if it is refused; empty: not known."""
    model: str = ""
    """The model that the server serves; empty while not connected."""
    session: str = ""
    """The session that a request names so that this edge drafts for it."""
    state: str = "connecting"
    speculation: Speculation = field(init=False)
    totals: list[SpeculationStats] = field(default_factory=list)
    _own_drafter: Drafter = field(init=False)
    """The drafter as given. `drafter` wraps it with a translation if the target's vocabulary differs."""
    _was_admitted: bool = False
    _has_said_too_long: bool = False
    _has_said_not_finite: bool = False
    _link: Link = field(init=False)
    _sequences: Sequences = field(init=False)
    _together: Together = field(init=False)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _executor: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "draft"))

    def __post_init__(self) -> None:
        self._own_drafter = self.drafter
        self._renew()

    def _renew(self) -> None:
        """Reset the state for a new connection: the gateway sends Open again for each request of this edge."""
        hello = Hello(
            version=PROTOCOL_VERSION,
            client=f"edge-client/{__version__} ({self.drafter.description})"[:MAX_CLIENT],
            name=self.name,
            role=self.role,
            fingerprint=self.drafter.fingerprint,
            max_requests=self.max_requests,
        )
        self._link = Link(self.gateway, hello, self._on_frame)
        widest = self.drafter.max_width
        self.speculation = Speculation(
            self.drafter.max_context_tokens,
            max_width=min(self.max_width or widest, widest),
            max_requests=self.max_requests,
            max_kept=MAX_KEPT,
            pace=self.pace,
            max_shared_rows=self.drafter.max_shared_rows if isinstance(self.drafter, SharingDrafter) else 0,
        )
        self._together = self.drafter.branch_together if isinstance(self.drafter, SharingDrafter) else one_by_one
        self._sequences = Sequences(self.drafter.open, self.speculation.needs)
        self.model = ""

    def open_session(self) -> str:
        """The session that a request names so that this edge drafts for it; empty while not connected."""
        return self.session if self.model else ""

    @property
    def rtt_s(self) -> float | None:
        return self._link.rtt_s

    async def run(self, wait_s: float) -> None:
        """Stay connected until cancelled. Raises UserError for faults that a retry cannot fix.

        The first connection is retried for `wait_s`; after one success, retries never end. Many edges lose a gateway
        at once, so each reconnects after its own random pause, which grows if its connections do not last.
        """
        until_s, backoff = time.monotonic() + wait_s, Backoff()
        while True:
            lasted_s = 0.0
            try:
                lasted_s = await self._run_once()
            except LinkError as error:
                if not self._was_admitted and time.monotonic() >= until_s:
                    text = f"The gateway at {self.gateway.url} cannot be used: {str(error).rstrip('.')}."
                    raise UserError(text) from None
                logger.warning("Not connected: %s", error)
                self._change("reconnecting" if self._was_admitted else "connecting")
            except OtherVocabularyError as refusal:
                await self._fit(refusal)
                continue
            await asyncio.sleep(self.pause_s(backoff.ended(lasted_s)))

    async def _fit(self, refusal: OtherVocabularyError) -> None:
        """Draft for the model with the most similar vocabulary. Raises UserError if none is similar enough."""
        mismatch, translation = await fitted(refusal, self.gateway, self.own_vocabulary)
        if mismatch.fingerprint == self.drafter.fingerprint:
            raise refusal  # the engine with this vocabulary has left
        if mismatch.found:
            logger.warning("%s", mismatch)
        if isinstance(translation, Retokenization):
            self.drafter = retokenized(self._own_drafter, translation, mismatch.fingerprint)
        else:
            self.drafter = translated(self._own_drafter, translation, mismatch.fingerprint)

    async def _run_once(self) -> float:
        """Run one connection. Returns how many seconds it lasted; raises LinkError if it was not even admitted."""
        self._renew()
        started_s = time.monotonic()
        drafting = asyncio.create_task(self._draft())
        linking = asyncio.create_task(self._link.run())
        try:
            done, _ = await asyncio.wait({drafting, linking}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except LinkError as error:
            if not self.model:
                raise
            logger.warning("Connection lost: %s", error)
            self._change("reconnecting")
        except asyncio.CancelledError:
            if self.model:
                self._link.close()
                await asyncio.wait({linking}, timeout=BYE_S)
            raise
        finally:
            self.totals.append(self.speculation.stats)
            self.model = ""
            drafting.cancel()
            linking.cancel()
            await asyncio.gather(drafting, linking, return_exceptions=True)
        return time.monotonic() - started_s

    def _on_frame(self, frame: Frame) -> None:
        if isinstance(frame, Welcome):
            self.model, self.session, self._was_admitted = frame.model, frame.session, True
            self.speculation.vocab_size = frame.vocab_size
            self._change("connected")
            return
        self.pace.rtt_s = self._link.rtt_s or 0.0
        self._send(self.speculation.receive(frame, time.monotonic()))
        if self.speculation.stats.num_too_long and not self._has_said_too_long:
            self._has_said_too_long = True
            limit = self.drafter.max_context_tokens
            logger.warning("Requests that are longer than this draft's context (%s tokens) are declined", f"{limit:,}")
        self._wake.set()

    def _send(self, frames: Iterable[Frame]) -> None:
        for frame in frames:
            num_bytes = self._link.send(frame)
            if num_bytes and isinstance(frame, Propose):
                self.pace.sent(num_bytes)

    def _change(self, state: str) -> None:
        self.state = state
        self.on_change()

    async def _draft(self) -> None:
        """Run forward passes one after the other, and send proposals as they become due."""
        loop = asyncio.get_running_loop()
        while True:
            now_s = time.monotonic()
            self._send(self.speculation.poll(now_s))
            jobs = self.speculation.next_pass() if now_s >= self.pace.rest_until_s else ()
            if not jobs:
                await self._rest(now_s)
                continue
            has_failed = False
            try:
                said = await loop.run_in_executor(
                    self._executor, run_pass, jobs, self._sequences.of(jobs), self._together
                )
            except CacheFullError as error:
                logger.warning("Request %s is declined, as the draft's cache is full: %s", _numbers(jobs), error)
                self.speculation.forget_kept()
                self._give_back(jobs)
                continue
            except NotFiniteError as error:
                self._fail(error.failed, error, is_known=True)
                said, has_failed = error.said, True
            except Exception as error:  # noqa: BLE001 - a model may raise anything; it is reported
                self._fail(jobs, error, is_known=False)
                await loop.run_in_executor(self._executor, self._check_drafter)
                continue
            done_s = time.monotonic()
            self._send(self.speculation.drafted(jobs, said, done_s - now_s, done_s))
            self.pace.drafted(sum(map(len, said)), now_s, done_s - now_s)
            if has_failed:
                await loop.run_in_executor(self._executor, self._check_drafter)

    def _fail(self, jobs: Sequence[Job], error: Exception, is_known: bool) -> None:
        """Decline the requests that the draft model failed for. A known fault is logged once, then only counted."""
        if not (is_known and self._has_said_not_finite):
            logger.warning(
                "The draft model failed: request %s is declined: %s", _numbers(jobs), error, exc_info=not is_known
            )
        self._has_said_not_finite |= is_known
        self.speculation.stats.num_failed += len(jobs)
        self._give_back(jobs)

    def _give_back(self, jobs: Sequence[Job]) -> None:
        """Decline requests whose contexts are in an unknown state or cannot be continued."""
        for job in jobs:
            self._send(self.speculation.decline(job.request))

    def _check_drafter(self) -> None:
        """Raises DraftModelError if the draft model fails for any input, for instance because its device is gone."""
        try:
            run_pass([Job(0, 0, (), (1,), (), 1)], [self.drafter.open()])
        except CacheFullError:
            pass
        except Exception as error:
            text = f"The draft model fails ({error!s:.120}): start again, or choose another --device or --draft."
            raise DraftModelError(text) from error

    async def _rest(self, now_s: float) -> None:
        """Wait until a frame arrives or something is due."""
        due = [at_s for at_s in (self.speculation.due_s, self.pace.rest_until_s) if at_s is not None and at_s > now_s]
        self._wake.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(min(due) - now_s if due else None):
                await self._wake.wait()


def _numbers(jobs: Sequence[Job]) -> str:
    return ", ".join(str(job.request) for job in jobs)
