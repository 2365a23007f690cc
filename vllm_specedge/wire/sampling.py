"""A request's sampling parameters, which an edge needs to predict sampled tokens (docs/protocol.md, "Sampling")."""

from collections.abc import Sequence
from dataclasses import dataclass, field

SPLITMIX, MURMUR = 1, 2
"""Kinds of noise: of vLLM's CPU build, and of the V2 model runner (edge_client/drafting/noise.py)."""
_PER_UNIT = 1000
_MASK = 2**32 - 1
_NUM_FIELDS = 7


@dataclass(frozen=True, slots=True)
class Sampling:
    """A sampled request's parameters, as far as a draft can follow them."""

    temperature: float
    top_k: int
    """0: no limit."""
    top_p: float
    seed: int = field(repr=False)
    """64 bits."""
    first: int
    """Position of the first sampled token: the length of the prompt."""
    noise: int = SPLITMIX

    def fields(self) -> tuple[int, ...]:
        """The parameters as numbers on the wire."""
        heat, part = round(self.temperature * _PER_UNIT), round(self.top_p * _PER_UNIT)
        return self.noise, heat, self.top_k, part, self.first, self.seed >> 32 & _MASK, self.seed & _MASK


def sampling_of(fields: Sequence[int]) -> Sampling | None:
    """The parameters in these numbers; None: the request is greedy, or its sampling is not known."""
    if len(fields) != _NUM_FIELDS or fields[0] not in (SPLITMIX, MURMUR) or not fields[1]:
        return None
    noise, heat, top_k, part, first, high, low = fields
    return Sampling(heat / _PER_UNIT, top_k, part / _PER_UNIT, high << 32 | low, first, noise)
