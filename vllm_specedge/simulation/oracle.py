"""Exact acceptance and step costs, for a policy that need not learn them."""

from typing import Any

from vllm_specedge.policy.acceptance import MAX_DEPTH, Acceptance
from vllm_specedge.policy.step_cost import StepCost
from vllm_specedge.simulation.models import Server


class ExactCost(StepCost):
    """The exact step costs of a server."""

    def __init__(self, server: Server, gap_s: float = 0.0) -> None:
        """`gap_s`: seconds added by a synchronous step, on an engine whose steps need not be synchronous."""
        super().__init__()
        self._server, self._gap_s = server, gap_s
        self._requests = 1
        """Requests of the step queried last; the policy queries its growth next."""

    def observe(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, requests: int, tokens: int, context: int, prefilled: int = 0) -> float:
        self._requests = requests
        return self._server.step_s(requests, tokens) if tokens > 0 else 0.0

    @property
    def gap_s(self) -> float:
        return self._gap_s

    def verifying_s(self, requests: int) -> float:
        return self._server.step_s(requests, requests, True) - self._server.step_s(requests, requests)

    def growth(self, tokens: int, more: int) -> list[float]:
        base_s = self._server.step_s(self._requests, tokens)
        return [self._server.step_s(self._requests, tokens + i) - base_s for i in range(1, more + 1)]


class ExactAcceptance(Acceptance):
    """The exact acceptance of a draft model."""

    __slots__ = ()

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rates = [rate] * MAX_DEPTH

    def observe(self, num_right: int, num_known: int) -> None:
        pass
