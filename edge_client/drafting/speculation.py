"""The requests of an edge and what it drafts next. Pure: frames and drafted tokens in, frames and jobs out.

Rule 1: committed tokens are the truth. A commit that matches the draft costs nothing. One that differs rolls back to
the fork, and a branch that matches it is kept.
Rule 2: one job is one forward pass of the draft model, so a commit never waits for longer than that.
Rule 3: the most probable tokens are drafted first, on the trunk or on branches, up to a horizon within the credit.
Time is an argument; depth, width and frequency follow from the measurements in `pace`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from edge_client.drafting.draft_tree import Node, new_branches, proposal
from edge_client.drafting.jobs import Job, Said
from edge_client.drafting.kept_contexts import KeptContexts
from edge_client.drafting.noise import NUM_CANDIDATES, Noise
from edge_client.drafting.pacing import Pace
from edge_client.drafting.passes import Waiting, rows_of_next_pass
from edge_client.drafting.request import DraftedRequest
from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.frames import MAX_UINT32, Close, CloseReason, Commit, Open, Propose
from vllm_specedge.wire.sampling import sampling_of

MAX_SHORT = 3
MAX_CANDIDATES = 3
MAX_ENTRIES = 64
"""Maximum draft tokens of one request that a drafter holds at once."""
MAX_KEPT = 4
"""Maximum contexts of ended requests that an edge keeps for reuse."""


@dataclass(slots=True)
class SpeculationStats:
    """Totals over all requests since the start."""

    num_requests: int = 0
    num_failed: int = 0
    """Requests declined because the draft model failed."""
    num_too_long: int = 0
    """Requests declined because they exceed the draft model's context."""
    drafted_tokens: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0
    rejected_tokens: int = 0
    committed_tokens: int = 0
    branch_hits: int = 0
    """Commits that left the trunk along a branch."""
    reused_tokens: int = 0
    """Prompt tokens whose entries were reused from an earlier request."""

    @property
    def acceptance(self) -> float | None:
        """Share of the proposed trunk tokens whose positions are decided that the target chose too; None before any."""
        decided = self.accepted_tokens + self.rejected_tokens
        return self.accepted_tokens / decided if decided else None


