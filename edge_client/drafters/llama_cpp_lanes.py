"""A context's tree of entries in llama.cpp's cache: in lanes, one for each path from the root to a leaf.

In llama.cpp a row of a pass only sees the earlier cells of its own lane (a sequence id). A cell may be in many lanes,
so a branch takes memory only for its own entries: its lane begins as a copy of the one it leaves, and copying changes
marks, not keys or values. Pure: the methods return what to do to the cache.
"""

from collections.abc import Sequence
from typing import NamedTuple

from edge_client.drafters import CacheFullError
from edge_client.drafters.entries import Entries


class Cut(NamedTuple):
    """Remove from `lane` all cells from `position` on."""

    lane: int
    position: int


class Row(NamedTuple):
    """Run a token at `position` in `lane`. If `source` is not None, the lane first becomes a copy of that lane, up to
    the position."""

    lane: int
    position: int
    source: int | None


class Lanes:
    """The lanes of one context: one for each leaf of its tree. All contexts share the unused ones, in `free`."""

    def __init__(self, free: list[int]) -> None:
        self._free = free
        self._entries = Entries()
        self._of_leaf: dict[int, int] = {}
        """The lane that ends with each leaf."""

    def __len__(self) -> int:
        return len(self._entries)

    def append(self, count: int) -> Row:
        """Add a chain of entries. Returns the row of its first. Raises ValueError if the context is a tree,
        CacheFullError if no lane is free."""
        start = len(self._entries)
        lane = self._of_leaf.get(start - 1)
        if lane is None and not start:
            lane = self._take()
        self._entries.append(count)
        assert lane is not None  # of a chain, the last entry is the only leaf
        self._of_leaf = {start + count - 1: lane}
        return Row(lane, start, None)

    def branch(self, parents: Sequence[int]) -> list[Row]:
        """Add an entry behind each of `parents`. Raises ValueError if one does not exist, CacheFullError without enough
        free lanes."""
        num_new = sum(parent not in self._of_leaf or parent in parents[:i] for i, parent in enumerate(parents))
        if num_new > len(self._free):
            raise CacheFullError(f"no lanes for {num_new} more branches")
        start = len(self._entries)
        lane_of = {parent: self._through(parent) for parent in set(parents) if 0 <= parent < start}
        self._entries.branch(parents)
        rows = []
        for entry, parent in enumerate(parents, start):
            lane, source = self._of_leaf.pop(parent, None), None
            if lane is None:
                lane, source = self._take(), lane_of[parent]
            self._of_leaf[entry] = lane
            rows.append(Row(lane, self._entries.position(entry), source))
        # A lane is copied before new cells are added to it; a copy ends at its own parent in any case.
        return rows

    def keep(self, length: int, moved: Sequence[int]) -> list[Cut]:
        """Forget all but the first `length` entries and `moved`, as `DraftSequence.keep`. No cell is moved."""
        entries = self._entries
        kept = set(moved)
        ends = []
        """For each lane, its last kept entry (-1: none), the position after it, and whether that is the lane's leaf."""
        for leaf, lane in self._of_leaf.items():
            entry = leaf
            while entry >= length and entry not in kept:
                entry = entries.parent(entry)
            ends.append((lane, entry, entries.position(entry) + 1 if entry >= 0 else 0, entry == leaf))
        entries.keep(length, moved)
        number = {old: length + i for i, old in enumerate(moved)}
        leaves, self._of_leaf = set(entries.leaves), {}
        cuts = []
        for lane, entry, position, is_whole in ends:
            new = number.get(entry, entry)
            if new in leaves and new not in self._of_leaf:
                self._of_leaf[new] = lane
                cuts += [] if is_whole else [Cut(lane, position)]
            else:
                self._free.append(lane)
                cuts.append(Cut(lane, 0))
        return cuts

    @property
    def held(self) -> list[int]:
        return list(self._of_leaf.values())

    def _through(self, entry: int) -> int:
        """A lane that has this entry."""
        for leaf, lane in self._of_leaf.items():
            above = leaf
            while above > entry and above >= self._entries.trunk:
                above = self._entries.parent(above)
            if above == entry or entry < self._entries.trunk:
                return lane
        raise ValueError(f"entry {entry} is in no lane")

    def _take(self) -> int:
        if not self._free:
            raise CacheFullError("no lane is free")
        return self._free.pop()
