"""The drafting of one engine, step by step: what the next step verifies, and its outcome. Pure.

The code that runs steps drives this: vLLM's scheduler (`adapter/`), the simulation, the tests, the benchmarks.

    plan = driver.begin(rows, now_s, load)      a query; may be called any number of times for one step
    driver.start(plan)                          the plan is carried out: a step begins with it, or all wait
    driver.learn()                              if there is time while the step is computed; else `end` does it
    frames = driver.end(plan, outcomes, step)   the step is done; a request that ended in it is an outcome like others

`open`, `close` and `receive` may be called at any time in between; returned frames are for the gateway.

Rule 1: nothing here can change a token. A draft is offered for exactly the tokens the request has, or not at all.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from vllm_specedge.engine.learning import Learning, Lesson
from vllm_specedge.engine.ledger import RequestLedger
from vllm_specedge.engine.plan import Choice, RequestOutcome, Row, Step, StepPlan, choose
from vllm_specedge.engine.predicted_output import Prediction
from vllm_specedge.engine.requests import DraftedRequest, Source
from vllm_specedge.engine.speedup import Speedup
from vllm_specedge.policy.acceptance import Acceptance
from vllm_specedge.policy.capacity import EdgeDrafts
from vllm_specedge.policy.decision import decide
from vllm_specedge.policy.edge_record import EdgeRecord
from vllm_specedge.policy.ngram_budget import NgramBudget
from vllm_specedge.policy.probing import Probing
from vllm_specedge.policy.situation import HoldLimits, Load, Situation
from vllm_specedge.policy.step_cost import StepCost
from vllm_specedge.wire.codec import Frame
from vllm_specedge.wire.telemetry import Group

NOTHING_ELSE = Load()


class StepDriver:
    """The live requests of one engine, their proposal trees, and what it learns from their steps."""

    def __init__(
        self,
        vocab_size: int,
        max_draft: int,
        limits: HoldLimits,
        cost: StepCost,
        acceptance_of: Callable[[EdgeRecord], Acceptance] = lambda record: Acceptance(record.acceptance),
    ) -> None:
        """`cost`: the cost model so far. `acceptance_of`: the expected acceptance of an edge's drafts for a request."""
        self.counters: Counter[str] = Counter()
        self.cost = cost
        self._max_draft = max_draft
        self._limits = limits
        self._ledger = RequestLedger(vocab_size, max_draft, self.counters, acceptance_of)
        self._ngram_budget = NgramBudget()
        self._learning = Learning(self._ngram_budget)
        self._probing = Probing()
        self._has_verified = False
        """Whether any step has verified something so far."""
        self.speedups = Speedup(self.counters)
        self._suggested: set[str] = set()
        self._predicted: set[str] = set()
        self._row_s = 0.0
        """Seconds per token in a plain step like the last one."""
        self._num_rows = 0

    def __len__(self) -> int:
        return len(self._ledger)

    @property
    def num_edges(self) -> int:
        """Edges that could draft here."""
        return self._ledger.num_edges

    @property
    def edge_drafts(self) -> EdgeDrafts:
        """The present share of requests with edges, and the survivals of their drafts, for the capacity model."""
        return EdgeDrafts(self._ledger.drafted_share, self._ledger.acceptances.edge.survivals(self._max_draft))

    @property
    def locally_drafted(self) -> set[str]:
        """Requests that may have a draft without an edge: from the n-gram lookup or a predicted output."""
        return self._suggested | self._predicted

    def take_groups(self) -> list[Group]:
        """The steps done since the previous call, or the last ones of them."""
        groups = self.speedups.groups
        return [groups.popleft() for _ in range(len(groups))]  # another thread may add one meanwhile

    # -- requests and their drafts ---------------------------------------------------------------------------------

    def open(self, request_id: str, tokens: Sequence[int], session: str, sampling: tuple[int, ...] = ()) -> list[Frame]:
        """Add a request. `tokens`: a live view of all its token ids, prompt first."""
        return self._ledger.open(request_id, tokens, session, sampling)

    def close(self, request_id: str) -> list[Frame]:
        """Remove a request that was aborted between two steps, or that must not be drafted for any more."""
        self.learn()
        self._predicted.discard(request_id)
        self._suggested.discard(request_id)
        frames = self._ledger.close(request_id)
        if not self._ledger:
            self.speedups.idle()
        return frames

    def receive(self, frame: Frame, now_s: float) -> list[Frame]:
        """Process one frame of the gateway, or the Bye that tells that it is gone. Returns the frames to send back."""
        return self._ledger.receive(frame, now_s)

    def predict(self, request_id: str, tokens: Sequence[int]) -> None:
        """Set a request's predicted output; it may arrive while the request runs. No tokens: it was not usable."""
        request = self._ledger.find(request_id)
        if request is None:
            return
        if not tokens or any(not 0 <= token < self._ledger.vocab_size for token in tokens):
            self.counters["refused_predictions"] += 1
            return
        request.prediction = Prediction(tokens)
        request.prediction.advance(request.tokens[request.num_prompt : request.tree.length])
        self._predicted.add(request_id)

    @property
    def is_lookup_due(self) -> bool:
        """Whether to run the n-gram lookup for `suggest` after the step that ended."""
        return self._ngram_budget.is_due(self._row_s, self._row_s * self._num_rows)

    def suggest(self, found: Mapping[str, Sequence[int]], took_s: float) -> None:
        """Set the drafts that a lookup found for the requests' present tokens, by request id, and the time it took."""
        for request_id, tokens in found.items():
            request = self._ledger.find(request_id)
            if request is not None:
                request.suggestion = tuple(tokens)
                self._suggested.add(request_id)
        self._ngram_budget.answered(took_s)

    # -- a step ----------------------------------------------------------------------------------------------------

    def begin(self, rows: Iterable[Row], now_s: float, load: Load = NOTHING_ELSE) -> StepPlan:
        """Plan what each row does next: verify a draft, wait for one, or decode plainly. Changes nothing.

        A row that was never opened here decodes plainly, with the same limit on its slowdown as others that do.
        """
        choices, num_plain = {}, 0
        for row in rows:
            request = self._ledger.find(row.request_id)
            if request is not None:
                choices[row.request_id] = choose(row, request, self._max_draft, self._limits, now_s)
            else:
                num_plain += 1
        load = replace(load, probe=self._probing.next, num_others=load.num_others + num_plain)
        candidates = [choice.candidate for choice in choices.values()]
        decision = decide(Situation(candidates, load, self.cost, self.speedups.ratio, self._limits, now_s))
        return StepPlan(
            drafts={key: list(choices[key].draft[:length]) for key, length in decision.lengths.items()},
            holds=decision.holds,
            wait_until_s=decision.wait_until_s,
            made_s=now_s,
            num_rows=len(candidates) + load.num_others,
            context=load.context,
            choices=choices,
        )

    def start(self, plan: StepPlan) -> None:
        self._ledger.begin_step()
        if plan.wait_until_s is None:
            has_drafts = any(choice.draft for choice in plan.choices.values())
            self._probing.started(has_drafts, bool(plan.drafts))
        for request_id, choice in plan.choices.items():
            self._note_wait(choice, request_id in plan.holds, plan.made_s)

    def learn(self) -> None:
        """Learn what is left from the last step."""
        self._learning.learn()

    def end(self, plan: StepPlan, outcomes: Sequence[RequestOutcome], step: Step) -> list[Frame]:
        self.learn()
        if step.ended_s > step.started_s:
            self._note_step(plan, outcomes, step)
        self._ngram_budget.stepped()
        frames: list[Frame] = []
        num_verified = num_accepted = 0
        for outcome in outcomes:
            request = self._ledger.find(outcome.request_id)
            if request is not None and (num_decided := len(request.tokens) - request.tree.length) > 0:
                frames += self._commit(request, outcome, plan, step.ended_s)
                num_verified += outcome.num_verified
                num_accepted += min(num_decided - 1, outcome.num_verified)
        if step.ended_s > step.started_s:
            num_requests = sum(outcome.num_tokens > 0 for outcome in outcomes)
            took_s = step.ended_s - step.started_s
            self.speedups.groups.append(Group(step.ended_s, took_s, num_requests, num_verified, num_accepted))
        for outcome in outcomes:
            if outcome.is_over:
                frames += self.close(outcome.request_id)
        return frames

    # -- how a step begins -----------------------------------------------------------------------------------------

    def _note_wait(self, choice: Choice, is_held: bool, now_s: float) -> None:
        """Note whether a request begins to wait for its draft, or has waited in vain."""
        request, edge = choice.request, choice.request.edge
        if is_held and request.held_since_s is None:
            request.held_since_s = now_s
        if edge is None or (choice.draft and choice.source is Source.EDGE):
            return  # there is no edge to wait for, or the draft is there
        length = request.tree.length
        if is_held and choice.candidate.awaited is not None:
            self.counters["holds"] += edge.awaited_at != length
            edge.awaited_at = length
        elif edge.awaited_at == length and not is_held:
            edge.awaited_at = None
            emptied_s = edge.emptied_s.get(length, now_s)
            late_s = self._limits.hold_limit_s
            if self._limits.mode != "wait":
                late_s = min(late_s, edge.record.late_after_s)
            if now_s >= emptied_s + late_s:  # else something else ended the wait
                self.counters["missed_holds"] += 1
                edge.record.missed()

    # -- how a step ends -------------------------------------------------------------------------------------------

    def _note_step(self, plan: StepPlan, outcomes: Sequence[RequestOutcome], step: Step) -> None:
        """Record the step's time and size, regardless of its tokens."""
        took_s = step.ended_s - step.started_s
        self.counters["engine_steps"] += 1
        self.counters["waited_steps"] += plan.has_gap
        self.counters["engine_step_us"] += int(took_s * 1e6)
        num_tokens = sum(outcome.num_tokens for outcome in outcomes)
        num_requests = sum(outcome.num_tokens > 0 for outcome in outcomes)
        num_verified = sum(outcome.num_verified for outcome in outcomes)
        # A decoding request has one token and its draft; any other number is a prompt.
        prefilled = sum(each.num_tokens for each in outcomes if each.num_tokens != 1 + each.num_verified)
        is_first = num_verified > 0 and not self._has_verified
        self._has_verified |= num_verified > 0
        if not is_first:  # see FIRST_STEP
            self.cost.observe(num_requests, num_tokens, plan.context, took_s, prefilled, num_verified > 0, plan.has_gap)
        plain_step_s = self.cost(plan.num_rows, plan.num_rows, plan.context) if plan.num_rows else 0.0
        self._row_s, self._num_rows = plain_step_s / max(1, plan.num_rows), plan.num_rows
        plain_step_s = 0.0 if prefilled else plain_step_s
        self.speedups.stepped(step.started_s, step.ended_s, plan.num_rows, plain_step_s, plan.has_gap, is_first)

    def _commit_plain(self, request: DraftedRequest, ended_s: float) -> list[Frame]:
        """`_commit` for a request with no draft and no edge, as on a server without edges."""
        num_decided = len(request.tokens) - request.tree.length
        request.tree.skip(num_decided)
        self.speedups.committed(request, num_decided, ended_s)
        request.count("committed_tokens", num_decided)
        request.count("steps", 1)
        request.held_since_s = None
        return self._ledger.publish(request, ended_s)

    def _commit(self, request: DraftedRequest, outcome: RequestOutcome, plan: StepPlan, ended_s: float) -> list[Frame]:
        """Process a request's decided tokens. Only what the next plan needs is done at once, the rest later."""
        tree, edge, num_verified = request.tree, request.edge, outcome.num_verified
        if edge is None and not num_verified and request.is_without_drafts:
            return self._commit_plain(request, ended_s)
        decided = tuple(request.tokens[tree.length :])
        self.speedups.committed(request, len(decided), ended_s)
        source, is_refused = plan.verdict(outcome.request_id)
        num_ahead, draft = tree.num_ahead, tree.chain(max(len(decided), num_verified + 1))
        predicted: Sequence[int] = ()
        if request.prediction is not None:  # the draft that it had for these positions
            predicted = request.prediction.draft(max(self._max_draft, len(decided)))
            request.prediction.advance(decided)
        done = tree.advance(decided)
        lesson = Lesson(
            request,
            edge.record if edge is not None else None,
            request.acceptances.edge,
            draft,
            decided,
            num_verified,
            source,
            request.suggestion,
            predicted,
            num_ahead,
            done,
            tree.num_ahead > 0,
        )
        self._learning.note(lesson)
        if edge is not None:
            is_verified = num_verified > 0 and source is Source.EDGE
            if edge.has_answered:
                edge.record.stepped(is_verified, ended_s)
            num_unused = edge.record.num_unused if edge.has_answered else 0
            edge.coalescing.committed(len(decided), is_refused, is_verified, num_unused)
        request.suggestion, request.held_since_s = (), None
        self._suggested.discard(outcome.request_id)
        return self._ledger.publish(request, ended_s)
