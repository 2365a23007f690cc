"""What is simulated, and what is measured of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil

from edge_client.drafting.pacing import UPLINK_BYTES_PER_TOKEN
from vllm_specedge.gateway.known import RouterLimits
from vllm_specedge.policy.situation import HoldLimits
from vllm_specedge.simulation.models import SERVERS, Server


@dataclass(frozen=True, slots=True)
class EdgeModel:
    """What one edge is like."""

    pass_s: float = 0.006
    """A forward pass of its draft model."""
    row_s: float = 0.0
    """For each further row of it, and each further token of a prompt."""
    acceptance: float = 0.75
    """How often the target says what the draft thinks most probable, at each position anew."""
    branch: float = 0.6
    """How often, where it does not, it says the second candidate."""
    max_width: int = 8
    """Rows a pass of one request; 1: no branches."""
    max_shared_rows: int = 16
    """Rows of a pass that several requests share; 0: each has passes of its own."""
    uplink_bytes_per_token: float = UPLINK_BYTES_PER_TOKEN
    fault: str = ""
    """`stalling`, `dead`, or none."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A server under a load, and its edges."""

    server: Server = SERVERS["a100-14b"]
    requests: int = 1
    """At any time: each client asks again when it has its answer."""
    rtt_s: float = 0.020
    """Between edges and gateway."""
    jitter_s: float = 0.0
    """At most so much more, each way. Frames do not overtake each other."""
    processing_s: float = 0.0005
    """What soft- and hardware on both ends add to each way."""
    edge: EdgeModel = field(default_factory=EdgeModel)
    share: float = 1.0
    """For so many of the requests there is an edge."""
    requests_per_edge: int = 1
    """More, where `max_edges` do not suffice."""
    max_edges: int = 1 << 20
    gap_s: float | None = None
    """What a synchronous step adds on an engine that can schedule asynchronously; None: it cannot, and its steps have
    all in them."""
    limits: HoldLimits = field(default_factory=HoldLimits)
    spec_tokens: int = 5
    credit_tokens: int = RouterLimits().credit_tokens
    prompt_tokens: int = 64
    output_tokens: int = 256
    tokens: int = 400
    """It goes on until each client has so many."""
    warm_up: float = 0.25
    """The part of `tokens` that is not measured."""
    is_in_step: bool = False
    """Clients ask again together, when the last one has its answer."""
    max_running: int = 1024
    max_step_tokens: int = 8192
    vocab_size: int = 128_256
    seed: int = 0
    is_oracle: bool = False
    """The policy is told how long steps take and how often drafts are right, and need not learn it."""

    @property
    def num_edges(self) -> int:
        return min(self.max_edges, ceil(self.share * self.requests / self.requests_per_edge - 1e-9))

    @property
    def edge_capacity(self) -> int:
        """Requests that one edge drafts for at once."""
        return max(self.requests_per_edge, ceil(self.share * self.requests / max(1, self.num_edges) - 1e-9))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was measured after the warm-up."""

    seconds: float
    tokens: int
    itl_p50_s: float
    """Between one chunk of an answer and the next, as a client that streams sees it; a chunk is what a step made."""
    itl_p99_s: float
    ttft_p50_s: float
    """From the arrival of a request to its first token."""
    ttft_p99_s: float
    counters: Mapping[str, int]
    """Those of the engine's that grew, by their names in wire/telemetry.py."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def verified_per_accepted(self) -> float:
        """Draft tokens verified for each accepted one; 0 where none was."""
        accepted = self.counters.get("accepted_tokens", 0)
        return self.counters.get("verified_tokens", 0) / accepted if accepted else 0.0
