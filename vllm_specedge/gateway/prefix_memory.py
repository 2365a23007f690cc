"""A memory of which edge has drafted for which context prefix. Pure."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

MAX_EXTRA_LOAD = 1
"""How many requests more than the least loaded edge an edge with most of a context may have. With 0, two edges with
alternating loads would swap their conversations. With more, conversations would pile up on one edge, and sharing it for
a whole answer costs more than prefilling a context once."""


@dataclass(slots=True, eq=False)
class PrefixMemory:
    """The edge that last drafted for each context prefix: it may still have this part in its cache.

    Keeps the `max_kept` most recent hashes of 8 bytes, and looks at the first `max_blocks` whole blocks of
    `block_tokens` tokens of a context. This takes some 60 microseconds at most, less than sending such a context. There
    is no clock: an edge may have dropped its cache meanwhile. A wrong entry (for that reason, by a collision, or from
    users who fill this with their own contexts) only costs the edge a cold prefill, as the choice is among edges that
    may have the request anyway.
    """

    block_tokens: int = 64
    max_blocks: int = 64
    max_kept: int = 4096
    _edges: OrderedDict[bytes, int] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._edges)

    def remember(self, tokens: "array[int]", edge: int) -> None:
        """Record that this edge now has all these tokens."""
        for digest in self._digests(tokens):
            self._edges[digest] = edge
            self._edges.move_to_end(digest)
        while len(self._edges) > self.max_kept:
            self._edges.popitem(last=False)

    def holders(self, tokens: "array[int]") -> Iterator[tuple[float, int]]:
        """Edges with a prefix of a context, longest first, each with its share of the tokens that are looked at."""
        num_looked_at = min(len(tokens), self.max_blocks * self.block_tokens)
        digests = self._digests(tokens)
        for num_blocks in range(len(digests), 0, -1):
            edge = self._edges.get(digests[num_blocks - 1])
            if edge is not None:
                yield num_blocks * self.block_tokens / num_looked_at, edge

    def choose(self, tokens: "array[int]", loads: Mapping[int, int]) -> int | None:
        """The edge that has the most of a context and is not clearly busier. `loads`: each edge's number of requests.

        Less than half of a context, such as a system prompt, is no reason to take a busier edge.
        """
        least = min(loads.values())
        for part, edge in self.holders(tokens):
            extra_load = MAX_EXTRA_LOAD if part >= 0.5 else 0
            if edge in loads and loads[edge] <= least + extra_load:
                return edge
        return None

    def forget(self, edge: int) -> None:
        """Forget an edge that has left. Scans all entries."""
        self._edges = OrderedDict((digest, other) for digest, other in self._edges.items() if other != edge)

    def _digests(self, tokens: "array[int]") -> list[bytes]:
        """Digests of the first block, of the first two, and so on: each covers all tokens up to its block's end."""
        # Not Python's `hash`: users choose the tokens, and with this hash nobody finds a collision on purpose.
        state = hashlib.blake2b(digest_size=8)
        digests: list[bytes] = []
        for index in range(min(len(tokens) // self.block_tokens, self.max_blocks)):
            state.update(tokens[index * self.block_tokens : (index + 1) * self.block_tokens])
            digests.append(state.digest())
        return digests
