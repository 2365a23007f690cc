"""The state of one request that an edge drafts for. Pure."""

from dataclasses import dataclass, field

from edge_client.drafting.draft_tree import DraftTree, Node
from edge_client.drafting.noise import Noise
from edge_client.drafting.pacing import Calibration, Pace


@dataclass(slots=True)
class DraftedRequest:
    """A request that an edge drafts for."""

    num_prompt: int
    credit: int
    max_draft: int
    noise: Noise | None = None
    """The noise that the target adds when it samples; None: the request is greedy, or its noise is not known."""
    tree: DraftTree = field(default_factory=DraftTree)
    running: list[Node] | None = None
    """Nodes of the running job; empty: it runs committed tokens; None: no job is running."""
    turn: int = 0
    has_passed: bool = False
    """Whether an empty proposal was sent for this position."""
    num_short: int = 0
    """Consecutive commits that matched the draft but were shorter than the proposal should have made them."""
    short_since_s: float = 0.0
    committed_s: float | None = None
    """Time of its last commit."""
    due_s: float | None = None
    """Time at which unsent nodes are sent at the latest."""

    @property
    def is_prefilling(self) -> bool:
        return len(self.tree.tokens) < self.num_prompt

    def calibration(self, pace: Pace) -> Calibration:
        """The calibration for requests of this kind, greedy or sampled."""
        return pace.calibration if self.noise is None else pace.sampled_calibration
