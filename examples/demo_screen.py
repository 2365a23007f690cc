"""The demo's output: answers as they stream, accepted draft tokens in green, tokens per second side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

DRAFTED, OWN = "green", "default"
REFRESHES_PER_S = 5

Decode = Callable[[Sequence[int]], str]
"""The text of token ids, by the target's tokenizer."""


@dataclass
class Answer:
    """One streamed answer. A chunk is the output of one server step: accepted drafts, then a token of the target's."""

    kind: str
    question: str
    text: Text = field(default_factory=Text)
    token_ids: list[int] = field(default_factory=list)
    num_first: int = 0
    """Tokens of the first chunk, whose time is mostly prefill."""
    first_s: float = 0.0
    last_s: float = 0.0

    def take(self, content: str, token_ids: Sequence[int], at_s: float, decode: Decode) -> None:
        """Add a chunk: its text, its tokens, and its arrival time by the monotonic clock."""
        if not self.token_ids:
            self.first_s, self.num_first = at_s, len(token_ids)
        self.last_s = at_s
        self.token_ids += token_ids
        own = decode(token_ids[-1:])
        drafted = content.removesuffix(own)
        self.text.append(drafted, DRAFTED if len(token_ids) > 1 else OWN)
        self.text.append(content[len(drafted) :], OWN)

    @property
    def num_timed(self) -> int:
        """Tokens that arrived between `first_s` and `last_s`."""
        return len(self.token_ids) - self.num_first

    @property
    def seconds(self) -> float:
        return self.last_s - self.first_s


def tokens_per_s(answers: Sequence[Answer]) -> float:
    """Tokens per second of decoding; 0 before the second chunk."""
    seconds = sum(answer.seconds for answer in answers)
    return sum(answer.num_timed for answer in answers) / seconds if seconds else 0.0


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Position of the first token in which two answers differ; None if they are the same."""
    if ours == theirs:
        return None
    pairs = zip(ours, theirs, strict=False)
    return next((at for at, pair in enumerate(pairs) if pair[0] != pair[1]), min(len(ours), len(theirs)))


@dataclass
class Screen:
    """A terminal, or a log file, in which each answer appears when it is complete."""

    console: Console

    def stream(self, answer: Answer, others: Sequence[Answer]) -> Live:
        """Show an answer while the block runs; `others`: the plain answers of the same kind, for comparison."""
        headline = Text(f"{answer.kind}: ", "bold").append(answer.question.partition("\n")[0], "bold")

        def shown() -> Group:
            return Group(headline, answer.text, Text(_pace(answer, others), "dim"), Text())

        return Live(console=self.console, get_renderable=shown, refresh_per_second=REFRESHES_PER_S)


def _pace(answer: Answer, others: Sequence[Answer]) -> str:
    now = tokens_per_s([answer])
    if not others:
        return f"plain {now:.1f} tokens/s"
    plain = tokens_per_s(others)
    times = f" ({now / plain:.2f} times)" if plain else ""
    return f"plain {plain:.1f} | with an edge {now:.1f} tokens/s{times}"


@dataclass(frozen=True)
class Row:
    """Results of one kind of question, or of all, without and with an edge."""

    kind: str
    plain_tokens_per_s: float
    edge_tokens_per_s: float
    acceptance_rate: float
    """Accepted draft tokens, as a share of the verified ones."""
    tokens_per_step: float

    @property
    def speedup(self) -> float:
        return self.edge_tokens_per_s / self.plain_tokens_per_s


def table(rows: Sequence[Row]) -> Table:
    """The closing comparison."""
    shown = Table("", "plain tokens/s", "with an edge", "times", "drafts accepted", "tokens per step")
    for row in rows:
        cells = (f"{row.plain_tokens_per_s:.1f}", f"{row.edge_tokens_per_s:.1f}", f"{row.speedup:.2f}")
        shown.add_row(row.kind, *cells, f"{row.acceptance_rate:.0%}", f"{row.tokens_per_step:.2f}")
    return shown
