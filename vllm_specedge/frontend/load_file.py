"""What an engine tells the front of its load: a file beside its socket, written some times a second."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from vllm_specedge.policy.slo import DEFAULT_CLASS

LOAD_VARIABLE = "SPECEDGE_LOAD"
"""The directory of the engines' load files; set by the front end when there are targets, inherited by its engines."""
PLACES, CLASSES = "places", "classes"
"""What else is in it: what the API processes have taken, and how they tell classes apart."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one engine could take on."""

    said_s: float
    """On the machine's monotonic clock."""
    room: Mapping[str, int] = field(default_factory=dict)
    """By class, how many more requests would meet their targets, and leave to others theirs."""
    unserved: frozenset[str] = frozenset()
    """The classes whose targets this engine could not meet with nothing else to do."""
    retry_after_s: int = 1

    def room_of(self, class_: str) -> int:
        return self.room.get(class_, self.room.get(DEFAULT_CLASS, 0))


_read = msgspec.json.Decoder(Load).decode


@dataclass(frozen=True, slots=True)
class LoadFile:
    """That of one engine."""

    path: Path

    def write(self, load: Load) -> None:
        """What cannot be written (a full disk) is left out: what was said before grows old, and then all are let in."""
        new = self.path.with_suffix(".new")
        with suppress(OSError):
            new.write_bytes(msgspec.json.encode(load))
            new.replace(self.path)

    def read(self) -> Load:
        """Raises OSError, or ValueError for what no engine of this release writes."""
        return _read(self.path.read_bytes())
