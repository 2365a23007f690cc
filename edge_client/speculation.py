"""What an edge knows of its requests and what it drafts next. Pure: frames and drafted tokens in, frames and jobs out.

Rule 1: committed tokens are the truth. A commit that agrees with the draft costs nothing; one that disagrees rolls
back to the fork, and drafting goes on from there.
Rule 2: one job is one forward pass of the draft model, so a commit is never waited with for longer than that.
Rule 3: a draft never ends more than the granted credit past the last committed token.
"""

from dataclasses import dataclass, field

from vllm_specedge.frames import MAX_UINT32, Close, CloseReason, Commit, Frame, Open, Propose

MAX_SHORT = 3


@dataclass(frozen=True, slots=True)
class Job:
    """One forward pass for `request`: forget what follows `keep` tokens, then append `tokens` and draft one more."""

    request: int
    keep: int
    tokens: tuple[int, ...]
    stamp: int

    @property
    def end(self) -> int:
        """How many tokens the drafter holds afterwards."""
        return self.keep + len(self.tokens)


@dataclass(slots=True)
class SpeculationStats:
    """Totals over all requests since the start."""

    num_requests: int = 0
    drafted_tokens: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0
    rejected_tokens: int = 0
    committed_tokens: int = 0

    @property
    def acceptance(self) -> float | None:
        """Of the proposed tokens whose position was decided, how many the target chose too."""
        decided = self.accepted_tokens + self.rejected_tokens
        return self.accepted_tokens / decided if decided else None


@dataclass(slots=True)
class _Request:
    num_prompt: int
    credit: int
    max_draft: int
    tokens: list[int] = field(default_factory=list)
    """Committed, then drafted."""
    committed: int = 0
    sent: int = 0
    """Everything before this position is committed or has been proposed."""
    held: int = 0
    """So many of the first tokens the drafter holds."""
    stamp: int = 0
    """Counts rollbacks: a job of an older stamp drafted for a past that was not to be."""
    fork: int = 0
    """Where the last rollback since the running job began left off."""
    is_stuck: bool = False
    """The drafter has nothing to say until the next commit."""
    num_short: int = 0
    """Commits in a row that agreed, yet were shorter than what was proposed would have given."""

    @property
    def num_drafted(self) -> int:
        return len(self.tokens) - self.committed


class Speculation:
    """All requests of one connection. A new connection needs a new one."""

    def __init__(self, max_context_tokens: int, prefill_chunk_tokens: int = 256, max_requests: int = 4096) -> None:
        self.stats = SpeculationStats()
        self.vocab_size = MAX_UINT32
        self._max_context_tokens = max_context_tokens
        self._max_requests = max_requests
        self._prefill_chunk_tokens = prefill_chunk_tokens
        self._requests: dict[int, _Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def receive(self, frame: Frame) -> list[Frame]:
        """Take in one frame about requests; returns what to answer."""
        match frame:
            case Open():
                return self._open(frame)
            case Commit():
                return self._commit(frame)
            case Close():
                self._requests.pop(frame.request, None)
                return []
            case _:
                raise TypeError(frame)

    def _open(self, frame: Open) -> list[Frame]:
        is_full = len(self._requests) >= self._max_requests and frame.request not in self._requests
        if is_full or frame.num_tokens + frame.credit > self._max_context_tokens:
            return [Close(frame.request, CloseReason.DECLINED)]
        self._requests[frame.request] = _Request(frame.num_tokens, frame.credit, frame.max_draft)
        self.stats.num_requests += 1
        return []

    def _commit(self, frame: Commit) -> list[Frame]:
        request = self._requests.get(frame.request)
        if request is None:
            return []
        end = frame.base + len(frame.tokens)
        reason = None
        if frame.base > request.committed:
            reason = CloseReason.GAP
        elif end + request.credit > self._max_context_tokens:
            reason = CloseReason.DECLINED
        if reason is not None:
            del self._requests[frame.request]
            return [Close(frame.request, reason)]
        if end > request.committed:
            self._advance(request, frame.tokens[request.committed - frame.base :])
        return []

    def decline(self, number: int) -> list[Frame]:
        """Give a request back: this edge cannot draft for it."""
        return [Close(number, CloseReason.DECLINED)] if self._requests.pop(number, None) is not None else []

    def _advance(self, request: _Request, tokens: tuple[int, ...]) -> None:
        start, end = request.committed, request.committed + len(tokens)
        drafted = request.tokens[start:]
        num_same = 0
        while num_same < min(len(drafted), len(tokens)) and drafted[num_same] == tokens[num_same]:
            num_same += 1
        num_proposed = max(0, request.sent - start)
        is_short = num_same == len(tokens) < 1 + min(request.max_draft, num_proposed)
        request.num_short = request.num_short + 1 if is_short else 0
        self.stats.committed_tokens += len(tokens) if start >= request.num_prompt else 0
        self.stats.accepted_tokens += min(num_same, num_proposed)
        if num_same < len(tokens):
            self.stats.rejected_tokens += max(0, num_proposed - num_same)
            self._roll_back(request, start + num_same)
            request.tokens += tokens[num_same:]
        request.committed = end
        request.sent = max(request.sent, end)
        if request.num_short == MAX_SHORT:
            request.sent, request.num_short = end, 0  # the server seems not to have it: propose it again
        request.is_stuck = False

    def _roll_back(self, request: _Request, fork: int) -> None:
        del request.tokens[fork:]
        request.held = min(request.held, fork)
        request.fork = min(request.fork, fork)
        request.sent = min(request.sent, fork)
        request.stamp += 1

    def next_job(self) -> Job | None:
        """The next forward pass: for the request whose draft is shortest; None when there is nothing to draft."""
        number, request = min(
            ((number, request) for number, request in self._requests.items() if self._wants_draft(request)),
            key=lambda item: item[1].num_drafted,
            default=(0, None),
        )
        if request is None:
            return None
        request.fork = len(request.tokens)
        # Where the drafter has all tokens but said nothing, it gets the last one again: a pass needs one.
        keep = min(request.held, len(request.tokens) - 1)
        # A prompt goes through the model in chunks, so that other requests and commits get their turn between them.
        tokens = tuple(request.tokens[keep : keep + self._prefill_chunk_tokens])
        return Job(number, keep, tokens, request.stamp)

    def _wants_draft(self, request: _Request) -> bool:
        if request.committed < request.num_prompt:
            return request.held < request.committed
        return not request.is_stuck and request.num_drafted < request.credit

    def drafted(self, job: Job, token: int | None) -> list[Frame]:
        """A job is done; `token` is what the draft model would say next, None if it has nothing to say."""
        request = self._requests.get(job.request)
        if request is None:
            return []
        if request.stamp != job.stamp:
            request.held = min(job.end, request.fork)
            return []
        request.held = job.end
        if job.end < len(request.tokens) or request.committed < request.num_prompt:
            return []
        if token is None or token >= self.vocab_size:
            request.is_stuck = True
        else:
            request.tokens.append(token)
            self.stats.drafted_tokens += 1
            if request.num_drafted < request.credit:
                return []
        return self._propose(job.request, request)

    def _propose(self, number: int, request: _Request) -> list[Frame]:
        base = request.sent
        tokens = tuple(request.tokens[base:])
        if not tokens and request.num_drafted:
            return []  # what was proposed before still stands
        request.sent = len(request.tokens)
        self.stats.proposed_tokens += len(tokens)
        return [Propose(number, base, tokens)]
