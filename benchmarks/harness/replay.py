"""An edge that drafts from recorded answers of the target, with a configured accuracy and speed.

    python benchmarks/harness/replay.py http://127.0.0.1:8100 --recordings FILE

It is the real edge client; only its draft model is replaced. (With --draft DIRECTORY not even that: then it is
`edge-client connect`, to compare the two by the same command.) Its drafts depend only on the seed, the request's prompt
and the position, so every run and every way of drafting ahead has the same draft model. Recordings may also have a
real draft's candidates at each position (recorded_draft.py); then nothing is drawn. --edges runs several edges in one
process, with a connection, a drafter and a thread each; with --stall-s each of them stalls now and then. --trace
records the start and end of each forward pass. On SIGTERM it prints the totals of all edges as one JSON line.
"""

import asyncio
import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Annotated, NamedTuple

import typer

from edge_client.client import EdgeClient
from edge_client.drafters import Candidate, Drafter, DrafterOptions
from edge_client.drafters.choose import load_drafter
from edge_client.drafters.entries import Entries
from edge_client.gateway_link import Gateway

SMOLLM2_VOCAB_SIZE = 49152
WAIT_S = 30.0
MAX_DRAWN = 1 << 13
"""Draws that a drafter caches: wrong pasts recur while they are drafted, right ones in every run."""


class Recording(NamedTuple):
    """One answer of the target, as token ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    guesses: tuple[tuple[Candidate, ...], ...] = ()
    """A draft model's candidates for each token of the answer, most probable first; none: to be drawn."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How often the draft is right after a right past. Third and later candidates never are."""

    first: float = 0.75
    """Probability that the first candidate is the target's token."""
    second: float = 0.6
    """Probability that the second one is, if the first is not."""
    seed: int = 0

    def probability(self, rank: int) -> float:
        """The draft's probability of a candidate; rank 0 is the first. Third and later ones share the rest."""
        if rank == 0:
            return self.first
        if rank == 1:
            return (1 - self.first) * self.second
        return (1 - self.first) * (1 - self.second) * 0.5 ** (rank - 1)


class Stalls:
    """Stalls of an edge: `stall_s` each, on average `every_s` from the start of one to the start of the next."""

    def __init__(self, stall_s: float, every_s: float, seed: int, now_s: float) -> None:
        if not 0 < stall_s < every_s:
            raise ValueError(f"stalls of {stall_s:g} s cannot come every {every_s:g} s")
        self._stall_s = stall_s
        self._pause_s = every_s - stall_s
        self._chance = Random(seed)
        self._start_s = now_s + self._chance.expovariate(1 / self._pause_s)

    def over_s(self, at_s: float) -> float:
        """End of work that would end at `at_s`: later if a stall covers it. Successive `at_s` must not decrease."""
        while self._start_s + self._stall_s <= at_s:
            self._start_s += self._stall_s + self._chance.expovariate(1 / self._pause_s)
        return at_s if at_s < self._start_s else self._start_s + self._stall_s


