"""An edge that drafts from recorded answers of the target, right as often as it is told to be, at a given pace.

    python benchmarks/replay.py http://127.0.0.1:8100 --recordings FILE

It is the real edge client; only its draft model is replaced. (With --draft DIRECTORY it is not even that: then it is
`edge-client connect`, for comparing the two by the same command.) What it drafts depends on the seed, the request's
prompt and the position alone, so every run and every way of drafting ahead meets the same draft model. When it is told
to end it prints its totals as one JSON line.
"""

import asyncio
import json
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Annotated, NamedTuple

import typer

from edge_client.client import EdgeClient
from edge_client.drafters import Candidate, Drafter, DrafterOptions
from edge_client.drafters.load import load_drafter
from edge_client.link import Gateway

SMOLLM2_VOCAB_SIZE = 49152
WAIT_S = 30.0


class Recording(NamedTuple):
    """One greedy answer of the target, as token ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How often the draft is right at a position whose past is true. Its third candidates never are."""

    first: float = 0.75
    """That the most probable candidate is what the target says."""
    second: float = 0.6
    """That the second one is, where the first is not."""
    seed: int = 0

    def probability(self, rank: int) -> float:
        """What the draft claims of its candidates: 0 is the first. The third and later ones share what is left."""
        if rank == 0:
            return self.first
        if rank == 1:
            return (1 - self.first) * self.second
        return (1 - self.first) * (1 - self.second) * 0.5 ** (rank - 1)


class ReplayDrafter:
    """Knows what the target says to the recorded prompts; has nothing to say to others, or past an answer's end."""

    fingerprint = ""
    max_context_tokens = 1 << 20

    def __init__(
        self,
        recordings: Sequence[Recording],
        accuracy: Accuracy,
        pass_s: float = 0.0,
        max_width: int = 8,
        vocab_size: int = SMOLLM2_VOCAB_SIZE,
    ) -> None:
        """Every forward pass takes `pass_s` seconds, however many rows it has."""
        self.max_width = max_width
        self.description = f"replay, {accuracy.first:.0%} right, {1000 * pass_s:.1f} ms a token"
        self._recordings = sorted(recordings, key=lambda recording: -len(recording.prompt))
        self._accuracy = accuracy
        self._pass_s = pass_s
        self._vocab_size = vocab_size

    def open(self) -> "ReplaySequence":
        return ReplaySequence(self)

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Takes the time of a pass, of which what is done inside is part."""
        until_s = time.monotonic() + self._pass_s
        yield
        time.sleep(max(0.0, until_s - time.monotonic()))

    def candidates(self, chain: tuple[int, ...], width: int) -> list[Candidate]:
        """What the draft model says may follow these tokens, most probable first."""
        recording = next((known for known in self._recordings if chain[: len(known.prompt)] == known.prompt), None)
        if recording is None:
            return []
        prompt, answer = recording
        said = chain[len(prompt) :]
        if len(said) >= len(answer):
            return []
        is_true = said == answer[: len(said)]
        # A false past is known by its tokens; a true one by its length, so that branches cannot change what is drawn.
        chance = Random(repr((self._accuracy.seed, prompt, len(said), () if is_true else said)))
        tokens = self._draw(chance, answer[len(said)] if is_true else None, width)
        return [Candidate(token, self._accuracy.probability(rank)) for rank, token in enumerate(tokens)]

    def _draw(self, chance: Random, right: int | None, width: int) -> list[int]:
        """`width` different tokens, with `right` in its place if it comes at all. A wider draw starts alike."""
        is_first, is_second = chance.random() < self._accuracy.first, chance.random() < self._accuracy.second
        place = 0 if is_first else 1 if is_second else None
        tokens: list[int] = []
        while len(tokens) < width:
            token = right if right is not None and len(tokens) == place else chance.randrange(self._vocab_size)
            if token not in tokens and (token != right or len(tokens) == place):
                tokens.append(token)
        return tokens


class ReplaySequence:
    """One request's entries: a token and the entry before it, each."""

    def __init__(self, drafter: ReplayDrafter) -> None:
        self._drafter = drafter
        self._tokens: list[int] = []
        self._parents: list[int] = []

    def __len__(self) -> int:
        return len(self._tokens)

    def chain(self, entry: int) -> tuple[int, ...]:
        """The tokens from the first one to this entry's; none for entry -1."""
        tokens = []
        while entry >= 0:
            tokens.append(self._tokens[entry])
            entry = self._parents[entry]
        return tuple(reversed(tokens))

    def keep(self, length: int, moved: Sequence[int] = ()) -> None:
        kept = [*range(length), *moved]
        if kept != sorted(set(kept)) or (kept and kept[-1] >= len(self)):
            raise ValueError(f"cannot keep {length} entries and {list(moved)} of {len(self)}")
        numbers = {-1: -1} | {old: new for new, old in enumerate(kept)}
        self._parents = [numbers[self._parents[old]] for old in kept]
        self._tokens = [self._tokens[old] for old in kept]

    def append(self, tokens: Sequence[int], width: int) -> list[Candidate]:
        with self._drafter.forward_pass():
            if any(parent != entry - 1 for entry, parent in enumerate(self._parents)):
                raise ValueError("a chain is appended to a chain only")
            self._parents += range(len(self) - 1, len(self) + len(tokens) - 1)
            self._tokens += tokens
            return self._drafter.candidates(self.chain(len(self) - 1), width)

    def branch(self, tokens: Sequence[int], parents: Sequence[int], width: int) -> list[list[Candidate]]:
        with self._drafter.forward_pass():
            num_before = len(self)
            if not 1 <= len(tokens) <= self._drafter.max_width:
                raise ValueError(f"{len(tokens)} rows in one pass, of at most {self._drafter.max_width}")
            if len(parents) != len(tokens) or not all(0 <= parent < num_before for parent in parents):
                raise ValueError(f"{len(tokens)} tokens behind {list(parents)}, of {num_before} entries")
            self._tokens += tokens
            self._parents += parents
            return [self._drafter.candidates(self.chain(entry), width) for entry in range(num_before, len(self))]


