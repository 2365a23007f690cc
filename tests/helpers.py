"""Shared by several tests: frames of every type, two sessions back to back, and a world in virtual time."""

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

from hypothesis import strategies as st

from edge_client.drafters import Candidate, DraftSequence
from edge_client.drafting.pacing import Pace
from edge_client.drafting.speculation import Speculation
from tests.offers import Offers
from vllm_specedge.engine.driver import StepDriver
from vllm_specedge.engine.plan import Row, Step, StepOutcome, StepPlan
from vllm_specedge.errors import RemoteProtocolError
from vllm_specedge.gateway.effects import Effect, ToEdge, ToEngine
from vllm_specedge.gateway.known import ROLES, RouterLimits
from vllm_specedge.gateway.router import Router
from vllm_specedge.policy.situation import HoldLimits, Load
from vllm_specedge.policy.step_cost import StepCost
from vllm_specedge.simulation.clock import VirtualTime
from vllm_specedge.simulation.edge import VirtualEdge
from vllm_specedge.wire.codec import Frame, FrameReader, encode
from vllm_specedge.wire.engine_frames import EngineHello
from vllm_specedge.wire.frames import (
    MAX_BRANCHES,
    MAX_TEXT_BYTES,
    MAX_UINT32,
    PROTOCOL_VERSION,
    Bye,
    Close,
    Hello,
    Ping,
    Propose,
    Welcome,
)
from vllm_specedge.wire.session import Role, Session, State

FRAME_TYPES: tuple[type[Frame], ...] = Frame.__args__

_uints = st.integers(0, MAX_UINT32)
_texts = st.text(max_size=40).filter(lambda text: len(text.encode()) <= MAX_TEXT_BYTES)
_BY_FIELD: dict[object, st.SearchStrategy[Any]] = {
    int: _uints,
    str: _texts,
    bool: st.booleans(),
    bytes: st.binary(max_size=40),
    tuple[int, ...]: st.lists(_uints, max_size=40).map(tuple),
}


def fitting(request: int, base: int, tokens: Sequence[int], forks: Sequence[tuple[int, int]] = ()) -> Propose:
    """A proposal; `forks`: for each branch its distance from the trunk's end and its length, as far as fits."""
    num_trunk, branches = len(tokens), list[int]()
    for back, own in forks if tokens else ():
        length = own % num_trunk
        num_trunk -= length
        branches += [back, length]
    branches[::2] = [back % (base + num_trunk + 1) for back in branches[::2]]
    return Propose(request, base, tuple(tokens), tuple(branches))


def frames_of(cls: type[Frame]) -> st.SearchStrategy[Frame]:
    """Any frame of one type."""
    if cls is Propose:
        forks = st.lists(st.tuples(_uints, st.integers(0, 40)), max_size=MAX_BRANCHES)
        tokens = _BY_FIELD[tuple[int, ...]]
        # A branch leaves no further back than the wire format can express.
        return st.builds(fitting, _uints, st.integers(0, MAX_UINT32 - 40), tokens, forks)
    return st.builds(cls, **{item.name: _BY_FIELD[item.type] for item in dataclasses.fields(cls)})


def any_frame() -> st.SearchStrategy[Frame]:
    return st.sampled_from(FRAME_TYPES).flatmap(frames_of)


_EXAMPLES: dict[object, object] = {int: 1, str: "x", bool: True, bytes: b"x", tuple[int, ...]: (1, 2, 3)}


def example_of(cls: type[Frame]) -> Frame:
    """One plain frame of a type."""
    if cls is Propose:
        return Propose(1, 1, (1, 2, 3), (1, 2))
    return cls(*(_EXAMPLES[item.type] for item in dataclasses.fields(cls)))  # type: ignore[arg-type]


class ConnectionPair:
    """An edge's and a gateway's session back to back; after every frame both must be in the same state."""

    def __init__(self) -> None:
        self.ends = {role: Session(role) for role in Role}

    @property
    def state(self) -> State:
        assert self.ends[Role.EDGE].state is self.ends[Role.GATEWAY].state
        return self.ends[Role.EDGE].state

    def send(self, role: Role, frame: Frame) -> State:
        data = self.ends[role].send(frame)
        assert self.ends[role.peer].receive(data) == [frame]
        return self.state


