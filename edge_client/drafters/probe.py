"""Whether a runtime's trees say what its chains say. Not every attention has a mask or positions of its own, and no
property of a model tells: it is tried."""

from collections.abc import Callable, Sequence
from math import log

from edge_client.drafters import Candidate, DraftSequence

PROBED = 8
"""So many of the most probable tokens are compared."""
TOLERANCE = 0.3
"""Of a log probability. Two steps of a logit of 16 to 32 in bfloat16 are less, a wrong position or mask makes more."""


LEAST = 1e-30
"""Of a probability."""


def probed_paths(size: int) -> list[list[int]]:
    """Two chains of tokens of a vocabulary of this size: those that lead to a small tree's leaves."""
    first, second, third, left, right = (size * part // 6 for part in range(1, 6))
    return [[first, second, left, right], [first, second, third, right, left]]


def is_sound(
    open_context: Callable[[], DraftSequence], paths: Sequence[Sequence[int]], alone: Sequence[Sequence[Candidate]]
) -> bool:
    """Whether the leaves of a small tree say what is said behind the paths that lead there.

    `paths` as `probed_paths` has them; `alone`: PROBED candidates behind each, of the model without a tree.
    """
    (first, second, left, right), (_, _, third, _, _) = paths
    tree = open_context()
    tree.append([first, second, third], PROBED)
    tree.branch([left, right], [1, 2], PROBED)
    leaves = tree.branch([right, left], [3, 4], PROBED)
    return all(map(_are_alike, leaves, alone))


def _are_alike(said: Sequence[Candidate], alone: Sequence[Candidate]) -> bool:
    return all(
        abs(log(max(ours.probability, LEAST)) - log(max(theirs.probability, LEAST))) <= TOLERANCE
        for ours, theirs in zip(said, alone, strict=True)
    )
