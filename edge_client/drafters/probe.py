"""A test whether a runtime gives the same output for trees as for chains. Not every attention honours a mask and
positions, and no property of a model tells, so it is tried."""

from collections.abc import Callable, Sequence
from math import log

from edge_client.drafters import Candidate, DraftSequence

PROBED = 8
"""Number of most probable tokens to compare."""
TOLERANCE = 0.3
"""Tolerance of a log probability. Two bfloat16 steps of a logit of 16 to 32 are below it; the effect of a wrong
position or mask is above it."""


LEAST = 1e-30
"""Lower bound of a probability before its logarithm is taken."""


def probed_paths(size: int) -> list[list[int]]:
    """Two chains of tokens, the paths to the leaves of a small tree, for a vocabulary of this size."""
    first, second, third, left, right = (size * part // 6 for part in range(1, 6))
    return [[first, second, left, right], [first, second, third, right, left]]


def is_sound(
    open_context: Callable[[], DraftSequence], paths: Sequence[Sequence[int]], alone: Sequence[Sequence[Candidate]]
) -> bool:
    """Whether the output at the leaves of a small tree agrees with the output after the same tokens as chains.

    `paths`: from `probed_paths`. `alone`: PROBED candidates behind each path, from the model without a tree.
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
