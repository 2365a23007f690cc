"""Drafting for one of vLLM's schedulers: the work before a step, while it is computed, after it, and in between."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request
from zmq import ZMQError

from vllm_specedge.adapter.demand_report import DemandReport
from vllm_specedge.adapter.engine_handle import EngineHandle
from vllm_specedge.adapter.load_report import LoadReport
from vllm_specedge.adapter.look import has_room_for_waiting, look, num_waiting
from vllm_specedge.adapter.ngrams import NgramLookup
from vllm_specedge.adapter.parameters import Treatment, treatment
from vllm_specedge.adapter.prediction_reader import Predictions
from vllm_specedge.adapter.seeds import noise_kind, seed
from vllm_specedge.adapter.shared_driver import SharedDriver
from vllm_specedge.adapter.start import engine_options, start_link
from vllm_specedge.adapter.step_loop import StepLoop
from vllm_specedge.adapter.tracing import RequestSpans, request_spans
from vllm_specedge.engine.driver import StepDriver
from vllm_specedge.engine.gateway_link import EngineLink
from vllm_specedge.engine.gateway_process import GatewayProcess
from vllm_specedge.engine.plan import UNMEASURED, Step, StepOutcome, StepPlan
from vllm_specedge.errors import UserError
from vllm_specedge.policy.slo import Targets
from vllm_specedge.policy.step_cost import StepCost
from vllm_specedge.policy.stepping import Stepping
from vllm_specedge.wire.codec import is_text
from vllm_specedge.wire.request_fields import KEY

logger = init_logger("vllm.specedge.scheduler")

_WITHOUT_DRAFTS = (Treatment.ALONE, Treatment.UNDRAFTED)


@dataclass(frozen=True, slots=True)
class Services:
    """Threads and processes that run next to the scheduler's thread, and are stopped with it."""

    predictions: Predictions
    link: EngineLink | None
    process: GatewayProcess | None

    def stop(self) -> None:
        if self.link is not None:
            self.link.stop()
        if self.process is not None:
            self.process.stop()
        self.predictions.stop()


@dataclass(slots=True)
class _Ending:
    """A step whose outcome vLLM is processing."""

    plan: StepPlan
    started_s: float
    verified: Mapping[str, Sequence[int]]
    """Verified draft tokens by request."""
    over: list[str] = field(default_factory=list)
    """Requests that have ended in it so far; a failed KV transfer may end some that were in no step."""

    def outcome(self, num_scheduled_tokens: Mapping[str, int]) -> StepOutcome:
        num_verified = {request_id: len(tokens) for request_id, tokens in self.verified.items()}
        return StepOutcome(num_scheduled_tokens, num_verified, self.over)


