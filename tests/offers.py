"""Edges' proposals with their pasts: all that an engine may offer to its target. Independent of the proposal tree."""

from collections import defaultdict
from collections.abc import Sequence

from vllm_specedge.wire.frames import Propose

Path = tuple[int, tuple[int, ...]]
"""The position of its first token, and its tokens, of which the first is the past that it was drafted for."""


class Offers:
    """The proposals that reached an engine, by the number of their request."""

    def __init__(self) -> None:
        self._paths: dict[int, list[Path]] = defaultdict(list)

    def proposed(self, frame: Propose) -> None:
        """Record a proposal: the trunk is a path, and each branch together with the tokens before it."""
        (base, trunk), *branches = frame.runs
        paths = [(base, trunk)]
        for at, tokens in branches:
            paths.append((base, (*trunk[: at - base], *tokens)) if at > base else (at, tokens))
        self._paths[frame.request] += paths

    def were_proposed(self, number: int, tokens: Sequence[int], draft: Sequence[int]) -> bool:
        """Whether each token of a draft after `tokens` is in a path that agrees with all tokens before it."""
        whole = [*tokens, *draft]
        return all(self._is_on_a_path(number, whole[: end + 1]) for end in range(len(tokens), len(whole)))

    def _is_on_a_path(self, number: int, whole: list[int]) -> bool:
        last = len(whole) - 1
        return any(
            base < last < base + len(path) and list(path[: last - base + 1]) == whole[base:]
            for base, path in self._paths[number]
        )