class ReplayDrafter:
    """Drafts the target's recorded answers; has no draft for other prompts, or past an answer's end."""

    fingerprint = ""
    max_context_tokens = 1 << 20

    def __init__(
        self,
        recordings: Sequence[Recording],
        accuracy: Accuracy,
        pass_s: float = 0.0,
        max_width: int = 8,
        vocab_size: int = SMOLLM2_VOCAB_SIZE,
        stalls: Stalls | None = None,
        trace: Callable[[dict[str, float]], object] | None = None,
        row_s: float = 0.0,
    ) -> None:
        """Every forward pass takes `pass_s` seconds, and `row_s` more for each row after the first; longer while it
        stalls. `trace` is called for each, with times of the monotonic clock."""
        self.max_width = max_width
        self.description = f"replay, {accuracy.first:.0%} right, {1000 * pass_s:.1f} ms per token"
        self._recordings = sorted(recordings, key=lambda recording: -len(recording.prompt))
        self._accuracy = accuracy
        self._pass_s, self._row_s = pass_s, row_s
        self._vocab_size = vocab_size
        self._stalls = stalls
        self._trace = trace
        self._longest = max((len(recording.prompt) for recording in recordings), default=0)
        # The cost of a pass besides its sleep matters, as many edges share a core: nothing is computed twice.
        self._recording = lru_cache(MAX_DRAWN)(self._find)
        self._drawn = lru_cache(MAX_DRAWN)(self._draw)

    def open(self) -> "ReplaySequence":
        return ReplaySequence(self)

    @contextmanager
    def forward_pass(self, num_rows: int) -> Iterator[None]:
        """Take the time of a pass, including the time of the block."""
        start_s = time.monotonic()
        until_s = start_s + self._pass_s + (num_rows - 1) * self._row_s
        yield
        if self._stalls is not None:
            until_s = self._stalls.over_s(max(until_s, time.monotonic()))
        time.sleep(max(0.0, until_s - time.monotonic()))
        if self._trace is not None:
            self._trace({"start_s": start_s, "end_s": time.monotonic(), "rows": num_rows})

    def candidates(self, chain: tuple[int, ...], width: int) -> list[Candidate]:
        """The draft model's candidates for the next token, most probable first."""
        recording = self._recording(chain[: self._longest])
        if recording is None:
            return []
        prompt, answer, guesses = recording
        said = chain[len(prompt) :]
        if len(said) >= len(answer):
            return []
        is_true = said == answer[: len(said)]
        # The key of a wrong past is its tokens, of a right one its length, so that branches cannot change the draw.
        right = answer[len(said)] if is_true else None
        if not guesses:
            return list(self._drawn(prompt, len(said), () if is_true else said, right, width))
        likely = guesses[len(said)][:width]
        if is_true:
            return list(likely)
        # As sure as after the true past, and wrong, as whatever follows a wrong token will be.
        drawn = self._drawn(prompt, len(said), said, None, len(likely))
        return [Candidate(wrong.token, known.probability) for wrong, known in zip(drawn, likely, strict=True)]

    def _find(self, head: tuple[int, ...]) -> Recording | None:
        """The recording with the longest prompt that is a prefix of the tokens."""
        return next((known for known in self._recordings if head[: len(known.prompt)] == known.prompt), None)

    def _draw(
        self, prompt: tuple[int, ...], num_said: int, false_past: tuple[int, ...], right: int | None, width: int
    ) -> tuple[Candidate, ...]:
        """`width` different tokens, with `right` at its rank if it is drawn. A wider draw has the same start."""
        chance = Random(repr((self._accuracy.seed, prompt, num_said, false_past)))
        is_first, is_second = chance.random() < self._accuracy.first, chance.random() < self._accuracy.second
        place = 0 if is_first else 1 if is_second else None
        tokens: list[int] = []
        while len(tokens) < width:
            token = right if right is not None and len(tokens) == place else chance.randrange(self._vocab_size)
            if token not in tokens and (token != right or len(tokens) == place):
                tokens.append(token)
        return tuple(Candidate(token, self._accuracy.probability(rank)) for rank, token in enumerate(tokens))


class ReplaySequence:
    """One request's entries, of one token each."""

    def __init__(self, drafter: ReplayDrafter) -> None:
        self._drafter = drafter
        self._tokens: list[int] = []
        self._entries = Entries()

    def __len__(self) -> int:
        return len(self._tokens)

    def chain(self, entry: int) -> tuple[int, ...]:
        """The tokens from the first one to this entry's; none for entry -1."""
        tokens = []
        while entry >= self._entries.trunk:
            tokens.append(self._tokens[entry])
            entry = self._entries.parent(entry)
        return (*self._tokens[: entry + 1], *reversed(tokens))

    def keep(self, length: int, moved: Sequence[int] = ()) -> None:
        self._entries.keep(length, moved)
        self._tokens[length:] = [self._tokens[old] for old in moved]

    def append(self, tokens: Sequence[int], width: int) -> list[Candidate]:
        with self._drafter.forward_pass(len(tokens)):
            self._entries.append(len(tokens))
            self._tokens += tokens
            return self._drafter.candidates(self.chain(len(self) - 1), width)

    def branch(self, tokens: Sequence[int], parents: Sequence[int], width: int) -> list[list[Candidate]]:
        with self._drafter.forward_pass(len(tokens)):
            if not 1 <= len(tokens) == len(parents) <= self._drafter.max_width:
                raise ValueError(f"{len(tokens)} rows in one pass, of at most {self._drafter.max_width}")
            num_before = len(self)
            self._entries.branch(parents)
            self._tokens += tokens
            return [self._drafter.candidates(self.chain(entry), width) for entry in range(num_before, len(self))]