class Speculation:
    """All requests of one connection. A new connection needs a new one."""

    def __init__(
        self,
        max_context_tokens: int,
        max_width: int = 1,
        prefill_chunk_tokens: int = 256,
        max_requests: int = 4096,
        max_kept: int = 0,
        pace: Pace | None = None,
        max_shared_rows: int = 0,
    ) -> None:
        """`max_width`: rows of a pass for one request, 1: no branches. `max_shared_rows`: rows of a pass that several
        requests share, 0: passes are not shared. `max_kept`: contexts of ended requests to keep for reuse."""
        self.stats = SpeculationStats()
        self.pace = pace or Pace()
        self.vocab_size = MAX_UINT32
        self._max_context_tokens = max_context_tokens
        self._max_width = max_width
        self._max_shared_rows = max_shared_rows
        self._num_kept = MAX_CANDIDATES if max_width > 1 else 1
        self._max_requests = max_requests
        self._prefill_chunk_tokens = prefill_chunk_tokens
        self._requests: dict[int, DraftedRequest] = {}
        self._kept = KeptContexts(max_kept)
        self._turn = 0

    def __len__(self) -> int:
        return len(self._requests)

    def needs(self, number: int) -> bool:
        """Whether the drafter's sequence of this request, live or ended, is still needed."""
        return number in self._requests or number in self._kept

    # -- from the gateway ------------------------------------------------------------------------------------------

    def receive(self, frame: Frame, now_s: float) -> list[Frame]:
        """Process one frame about requests. Returns the frames to send."""
        match frame:
            case Open():
                return self._open(frame)
            case Commit():
                return self._commit(frame, now_s)
            case Close():
                self._end(frame.request)
                return []
            case _:
                raise TypeError(frame)

    def _open(self, frame: Open) -> list[Frame]:
        is_full = len(self._requests) >= self._max_requests and frame.request not in self._requests
        is_too_long = frame.num_tokens + frame.credit > self._max_context_tokens
        self.stats.num_too_long += is_too_long
        if is_full or is_too_long:
            return [Close(frame.request, CloseReason.DECLINED)]
        self._kept.forget(frame.request)  # the new request takes over its sequence
        sampling = sampling_of(frame.sampling)
        noise = Noise(sampling) if sampling is not None else None
        self._requests[frame.request] = DraftedRequest(frame.num_tokens, frame.credit, frame.max_draft, noise)
        self.stats.num_requests += 1
        return []

    def _commit(self, frame: Commit, now_s: float) -> list[Frame]:
        request = self._requests.get(frame.request)
        if request is None:
            return []
        known, end = len(request.tree.tokens), frame.base + len(frame.tokens)
        reason = None
        if frame.base > known:
            reason = CloseReason.GAP
        elif end + request.credit > self._max_context_tokens:
            reason = CloseReason.DECLINED
            self.stats.num_too_long += 1
        if reason is not None:
            self._end(frame.request)
            return [Close(frame.request, reason)]
        if end <= known:
            return []
        self._advance(request, frame.tokens[known - frame.base :], now_s)
        return self._propose(frame.request, request, now_s)

    def decline(self, number: int) -> list[Frame]:
        """Decline a request that this edge cannot draft for. Its context is not reused."""
        self._kept.forget(number)
        return [Close(number, CloseReason.DECLINED)] if self._requests.pop(number, None) is not None else []

    def forget_kept(self) -> None:
        """Drop the contexts of ended requests, the first to go when the cache is full."""
        self._kept.clear()

    def _end(self, number: int) -> None:
        request = self._requests.pop(number, None)
        if request is not None:
            self._kept.keep(number, request.tree.tokens[: request.tree.num_prefix])

    def _advance(self, request: DraftedRequest, tokens: tuple[int, ...], now_s: float) -> None:
        tree, was_prefilling = request.tree, request.is_prefilling
        trunk, parents = tree.trunk(), [tree.root]
        foreseen = tree.advance(tokens)
        request.has_passed = False
        if was_prefilling:
            return
        parents += foreseen
        calibration = request.calibration(self.pace)
        for parent, token in zip(parents, tokens, strict=False):
            for child in parent.children:
                calibration.observe(child.claimed, child.token == token)
        num_on_trunk = sum(
            1 for node, said in zip(trunk, tokens, strict=False) if node.token == said and node in foreseen
        )
        num_sent = sum(node.is_sent for node in trunk)
        self.stats.committed_tokens += len(tokens)
        self.pace.committed(len(tokens))
        self.stats.accepted_tokens += min(num_on_trunk, num_sent)
        if num_on_trunk < len(tokens):
            self.stats.rejected_tokens += max(0, num_sent - num_on_trunk)
            self.stats.branch_hits += len(foreseen) == len(tokens)
        # More tokens than one step decides are several steps' commits: they tell nothing about the time of a step.
        if request.committed_s is not None and len(tokens) <= request.max_draft + 1:
            self.pace.round_took(now_s - request.committed_s)
        request.committed_s = now_s
        self._watch_for_loss(request, num_on_trunk == len(tokens) < 1 + min(request.max_draft, num_sent), now_s)

    def _watch_for_loss(self, request: DraftedRequest, is_short: bool, now_s: float) -> None:
        """Send the draft again if commits stay shorter than it should make them: the server seems not to have it."""
        if not is_short:
            request.num_short = 0
            return
        if not request.num_short:
            request.short_since_s = now_s
        request.num_short += 1
        if request.num_short >= MAX_SHORT and now_s - request.short_since_s >= self.pace.rtt_s:
            request.num_short = 0
            for node in request.tree.root.below():
                node.is_sent = False

    # -- drafting --------------------------------------------------------------------------------------------------

    def next_pass(self) -> tuple[Job, ...]:
        """The jobs of the next forward pass: of the request that needs it most, and of those that share it; or none."""
        waiting = [
            Waiting(number, request, nodes)
            for number, request in self._requests.items()
            if (nodes := self._runnable(request)) is not None
        ]
        if not waiting:
            return ()
        self._turn += 1
        chosen = rows_of_next_pass(waiting, self.pace, self._max_width, self._max_shared_rows)
        return tuple(self._job(each.number, each.request, nodes) for each, nodes in chosen)

    def _runnable(self, request: DraftedRequest) -> list[Node] | None:
        """The draft tokens that can run next, most probable first; empty: committed tokens are next; None: nothing."""
        tree = request.tree
        if request.running is not None or not tree.tokens:
            return None
        if not tree.is_caught_up:
            is_waiting_for_prompt = request.is_prefilling and self._kept and not tree.num_entered
            return None if is_waiting_for_prompt else []
        if request.is_prefilling or not tree.root.is_expanded:
            return None
        limit = tree.root.position + self.pace.horizon(request.max_draft, request.credit)
        nodes = list(tree.root.below()) if self._max_width > 1 else tree.trunk()
        if sum(node.entry is not None for node in nodes) >= MAX_ENTRIES:
            return None
        runnable = [
            node for node in nodes if node.entry is None and node.position < limit and node.survival >= self.pace.floor
        ]
        runnable.sort(key=lambda node: -node.survival)
        return runnable or None

    def _job(self, number: int, request: DraftedRequest, nodes: list[Node]) -> Job:
        tree = request.tree
        width = NUM_CANDIDATES if request.noise is not None else self._num_kept
        source = None
        if not nodes and not tree.num_entered and (found := self._kept.take(tree.tokens)) is not None:
            source, num_shared = found
            tree.adopt(num_shared)
            self.stats.reused_tokens += num_shared
        keep, moved = tree.compact()
        if nodes:
            parents = tree.enter(nodes)
            tokens = [node.token for node in nodes]
        else:
            # A prompt runs in chunks, so that other requests and commits get their turn in between.
            tokens, parents = tree.enter_committed(self._prefill_chunk_tokens), []
        request.running = nodes
        request.turn = self._turn
        return Job(number, keep, moved, tuple(tokens), tuple(parents), width, source)

    def drafted(self, jobs: Sequence[Job], said: Sequence[Said], took_s: float, now_s: float) -> list[Frame]:
        """Process the result of a pass that took `took_s`: `said` has each job's candidates. Returns frames to send."""
        first = self._requests.get(jobs[0].request)
        is_of_committed = len(jobs) == 1 and (first is None or not first.running)
        if not is_of_committed:
            self.pace.pass_s.observe(sum(len(job.tokens) for job in jobs), took_s)
        return [frame for job, told in zip(jobs, said, strict=True) for frame in self._drafted(job, told, now_s)]

    def _drafted(self, job: Job, said: Said, now_s: float) -> list[Frame]:
        request = self._requests.get(job.request)
        if request is None or request.running is None:
            return []
        nodes, request.running = request.running, None
        tree = request.tree
        if not nodes and (not tree.is_caught_up or request.is_prefilling):
            return []
        for node, candidates in zip(nodes or [tree.root], said, strict=True):
            if tree.contains(node):
                known = [candidate for candidate in candidates if candidate.token < self.vocab_size]
                if request.noise is not None:
                    known = request.noise.chosen(known, node.position + 1, self._num_kept)
                tree.expand(node, known, request.calibration(self.pace))
                self.stats.drafted_tokens += 1
        return self._propose(job.request, request, now_s)

    # -- proposing -------------------------------------------------------------------------------------------------

    def _propose(self, number: int, request: DraftedRequest, now_s: float, is_due: bool = False) -> list[Frame]:
        """The proposal to send now, if any: new nodes on the trunk and branches, or an empty one if there are none."""
        tree = request.tree
        request.due_s = None
        if request.is_prefilling or not tree.tokens:
            return []
        limit = tree.root.position + request.credit
        trunk = [node for node in tree.root.chain() if self._is_of_use(node, limit)]
        is_over = request.running is None and self._runnable(request) is None
        if not trunk:
            if not is_over or not tree.root.is_expanded or request.has_passed:
                return []
            request.has_passed = True
            return [Propose(number, len(tree.tokens), ())]
        num_sent = next((i for i, node in enumerate(trunk) if not node.is_sent), len(trunk))
        branches = new_branches(trunk, lambda node: self._is_of_use(node, limit))
        new = sum(node.survival for node in trunk[num_sent:])
        new += sum(node.survival for branch in branches for node in branch[1:] if not node.is_sent)
        if num_sent and not self.pace.is_worth_a_frame(new):
            return []
        is_due = is_due or (not num_sent and (is_over or self.pace.is_enough([node.survival for node in trunk])))
        if not is_due:
            request.due_s = self.pace.deadline_s(request.committed_s or now_s, now_s)
            is_due = now_s + (0.0 if is_over else self.pace.pass_s(1)) >= request.due_s
        if not is_due:
            return []
        request.due_s = None
        before = trunk[num_sent - 1] if num_sent else tree.root
        frame = proposal(number, before, trunk[num_sent:], branches)
        self.stats.proposed_tokens += frame.num_drafted
        return [frame]

    @property
    def due_s(self) -> float | None:
        """The time at which `poll` has something to send if nothing happens before."""
        return min((request.due_s for request in self._requests.values() if request.due_s is not None), default=None)

    def poll(self, now_s: float) -> list[Frame]:
        """The proposals whose deadline has come."""
        due = [item for item in self._requests.items() if item[1].due_s is not None and item[1].due_s <= now_s]
        return [frame for number, request in due for frame in self._propose(number, request, now_s, is_due=True)]

    def _is_of_use(self, node: Node, limit: int) -> bool:
        return node.survival >= self.pace.floor and node.position <= limit
