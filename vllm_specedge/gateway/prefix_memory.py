"""Which edge knows the beginning of which context. Pure."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

MAX_EXTRA_LOAD = 1
"""How many requests more than the least loaded edge an edge may have that knows most of a context. With 0, two edges
that take turns at being one ahead would swap their conversations; with more, conversations would pile up on an edge,
and sharing it for a whole answer costs more than reading a context once."""


@dataclass(slots=True, eq=False)
class PrefixMemory:
    """Which edge last drafted for a context that begins so: it may still have that part in its cache.

    Keeps `max_kept` hashes of 8 bytes, those used last, and looks at the first `max_blocks` whole blocks of
    `block_tokens` tokens of a context: some 60 microseconds at most, for a context that costs more to send. No clock:
    an edge may have dropped its cache meanwhile. What is wrong here (that, a collision, or users who fill this with
    contexts of their own) costs the edge a cold prefill and nothing else, for only edges that may have the request
    anyway are chosen among.
    """

    block_tokens: int = 64
    max_blocks: int = 64
    max_kept: int = 4096
    _edges: OrderedDict[bytes, int] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._edges)

    def remember(self, tokens: "array[int]", edge: int) -> None:
        """This edge has all these tokens now."""
        for digest in self._digests(tokens):
            self._edges[digest] = edge
            self._edges.move_to_end(digest)
        while len(self._edges) > self.max_kept:
            self._edges.popitem(last=False)

    def holders(self, tokens: "array[int]") -> Iterator[tuple[float, int]]:
        """Edges that know a beginning of a context, longest first, with the part that it is of what is looked at."""
        num_looked_at = min(len(tokens), self.max_blocks * self.block_tokens)
        digests = self._digests(tokens)
        for num_blocks in range(len(digests), 0, -1):
            edge = self._edges.get(digests[num_blocks - 1])
            if edge is not None:
                yield num_blocks * self.block_tokens / num_looked_at, edge

    def choose(self, tokens: "array[int]", loads: Mapping[int, int]) -> int | None:
        """Of edges with so many requests each, the one that knows most of a context and is not clearly busier.

        Knowing less than half of it, such as a system prompt, is no reason to take a busier edge.
        """
        least = min(loads.values())
        for part, edge in self.holders(tokens):
            extra_load = MAX_EXTRA_LOAD if part >= 0.5 else 0
            if edge in loads and loads[edge] <= least + extra_load:
                return edge
        return None

    def forget(self, edge: int) -> None:
        """This edge is gone. Looks at all that is kept."""
        self._edges = OrderedDict((digest, other) for digest, other in self._edges.items() if other != edge)

    def _digests(self, tokens: "array[int]") -> list[bytes]:
        """Of the first block, of the first two, and so on: each stands for all tokens up to its block's end."""
        # Not Python's `hash`: users choose the tokens, and nobody finds a second context for one of these on purpose.
        state = hashlib.blake2b(digest_size=8)
        digests: list[bytes] = []
        for index in range(min(len(tokens) // self.block_tokens, self.max_blocks)):
            state.update(tokens[index * self.block_tokens : (index + 1) * self.block_tokens])
            digests.append(state.digest())
        return digests
