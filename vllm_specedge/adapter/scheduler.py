"""vLLM's scheduler with drafts from the network: it attaches them, holds requests for them, and publishes commits.

Rule 1: vLLM's own scheduler does all scheduling; this one adds draft tokens before a step and reads tokens after it.
Rule 2: nothing here may raise into the engine. Any error in drafting turns drafting off, with a log line.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import Request

from vllm_specedge.adapter import hooks
from vllm_specedge.adapter.drafting import Drafting, Services, start_drafting
from vllm_specedge.adapter.engine_handle import find_engine
from vllm_specedge.adapter.request_log import hide_ours
from vllm_specedge.engine.plan import StepPlan

logger = init_logger("vllm.specedge.scheduler")

_T = TypeVar("_T")


class EdgeScheduler(Scheduler):
    """`--scheduler-cls vllm_specedge.adapter.scheduler.EdgeScheduler`; `--speculative-config edge` sets it."""

    num_spec_tokens: int
    """vLLM's attribute."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._engine = find_engine()
        self._drafting: Drafting | None = None
        """None: drafting is off, and this is a plain scheduler."""
        self._services: Services | None = None
        self._has_held = False
        """Whether the last step left requests out."""
        hide_ours()
        problems = hooks.drafting_problems(hooks.V2 if self.vllm_config.use_v2_model_runner else hooks.V1)
        if problems:
            logger.warning("Serving without edge drafts: %s", "; ".join(problems))
        else:
            self._drafting, self._services = start_drafting(self, self._engine)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self._do(lambda drafting: self._attach(drafting.start_step()))
        # At 0, vLLM's loop over waiting requests pads none with drafts of -1, which its CPU kernels take for tokens.
        num_spec_tokens, self.num_spec_tokens = self.num_spec_tokens, 0
        try:
            return super().schedule(*args, **kwargs)
        finally:
            self.num_spec_tokens = num_spec_tokens

    def get_grammar_bitmask(self, scheduler_output: Any) -> Any:
        """vLLM calls this once the workers have their step."""
        grammar = super().get_grammar_bitmask(scheduler_output)
        self._do(Drafting.computing)
        return grammar

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        verified = scheduler_output.scheduled_spec_decode_tokens
        self._do(lambda drafting: drafting.ending_step(verified))
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._do(lambda drafting: drafting.end_step(scheduler_output.num_scheduled_tokens))
        self._engine.skip_draft_poll()  # the engine checks this next
        return outputs

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        """Ignore the workers' drafts: they have none."""

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        self._do(lambda drafting: drafting.added(request))

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._do(lambda drafting: drafting.freed(request))
        return super()._free_request(request, *args, **kwargs)

    def has_requests(self) -> bool:
        if self._drafting is not None and self._drafting.is_draining:
            return False
        return super().has_requests() and not self._do(Drafting.park)

    def shutdown(self) -> None:
        if self._services is not None:
            self._services.stop()
        super().shutdown()

    def _attach(self, plan: StepPlan) -> None:
        if plan.holds or self._has_held:
            for request in self.running:
                is_held = request.request_id in plan.holds
                # schedule() adds one to current_step before it compares, so + 2 skips exactly the coming step.
                request.next_decode_eligible_step = self.current_step + 2 if is_held else 0
        self._has_held = bool(plan.holds)
        if plan.drafts:
            super().update_draft_token_ids(DraftTokenIds(list(plan.drafts), list(plan.drafts.values())))

    def _do(self, act: Callable[[Drafting], _T]) -> _T | None:
        """Run a part of drafting. Returns None if drafting is off, or if it fails, which turns it off."""
        drafting = self._drafting
        if drafting is None:
            return None
        try:
            return drafting.shared.locked(lambda: act(drafting))
        except Exception:
            logger.exception("Drafting failed and is off; serving continues without it")
            self._drafting = None
            drafting.stop()
            for request in self.running:
                request.next_decode_eligible_step = 0
                request.spec_token_ids = []
            return None


class EdgeAsyncScheduler(EdgeScheduler, AsyncScheduler):
    """The same for an engine that schedules a step while the previous one is computed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._max_draft = self.num_spec_tokens

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        # As many placeholders follow each request for drafts by the workers themselves, which make none here.
        scheduler_output.num_spec_tokens_to_schedule = 0
        super()._update_after_schedule(scheduler_output)
        scheduler_output.num_spec_tokens_to_schedule = self._max_draft  # with fewer, workers clear the others
