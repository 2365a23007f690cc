"""What engine and gateway say to each other beside what edges hear (docs/protocol.md, appendix)."""

from dataclasses import dataclass, field
from typing import TypeAlias

from vllm_specedge.wire.frames import Coded


@dataclass(frozen=True, slots=True)
class EngineHello(Coded, code=32):
    """Engine to gateway, first and after every Bye: the model it serves."""

    version: int
    model: str
    fingerprint: str
    vocab_size: int


@dataclass(frozen=True, slots=True)
class EngineWelcome(Coded, code=33):
    """Gateway to engine: known now; open your requests (again) when there are edges."""

    version: int


@dataclass(frozen=True, slots=True)
class Edges(Coded, code=34):
    """Gateway to engine: so many edges could draft for you. At 0 nothing need be published."""

    num_edges: int


@dataclass(frozen=True, slots=True)
class Assign(Coded, code=35):
    """Gateway to engine: the edge of this number, from 1 on, drafts for this request; 0: none does any more."""

    request: int
    edge: int


@dataclass(frozen=True, slots=True)
class Stats(Coded, code=36):
    """Engine to gateway, now and then: its counters since it started, in the order of telemetry.ENGINE_COUNTERS."""

    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Report(Coded, code=37):
    """Engine to gateway: a request is about to close; its own counters, in the order of telemetry.REQUEST_COUNTERS.

    A counter that no longer fits says MAX_UINT32.
    """

    request: int
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepTimes(Coded, code=38):
    """Engine to gateway, with Stats: what it has learnt its steps to take.

    `curve_us`: microseconds of a step of each number of tokens in step_cost.KNOTS, but for what the others add.
    """

    curve_us: tuple[int, ...]
    request_ns: int
    """For each request in the step."""
    context_ns: int
    """For each 1,024 tokens of these requests' contexts."""
    verifying_ns: int
    """For each request in a step that verifies something."""


@dataclass(frozen=True, slots=True)
class Groups(Coded, code=39):
    """Engine to gateway, with Stats: its last steps, for people to look at.

    `values`: five numbers a step: microseconds from its end to now, and that it took; its requests; their draft tokens
    that were verified, and accepted.
    """

    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WantVocabulary(Coded, code=40):
    """Gateway to engine: send the part of your packed vocabulary that begins here (`vocabulary.pack_vocabulary`)."""

    offset: int


@dataclass(frozen=True, slots=True)
class VocabularyPart(Coded, code=41):
    """Engine to gateway, when asked: as much of its packed vocabulary as a frame takes; nothing where there is none."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Demand(Coded, code=43):
    """Engine to gateway, with Stats, for each class of requests: its counters, in the order of
    telemetry.DEMAND_COUNTERS, as Stats has its own."""

    name: str
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Capacity(Coded, code=44):
    """Engine to gateway, with Stats: how many tokens of answers a second it could make, in thousandths, with the edges
    it has and without, and milliseconds from the start of its server to its own."""

    with_edges: int
    without_edges: int
    start_ms: int


@dataclass(frozen=True, slots=True)
class EngineOpen(Coded, code=42):
    """Engine to gateway: a request begins. As Open, but how far an edge may propose is the gateway's to say."""

    request: int
    num_tokens: int
    max_draft: int
    session: str
    sampling: tuple[int, ...] = field(default=(), repr=False)


FromEngine: TypeAlias = (
    EngineHello | EngineOpen | Stats | Report | StepTimes | Groups | VocabularyPart | Demand | Capacity
)
ToEngine: TypeAlias = EngineWelcome | Edges | Assign | WantVocabulary
"""What an engine says, and hears, beside frames that edges have too."""
