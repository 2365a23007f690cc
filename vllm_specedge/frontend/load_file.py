"""An engine's load report for the API processes: a file next to its socket, written several times per second."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from vllm_specedge.policy.slo import DEFAULT_CLASS

LOAD_VARIABLE = "SPECEDGE_LOAD"
"""The directory of the engines' load files; set by the API server if there are targets, inherited by its engines."""
PLACES, CLASSES = "places", "classes"
"""Other files in it: the places that API processes have taken, and how classes are determined."""


@dataclass(frozen=True, slots=True)
class Load:
    """The further requests that one engine could take."""

    said_s: float
    """Time of the report, on the machine's monotonic clock."""
    known_s: float
    """Time at which the engine last took requests in. The report does not include later ones."""
    room: Mapping[str, int] = field(default_factory=dict)
    """By class, how many more requests would meet their targets without breaking others'."""
    unserved: frozenset[str] = frozenset()
    """The classes whose targets this engine could not meet even when idle."""
    retry_after_s: int = 1

    def room_of(self, class_: str) -> int:
        return self.room.get(class_, self.room.get(DEFAULT_CLASS, 0))


_read = msgspec.json.Decoder(Load).decode


@dataclass(frozen=True, slots=True)
class LoadFile:
    """The load file of one engine."""

    path: Path

    def write(self, load: Load) -> None:
        """Write a report. A failure (a full disk) is ignored: the old report expires, and then all are admitted."""
        new = self.path.with_suffix(".new")
        with suppress(OSError):
            new.write_bytes(msgspec.json.encode(load))
            new.replace(self.path)

    def read(self) -> Load:
        """The last report. Raises OSError, or ValueError for content that no engine of this release writes."""
        return _read(self.path.read_bytes())
