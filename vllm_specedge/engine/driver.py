"""The drafting of one engine, step by step: what the next step verifies, and its outcome. Pure.

The code that runs steps drives this: vLLM's scheduler (`adapter/`), the simulation, the tests, the benchmarks.

    plan = driver.begin(rows, now_s, load)      a query; may be called any number of times for one step
    driver.start(plan)                          the plan is carried out: a step begins with it, or all wait
    driver.learn()                              if there is time while the step is computed; else `end` does it
    frames = driver.end(plan, outcome, step)    the step is done; a request that ended in it is part of its outcome

`open`, `close` and `receive` may be called at any time in between; returned frames are for the gateway.

Rule 1: nothing here can change a token. A draft is offered for exactly the tokens the request has, or not at all.
Rule 2: while no request can have a draft (`is_plain`), a step takes no time per request (engine/plain_steps.py).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from vllm_specedge.engine.learning import Learning, Lesson
from vllm_specedge.engine.ledger import RequestLedger
from vllm_specedge.engine.plain_steps import PlainSteps
from vllm_specedge.engine.plan import Choice, Row, Step, StepOutcome, StepPlan, choose
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
        self._plain_steps = PlainSteps(self._ledger, self.speedups)
        self._suggested: set[str] = set()
        self._predicted: set[str] = set()
        self._row_s = 0.0
        """Seconds per token in a plain step like the last measured one."""
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

    @property
    def is_plain(self) -> bool:
        """Whether no request can have a draft: there is no edge, and nothing was looked up or predicted."""
        return not (self._ledger.num_edges or self._suggested or self._predicted)

    @property
    def needs_no_plan(self) -> bool:
        """Whether the next step may have the plan UNMEASURED instead of one from `begin`, unless it has prompts."""
        return self.is_plain and not self._plain_steps.is_measurement_due

    # -- requests and their drafts ---------------------------------------------------------------------------------

    def open(self, request_id: str, tokens: Sequence[int], session: str, sampling: tuple[int, ...] = ()) -> list[Frame]:
        """Add a request. `tokens`: a live view of all its token ids, prompt first."""
        return self._ledger.open(request_id, tokens, session, sampling)

    def close(self, request_id: str) -> list[Frame]:
        """Remove a request that was aborted between two steps, or that must not be drafted for any more."""
        self.learn()
        self._predicted.discard(request_id)
        self._suggested.discard(request_id)
        if self.is_plain and (request := self._ledger.find(request_id)) is not None:
            self._plain_steps.book(request)
        frames = self._ledger.close(request_id)
        if not self._ledger:
            self.speedups.idle()
        return frames

    def receive(self, frame: Frame, now_s: float) -> list[Frame]:
        """Process one frame of the gateway, or the Bye that tells that it is gone. Returns the frames to send back."""
        if self.is_plain:
            self._plain_steps.book_all()
        return self._ledger.receive(frame, now_s)

    def predict(self, request_id: str, tokens: Sequence[int]) -> None:
        """Set a request's predicted output; it may arrive while the request runs. No tokens: it was not usable."""
        request = self._ledger.find(request_id)
        if request is None:
            return
        if not tokens or any(not 0 <= token < self._ledger.vocab_size for token in tokens):
            self.counters["refused_predictions"] += 1
            return
        if self.is_plain:
            self._plain_steps.book_all()
        request.prediction = Prediction(tokens)
        request.prediction.advance(request.tokens[request.num_prompt : request.tree.length])
        self._predicted.add(request_id)

    @property
    def is_lookup_due(self) -> bool:
        """Whether to run the n-gram lookup for `suggest` after the step that ended."""
        return self._ngram_budget.is_due(self._row_s, self._row_s * self._num_rows)

    def suggest(self, found: Mapping[str, Sequence[int]], took_s: float) -> None:
        """Set the drafts that a lookup found for the requests' present tokens, by request id, and the time it took."""
        if found and self.is_plain:
            self._plain_steps.book_all()
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

    def end(self, plan: StepPlan, outcome: StepOutcome, step: Step) -> list[Frame]:
        self.learn()
        took_s = step.ended_s - step.started_s
        if took_s > 0:
            self._note_step(plan, outcome, step)
        self._ngram_budget.stepped()
        frames: list[Frame] = []
        num_verified = num_accepted = 0
        if self.is_plain and not outcome.num_verified:
            self._plain_steps.ended(len(outcome.num_tokens), step.ended_s)
        else:
            for request_id in outcome.num_tokens:
                request = self._ledger.find(request_id)
                if request is not None and (num_decided := len(request.tokens) - request.tree.length) > 0:
                    verified = outcome.num_verified.get(request_id, 0)
                    frames += self._commit(request, request_id, verified, plan, step.ended_s)
                    num_verified += verified
                    num_accepted += min(num_decided - 1, verified)
        if took_s > 0:
            group = Group(step.ended_s, took_s, len(outcome.num_tokens), num_verified, num_accepted)
            self.speedups.groups.append(group)
        for request_id in outcome.over:
            frames += self.close(request_id)
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

    def _note_step(self, plan: StepPlan, outcome: StepOutcome, step: Step) -> None:
        """Record the step's time and size, regardless of its tokens."""
        took_s = step.ended_s - step.started_s
        self.counters["engine_steps"] += 1
        self.counters["waited_steps"] += plan.has_gap
        self.counters["engine_step_us"] += int(took_s * 1e6)
        prefilled = outcome.num_prefilled
        if not plan.is_measured:
            self._plain_steps.unmeasured(step.started_s, step.ended_s, prefilled > 0)
            return
        num_tokens, is_verifying = sum(outcome.num_tokens.values()), bool(outcome.num_verified)
        is_first = is_verifying and not self._has_verified
        self._has_verified |= is_verifying
        if not is_first:  # see FIRST_STEP
            num_requests = len(outcome.num_tokens)
            self.cost.observe(num_requests, num_tokens, plan.context, took_s, prefilled, is_verifying, plan.has_gap)
        plain_step_s = self.cost(plan.num_rows, plan.num_rows, plan.context) if plan.num_rows else 0.0
        self._row_s, self._num_rows = plain_step_s / max(1, plan.num_rows), plan.num_rows
        self._plain_steps.measured(plain_step_s)
        plain_step_s = 0.0 if prefilled else plain_step_s
        self.speedups.stepped(step.started_s, step.ended_s, plan.num_rows, plain_step_s, plan.has_gap, is_first)

    def _commit(
        self, request: DraftedRequest, request_id: str, num_verified: int, plan: StepPlan, ended_s: float
    ) -> list[Frame]:
        """Process a request's decided tokens. Only what the next plan needs is done at once, the rest later."""
        tree, edge = request.tree, request.edge
        if edge is None and not num_verified and request.is_without_drafts:
            self._plain_steps.commit(request, ended_s)
            return self._ledger.publish(request, ended_s)
        decided = tuple(request.tokens[tree.length :])
        self.speedups.committed(request, len(decided), ended_s)
        source, is_refused = plan.verdict(request_id)
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
        self._suggested.discard(request_id)
        return self._ledger.publish(request, ended_s)
