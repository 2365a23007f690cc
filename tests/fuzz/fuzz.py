"""`make fuzz`: coverage-guided fuzzing of everything that parses or stores input from outside.

    python -m tests.fuzz.fuzz frames|session|driver [CORPUS ...] [-max_total_time=60]

`frames`: the decoder. `session`: an edge's bytes through session machine and router, as in a gateway. `driver`: input
that a gateway may send to an engine, through driver, proposal tree and policy. A finding ends the run and is written to
a file crash-...: fix it, and add a test for it. All arguments after the target are libFuzzer's.
"""

import sys
from collections.abc import Callable

import atheris

with atheris.instrument_imports(include=["vllm_specedge"]):
    from tests.helpers import fitting
    from tests.test_driver import START, Act, Engine, GoodDraft
    from vllm_specedge.errors import RemoteProtocolError
    from vllm_specedge.gateway.effects import ToEdge
    from vllm_specedge.gateway.known import ROLES, RouterLimits
    from vllm_specedge.gateway.router import Router
    from vllm_specedge.wire.codec import Frame, FrameReader, encode
    from vllm_specedge.wire.engine_frames import Assign, Edges, EngineHello, EngineOpen
    from vllm_specedge.wire.frames import PROTOCOL_VERSION, Bye, Commit, Greet, Hello, Propose
    from vllm_specedge.wire.session import Role, Session, State

VOCAB_SIZE = 100
NUM_REQUESTS = 3


def decoded(data: bytes, cut: int) -> list[Frame] | None:
    """Frames decoded from two pieces; None: refused."""
    reader, found = FrameReader(), []
    try:
        for piece in (data[:cut], data[cut:]):
            found += list(reader.feed(piece))
    except RemoteProtocolError:
        return None
    return found


def frames(data: bytes) -> None:
    """Bytes are refused or decode to frames that are equal after encoding again, however they are cut."""
    cut = data[0] if data else 0
    found = decoded(data[1:], cut)
    assert found == decoded(data[1:], 0)
    if found:
        again = b"".join(encode(frame) for frame in found)
        assert decoded(again, len(again) // 2) == found


def session(data: bytes) -> None:
    """No input from an edge raises anything but RemoteProtocolError, or reaches an engine out of bounds."""
    router, engine = Router(RouterLimits()), b"engine"
    router.from_engine(engine, EngineHello(PROTOCOL_VERSION, "toy", "f", VOCAB_SIZE))
    for number in range(NUM_REQUESTS):
        router.from_engine(engine, EngineOpen(number, 3, 5, ""))
        router.from_engine(engine, Commit(number, 0, (1, 2, 3)))
    machine = Session(Role.GATEWAY)
    machine.send(Greet("key", PROTOCOL_VERSION))
    try:
        # An edge that is not admitted can do little: half of them start with a valid handshake.
        hello = encode(Hello(PROTOCOL_VERSION, "x", "x", "pool", "f", 8)) if data[:1] < b"\x80" else b""
        for frame in machine.receive(hello + data[1:]):
            if isinstance(frame, Bye) or machine.state is State.CLOSED:
                return
            is_hello = isinstance(frame, Hello)
            effects = router.edge_hello(1, frame, "s", frozenset(ROLES)) if is_hello else router.from_edge(1, frame)
            for effect in effects:
                if isinstance(effect, ToEdge):
                    machine.send(effect.frame)
                elif isinstance(effect.frame, Propose):
                    assert all(token < VOCAB_SIZE for token in effect.frame.tokens)
                    assert effect.frame.request < NUM_REQUESTS
            if machine.state is State.CLOSED:
                return
    except RemoteProtocolError:
        return


def driver(data: bytes) -> None:
    """Only legal drafts are offered, whatever a gateway sends and an engine does (checked by tests/test_driver.py)."""
    chance = atheris.FuzzedDataProvider(data)

    def run(most: int) -> list[int]:
        return [chance.ConsumeIntInRange(0, 4) for _ in range(chance.ConsumeIntInRange(0, most))]

    def branches() -> list[tuple[int, int]]:
        return [(chance.ConsumeIntInRange(0, 6), chance.ConsumeIntInRange(0, 4)) for _ in range(len(run(2)))]

    def proposal() -> Propose:
        tokens, forks = run(12), branches()
        return fitting(chance.ConsumeIntInRange(0, 3), chance.ConsumeIntInRange(0, 30), tokens, forks)

    makers: list[Callable[[], Act | GoodDraft | Frame]] = [
        lambda: Act("step", chance.ConsumeIntInRange(0, 1), run(6)),
        lambda: GoodDraft(chance.ConsumeIntInRange(0, 1), chance.ConsumeIntInRange(0, 3), run(8), branches()),
        proposal,
        lambda: Act(
            ["open", "close", "suggest", "predict", "plan"][chance.ConsumeIntInRange(0, 4)], len(run(2)), run(5)
        ),
        lambda: Assign(chance.ConsumeIntInRange(0, 3), chance.ConsumeIntInRange(0, 2)),
        lambda: Edges(chance.ConsumeIntInRange(0, 2)),
    ]
    engine = Engine(chance.ConsumeIntInRange(0, 6))
    for act in START:
        engine.do(act)
    while chance.remaining_bytes():
        engine.do(makers[chance.ConsumeIntInRange(0, len(makers) - 1)]())
    engine.end()


TARGETS = {target.__name__: target for target in (frames, session, driver)}

if __name__ == "__main__":
    target, *rest = sys.argv[1:]
    atheris.Setup([sys.argv[0], *rest], TARGETS[target])
    atheris.Fuzz()
