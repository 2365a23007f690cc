"""What engine and gateway say to each other beside what edges hear (docs/protocol.md, appendix)."""

from dataclasses import dataclass
from typing import ClassVar, TypeAlias


@dataclass(frozen=True, slots=True)
class EngineHello:
    """Engine to gateway, first and after every Bye: the model it serves."""

    CODE: ClassVar[int] = 32
    version: int
    model: str
    fingerprint: str
    vocab_size: int


@dataclass(frozen=True, slots=True)
class EngineWelcome:
    """Gateway to engine: known now; open your requests (again) when there are edges."""

    CODE: ClassVar[int] = 33
    version: int


@dataclass(frozen=True, slots=True)
class Edges:
    """Gateway to engine: so many edges could draft for you. At 0 nothing need be published."""

    CODE: ClassVar[int] = 34
    num_edges: int


@dataclass(frozen=True, slots=True)
class Assign:
    """Gateway to engine: the edge of this number, from 1 on, drafts for this request; 0: none does any more."""

    CODE: ClassVar[int] = 35
    request: int
    edge: int


@dataclass(frozen=True, slots=True)
class Stats:
    """Engine to gateway, now and then: its counters since it started, in the order of telemetry.ENGINE_COUNTERS."""

    CODE: ClassVar[int] = 36
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Engine to gateway: a request is about to close; its own counters, in the order of telemetry.REQUEST_COUNTERS.

    A counter that no longer fits says MAX_UINT32.
    """

    CODE: ClassVar[int] = 37
    request: int
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Engine to gateway, with Stats: what it has learnt its steps to take.

    `curve_us`: microseconds of a step of each number of tokens in step_cost.KNOTS, but for what the others add.
    """

    CODE: ClassVar[int] = 38
    curve_us: tuple[int, ...]
    request_ns: int
    """For each request in the step."""
    context_ns: int
    """For each 1,024 tokens of these requests' contexts."""
    verifying_ns: int
    """For each request in a step that verifies something."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Engine to gateway, with Stats: its last steps, for people to look at.

    `values`: five numbers a step: microseconds from its end to now, and that it took; its requests; their draft tokens
    that were verified, and accepted.
    """

    CODE: ClassVar[int] = 39
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WantVocabulary:
    """Gateway to engine: send the part of your packed vocabulary that begins here (`vocabulary.pack_vocabulary`)."""

    CODE: ClassVar[int] = 40
    offset: int


@dataclass(frozen=True, slots=True)
class VocabularyPart:
    """Engine to gateway, when asked: as much of its packed vocabulary as a frame takes; nothing where there is none."""

    CODE: ClassVar[int] = 41
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class EngineOpen:
    """Engine to gateway: a request begins. As Open, but how far an edge may propose is the gateway's to say."""

    CODE: ClassVar[int] = 42
    request: int
    num_tokens: int
    max_draft: int
    session: str


FromEngine: TypeAlias = EngineHello | EngineOpen | Stats | Report | StepTimes | Groups | VocabularyPart
ToEngine: TypeAlias = EngineWelcome | Edges | Assign | WantVocabulary
"""What an engine says, and hears, beside frames that edges have too."""
