"""Front end of the server of `make bench-overload`, with a selectable arm of the simulator for admission.

`POST /arm` with {"arm", "limit", "gold_itl_ms", "itl_ms"} selects an arm and resets it. "cost model" is the shipping
middleware. The others see what a front end sees: arrival times of requests, and of each chunk of their answers.
"""

import json
import time
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_specedge.admission import AdmissionMiddleware
from vllm_specedge.simulation.arrivals import RequestClass
from vllm_specedge.simulation.overload import CLASSES, ENOUGH_TOKENS
from vllm_specedge.simulation.overload_arms import ARMS, Adaptive, Arm

COST_MODEL = "cost model"
CLASS_HEADER = "x-bench-class"


@dataclass
class Front:
    """The selected arm."""

    name: str = "none"
    classes: dict[str, RequestClass] = field(default_factory=lambda: {each.name: each for each in CLASSES})
    arm: Arm = field(default_factory=lambda: ARMS["none"](CLASSES, 0))
    shortest_s: float = float("inf")
    """Shortest time to a first token so far; any more time counts as waiting."""

    def decide(self, now_s: float) -> None:
        """Let rates change, as the simulated front does with each report; between bursts there are only answers."""
        if isinstance(self.arm, Adaptive):
            self.arm.rates.decide(now_s)


def front_of(asked: dict[str, Any]) -> Front:
    gold, default = CLASSES
    classes = (
        replace(gold, target=replace(gold.target, itl_s=asked["gold_itl_ms"] / 1e3)),
        replace(default, target=replace(default.target, itl_s=asked["itl_ms"] / 1e3)),
    )
    arm = ARMS[asked["arm"]](classes, asked["limit"])
    return Front(asked["arm"], {each.name: each for each in classes}, arm)


class ArmMiddleware:
    """ASGI middleware for vLLM's `--middleware`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._with_cost_model = AdmissionMiddleware(app)
        self._front = Front()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in ("/arm", "/v1/completions"):
            await self._app(scope, receive, send)
        elif scope["path"] == "/arm":
            self._front = front_of(json.loads(await Request(scope, receive).body()))
            await JSONResponse({})(scope, receive, send)
        elif self._front.name == COST_MODEL:
            await self._with_cost_model(scope, receive, send)
        else:
            await self._ask(scope, receive, send)

    async def _ask(self, scope: Scope, receive: Receive, send: Send) -> None:
        front, came_s = self._front, time.monotonic()
        class_ = front.classes[Request(scope).headers.get(CLASS_HEADER, "default")]
        front.decide(came_s)
        if not front.arm.ask(class_, came_s):
            await Response(status_code=429)(scope, receive, send)
            return
        first_s, num_tokens = 0.0, 0

        async def watched(message: Message) -> None:
            nonlocal first_s, num_tokens
            made = message.get("body", b"").count(b'"token_ids"') if message["type"] == "http.response.body" else 0
            now_s = time.monotonic()
            front.decide(now_s)
            if made and not num_tokens:
                first_s = now_s
                front.shortest_s = min(front.shortest_s, now_s - came_s)
                front.arm.began(now_s - came_s - front.shortest_s, now_s)
                front.arm.got(class_, now_s - came_s, True)
            num_tokens += made
            if made and num_tokens >= ENOUGH_TOKENS:
                front.arm.got(class_, (now_s - first_s) / (num_tokens - 1), False)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            front.arm.ended(time.monotonic() - came_s)
