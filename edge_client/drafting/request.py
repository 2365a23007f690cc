"""What an edge knows of one request that it drafts for. Pure."""

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
    """What the target adds where it samples; None: it is greedy, or nothing is known of that."""
    tree: DraftTree = field(default_factory=DraftTree)
    running: list[Node] | None = None
    """What the job under way runs; empty: committed tokens."""
    turn: int = 0
    has_passed: bool = False
    """It was said that there is nothing for this position."""
    num_short: int = 0
    """Commits in a row that agreed, yet were shorter than what was proposed would have given."""
    short_since_s: float = 0.0
    committed_s: float | None = None
    """When its last commit came."""
    due_s: float | None = None
    """Until when what is new may wait for more."""

    @property
    def is_prefilling(self) -> bool:
        return len(self.tree.tokens) < self.num_prompt

    def calibration(self, pace: Pace) -> Calibration:
        """How often what is drafted for such requests is right."""
        return pace.calibration if self.noise is None else pace.sampled_calibration
