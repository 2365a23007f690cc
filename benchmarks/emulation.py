"""A pseudo language model and its step times on an accelerator, served by emulated_worker.py. Pure.

The model has a fixed token at each position of each request (models.SimulatedTarget), so the prompt determines the
right answer: every run can be checked token by token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vllm_specedge.simulation.models import Server, SimulatedTarget

SERVER_VARIABLE = "SPECEDGE_EMULATED"
"""Environment variable for the worker: the name of one of models.SERVERS."""
SLOWER_VARIABLE = "SPECEDGE_EMULATED_SLOWER"
"""Environment variable: factor by which steps are longer than modelled; see emulated.py."""
SEED = 20_252
VOCAB_SIZE = 49_152
"""Vocabulary size of SmolLM2, whose tokenizer the front end uses."""


def target() -> SimulatedTarget:
    return SimulatedTarget(SEED, VOCAB_SIZE)


@dataclass(slots=True)
class _Known:
    key: int
    tokens: list[int]


@dataclass(slots=True)
class PseudoModel:
    """The requests in an engine's cache."""

    target: SimulatedTarget = field(default_factory=target)
    _requests: dict[str, _Known] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._requests)

    def open(self, id_: str, prompt: Sequence[int]) -> None:
        self._requests[id_] = _Known(self.target.key(self.target.named(prompt)), list(prompt))

    def close(self, id_: str) -> None:
        self._requests.pop(id_, None)

    def step(
        self, scheduled: Mapping[str, int], computed: Mapping[str, int], drafts: Mapping[str, Sequence[int]]
    ) -> dict[str, list[int]]:
        """Output tokens of each request. `scheduled`: tokens in this step, `computed`: tokens before it, by request;
        `drafts`: the scheduled tokens that are drafts. Empty if only a part of a prompt was computed."""
        return {
            id_: self._said(self._requests[id_], computed[id_] + num_tokens, drafts.get(id_, ()))
            for id_, num_tokens in scheduled.items()
        }

    def _said(self, known: _Known, end: int, draft: Sequence[int]) -> list[int]:
        position = len(known.tokens)
        if end < position + len(draft):
            return []
        said: list[int] = []
        for guess in [*draft, None]:
            said.append(self.target.token(known.key, position + len(said)))
            if guess != said[-1]:
                break
        known.tokens += said
        return said


@dataclass(slots=True)
class Pacer:
    """End times of emulated steps, and the engine's time between an output and the next step that it starts.

    With asynchronous scheduling another step is computed during that time, and the device waits only if it is longer.
    """

    server: Server
    slower: float = 1.0
    num_steps: int = 0
    modelled_s: float = 0.0
    between_s: float = 0.0
    """Total time from the output of a step to the start of the next one, if requests were left to continue."""
    num_between: int = 0
    idle_s: float = 0.0
    """Part of `between_s` during which the device had no step."""
    _ended_s: float | None = None
    _busy_until_s: float = 0.0

    def start(self, requests: int, tokens: int, is_verifying: bool, has_more: bool, now_s: float) -> float:
        """Start a step; returns its end time. `has_more`: some of its requests were in the previous step."""
        if not has_more:
            self._ended_s = None  # ahead of the first output, a second step may start
        if self._ended_s is not None:
            self.between_s += now_s - self._ended_s
            self.num_between += 1
            self.idle_s += max(0.0, now_s - self._busy_until_s)
        step_s = self.slower * self.server.step_s(requests, tokens, is_verifying)
        self.num_steps += 1
        self.modelled_s += step_s
        self._busy_until_s = max(now_s, self._busy_until_s) + step_s
        return self._busy_until_s

    def end(self, now_s: float) -> None:
        self._ended_s = now_s

    def report(self) -> dict[str, float]:
        """Totals since the start."""
        return {
            "num_steps": self.num_steps,
            "modelled_s": self.modelled_s,
            "between_s": self.between_s,
            "num_between": self.num_between,
            "idle_s": self.idle_s,
        }
