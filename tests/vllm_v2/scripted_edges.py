"""Edges that know the target's answers, in this process: they replace an engine's link to its gateway."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.engine_frames import Assign, Edges, EngineOpen
from vllm_specedge.wire.frames import Close, Commit, Propose

Draft = Callable[[Sequence[int]], Sequence[int]]
"""The draft to propose after these tokens."""


@dataclass
class ScriptedEdges:
    """One edge, which answers each commit immediately, before the engine does anything else."""

    draft: Draft
    inbox: "deque[tuple[float, Frame]]" = field(default_factory=deque)
    num_welcomes: int = 1
    is_gone: bool = False
    """It sends nothing any more."""
    num_proposed: int = 0
    _tokens: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._say(Edges(1))

    def send(self, frames: Iterable[Frame]) -> None:
        """Receive the frames that the engine publishes."""
        for frame in frames:
            match frame:
                case EngineOpen():
                    self._tokens[frame.request] = []
                    self._say(Assign(frame.request, 1))
                case Commit():
                    known = self._tokens[frame.request]
                    known[frame.base :] = frame.tokens
                    self._propose(frame.request, known)
                case Close():
                    self._tokens.pop(frame.request, None)

    @property
    def num_open(self) -> int:
        """Requests of which they were told, and not that these are over."""
        return len(self._tokens)

    def _propose(self, request: int, known: Sequence[int]) -> None:
        draft = self.draft(known)
        if draft and not self.is_gone:
            self.num_proposed += len(draft)
            self._say(Propose(request, len(known) - 1, (known[-1], *draft)))

    def _say(self, frame: Frame) -> None:
        self.inbox.append((time.monotonic(), frame))

    # -- what a link is asked beside -------------------------------------------------------------------------------

    def wake_at(self, until_s: float) -> bool:
        del until_s
        return False

    def stop(self) -> None:
        self.is_gone = True


@dataclass
class Oracle:
    """Drafts from known answers, with every `wrong_every`-th token replaced."""

    length: int = 8
    wrong_every: int = 5
    answers: dict[tuple[int, ...], Sequence[int]] = field(default_factory=dict)
    """By prompt."""

    def __call__(self, known: Sequence[int]) -> Sequence[int]:
        for prompt, answer in self.answers.items():
            if tuple(known[: len(prompt)]) == prompt:
                at = len(known) - len(prompt)
                return [self._said(answer, position) for position in range(at, min(at + self.length, len(answer)))]
        return ()

    def _said(self, answer: Sequence[int], position: int) -> int:
        wrong = self.wrong_every and position % self.wrong_every == self.wrong_every - 1
        return (answer[position] + 1) % 256 if wrong else answer[position]


def install(monkeypatch: Any, edges: ScriptedEdges) -> None:
    """Make engines that are built from now on use these edges and no gateway."""
    monkeypatch.setattr("vllm_specedge.adapter.drafting.start_link", lambda *args, **kwargs: (edges, None))