class Drafting:
    """Connects a StepDriver with vLLM's scheduler. Its methods are called in the scheduler's thread, under the lock."""

    def __init__(
        self,
        scheduler: Any,
        engine: EngineHandle,
        shared: SharedDriver,
        targets: Targets,
        ngrams: NgramLookup | None = None,
        predictions: Predictions | None = None,
        spans: RequestSpans | None = None,
        load_report: LoadReport | None = None,
        demand: DemandReport | None = None,
        noise: int | None = None,
    ) -> None:
        """`noise`: the kind of noise sent to edges, together with a request's sampling parameters and seed."""
        self.shared = shared
        self.driver = shared.driver
        self._scheduler = scheduler
        self._engine = engine
        self._targets = targets
        self._ngrams = ngrams
        self._predictions = predictions
        self._spans = spans
        self._load_report = load_report
        self._demand = demand
        self._noise = noise
        self._alone: set[str] = set()
        """Requests during which nothing may be verified."""
        self._started: deque[tuple[StepPlan, float]] = deque()
        """Running steps, with the start time of each."""
        self._ending: _Ending | None = None
        """The step whose outcome vLLM is processing now."""
        self._ended_s = 0.0
        """End of the last step."""
        self._stepping = Stepping()
        self._loop: StepLoop | None = None
        """The loop of an engine whose steps may be asynchronous; None: all steps are synchronous."""

    # -- synchronous and asynchronous steps ------------------------------------------------------------------------

    def _follow(self) -> None:
        """Decide from now on whether the engine's steps are synchronous, if it has a choice."""

        def make_step(core: Any) -> Callable[[], Any]:
            self._loop = StepLoop(core, lambda: self._stepping.is_synchronous)
            return self._loop.step

        if self._loop is None:
            self._engine.replace_step(make_step)

    @property
    def is_draining(self) -> bool:
        """Whether nothing must be scheduled before the running step has ended."""
        return self._loop is not None and self._loop.is_draining

    def stop(self) -> None:
        """Stop drafting; from now on all steps are asynchronous if the engine can."""
        self._stepping = Stepping()
        self.shared.stop()

    def _as_stepped(self, plan: StepPlan) -> StepPlan:
        """The part of a plan that the step beginning now can carry out: an asynchronous step cannot verify."""
        if self._loop is None:
            return plan
        self._stepping.planned(not plan.is_plain, self.driver.speedups.gain_of_waiting)
        if self._loop.is_synchronous_step:
            return replace(plan, has_gap=True)
        return plan if plan.is_plain else plan.undrafted()

    # -- before a step ---------------------------------------------------------------------------------------------

    def start_step(self) -> StepPlan:
        """Plan and start the step that begins now: what it verifies, and which requests it leaves out."""
        started_s = time.monotonic()
        self.shared.unpark()
        plan = self._as_stepped(self.shared.planned(self._plan))
        self.shared.changed()
        if plan.wait_until_s is not None:
            plan = self._all_held(plan)
        self._carry_out(plan)
        self._started.append((plan, started_s))
        return plan

    def _carry_out(self, plan: StepPlan) -> None:
        self.driver.start(plan)
        if self._spans is not None:
            for request_id in plan.holds:
                self._spans.held(request_id)

    def _plan(self) -> StepPlan:
        while self._predictions is not None and self._predictions.read:
            self.driver.predict(*self._predictions.read.popleft())
        if self.driver.needs_no_plan and not has_room_for_waiting(self._scheduler):
            return UNMEASURED
        if self._alone:
            drafted: set[str] | None = set()
        else:
            drafted = None if self.driver.num_edges else self.driver.locally_drafted
        rows, load = look(self._scheduler, self._targets, drafted)
        if self._loop is not None:
            load = replace(load, is_synchronous=self._stepping.is_synchronous)
        return self.driver.begin(rows, time.monotonic(), load)

    def _all_held(self, plan: StepPlan) -> StepPlan:
        """Handle a step in which nothing would run.

        An engine in the caller's process (LLM without multiprocessing) has no loop that could sleep, so wait here.
        """
        while not self._engine.has_loop and plan.wait_until_s is not None and self.shared.wait(plan.wait_until_s):
            self.driver.start(plan)
            self.shared.take_in()
            plan = self._plan()
        return plan

    # -- while it is computed, and after ---------------------------------------------------------------------------

    def computing(self) -> None:
        """Do work that need not be done between two steps, while the workers compute."""
        self.driver.learn()

    def ending_step(self, verified: Mapping[str, Sequence[int]]) -> None:
        """vLLM begins to process the oldest step's outcome, which verified these drafts; requests may end in it."""
        self._ending = _Ending(*self._started.popleft(), verified)

    def end_step(self, num_scheduled_tokens: Mapping[str, int]) -> None:
        """vLLM has processed the outcome."""
        ending, self._ending = self._ending, None
        assert ending is not None
        self.shared.changed()
        self.shared.take_in()  # proposals that arrived during the step do not know its tokens
        if not num_scheduled_tokens and not ending.over:
            return
        # A step that was scheduled while another was computed begins when that ends.
        step = Step(max(ending.started_s, self._ended_s), time.monotonic())
        self._ended_s = step.ended_s
        self.shared.send(self.driver.end(ending.plan, ending.outcome(num_scheduled_tokens), step))
        self._trace(ending, num_scheduled_tokens, step.started_s)
        if self._demand is not None:
            self._demand.look(self._scheduler, step.ended_s)
        if self._load_report is not None:
            known_s = self._started[-1][1] if self._started else ending.started_s
            self._load_report.report(self._scheduler, self.driver.cost, known_s, step.ended_s)
        self._look_up()

    def _trace(self, ending: _Ending, request_ids: Iterable[str], started_s: float) -> None:
        if self._spans is None:
            return
        for request_id in request_ids:
            request = self._scheduler.requests.get(request_id)
            if request is not None:
                self._spans.stepped(request, len(ending.verified.get(request_id, ())), started_s)

    def _look_up(self) -> None:
        """Run vLLM's n-gram lookup for the next step, if due; the plan decides what is verified."""
        if self._ngrams is None or not self.driver.is_lookup_due:
            return
        started_s, found = time.monotonic(), {}
        for request in self._scheduler.running:
            if request.num_tokens - request.num_computed_tokens == 1:
                tokens = self._ngrams.propose(request.request_id, request.all_token_ids)
                if tokens:
                    found[request.request_id] = tokens
        self.driver.suggest(found, time.monotonic() - started_s)

    # -- requests --------------------------------------------------------------------------------------------------

    def added(self, request: Request) -> None:
        """vLLM has added a request."""
        self._follow()  # the engine is complete by now
        self.shared.changed()
        parameters = request.sampling_params
        has_ids = request.prompt_token_ids is not None and request.prompt_embeds is None and not request.mm_features
        # The end of a streaming-input session arrives as another Request with the same id.
        is_new = self._scheduler.requests.get(request.request_id) is request
        if parameters is None:
            return
        if self._demand is not None and is_new:
            self._demand.added(request)
        how = treatment(parameters)
        if how is Treatment.ALONE:
            self._alone.add(request.request_id)
        if how in _WITHOUT_DRAFTS or not has_ids or request.resumable or not is_new:
            return
        asked = parameters.extra_args or {}
        session = asked.get("specedge", "")
        if self._ngrams is not None:
            self._ngrams.open(request.request_id)
        if self._spans is not None:
            self._spans.open(request)
        # Without edges, draw from no generator that plain vLLM would not draw from.
        sampling = seed(request, self._noise) if self._noise and self.driver.num_edges else ()
        session = session if is_text(session) else ""
        self.shared.send(self.driver.open(request.request_id, request.all_token_ids, session, sampling))
        predicted = asked.get(KEY)
        if predicted is not None and self._predictions is not None:
            self._predictions.submit(request.request_id, predicted)

    def freed(self, request: Request) -> None:
        """vLLM frees a request: at the end of a step, or because it was aborted."""
        request_id, ending = request.request_id, self._ending
        self.shared.changed()
        self._alone.discard(request_id)
        if self._load_report is not None:
            self._load_report.num_finished += 1
        if self._demand is not None:
            self._demand.freed(request)
        if self._ngrams is not None:
            self._ngrams.close(request_id)
        if self._spans is not None:
            if ending is not None:
                self._spans.stepped(request, len(ending.verified.get(request_id, ())), ending.started_s)
            self._spans.close(request)
        if ending is not None:
            ending.over.append(request_id)
        else:
            self.shared.send(self.driver.close(request_id))

    # -- waiting ---------------------------------------------------------------------------------------------------

    def park(self) -> bool:
        """Whether the only thing to do is to wait for drafts; if so, the link wakes the engine in time.

        Returning False while the engine is marked as parked is harmless: it runs a step. True must mean that a wake-up
        is certain, and that vLLM has no work of its own (see docs/design.md, "Parking").
        """
        scheduler, engine = self._scheduler, self._engine
        if not engine.has_loop or not self.driver.num_edges or not scheduler.running:
            return False
        has_connector = scheduler.connector is not None or scheduler.ec_connector is not None
        if num_waiting(scheduler) or scheduler.finished_req_ids or has_connector:
            return False
        if scheduler.pause_state != PauseState.UNPAUSED or not engine.is_running():
            return False
        if self._loop is not None and (engine.num_in_flight or not self._stepping.is_synchronous):
            return False
        plan = self.shared.planned(self._plan)
        if plan.wait_until_s is None:
            return False
        self._carry_out(plan)
        self.shared.changed()  # the plan ages while the engine sleeps
        return self.shared.park(plan.wait_until_s)


