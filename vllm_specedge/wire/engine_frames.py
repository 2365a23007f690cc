"""The frames between engine and gateway only, in addition to those of edges (docs/protocol.md, appendix)."""

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
    """Gateway to engine: admitted; open your requests (again) when there are edges."""

    version: int


@dataclass(frozen=True, slots=True)
class Edges(Coded, code=34):
    """Gateway to engine: the number of edges that could draft for it. At 0 nothing need be published."""

    num_edges: int


@dataclass(frozen=True, slots=True)
class Assign(Coded, code=35):
    """Gateway to engine: the edge with this number, from 1 on, drafts for this request; 0: none does any more."""

    request: int
    edge: int


@dataclass(frozen=True, slots=True)
class Stats(Coded, code=36):
    """Engine to gateway, regularly: its counters since it started, in the order of telemetry.ENGINE_COUNTERS."""

    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Report(Coded, code=37):
    """Engine to gateway, before a request closes: its own counters, in the order of telemetry.REQUEST_COUNTERS.

    A counter that does not fit is MAX_UINT32.
    """

    request: int
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepTimes(Coded, code=38):
    """Engine to gateway, with Stats: the step times that it has learnt.

    `curve_us`: microseconds of a step by its tokens, at step_cost.KNOTS, without what the other fields add.
    """

    curve_us: tuple[int, ...]
    request_ns: int
    """Added by each request in the step."""
    context_ns: int
    """Added by each 1,024 tokens of these requests' contexts."""
    verifying_ns: int
    """Added by each request if the step verifies something."""


@dataclass(frozen=True, slots=True)
class Groups(Coded, code=39):
    """Engine to gateway, with Stats: its last steps, for display.

    `values`: five numbers per step: microseconds from its end to now, and of its duration; its requests; their verified
    draft tokens; and those accepted.
    """

    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WantVocabulary(Coded, code=40):
    """Gateway to engine: send the part of your packed vocabulary that begins here (`vocabulary.pack_vocabulary`)."""

    offset: int


@dataclass(frozen=True, slots=True)
class VocabularyPart(Coded, code=41):
    """Engine to gateway, on request: the part of its packed vocabulary that fits a frame; empty if it has none."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Demand(Coded, code=43):
    """Engine to gateway, with Stats, for each class of requests: the counters of the class since the start, in the
    order of telemetry.DEMAND_COUNTERS."""

    name: str
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Capacity(Coded, code=44):
    """Engine to gateway, with Stats: its capacity in thousandths of answer tokens per second, with its present edges
    and without, and milliseconds from the start of its server process to that of the engine."""

    with_edges: int
    without_edges: int
    start_ms: int


@dataclass(frozen=True, slots=True)
class EngineOpen(Coded, code=42):
    """Engine to gateway: a request begins. Like Open without the credit, which the gateway sets."""

    request: int
    num_tokens: int
    max_draft: int
    session: str
    sampling: tuple[int, ...] = field(default=(), repr=False)


FromEngine: TypeAlias = (
    EngineHello | EngineOpen | Stats | Report | StepTimes | Groups | VocabularyPart | Demand | Capacity
)
ToEngine: TypeAlias = EngineWelcome | Edges | Assign | WantVocabulary
"""Frames from and to an engine, in addition to those shared with edges."""
