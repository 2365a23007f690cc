"""Slots of a cache that all contexts share: which of them hold a context's entries, and which an entry attends to."""

import heapq
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_client.drafters import CacheFullError
from edge_client.drafters.entries import Entries

Numbers = NDArray[np.int64]
Truths = NDArray[np.bool_]

LEAST_SLOTS = 256
MAX_SLOTS = 1 << 16
"""2 GB for a draft with 32 KB per token, such as Llama 3.2 1B. Requests longer than half of them are declined."""
TRASH = 0
"""The slot that padding rows write to; no other row reads it."""


class Slots:
    """The slots 0, 1, ... of a cache. The lowest free ones are taken first, so that those in use stay together."""

    def __init__(self) -> None:
        self.size = LEAST_SLOTS
        """Slots of the cache: a power of two."""
        self._free = list(range(TRASH + 1, self.size))
        self._abandoned: deque[list[int]] = deque()
        self._num_of_stretch = [0] * (self.size // LEAST_SLOTS)
        """Number of slots in use in each stretch of LEAST_SLOTS."""
        self._positions = np.zeros(self.size, dtype=np.int64)
        """For each slot, the position of its entry in its text."""

    def take(self, number: int) -> list[int]:
        """Take free slots; the cache grows if necessary. Raises CacheFullError."""
        while self._abandoned:
            self.give_back(self._abandoned.popleft())
        while len(self._free) < number:
            if self.size >= MAX_SLOTS:
                raise CacheFullError(f"no room for {number} tokens in {MAX_SLOTS} slots")
            for slot in range(self.size, 2 * self.size):
                heapq.heappush(self._free, slot)
            self.size *= 2
            self._positions = np.pad(self._positions, (0, self.size // 2))
            self._num_of_stretch += [0] * len(self._num_of_stretch)
        taken = [heapq.heappop(self._free) for _ in range(number)]
        for slot in taken:
            self._num_of_stretch[slot // LEAST_SLOTS] += 1
        return taken

    def give_back(self, slots: Sequence[int]) -> None:
        for slot in slots:
            heapq.heappush(self._free, slot)
            self._num_of_stretch[slot // LEAST_SLOTS] -= 1

    def abandon(self, slots: list[int]) -> None:
        """Give slots back from any thread; the thread that takes slots frees them."""
        self._abandoned.append(slots)

    def note(self, slots: Numbers, positions: Numbers) -> None:
        """Record the positions of the entries in these slots, for sliding windows."""
        self._positions[slots] = positions

    def in_window(self, seen: Truths, positions: Numbers, window: int) -> Truths:
        """The part of `seen` that is less than `window` positions before each row: [rows, extent]."""
        is_near: Truths = positions[:, None] - self._positions[None, : seen.shape[1]] < window
        return seen & is_near

    @property
    def extent(self) -> int:
        """A power of two that is above all slots in use."""
        used = next((i for i in range(len(self._num_of_stretch) - 1, 0, -1) if self._num_of_stretch[i]), 0) + 1
        return LEAST_SLOTS << (used - 1).bit_length()


class SlotEntries:
    """The entries of one context and the slot of each. An entry never moves to another slot if its number changes."""

    def __init__(self, slots: Slots) -> None:
        self._entries = Entries()
        self._slots = slots
        self._held: list[int] = []
        self._row = np.zeros(slots.size, dtype=np.bool_)
        """True for the slots of the first `_num_shown` entries."""
        self._num_shown = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __del__(self) -> None:
        self._slots.abandon(self._held)

    def keep(self, length: int, moved: Sequence[int]) -> None:
        self._entries.keep(length, moved)
        self._show(min(self._num_shown, length))
        kept = [self._held[entry] for entry in moved]
        self._slots.give_back(list(set(self._held[length:]) - set(kept)))
        self._held[length:] = kept

    def append(self, count: int) -> None:
        self._entries.append(count)
        self._held += self._slots.take(count)

    def branch(self, parents: Sequence[int]) -> None:
        self._entries.branch(parents)
        self._held += self._slots.take(len(parents))

    def slots(self, start: int) -> list[int]:
        """Slots of the entries from `start` on."""
        return self._held[start:]

    def positions(self, start: int) -> list[int]:
        """Positions in the text of the entries from `start` on."""
        return [self._entries.position(entry) for entry in range(start, len(self))]

    def seen(self, start: int) -> Truths:
        """Whether the entries from `start` on attend to a slot: [entries, extent]."""
        extent = self._slots.extent
        if len(self._row) < extent:
            self._row = np.pad(self._row, (0, extent - len(self._row)))
        is_chain, trunk = self._entries.is_chain, self._entries.trunk
        self._show(start if is_chain else trunk)
        rows = np.repeat(self._row[None, :extent], len(self) - start, axis=0)
        if is_chain:
            rows[:, self._held[start:]] = np.tri(len(rows), dtype=np.bool_)
        else:
            rows[:, self._held[trunk:]] = [self._entries.seen(entry) for entry in range(start, len(self))]
        return rows

    def _show(self, number: int) -> None:
        """Make `_row` true for the slots of the first `number` entries only."""
        self._row[np.array(self._held[number : self._num_shown], dtype=np.int64)] = False
        self._row[np.array(self._held[self._num_shown : number], dtype=np.int64)] = True
        self._num_shown = number