def start_drafting(scheduler: Any, engine: EngineHandle) -> tuple[Drafting, Services]:
    """Set up drafting for a scheduler; without a gateway, and with a log line, if none can be started."""
    config = scheduler.vllm_config
    options = engine_options(config)
    num_spec_tokens, max_model_len = scheduler.num_spec_tokens, scheduler.max_model_len
    lookup = (options.prompt_lookup_min, options.prompt_lookup_max, max_model_len)
    # The lookup compiles while the profile waits for the workers.
    ngrams = NgramLookup(num_spec_tokens, *lookup) if options.ngram else None
    cost = StepCost(engine.step_profile(scheduler.max_num_scheduled_tokens))
    vocab_size = config.model_config.get_vocab_size()
    shared = SharedDriver(StepDriver(vocab_size, num_spec_tokens, options.hold_limits, cost), engine)
    tokenizer = getattr(scheduler.structured_output_manager, "tokenizer", None)
    predictions = Predictions(tokenizer, max_model_len)
    demand = DemandReport(config, options, shared.driver)
    shared.more_stats = demand.frames
    load_report = LoadReport(config, options, demand) if options.slo else None
    spans = request_spans(config)
    drafting = Drafting(
        scheduler,
        engine,
        shared,
        options.targets,
        ngrams,
        predictions,
        spans,
        load_report,
        demand,
        noise=noise_kind(config) if options.tell_seeds else None,
    )
    process = None
    try:
        shared.link, process = start_link(config, options, tokenizer, wake=shared.wake, stats=shared.stats)
    except UserError as error:
        logger.error("Serving without edge drafts: %s", error)
    except (OSError, ZMQError):
        logger.exception("Serving without edge drafts: the gateway cannot be started")
    return drafting, Services(predictions, shared.link, process)
