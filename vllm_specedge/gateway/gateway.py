"""The gateway: edges on one side, engines on the other, the Router in between."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector

from vllm_specedge.config import GatewayOptions
from vllm_specedge.errors import RemoteProtocolError
from vllm_specedge.gateway.connections import Connections
from vllm_specedge.gateway.demand import DemandBook
from vllm_specedge.gateway.effects import Effect, RequestReport, ToEdge, ToEngine
from vllm_specedge.gateway.engine_socket import EngineSocket
from vllm_specedge.gateway.known import RouterLimits
from vllm_specedge.gateway.metrics import DemandCollector, RequestHistograms, RouterCollector
from vllm_specedge.gateway.router import Router
from vllm_specedge.gateway.status import Overview
from vllm_specedge.gateway.vocabulary_store import VocabularyStore
from vllm_specedge.wire.codec import FrameReader, encode
from vllm_specedge.wire.engine_frames import Capacity, Demand, EngineHello, Groups, VocabularyPart
from vllm_specedge.wire.frames import Ping
from vllm_specedge.wire.telemetry import groups_of

logger = logging.getLogger("vllm_specedge.gateway")

ENGINE_DEAD_S = 15.0


class Gateway:
    """Carries out the Router's decisions."""

    def __init__(self, options: GatewayOptions, engine_endpoint: str) -> None:
        limits = RouterLimits(
            max_edges=options.max_edges,
            max_requests_per_edge=options.max_requests_per_edge,
            credit_tokens=options.credit_tokens,
        )
        self.router = Router(limits)
        self.edges = Connections(options, self.router, self._carry_out)
        self.vocabularies = VocabularyStore()
        self.registry = CollectorRegistry()
        self.registry.register(RouterCollector(self.router))
        self.demand = DemandBook()
        self.registry.register(DemandCollector(self.demand))
        self._histograms = RequestHistograms(self.registry)
        self._overview = Overview()
        ProcessCollector(registry=self.registry)
        for name, help_text, value in (
            ("connections", "Connections of edges, admitted or not.", lambda: len(self.edges)),
            ("tasks", "Tasks of the gateway's event loop.", lambda: len(asyncio.all_tasks())),
        ):
            Gauge(f"specedge_gateway_{name}", help_text, registry=self.registry).set_function(value)
        self._tick_s = limits.heartbeat_ms / 2000
        self._engine_heard_s: dict[bytes, float] = {}
        self._effects: deque[Effect] = deque()
        self._is_carrying_out = False
        self._has_public_names = options.public_names
        self.num_watching = 0
        """Current viewers of the status page."""
        self._engines = EngineSocket(engine_endpoint, self._heard)

    def serve_engines(self) -> None:
        self._engines.start()

    async def watch(self) -> None:
        """Close silent connections, for ever."""
        while True:
            await asyncio.sleep(self._tick_s)
            try:
                self._watch(time.monotonic())
            except Exception:  # noqa: BLE001 - the outermost edge of this task
                self.edges.failed("Watching the connections failed")

    def close(self) -> None:
        self._engines.close()

    def view(self, is_from_here: bool) -> dict[str, object]:
        """The data for the status page; a reader elsewhere may not get names."""
        has_names = self._has_public_names or is_from_here
        shown = self._overview.view(self.router, self.edges.rtts_s, time.monotonic(), has_names)
        return {**shown, "capacity": self.demand.view()}

    def served_vocabularies(self) -> list[dict[str, object]]:
        """The fingerprint, size and models of each vocabulary that an edge may fetch."""
        models: dict[str, list[str]] = {}
        for engine in self.router.engines.values():
            if engine.hello.fingerprint in self.vocabularies.packed:
                models.setdefault(engine.hello.fingerprint, []).append(engine.hello.model)
        packed = self.vocabularies.packed
        return [
            {"fingerprint": fingerprint, "bytes": len(packed[fingerprint]), "models": sorted(set(names))}
            for fingerprint, names in models.items()
        ]

    # -- received messages and their effects -----------------------------------------------------------------------

    def _heard(self, engine: bytes, data: bytes) -> None:
        self._engine_heard_s[engine] = time.monotonic()
        try:
            for frame in FrameReader().feed(data):
                self._carry_out(self.router.from_engine(engine, frame))
                if isinstance(frame, EngineHello | Ping | VocabularyPart):
                    self._learn_vocabulary(engine, frame)
                elif isinstance(frame, Demand | Capacity) and engine in self.router.engines:
                    self.demand.take(engine, self.router.engines[engine].number, frame)
        except RemoteProtocolError as error:
            self._carry_out(self.router.engine_left(engine))
            logger.warning("An engine was dropped: %s", error)
        except Exception:  # noqa: BLE001 - the outermost edge of this message
            self.edges.failed("Processing a message of an engine failed")

    def _learn_vocabulary(self, engine: bytes, frame: EngineHello | Ping | VocabularyPart) -> None:
        known = self.router.engines.get(engine)
        if known is None:
            return
        fingerprint = known.hello.fingerprint
        try:
            if isinstance(frame, VocabularyPart):
                want = self.vocabularies.take(engine, fingerprint, frame)
            else:
                want = self.vocabularies.ask(engine, fingerprint)
        except RemoteProtocolError as error:
            logger.warning("The vocabulary of %.60r is not served to edges: %s", known.hello.model, error)
            return
        if want is not None:
            self._engines.send(engine, encode(want))

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        """Carry out effects in the router's order. Effects of closing an edge on the way come after these."""
        self._effects.extend(effects)
        if self._is_carrying_out:
            return
        self._is_carrying_out = True
        try:
            while self._effects:
                self._carry_out_one(self._effects.popleft())
        finally:
            self._is_carrying_out = False

    def _carry_out_one(self, effect: Effect) -> None:
        match effect:
            case ToEngine():
                self._engines.send(effect.engine, encode(effect.frame))
            case ToEdge():
                self.edges.deliver(effect.edge, effect.frame)
            case RequestReport():
                self._histograms.observe(effect)
            case Groups():
                self._overview.steps(groups_of(effect, time.monotonic()))

    def _watch(self, now_s: float) -> None:
        self.edges.watch(now_s)
        self._overview.sample(self.router, now_s)
        self.demand.keep(self.router.engines.keys())
        self.demand.sample(now_s)
        for engine, heard_s in list(self._engine_heard_s.items()):
            if now_s - heard_s > ENGINE_DEAD_S:
                del self._engine_heard_s[engine]
                self._carry_out(self.router.engine_left(engine))
        self.vocabularies.keep({id_: engine.hello.fingerprint for id_, engine in self.router.engines.items()})
