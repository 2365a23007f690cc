"""The frames between edge and gateway (docs/protocol.md).

Rule: a frame states facts (which tokens, at which position); the receiver computes whatever follows from them.
`codec` encodes frames as bytes; `engine_frames` has the further frames between engine and gateway.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

PROTOCOL_VERSION = 1
MEDIA_TYPE = "application/vnd.specedge.frames"

MAX_TOKENS_PER_FRAME = 1024
"""A longer run of tokens (a prompt) is sent as several Commit frames, so that no frame delays those behind it."""
MAX_FRAME_BYTES = 8192
"""Holds MAX_TOKENS_PER_FRAME numbers of 5 bytes and every other field at its largest."""
MAX_BRANCHES = 64
MAX_TEXT_BYTES = 512
MAX_DATA_BYTES = 4096
MAX_UINT32 = 2**32 - 1


class Coded:
    """A kind of frame, by its code on the wire."""

    __slots__ = ()
    CODE: ClassVar[int]

    def __init_subclass__(cls, code: int | None = None) -> None:
        if code is not None:  # a dataclass with slots is created a second time, without the argument
            cls.CODE = code


@dataclass(frozen=True, slots=True)
class Greet(Coded, code=1):
    """Gateway to edge, first: the key that ties the uplink to this downlink, and the gateway's protocol version."""

    connection: str
    version: int


@dataclass(frozen=True, slots=True)
class Hello(Coded, code=2):
    """Edge to gateway, first: its identity and the vocabulary it can draft for."""

    version: int
    client: str
    name: str
    role: str
    fingerprint: str
    """Fingerprint of the draft's tokenizer (`fingerprint.py`); empty for a drafter that needs none, such as n-grams."""
    max_requests: int


@dataclass(frozen=True, slots=True)
class Welcome(Coded, code=3):
    """Gateway to edge: admitted. A request that names `session` is drafted for by this edge only."""

    session: str
    model: str
    vocab_size: int
    heartbeat_ms: int


@dataclass(frozen=True, slots=True)
class Open(Coded, code=4):
    """Gateway to edge: a request is yours to draft for.

    Its first `num_tokens` token ids follow as Commits from position 0. At most `max_draft` draft tokens are verified
    at once; a proposal may end at most `credit` tokens past the last commit. `session` is empty for a pooled request.
    `sampling`: how the target samples it (`sampling.Sampling`); empty: it is greedy, or a draft cannot follow it.
    """

    request: int
    num_tokens: int
    max_draft: int
    credit: int
    session: str
    sampling: tuple[int, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Commit(Coded, code=5):
    """The decided tokens at positions base, base + 1, ...: of the prompt, or chosen by the target."""

    request: int
    base: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Close(Coded, code=6):
    """The end of a request, in either direction: no more frames about it. `reason` is a CloseReason."""

    request: int
    reason: int


class CloseReason:
    """Values of `Close.reason`; a receiver treats unknown ones as FINISHED."""

    FINISHED = 0
    DECLINED = 1
    GAP = 2
    MOVED = 3


@dataclass(frozen=True, slots=True)
class Propose(Coded, code=7):
    """Draft tokens for positions base, base + 1, ...; no tokens: the edge has no draft for `base`, do not wait.

    `tokens` is a run of the trunk, followed by the tokens of branches. `branches` holds two numbers for each branch:
    how many positions before the end of the run it leaves the trunk, and how many of the tokens are its own.
    """

    request: int
    base: int
    tokens: tuple[int, ...]
    branches: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError if the branches do not add up to the tokens, or if no token of their trunk comes first."""
        if not self.branches:
            return
        num_trunk = len(self.tokens) - sum(self.branches[1::2])
        if num_trunk < 0 or len(self.branches) % 2 or max(self.branches[::2]) > self.base + num_trunk:
            raise ValueError("a proposal's branches do not add up to its tokens")
        if not num_trunk:
            raise ValueError("a proposal with branches must start with a token of their trunk")

    @property
    def num_drafted(self) -> int:
        """Number of draft tokens: all but the known one in front."""
        return max(0, len(self.tokens) - 1)

    @property
    def runs(self) -> list[tuple[int, tuple[int, ...]]]:
        """Base and tokens of the trunk's run and of each branch."""
        num_trunk = len(self.tokens) - sum(self.branches[1::2])
        end = self.base + num_trunk
        runs, at = [(self.base, self.tokens[:num_trunk])], num_trunk
        for back, length in zip(self.branches[::2], self.branches[1::2], strict=True):
            runs.append((end - back, self.tokens[at : at + length]))
            at += length
        return runs


@dataclass(frozen=True, slots=True)
class Ping(Coded, code=8):
    """Either side, any time once live: the peer answers with a Pong with the same stamp."""

    stamp: int


@dataclass(frozen=True, slots=True)
class Pong(Coded, code=9):
    """The answer to a Ping."""

    stamp: int


@dataclass(frozen=True, slots=True)
class Bye(Coded, code=10):
    """The last frame of a connection: why (an errors.ByeCode), and a sentence for a person."""

    code: int
    text: str


EdgeFrame: TypeAlias = Greet | Hello | Welcome | Open | Commit | Close | Propose | Ping | Pong | Bye
"""All frames between an edge and its gateway."""


def bye(code: int, text: str) -> Bye:
    """A Bye with its text cut to the limit, as the names in it may be long."""
    return Bye(code, text.encode()[:MAX_TEXT_BYTES].decode(errors="ignore"))


def commits(request: int, base: int, tokens: Sequence[int]) -> Iterator[Commit]:
    """A run of tokens of any length as Commits that each fit a frame."""
    for start in range(0, len(tokens), MAX_TOKENS_PER_FRAME):
        yield Commit(request, base + start, tuple(tokens[start : start + MAX_TOKENS_PER_FRAME]))


def num_equal(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix of two runs of tokens."""
    pairs = zip(one, other, strict=False)
    return next((i for i, pair in enumerate(pairs) if pair[0] != pair[1]), min(len(one), len(other)))
