"""The places that all API processes of a server have taken, in one file that they share with its engines.

Rule 1: the file is read and written under a lock (flock(2)), which the system releases if a process dies. One that is
stopped while it holds the lock does not stop the others: after LOCK_LIMIT_S they count without it.
Rule 2: places are stored by the time at which they were taken. An engine's report includes all requests that reached it
by then, so older places no longer count, and a dead process blocks its places for no longer than a report.
Rule 3: the count of refused requests of each class only grows, until the server ends.

Why a file? With a counter in each of four API processes, each would admit all that there is room for. With a share for
each, requests would be refused if the system distributes connections unevenly. A process to ask costs a round trip per
request, and may be down. The file costs a lock, a read and a write of 1 KiB, some 20 microseconds.
"""

import fcntl
import os
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vllm_specedge.policy.slo import MAX_CLASSES

MAX_ENGINES: Final = 64
"""Maximum engines of one machine. If there are more, some share places, and fewer requests are admitted than possible.
"""
SLICE_S: Final = 0.05
NUM_SLICES: Final = 64
"""Slices kept: 3.2 s, longer than a report counts."""
LOCK_LIMIT_S: Final = 0.5
"""Time to wait for the lock, which is normally held for 20 microseconds. A process waits this long once; it then tries
the lock without waiting until it is free again."""
LOCK_PAUSE_S: Final = 0.0002
_WORD_BYTES: Final = array("q").itemsize
_BLOCK: Final = 2 * NUM_SLICES
"""Words per engine: for each slice its number and the places taken in it."""
_SIZE_BYTES: Final = _WORD_BYTES * (MAX_CLASSES + MAX_ENGINES * _BLOCK)


@dataclass(frozen=True, slots=True)
class Place:
    """A place taken at an engine in this slice of time."""

    engine: int
    slice_number: int


class SharedPlaces:
    """The open file. Times are on the machine's monotonic clock, which all its processes share."""

    def __init__(self, path: Path) -> None:
        """Open the file; the first process creates it. Raises OSError."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._threads = threading.Lock()
        """The system's lock belongs to a process, so threads need their own."""
        self._is_stuck = False
        """The lock's holder stood still when it was last waited for."""
        try:
            with self.locked():
                if os.fstat(self._file).st_size < _SIZE_BYTES:
                    # Allocates all blocks: later writes need no more space.
                    os.pwrite(self._file, bytes(_SIZE_BYTES), 0)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._file)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock: values read inside stay valid until its end, unless the lock's holder stands still."""
        with self._threads:
            is_held = self._lock()
            try:
                yield
            finally:
                if is_held:
                    fcntl.flock(self._file, fcntl.LOCK_UN)

    def _lock(self) -> bool:
        """Take the lock, or give up on it."""
        end_s = time.monotonic() + (0.0 if self._is_stuck else LOCK_LIMIT_S)
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._is_stuck = time.monotonic() >= end_s
                if self._is_stuck:
                    return False
                time.sleep(LOCK_PAUSE_S)
            else:
                self._is_stuck = False
                return True

    # -- places, under the lock ------------------------------------------------------------------------------------

    def taken(self, engine: int, since_s: float) -> int:
        """Places taken at an engine since that time, its slice included."""
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

    # -- refused requests: written under the lock ------------------------------------------------------------------

    def refuse(self, class_number: int) -> None:
        self._write(class_number, (self._read(class_number, 1)[0] + 1,))

    def refused(self) -> Sequence[int]:
        """Refused requests so far, by class number. Read without the lock, as words that only grow are read whole; an
        engine never waits for an API process."""
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
