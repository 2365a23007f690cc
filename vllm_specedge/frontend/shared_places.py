"""The places that all API processes of a server have taken, in one file that they share with its engines.

Rule 1: it is read and written under a lock (flock(2)), which the system lets go of with a process that dies.
Rule 2: places are kept by when they were taken. What an engine reports knows of all that reached it by then, so what is
older counts no more, and a process that dies with places taken takes them from nobody for longer than a report.
Rule 3: what was refused of each class only grows, until the server ends.

A file and not a counter in each process: with four API processes each would let in all that there is room for. A share
each would refuse where the connections, which the system deals out, are uneven. And not a process to ask: that takes a
round trip a request, and may be away. Here it is a lock, a read and a write of 1 KiB, some 20 microseconds.
"""

import fcntl
import os
import threading
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vllm_specedge.policy.slo import MAX_CLASSES

MAX_ENGINES: Final = 64
"""Of one machine; of more, some share places, and fewer requests are let in than could be."""
SLICE_S: Final = 0.05
NUM_SLICES: Final = 64
"""So places are known for 3.2 s, longer than a report counts."""
_WORD_BYTES: Final = array("q").itemsize
_BLOCK: Final = 2 * NUM_SLICES
"""Words of an engine: of each slice its number, and the places taken in it."""
_SIZE_BYTES: Final = _WORD_BYTES * (MAX_CLASSES + MAX_ENGINES * _BLOCK)


@dataclass(frozen=True, slots=True)
class Place:
    """One that was taken at an engine, in this slice of time."""

    engine: int
    slice_number: int


class SharedPlaces:
    """The file, opened. Times are the machine's monotonic clock, which its processes have in common."""

    def __init__(self, path: Path) -> None:
        """Made by whoever comes first. Raises OSError."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._threads = threading.Lock()
        """A lock of the system's is one process's, whichever of its threads."""
        try:
            with self.locked():
                if os.fstat(self._file).st_size < _SIZE_BYTES:
                    os.pwrite(self._file, bytes(_SIZE_BYTES), 0)  # all its blocks: later writes need no more room
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._file)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """What is read within it stays true until its end."""
        with self._threads:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    # -- places, under the lock ------------------------------------------------------------------------------------

    def taken(self, engine: int, since_s: float) -> int:
        """Places taken at an engine since then, the slice of that moment included."""
        slices, since = self._read(_at(engine), _BLOCK), int(since_s / SLICE_S)
        return sum(slices[index + 1] for index in range(0, _BLOCK, 2) if slices[index] >= since)

    def take(self, engine: int, now_s: float) -> Place:
        number = int(now_s / SLICE_S)
        at = _at(engine) + 2 * (number % NUM_SLICES)
        then, taken = self._read(at, 2)
        self._write(at, (number, taken + 1 if then == number else 1))
        return Place(engine, number)

    def give_back(self, place: Place) -> None:
        at = _at(place.engine) + 2 * (place.slice_number % NUM_SLICES)
        then, taken = self._read(at, 2)
        if then == place.slice_number:
            self._write(at, (then, max(0, taken - 1)))

    # -- what was refused: written under the lock ------------------------------------------------------------------

    def refuse(self, class_number: int) -> None:
        self._write(class_number, (self._read(class_number, 1)[0] + 1,))

    def refused(self) -> Sequence[int]:
        """Requests so far, by class number. Without the lock: words that only grow are read whole, and an engine never
        waits for a front."""
        return self._read(0, MAX_CLASSES)

    # -- the file --------------------------------------------------------------------------------------------------

    def _read(self, at: int, num_words: int) -> "array[int]":
        words = array("q")
        words.frombytes(os.pread(self._file, num_words * _WORD_BYTES, at * _WORD_BYTES))
        return words

    def _write(self, at: int, words: Sequence[int]) -> None:
        os.pwrite(self._file, array("q", words).tobytes(), at * _WORD_BYTES)


def _at(engine: int) -> int:
    return MAX_CLASSES + engine % MAX_ENGINES * _BLOCK