def write_recordings(path: Path, recordings: Sequence[Recording]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(recordings))


def read_recordings(path: Path) -> list[Recording]:
    return [Recording(tuple(prompt), tuple(answer)) for prompt, answer in json.loads(path.read_text())]


async def draft(client: EdgeClient) -> None:
    """Draft until SIGTERM or SIGINT, and say Bye."""
    running = asyncio.create_task(client.run(WAIT_S))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, running.cancel)
    with suppress(asyncio.CancelledError):
        await running


def main(
    url: Annotated[str, typer.Argument(help="The gateway.")],
    recordings: Annotated[Path | None, typer.Option(help="JSON: [[prompt ids], [answer ids]], ...")] = None,
    draft_model: Annotated[str, typer.Option("--draft", help="A draft model's directory in their place.")] = "",
    first: Annotated[float, typer.Option(help="How often the first candidate is right.")] = 0.75,
    second: Annotated[float, typer.Option(help="How often the second is, where the first is not.")] = 0.6,
    pass_ms: Annotated[float, typer.Option(help="What one forward pass takes.")] = 6.0,
    max_width: Annotated[int, typer.Option(help="Rows of a pass; 0: as the drafter can; 1: no branches.")] = 0,
    seed: Annotated[int, typer.Option(help="Of what is drafted.")] = 0,
) -> None:
    """Connect to a gateway and draft for it until SIGTERM."""
    drafter: Drafter
    if recordings is not None:
        drafter = ReplayDrafter(read_recordings(recordings), Accuracy(first, second, seed), pass_ms / 1000)
    else:
        drafter = load_drafter(DrafterOptions(draft_model, device="cpu", threads=1))
    client = EdgeClient(Gateway(url), drafter, "replay", max_width=max_width)
    asyncio.run(draft(client))
    totals: Counter[str] = Counter()
    for stats in client.totals:
        totals.update(asdict(stats))
    print(json.dumps(totals))


if __name__ == "__main__":
    typer.run(main)
