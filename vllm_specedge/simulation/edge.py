"""An edge in virtual time, and a draft model with a given acceptance rate."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import InitVar, dataclass, field
from math import inf

from edge_client.drafters import Candidate, DraftSequence
from edge_client.drafting.jobs import Job, Said, Sequences, run_pass
from edge_client.drafting.pacing import Pace
from edge_client.drafting.speculation import MAX_KEPT, Speculation
from vllm_specedge.simulation.clock import VirtualTime
from vllm_specedge.simulation.models import SimulatedTarget, chance, key_of
from vllm_specedge.simulation.scenario import EdgeModel, Scenario
from vllm_specedge.wire.codec import Frame, encode
from vllm_specedge.wire.frames import Bye, Ping, Pong, Propose, Welcome

MAX_CONTEXT_TOKENS = 1 << 20
DRAFTING = 0
"""Purpose of random numbers in `key_of`: a draft. The simulation's own purposes follow after it."""


class SimulatedDraft:
    """A draft model that is right with a given probability, and knows this probability."""

    def __init__(self, target: SimulatedTarget, model: EdgeModel) -> None:
        self.target = target
        self._acceptance, self._branch = model.acceptance, model.branch
        missed = 1.0 - model.acceptance
        self._claims = (model.acceptance, missed * model.branch, missed * (1.0 - model.branch) * 0.3)
        """The probabilities that it gives to its candidates."""

    def open(self) -> DraftSequence:
        return _SimulatedSequence(self)

    def candidates(self, key: int, drafting: int, position: int, width: int) -> list[Candidate]:
        """The candidates at a position; the keys are the request's. At position 0, which stands for a context that the
        target would not have written, candidates are useless."""
        if not position:
            return [Candidate(i, self._claims[i]) for i in range(width)]
        vocab_size, right = self.target.vocab_size, self.target.token(key, position)
        other = right + 1
        if chance(drafting, 2 * position) < self._acceptance:
            tokens = (right, other, right + 2)
        elif chance(drafting, 2 * position + 1) < self._branch:
            tokens = (other, right, right + 2)
        else:
            tokens = (other, right + 2, right + 3)
        return [Candidate(tokens[i] % vocab_size, self._claims[i]) for i in range(width)]


class _SimulatedSequence(DraftSequence):
    """A context. Each entry is its position if it is on the target's path, else -1."""

    def __init__(self, draft: SimulatedDraft) -> None:
        self._draft = draft
        self._entries: list[int] = []
        self._key = self._drafting = -1

    def keep(self, length: int, moved: Sequence[int] = ()) -> None:
        entries = self._entries
        if moved:
            entries[length:] = [entries[entry] for entry in moved]
        else:
            del entries[length:]

    def append(self, tokens: Sequence[int], width: int) -> list[Candidate]:
        target, entries = self._draft.target, self._entries
        if not entries:
            request = target.named(tokens)
            self._key, self._drafting = target.key(request), key_of(target.seed, request, DRAFTING)
            entries += range(SimulatedTarget.NUM_NAMING)
            tokens = tokens[SimulatedTarget.NUM_NAMING :]
        for token in tokens:
            entries.append(self._follow(entries[-1], token))
        return self._said(entries[-1], width)

    def branch(self, tokens: Sequence[int], parents: Sequence[int], width: int) -> list[list[Candidate]]:
        entries = self._entries
        entries += [self._follow(entries[parent], token) for token, parent in zip(tokens, parents, strict=True)]
        return [self._said(entry, width) for entry in entries[-len(tokens) :]]

    def _follow(self, entry: int, token: int) -> int:
        return entry + 1 if entry >= 0 and self._draft.target.token(self._key, entry + 1) == token else -1

    def _said(self, entry: int, width: int) -> list[Candidate]:
        return self._draft.candidates(self._key, self._drafting, entry + 1, width)


@dataclass(slots=True)
class VirtualEdge:
    """An edge in virtual time: drives a Speculation as edge_client/client.py does."""

    time: VirtualTime
    speculation: Speculation
    open_sequence: InitVar[Callable[[], DraftSequence]]
    pass_s: Callable[[int], float]
    """Seconds of a forward pass by its tokens."""
    free_s: Callable[[float], float] = lambda now_s: now_s
    """The time from which on the edge works, given the present time."""
    send: Callable[[Frame], None] = lambda frame: None
    _sequences: Sequences = field(init=False)
    _is_busy: bool = False
    _wakes_s: float = inf

    def __post_init__(self, open_sequence: Callable[[], DraftSequence]) -> None:
        self._sequences = Sequences(open_sequence, self.speculation.needs)

    def receive(self, frame: Frame) -> None:
        self._when_free(self._receive, frame)

    def _when_free(self, action: Callable[..., None], *arguments: object) -> None:
        now_s = self.time.now_s
        free_s = self.free_s(now_s)
        if free_s <= now_s:
            action(*arguments)
        elif free_s < inf:
            self.time.at(free_s, action, *arguments)

    def _receive(self, frame: Frame) -> None:
        match frame:
            case Welcome():
                self.speculation.vocab_size = frame.vocab_size
            case Ping():
                self.send(Pong(frame.stamp))
            case Bye():
                pass
            case _:
                self._say(self.speculation.receive(frame, self.time.now_s))
                self._draft()

    def _say(self, frames: Iterable[Frame]) -> None:
        for frame in frames:
            if isinstance(frame, Propose):
                self.speculation.pace.sent(len(encode(frame)))
            self.send(frame)

    def _draft(self) -> None:
        if self._is_busy:
            return
        now_s = self.time.now_s
        self._say(self.speculation.poll(now_s))
        jobs = self.speculation.next_pass()
        if not jobs:
            self._rest()
            return
        self._is_busy = True
        said = run_pass(jobs, self._sequences.of(jobs))
        num_rows = sum(len(job.tokens) for job in jobs)
        self.time.after(self.pass_s(num_rows), self._when_free, self._drafted, jobs, said, now_s)

    def _drafted(self, jobs: Sequence[Job], said: list[Said], started_s: float) -> None:
        self._is_busy = False
        now_s = self.time.now_s
        self._say(self.speculation.drafted(jobs, said, now_s - started_s, now_s))
        self._draft()

    def _rest(self) -> None:
        due_s = self.speculation.due_s
        if due_s is not None and due_s < self._wakes_s:
            self._wakes_s = due_s
            self.time.at(due_s, self._when_free, self._wake)

    def _wake(self) -> None:
        self._wakes_s = inf
        self._draft()


def speculation(scenario: Scenario) -> Speculation:
    """The Speculation of an edge in a scenario."""
    model = scenario.edge
    return Speculation(
        MAX_CONTEXT_TOKENS,
        max_width=model.max_width,
        max_requests=scenario.edge_capacity,
        max_kept=MAX_KEPT,
        pace=Pace(rtt_s=scenario.rtt_s, uplink_bytes_per_token=model.uplink_bytes_per_token),
        max_shared_rows=model.max_shared_rows,
    )
