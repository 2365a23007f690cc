"""vLLM's scheduler with drafts from the network: attaches them, holds requests for them, publishes what was decided.

Rule 1: vLLM's own scheduler does all scheduling; this one adds draft tokens before a step and reads tokens after it.
Rule 2: nothing here may raise into the engine. Whatever goes wrong in drafting turns drafting off, with a log line.
Rule 3: while every request waits for a draft, the engine's loop sleeps ("parked") and is woken by the link.
Rule 4: the book belongs to whoever holds the lock. The link's thread takes proposals in while the scheduler's waits for
the workers, and never waits for the lock: else the scheduler's thread would have to, between two steps.
"""

import sys
import threading
import time
from collections.abc import Callable
from math import inf
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import Request, RequestStatus
from zmq import ZMQError

from vllm_specedge.adapter import hooks
from vllm_specedge.adapter.load_report import LoadReport
from vllm_specedge.adapter.ngrams import NgramLookup
from vllm_specedge.adapter.parameters import Treatment, treatment
from vllm_specedge.adapter.prediction_reader import Predictions
from vllm_specedge.adapter.profile import step_profile
from vllm_specedge.adapter.request_log import hide_ours
from vllm_specedge.adapter.start import engine_options, start_link
from vllm_specedge.adapter.tracing import RequestSpans, request_spans
from vllm_specedge.engine.drafting import DraftBook, Plan, Row, Step
from vllm_specedge.errors import UserError
from vllm_specedge.policy.decision import HoldLimits, Load
from vllm_specedge.wire.frames import Bye, Frame, Stats, is_text
from vllm_specedge.wire.request_fields import KEY
from vllm_specedge.wire.telemetry import CountedSince, groups_frame, step_times

logger = init_logger("vllm.specedge.scheduler")

_ENGINE_FRAMES = 12
_WITHOUT_DRAFTS = (Treatment.ALONE, Treatment.UNDRAFTED)
_BLOCK_S = 0.002


