"""The parents of the entries in a draft model's cache: a chain, with a tree at its end while branches are drafted."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _Entry:
    """An entry behind the trunk."""

    parent: int
    position: int
    """Position in the text: one more than the parent's."""
    seen: int
    """Bit i: entry trunk + i is an ancestor, or the entry itself."""


class Entries:
    """The parents of entries 0, 1, ...; each parent comes before its children, and entry 0 has none.

    Nearly all of a context is the trunk: a chain that every later entry descends from. Only entries behind the trunk
    need to be tracked one by one and masked in attention.
    """

    def __init__(self) -> None:
        self.trunk = 0
        """Number of first entries that form a chain and are ancestors of all others."""
        self._tree: list[_Entry] = []

    def __len__(self) -> int:
        return self.trunk + len(self._tree)

    @property
    def is_chain(self) -> bool:
        """Whether each entry follows the one before it."""
        return not self._tree

    def append(self, count: int) -> None:
        """Add a chain of `count` entries behind the last one; the existing entries must be a chain."""
        if not self.is_chain:
            raise ValueError("a chain can only be appended to a chain, not to branches")
        self.trunk += count

    def branch(self, parents: Sequence[int]) -> None:
        """Add an entry behind each of `parents`, which must exist."""
        if not all(0 <= parent < len(self) for parent in parents):
            raise ValueError(f"entries behind {list(parents)}, of {len(self)}")
        self._set(self.trunk, [*(entry.parent for entry in self._tree), *parents])

    def keep(self, length: int, moved: Sequence[int]) -> bool:
        """Forget all but the first `length` entries and `moved` (ascending, each with its parent), and close up.

        Returns whether any entry's number changed.
        """
        if not 0 <= length <= len(self):
            raise ValueError(f"{length} entries to be kept of {len(self)}")
        start = min(length, self.trunk)
        kept = [*range(start, length), *moved]
        numbers = {start - 1: start - 1} | {old: new for new, old in enumerate(kept, start)}
        try:
            parents = [numbers[self.parent(old)] for old in kept]
        except (KeyError, IndexError):
            raise ValueError(f"{list(moved)} cannot be kept after {length} entries without their parents") from None
        if kept != sorted(set(kept)):
            raise ValueError(f"{list(moved)} cannot be kept after {length} entries: not in ascending order")
        self._set(start, parents)
        return any(old != new for old, new in numbers.items())

    def position(self, entry: int) -> int:
        return entry if entry < self.trunk else self._tree[entry - self.trunk].position

    def seen(self, entry: int) -> list[bool]:
        """For each entry behind the trunk, whether `entry` attends to it: its ancestors and itself."""
        seen = self._tree[entry - self.trunk].seen if entry >= self.trunk else 0
        return [bool(seen >> index & 1) for index in range(len(self._tree))]

    def parent(self, entry: int) -> int:
        """The entry that this one follows; -1 for entry 0."""
        return entry - 1 if entry < self.trunk else self._tree[entry - self.trunk].parent

    @property
    def leaves(self) -> list[int]:
        """The entries without children, in ascending order; for a chain, its last."""
        followed = {entry.parent for entry in self._tree}
        return [entry for entry in range(max(0, self.trunk - 1), len(self)) if entry not in followed]

    def _set(self, start: int, parents: list[int]) -> None:
        """Make the first `start` entries a chain, and give the following entries these parents."""
        forks = [parent for entry, parent in enumerate(parents, start) if parent != entry - 1]
        # An entry that does not follow the one before it leaves the chain at its parent; the lowest of these parents
        # ends the trunk.
        self.trunk = min(forks) + 1 if forks else start + len(parents)
        self._tree = []
        for parent in [*range(self.trunk - 1, start - 1), *parents[max(0, self.trunk - start) :]]:
            above = self._tree[parent - self.trunk] if parent >= self.trunk else None
            seen = (above.seen if above else 0) | 1 << len(self._tree)
            self._tree.append(_Entry(parent, self.position(parent) + 1, seen))
