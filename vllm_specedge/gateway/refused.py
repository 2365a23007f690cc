"""A request over HTTP that is turned away."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(eq=False)
class Refused(Exception):
    """Answered with this status, and a sentence for whoever asked."""

    status: int
    text: str
    headers: Mapping[str, str] = field(default_factory=dict)
