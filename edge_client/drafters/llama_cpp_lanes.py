"""A context's tree of entries as llama.cpp's cache takes it: in lanes, one for each path from the root to a leaf.

There a row of a pass sees the cells of its own lane (a sequence id) that lie before it, and nothing else. A cell may be
in many lanes, so a branch costs no memory but its own entries: its lane begins as a copy of the one it leaves, which
copies marks and no keys or values. Pure: what is to be done to the cache is what the methods return.
"""

from collections.abc import Sequence
from typing import NamedTuple

from edge_client.drafters import CacheFullError
from edge_client.drafters.entries import Entries


class Cut(NamedTuple):
    """Take out of `lane` all cells from `position` on."""

    lane: int
    position: int


class Row(NamedTuple):
    """Run a token at `position` in `lane`; where `source` is not None, the lane first becomes a copy of that one, up to
    the position."""

    lane: int
    position: int
    source: int | None


class Lanes:
    """The lanes of one context: as many as its tree has leaves. What is not in use lies in `free`, for all contexts."""

    def __init__(self, free: list[int]) -> None:
        self._free = free
        self._entries = Entries()
        self._of_leaf: dict[int, int] = {}
        """The lane that ends with each leaf."""

    def __len__(self) -> int:
        return len(self._entries)

    def append(self, count: int) -> Row:
        """Add a chain of entries; returns where its first goes. Raises ValueError for a tree, CacheFullError if no lane
        is free."""
        start = len(self._entries)
        lane = self._of_leaf.get(start - 1)
        if lane is None and not start:
            lane = self._take()
        self._entries.append(count)
        assert lane is not None  # of a chain, the last entry is the only leaf
        self._of_leaf = {start + count - 1: lane}
        return Row(lane, start, None)

    def branch(self, parents: Sequence[int]) -> list[Row]:
        """Add an entry behind each of `parents`. Raises ValueError if one is missing, CacheFullError if lanes are."""
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
        # A lane is copied before anything is put into it: what a copy takes ends at its own parent all the same.
        return rows

    def keep(self, length: int, moved: Sequence[int]) -> list[Cut]:
        """Forget all but the first `length` entries and `moved`, as `DraftSequence.keep`; no cell is moved for it."""
        entries = self._entries
        kept = set(moved)
        ends = []
        """Of each lane: the last of its entries that is kept, -1 if none is, and the position behind it."""
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