class EdgeScheduler(Scheduler):
    """`--scheduler-cls vllm_specedge.adapter.scheduler.EdgeScheduler`; `--speculative-config edge` sets it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._core = engine = _find_engine()
        self._engine = engine if hasattr(engine, "input_queue") else None
        """None in a process without a busy loop (LLM without multiprocessing)."""
        self._is_parked = self._was_parked = False
        self._arrived = threading.Event()
        self._lock = threading.RLock()
        self._failure: Exception | None = None
        """Of the link's thread; raised where the scheduler's next uses the book."""
        self._step_started_s = 0.0
        self._context = 0
        self._plan_ahead: Plan | None = None
        """What was planned when the engine asked whether there is something to do, while it still holds."""
        self._verifying: dict[str, list[int]] = {}
        self._is_drafting = False
        self._ngrams: NgramLookup | None = None
        self._suggested: set[str] = set()
        self._alone: set[str] = set()
        """Requests beside which nothing may be verified."""
        self._spans: RequestSpans | None = None
        self._link = None
        self._process = None
        self._predictions: Predictions | None = None
        hide_ours()
        problems = hooks.problems()
        if problems:
            logger.warning("Serving without edge drafts: %s", "; ".join(problems))
            return
        options = engine_options(self.vllm_config)
        if options.ngram:
            # It compiles while the profile waits for the workers.
            self._ngrams = NgramLookup(
                self.num_spec_tokens, options.prompt_lookup_min, options.prompt_lookup_max, self.max_model_len
            )
        self.book = DraftBook(
            vocab_size=self.vllm_config.model_config.get_vocab_size(),
            max_draft=self.num_spec_tokens,
            limits=HoldLimits(
                hold_limit_s=options.hold_limit_ms / 1000,
                mode=options.mode,
                max_slowdown=options.max_slowdown,
                max_stretch=options.max_stretch,
            ),
            profile=step_profile(engine, self.max_num_scheduled_tokens),
        )
        self._targets = options.targets
        self._spans = request_spans(self.vllm_config)
        self._load = LoadReport(self.vllm_config, self._targets) if options.slo else None
        tokenizer = getattr(self.structured_output_manager, "tokenizer", None)
        self._predictions = Predictions(tokenizer, self.max_model_len)
        self._counted = CountedSince()
        try:
            self._link, self._process = start_link(
                self.vllm_config, options, tokenizer, wake=self._wake, stats=self._stats
            )
        except UserError as error:
            logger.error("Serving without edge drafts: %s", error)
        except (OSError, ZMQError):
            logger.exception("Serving without edge drafts: the gateway cannot be started")
        self._is_drafting = True

    # -- what vLLM calls -------------------------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self._step_started_s = time.monotonic()
        self._is_parked = False
        self._guarded(self._attach)
        # At 0 the waiting loop pads no request with -1 drafts, which vLLM's CPU kernels take for tokens.
        num_spec_tokens, self.num_spec_tokens = self.num_spec_tokens, 0
        try:
            return super().schedule(*args, **kwargs)
        finally:
            self.num_spec_tokens = num_spec_tokens

    def get_grammar_bitmask(self, scheduler_output: Any) -> Any:
        """Called when the workers have been given their step: what need not be done between two steps is done now."""
        grammar = super().get_grammar_bitmask(scheduler_output)
        self._guarded(self._learn)
        return grammar

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        self._verifying = scheduler_output.scheduled_spec_decode_tokens
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._guarded(lambda: self._publish(scheduler_output.num_scheduled_tokens))
        self._verifying = {}
        if self._core is not None:
            # The engine looks at this next. Workers draft nothing, and asking them costs a round trip, for all to wait.
            self._core.check_for_draft_tokens = False
        return outputs

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        """The workers' drafts: none."""

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        self._guarded(lambda: self._open(request))

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._guarded(lambda: self._close(request))
        return super()._free_request(request, *args, **kwargs)

    def has_requests(self) -> bool:
        return super().has_requests() and not self._guarded(self._park)

    def shutdown(self) -> None:
        if self._link is not None:
            self._link.stop()
        if self._process is not None:
            self._process.stop()
        if self._predictions is not None:
            self._predictions.stop()
        super().shutdown()

    # -- before a step ---------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        plan = self._planned()
        self._plan_ahead = None
        if plan.wait_until_s is not None:
            plan = self._all_held(plan)
        for request in self.running:
            is_held = request.request_id in plan.holds
            # schedule() adds one to current_step before it compares, so + 2 skips exactly the coming step.
            request.next_decode_eligible_step = self.current_step + 2 if is_held else 0
        self._note_holds(plan)
        if plan.drafts:
            drafts = DraftTokenIds(list(plan.drafts), list(plan.drafts.values()))
            super().update_draft_token_ids(drafts)

    def _note_holds(self, plan: Plan) -> None:
        if self._spans is not None:
            for request_id in plan.holds:
                self._spans.held(request_id)

    def _planned(self) -> Plan:
        """The plan for the next step. The engine asks several times for one step whether there is something to do."""
        if self._plan_ahead is None or (self._link is not None and self._link.inbox):
            self._plan_ahead = self._plan()
        return self._plan_ahead

    def _plan(self) -> Plan:
        self._take_in()
        while self._predictions.read:
            self.book.predict(*self._predictions.read.popleft())
        rows, load = self._look()
        return self.book.plan(rows, time.monotonic(), load)

    def _look(self) -> tuple[list[Row], Load]:
        """Who could decode in the next step, and what else there is to do.

        Without edges only those with something to verify are rows, for a row costs microseconds and there may be
        hundreds.
        """
        has_edges, is_scarce = bool(self.book.num_edges) and not self._alone, self._is_scarce()
        drafted = self._suggested | self.book.predicted if not self._alone else set()
        rows, prefill, context, num_others, step_limit_s = [], 0, 0, 0, inf
        for request in self.running:
            num_left = request.num_tokens - request.num_computed_tokens
            if request.status != RequestStatus.RUNNING or num_left != 1:
                prefill += num_left
                continue
            context += request.num_tokens
            step_limit_s = min(step_limit_s, self._targets.of(request.priority).itl_s)
            if not has_edges and request.request_id not in drafted:
                num_others += 1
                continue
            left = min(request.max_tokens - request.num_output_tokens, self.max_model_len - request.num_tokens)
            if is_scarce:
                left = min(left, 1 + -request.num_tokens % self.block_size)
            rows.append(Row(request.request_id, left - 1, request.priority))
        self._context = context
        is_pressed = bool(self.waiting or self.kv_holding_waiting or self.deferred_waiting)
        if is_pressed and len(self.running) < self.max_num_running_reqs:
            prefill += next((request.num_tokens for request in self.waiting), 0)
        load = Load(
            context=context,
            num_others=num_others,
            prefill=min(prefill, self.max_num_scheduled_tokens),
            is_pressed=is_pressed,
            room=self.max_num_scheduled_tokens,
            step_limit_s=step_limit_s,
        )
        return rows, load

    def _is_scarce(self) -> bool:
        """Not every request can get a block of the cache for its next token and one for its draft."""
        num_free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        return num_free < 2 * len(self.kv_cache_config.kv_cache_groups) * len(self.running)

    def _take_in(self) -> None:
        if self._link is None:
            return
        inbox = self._link.inbox
        self._arrived.clear()
        if inbox and self._was_parked:
            self.book.counters["wakes"] += 1
            self.book.counters["wake_us"] += int((time.monotonic() - inbox[0][0]) * 1e6)
        self._was_parked = False
        while inbox:
            arrived_s, frame = inbox.popleft()
            if isinstance(frame, Bye):
                self.book.lost_gateway()
            else:
                self._send(self.book.receive(frame, arrived_s))

    # -- after a step ----------------------------------------------------------------------------------------------

    def _publish(self, num_scheduled_tokens: dict[str, int]) -> None:
        self._plan_ahead = None
        self._suggested.clear()
        self._take_in()  # what came during the step was proposed before its tokens were known
        now_s = time.monotonic()
        self._stepped(num_scheduled_tokens, now_s)
        frames: list[Frame] = []
        for request_id in num_scheduled_tokens:
            frames += self._commit(request_id, now_s)
            if self._spans is not None and request_id in self.requests:
                self._trace(self.requests[request_id])
        self._send(frames)
        self._suggest()

    def _stepped(self, num_scheduled_tokens: dict[str, int], now_s: float) -> None:
        if not num_scheduled_tokens:
            return
        verifying = self._verifying
        step = Step(
            requests=len(num_scheduled_tokens),
            tokens=sum(num_scheduled_tokens.values()),
            # A request that decodes has one token and its draft.
            prefilled=sum(n for id_, n in num_scheduled_tokens.items() if n != 1 + len(verifying.get(id_, ()))),
            context=self._context,
            started_s=self._step_started_s,
            ended_s=now_s,
            is_verifying=any(map(len, verifying.values())),
        )
        self.book.stepped(step)
        if self._load is not None:
            self._load.report(self, self.book.cost, now_s)

    def _commit(self, request_id: str, now_s: float) -> list[Frame]:
        return self.book.commit(request_id, len(self._verifying.get(request_id, ())), now_s)

    def _trace(self, request: Request) -> None:
        num_verified = len(self._verifying.get(request.request_id, ()))
        self._spans.stepped(request, num_verified, self._step_started_s)

    def _learn(self) -> None:
        self.book.learn()

    def _suggest(self) -> None:
        """What vLLM's n-gram lookup finds for what comes next; the plan decides what is verified."""
        if self._ngrams is None or not self.book.has_lookup_due:
            return
        started_s = time.monotonic()
        for request in self.running:
            if request.num_tokens - request.num_computed_tokens != 1:
                continue
            tokens = self._ngrams.propose(request.request_id, request.all_token_ids)
            if tokens:
                self.book.suggest(request.request_id, tokens)
                self._suggested.add(request.request_id)
        self.book.lookups.answered(time.monotonic() - started_s)

    def _open(self, request: Request) -> None:
        self._plan_ahead = None
        parameters = request.sampling_params
        has_ids = request.prompt_token_ids is not None and request.prompt_embeds is None and not request.mm_features
        # The end of a streaming-input session comes as another Request of the same id.
        is_new = self.requests.get(request.request_id) is request
        if parameters is None:
            return
        how = treatment(parameters)
        if how is Treatment.ALONE:
            self._alone.add(request.request_id)
        if how in _WITHOUT_DRAFTS or not has_ids or request.resumable or not is_new:
            return
        session = (parameters.extra_args or {}).get("specedge", "")
        session = session if is_text(session) else ""
        if self._ngrams is not None:
            self._ngrams.open(request.request_id)
        if self._spans is not None:
            self._spans.open(request)
        self._send(self.book.open(request.request_id, request.all_token_ids, session))
        foretold = (parameters.extra_args or {}).get(KEY)
        if foretold is not None:
            self._predictions.submit(request.request_id, foretold)

    def _close(self, request: Request) -> None:
        self._plan_ahead = None
        self._alone.discard(request.request_id)
        if self._load is not None:
            self._load.num_finished += 1
        if self._ngrams is not None:
            self._ngrams.close(request.request_id)
        if self._spans is not None:
            self._trace(request)
            self._spans.close(request)
        last = self._commit(request.request_id, time.monotonic())
        self._send([*last, *self.book.close(request.request_id)])

    def _send(self, frames: list[Frame]) -> None:
        if frames and self._link is not None:
            self._link.send(frames)

    def _stats(self) -> list[Frame]:
        """Called by the link's thread."""
        groups = [self.book.groups.popleft() for _ in range(len(self.book.groups))]
        return [
            Stats(self._counted.values(self.book.counters, self._link.num_welcomes if self._link else 1)),
            step_times(*self.book.cost.parts_s),
            groups_frame(groups, time.monotonic()),
        ]

    # -- waiting ---------------------------------------------------------------------------------------------------

    def _park(self) -> bool:
        """Whether there is nothing to do but wait for drafts; if so, the link wakes the engine in time.

        False from this method while parked flags are set is harmless: the engine runs a step. True must mean that a
        wake-up is certain, and that vLLM has nothing of its own to do (see docs/design.md, "Parking").
        """
        engine = self._engine
        if engine is None or not self.book.num_edges or not self.running:
            return False
        num_waiting = len(self.waiting) + len(self.kv_holding_waiting) + len(self.deferred_waiting)
        if num_waiting or self.finished_req_ids or self.connector is not None or self.ec_connector is not None:
            return False
        if self.pause_state != PauseState.UNPAUSED or not engine.is_running():
            return False
        plan = self._planned()
        if plan.wait_until_s is None:
            return False
        self._note_holds(plan)
        self._plan_ahead = None  # time goes by
        # Set before the timer is set and the inbox looked at: the link looks at the flag after both.
        self._is_parked = self._was_parked = True
        if not self._link.wake_at(plan.wait_until_s) or self._link.inbox:
            self._is_parked = self._was_parked = False
        return self._is_parked

    def _wake(self) -> None:
        """Called by the link's thread, with frames in the inbox or because it is time."""
        if not self._is_parked:
            self._take_in_early()
        self._arrived.set()
        if self._is_parked and self._engine is not None:
            self._is_parked = False
            self._engine.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))

    def _take_in_early(self) -> None:
        if not self._is_drafting or not self._lock.acquire(blocking=False):
            return
        try:
            self._take_in()
            self._plan_ahead = None
        except Exception as error:  # noqa: BLE001 - raised again in `_guarded`, which ends drafting
            self._failure = error
        finally:
            self._lock.release()

    def _all_held(self, plan: Plan) -> Plan:
        """A step in which nothing would run.

        An engine inside of the caller's process (LLM without multiprocessing) has no loop that could sleep: wait here.
        """
        while self._engine is None and plan.wait_until_s is not None:
            left_s = plan.wait_until_s - time.monotonic()
            if left_s <= 0 or not self._arrived.wait(min(left_s, _BLOCK_S)):
                break
            plan = self._plan()
        return plan

    # -- the outermost edge ----------------------------------------------------------------------------------------

    def _guarded(self, act: Callable[[], Any]) -> Any:
        if not self._is_drafting:
            return None
        try:
            with self._lock:
                if self._failure is not None:
                    raise self._failure
                return act()
        except Exception:
            logger.exception("Drafting failed and is off; serving goes on without it")
            self._is_drafting = self._is_parked = False
            if self._link is not None:
                self._link.stop()
            for request in self.running:
                request.next_decode_eligible_step = 0
                request.spec_token_ids = []
            return None


def _find_engine() -> Any:
    """The EngineCore that is building this scheduler, or None if it is not to be found.

    vLLM gives a scheduler no reference to its engine; it is the caller a few frames up (v1/engine/core.py, __init__).
    """
    for depth in range(1, _ENGINE_FRAMES):
        try:
            owner = sys._getframe(depth).f_locals.get("self")
        except ValueError:
            return None
        if hasattr(owner, "model_executor"):
            return owner
    return None
