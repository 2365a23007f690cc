"""The parameters and the outcome of a simulation."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil

from edge_client.drafting.pacing import UPLINK_BYTES_PER_TOKEN
from vllm_specedge.gateway.known import RouterLimits
from vllm_specedge.policy.situation import HoldLimits
from vllm_specedge.simulation.models import SERVERS, Server


@dataclass(frozen=True, slots=True)
class EdgeModel:
    """The properties of one edge."""

    pass_s: float = 0.006
    """Seconds of a forward pass of its draft model."""
    row_s: float = 0.0
    """Seconds added by each further row of a pass, and each further token of a prompt."""
    acceptance: float = 0.75
    """Probability that the target chooses the draft's most probable token, independent at each position."""
    branch: float = 0.6
    """Probability that it chooses the second candidate if not."""
    max_width: int = 8
    """Maximum rows of a pass for one request; 1: no branches."""
    max_shared_rows: int = 16
    """Maximum rows of a pass that several requests share; 0: passes are not shared."""
    uplink_bytes_per_token: float = UPLINK_BYTES_PER_TOKEN
    fault: str = ""
    """`stalling`, `dead`, or none."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A server under a load, and its edges."""

    server: Server = SERVERS["a100-14b"]
    requests: int = 1
    """Concurrent requests: each client sends its next request when it has its answer."""
    rtt_s: float = 0.020
    """RTT between edges and gateway."""
    jitter_s: float = 0.0
    """Maximum extra delay each way. Frames do not overtake each other."""
    processing_s: float = 0.0005
    """Delay each way by software and hardware on both ends."""
    edge: EdgeModel = field(default_factory=EdgeModel)
    share: float = 1.0
    """Share of the requests that have an edge."""
    requests_per_edge: int = 1
    """Requests per edge; more if `max_edges` do not suffice."""
    max_edges: int = 1 << 20
    gap_s: float | None = None
    """Seconds added by a synchronous step on an engine that can schedule asynchronously; None: it cannot, and its step
    times include all."""
    limits: HoldLimits = field(default_factory=HoldLimits)
    spec_tokens: int = 5
    credit_tokens: int = RouterLimits().credit_tokens
    prompt_tokens: int = 64
    output_tokens: int = 256
    tokens: int = 400
    """Tokens that each client must have at the end."""
    warm_up: float = 0.25
    """Share of `tokens` that is not measured."""
    is_in_step: bool = False
    """Whether clients send their next requests together, when the last one has its answer."""
    max_running: int = 1024
    max_step_tokens: int = 8192
    vocab_size: int = 128_256
    seed: int = 0
    is_oracle: bool = False
    """Whether the policy knows step times and acceptance exactly, and need not learn them."""

    @property
    def num_edges(self) -> int:
        return min(self.max_edges, ceil(self.share * self.requests / self.requests_per_edge - 1e-9))

    @property
    def edge_capacity(self) -> int:
        """Requests that one edge drafts for at once."""
        return max(self.requests_per_edge, ceil(self.share * self.requests / max(1, self.num_edges) - 1e-9))


@dataclass(frozen=True, slots=True)
class Outcome:
    """The measurements after the warm-up."""

    seconds: float
    tokens: int
    itl_p50_s: float
    """Time between the chunks of an answer as a streaming client sees it; each step makes one chunk."""
    itl_p99_s: float
    ttft_p50_s: float
    """Time from the arrival of a request to its first token."""
    ttft_p99_s: float
    counters: Mapping[str, int]
    """The engine's counters that grew, by their names in wire/telemetry.py."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def verified_per_accepted(self) -> float:
        """Draft tokens verified per accepted one; 0 if none was accepted."""
        accepted = self.counters.get("accepted_tokens", 0)
        return self.counters.get("verified_tokens", 0) / accepted if accepted else 0.0