def write_recordings(path: Path, recordings: Sequence[Recording]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(recordings))


def read_recordings(path: Path) -> list[Recording]:
    return [
        Recording(tuple(prompt), tuple(answer), tuple(tuple(Candidate(*each) for each in likely) for likely in guesses))
        for prompt, answer, guesses in json.loads(path.read_text())
    ]


async def draft(clients: Sequence[EdgeClient]) -> None:
    """Draft until SIGTERM or SIGINT, and say Bye."""
    running = asyncio.gather(*(client.run(WAIT_S) for client in clients))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, running.cancel)
    with suppress(asyncio.CancelledError):
        await running


def main(
    url: Annotated[str, typer.Argument(help="The gateway.")],
    token_file: Annotated[Path | None, typer.Option(help="File with the edge's token.")] = None,
    ca_file: Annotated[str, typer.Option(help="Certificate authority to trust.")] = "",
    recordings: Annotated[Path | None, typer.Option(help="JSON: [[prompt ids], [answer ids], [guesses]], ...")] = None,
    draft_model: Annotated[str, typer.Option("--draft", help="A draft model's directory instead of recordings.")] = "",
    first: Annotated[float, typer.Option(help="How often the first candidate is right.")] = 0.75,
    second: Annotated[float, typer.Option(help="How often the second is right if the first is not.")] = 0.6,
    pass_ms: Annotated[float, typer.Option(help="Time of a forward pass.")] = 6.0,
    row_ms: Annotated[float, typer.Option(help="Time that each row after the first adds to it.")] = 0.0,
    max_width: Annotated[int, typer.Option(help="Rows of a pass; 0: the drafter's maximum; 1: no branches.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the drafts and the stalls.")] = 0,
    edges: Annotated[int, typer.Option(help="Connections, each a separate edge.", min=1)] = 1,
    max_requests: Annotated[int, typer.Option(help="Concurrent requests of each edge.", min=1)] = 8,
    stall_s: Annotated[float, typer.Option(help="Duration of each edge's stalls; 0: none.", min=0)] = 0.0,
    stall_every_s: Annotated[float, typer.Option(help="Mean time from one stall's start to the next's.")] = 5.0,
    trace: Annotated[Path | None, typer.Option(help="Append a line of JSON per replayed pass to this file.")] = None,
) -> None:
    """Connect to a gateway and draft for it until SIGTERM."""
    file = trace.open("a", buffering=1) if trace is not None else None

    def drafter(number: int) -> Drafter:
        if recordings is None:
            return load_drafter(DrafterOptions(draft_model, device="cpu", threads=1))
        stalls = Stalls(stall_s, stall_every_s, seed + number, time.monotonic()) if stall_s else None
        write = (lambda line: file.write(json.dumps({"edge": number, **line}) + "\n")) if file else None
        known, accuracy = read_recordings(recordings), Accuracy(first, second, seed)
        return ReplayDrafter(known, accuracy, pass_ms / 1000, stalls=stalls, trace=write, row_s=row_ms / 1000)

    gateway = Gateway(url, token_file.read_text().strip() if token_file else "", ca_file)
    clients = [
        EdgeClient(gateway, drafter(number), f"replay-{number}", max_requests=max_requests, max_width=max_width)
        for number in range(edges)
    ]
    asyncio.run(draft(clients))
    totals: Counter[str] = Counter()
    for client in clients:
        for stats in client.totals:
            totals.update(asdict(stats))
    print(json.dumps(totals))


if __name__ == "__main__":
    typer.run(main)