# -- virtual time -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trouble:
    """Faults of a link. Unequal delays reorder frames."""

    delay_s: float = 0.0005
    jitter_s: float = 0.0
    loss: float = 0.0
    doubling: float = 0.0


class VirtualLink:
    """One direction of a link: frames are encoded and decoded, and arrive late, never, twice or out of order."""

    def __init__(self, time: VirtualTime, random: Random, trouble: Trouble, deliver: Callable[[Frame], None]) -> None:
        self._time = time
        self._random = random
        self._trouble = trouble
        self._deliver = deliver

    def send(self, frame: Frame) -> None:
        data = encode(frame)
        num_copies = 0 if self._random.random() < self._trouble.loss else 1
        num_copies += self._random.random() < self._trouble.doubling
        for _ in range(num_copies):
            delay_s = self._trouble.delay_s + self._random.random() * self._trouble.jitter_s
            self._time.after(delay_s, lambda: self._arrive(data))

    def _arrive(self, data: bytes) -> None:
        for frame in FrameReader().feed(data):
            self._deliver(frame)


Guess = Callable[[Sequence[int]], Sequence[Candidate]]
"""A draft model: the candidates for the token after a context, most probable first."""


class ListSequence(DraftSequence):
    """A drafter that keeps its entries as a plain list and drafts by a function of an entry's whole past."""

    def __init__(self, guess: Guess) -> None:
        self.entries: list[tuple[int, int]] = []
        """Each entry's token, and the entry it follows."""
        self._guess = guess

    def past(self, entry: int) -> list[int]:
        tokens = []
        while entry >= 0:
            token, entry = self.entries[entry]
            tokens.append(token)
        return tokens[::-1]

    def keep(self, length: int, moved: Sequence[int] = ()) -> None:
        assert list(moved) == sorted(set(moved))
        assert all(length <= entry < len(self.entries) for entry in moved)
        kept = [*range(length), *moved]
        number = {-1: -1} | {old: new for new, old in enumerate(kept)}
        self.entries = [(self.entries[old][0], number[self.entries[old][1]]) for old in kept]

    def append(self, tokens: Sequence[int], width: int) -> list[Candidate]:
        assert tokens
        assert all(parent == entry - 1 for entry, (_, parent) in enumerate(self.entries)), "not a chain"
        for token in tokens:
            self.entries.append((token, len(self.entries) - 1))
        return list(self._guess(self.past(len(self.entries) - 1)))[:width]

    def branch(self, tokens: Sequence[int], parents: Sequence[int], width: int) -> list[list[Candidate]]:
        start = len(self.entries)
        assert tokens
        assert all(0 <= parent < start for parent in parents)
        self.entries += zip(tokens, parents, strict=True)
        return [list(self._guess(self.past(start + row)))[:width] for row in range(len(tokens))]


def virtual_edge(
    time: VirtualTime,
    guess: Guess,
    pass_s: float,
    max_context_tokens: int,
    max_width: int = 4,
    rtt_s: float = 0.0,
) -> VirtualEdge:
    """An edge whose forward pass takes `pass_s`; `guess` is its draft model."""
    pace = Pace(rtt_s=rtt_s)
    speculation = Speculation(max_context_tokens, max_width, prefill_chunk_tokens=7, max_kept=2, pace=pace)
    return VirtualEdge(time, speculation, lambda: ListSequence(guess), lambda num_tokens: pass_s)


class HostileEdge:
    """Answers every frame with invented ones, most of them false."""

    def __init__(self, random: Random, vocab_size: int, is_rude: bool) -> None:
        self.send: Callable[[Frame], None] = lambda frame: None
        self._random = random
        self._is_rude = is_rude
        self._max_token = vocab_size + (2 if is_rude else -1)
        self._known: dict[int, list[int]] = {}

    def receive(self, frame: Frame) -> None:
        if isinstance(frame, Welcome | Bye | Ping):
            return
        number: int = frame.request  # type: ignore[union-attr]
        tokens = self._known.setdefault(number, [])
        tokens += getattr(frame, "tokens", ())
        for _ in range(self._random.randrange(4)):
            self.send(self._lie(self._random.choice([number, number, number, number + 1]), tokens))

    def _lie(self, number: int, tokens: list[int]) -> Frame:
        if self._random.random() < 0.02:
            return Close(number, self._random.randrange(5))
        base = max(0, len(tokens) + self._random.randint(-4, 4))
        true = tokens[base : base + self._random.randrange(4)]
        run = [*true, *self._lies()]
        if self._random.random() < 0.5 or not run:
            return Propose(number, base, tuple(run))
        tokens, branches = list(run), list[int]()
        for _ in range(self._random.randint(1, 4)):
            branch = self._lies()
            tokens += branch
            branches += [self._random.randint(0, base + len(run)), len(branch)]
        return Propose(number, base, tuple(tokens), tuple(branches))

    def _lies(self) -> list[int]:
        return [self._random.randint(0, self._max_token) for _ in range(self._random.randrange(4))]


@dataclass(slots=True)
class _Served:
    tokens: list[int]
    end: int
    session: str
    num_steps: int = 0
    number: int = 0
    """On the wire."""


@dataclass
class World:
    """A toy engine with the real StepDriver, the real Router, and edges, joined by VirtualLinks.

    `choose` is the target model: the next token for a context. The engine verifies drafts as a greedy target does, so
    its output does not depend on the drafts. Drafts are judged by the number of steps, and by the assertion that each
    offered draft was proposed for exactly the tokens that the request has.
    """

    choose: Callable[[Sequence[int]], int]
    vocab_size: int
    max_draft: int = 5
    seed: int = 0
    engine_trouble: Trouble = Trouble()
    edge_trouble: Trouble = Trouble()
    hold_limits: HoldLimits = field(default_factory=HoldLimits)
    step_s: float = 0.01
    token_s: float = 0.0
    """Additional time of a step per verified draft token."""
    suggest: Callable[[Sequence[int]], Sequence[int]] = lambda tokens: ()
    """vLLM's n-gram lookup."""
    max_running: int = 3
    time: VirtualTime = field(default_factory=VirtualTime)
    router: Router = field(default_factory=lambda: Router(RouterLimits()))
    served: dict[str, _Served] = field(default_factory=dict)
    finished: dict[str, _Served] = field(default_factory=dict)
    driver: StepDriver = field(init=False)
    waiting: list[tuple[str, _Served]] = field(default_factory=list)
    inbox: list[tuple[float, Frame]] = field(default_factory=list)
    offers: Offers = field(default_factory=Offers)
    suggested: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Latest result of the lookup."""
    num_opened: int = 0
    byes: list[Bye] = field(default_factory=list)
    is_stepping: bool = False
    _links: dict[int, VirtualLink] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.driver = StepDriver(self.vocab_size, self.max_draft, self.hold_limits, StepCost())
        random = Random(self.seed)
        self._up = VirtualLink(self.time, random, self.engine_trouble, self._at_router)
        self._down = VirtualLink(self.time, random, self.engine_trouble, self._at_engine)
        self._random = random
        # Handshakes are not under test here: they are not disturbed.
        hello = EngineHello(PROTOCOL_VERSION, "toy", "f", self.vocab_size)
        for effect in self.router.from_engine(b"e", hello):
            self.inbox.append((0.0, effect.frame))

    def join(self, id_: int, edge: VirtualEdge | HostileEdge, role: str = "pool", session: str = "") -> None:
        """An edge connects."""
        self._links[id_] = VirtualLink(self.time, self._random, self.edge_trouble, edge.receive)
        up = VirtualLink(self.time, self._random, self.edge_trouble, lambda frame: self._from_edge(id_, frame))
        edge.send = up.send
        hello = Hello(PROTOCOL_VERSION, "test", "edge", role, "f", 4)
        effects = self.router.edge_hello(id_, hello, session, frozenset(ROLES))
        for effect in effects:
            if isinstance(effect, ToEngine):
                self.inbox.append((self.time.now_s, effect.frame))
        self._carry_out([effect for effect in effects if isinstance(effect, ToEdge)])

    def leave(self, id_: int) -> None:
        """An edge disconnects; frames in flight from it or to it are lost."""
        self._links.pop(id_, None)
        self._carry_out(self.router.edge_left(id_))

    def submit(self, request_id: str, prompt: Sequence[int], num_tokens: int, session: str = "") -> None:
        self.waiting.append((request_id, _Served(list(prompt), len(prompt) + num_tokens, session)))

    def run(self, limit_s: float = 1e4) -> None:
        self._wake()
        self.time.run(limit_s, lambda: not self.waiting and not self.served)

    def _from_edge(self, id_: int, frame: Frame) -> None:
        if id_ in self._links:
            self._carry_out(self.router.from_edge(id_, frame))

    def _at_router(self, frame: Frame) -> None:
        self._carry_out(self.router.from_engine(b"e", frame))

    def _at_engine(self, frame: Frame) -> None:
        self.inbox.append((self.time.now_s, frame))
        self._wake()

    def _carry_out(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, ToEngine):
                self._down.send(effect.frame)
            elif not isinstance(effect, ToEdge):
                pass  # for people
            elif isinstance(effect.frame, Bye):
                self.byes.append(effect.frame)
                self.leave(effect.edge)
            elif effect.edge in self._links:
                self._links[effect.edge].send(effect.frame)

    def _publish(self, frames: Sequence[Frame]) -> None:
        for frame in frames:
            self._up.send(frame)

    def _wake(self) -> None:
        if not self.is_stepping:
            self._step()

    def _take_in(self) -> None:
        for at_s, frame in self.inbox:
            if isinstance(frame, Propose):
                self.offers.proposed(frame)
            self._publish(self.driver.receive(frame, at_s))
        self.inbox.clear()

    def _step(self) -> None:
        self._take_in()
        while self.waiting and len(self.served) < self.max_running:
            request_id, served = self.waiting.pop(0)
            self.served[request_id] = served
            served.number = self.num_opened  # the driver counts them too
            self.num_opened += 1
            self._publish(self.driver.open(request_id, served.tokens, served.session))
        rows = [Row(id_, served.end - len(served.tokens) - 1) for id_, served in self.served.items()]
        context = sum(len(served.tokens) for served in self.served.values())
        plan = self.driver.begin(rows, self.time.now_s, Load(context=context))
        for request_id, draft in plan.drafts.items():
            assert self._was_proposed(request_id, draft), (request_id, draft)
        self.driver.start(plan)
        self.driver.learn()
        self.is_stepping = len(plan.holds) < len(self.served)
        if self.is_stepping:
            num_verified = sum(map(len, plan.drafts.values()))
            took_s = self.step_s + self.token_s * num_verified
            self.time.after(took_s, self._finish, plan, self.time.now_s)
        elif plan.holds:
            self.time.at(plan.wait_until_s or 0.0, self._wake)

    def _finish(self, plan: StepPlan, started_s: float) -> None:
        self._take_in()
        drafts = {id_: plan.drafts.get(id_, []) for id_ in self.served if id_ not in plan.holds}
        for request_id, draft in drafts.items():
            self._decide(request_id, draft)
        over = [id_ for id_ in drafts if len(self.served[id_].tokens) >= self.served[id_].end]
        num_verified = {id_: len(draft) for id_, draft in drafts.items() if draft}
        outcome = StepOutcome({id_: 1 + len(draft) for id_, draft in drafts.items()}, num_verified, over)
        self._publish(self.driver.end(plan, outcome, Step(started_s, self.time.now_s)))
        for request_id in over:
            self.finished[request_id] = self.served.pop(request_id)
        self.suggested = {id_: tuple(self.suggest(served.tokens)) for id_, served in self.served.items()}
        self.driver.suggest(self.suggested, 0.0)
        self.is_stepping = False
        self._step()

    def _was_proposed(self, request_id: str, draft: list[int]) -> bool:
        served, found = self.served[request_id], self.suggested.get(request_id, ())
        is_found = draft == list(found[: len(draft)])
        return is_found or self.offers.were_proposed(served.number, served.tokens, draft)

    def _decide(self, request_id: str, draft: list[int]) -> None:
        served = self.served[request_id]
        assert len(served.tokens) + len(draft) < served.end
        served.num_steps += 1
        served.tokens += self._verify(served.tokens, draft)

    def _verify(self, tokens: list[int], draft: list[int]) -> list[int]:
        chosen = [self.choose(tokens)]
        for guess in draft:
            if guess != chosen[-1]:
                break
            chosen.append(self.choose([*tokens, *chosen]))
        return chosen


def refused(act: Callable[[], object]) -> RemoteProtocolError:
    """The RemoteProtocolError that `act` must raise."""
    try:
        act()
    except RemoteProtocolError as error:
        return error
    raise AssertionError("nothing was refused")


@contextmanager
def in_thread(run: Callable[[], object]) -> Iterator[None]:
    """Run a function in a thread during the block, which has to end it."""
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(60.0)
        assert not thread.is_alive()
