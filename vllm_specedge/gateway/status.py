"""What the status page shows: how servers and edges do now, and over the last hour. Pure: times are arguments.

Numbers only, and what edges and servers call themselves: no token and no text of any user is known here.
"""

from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vllm_specedge.gateway.known import EdgeInfo
from vllm_specedge.gateway.router import Router
from vllm_specedge.wire.telemetry import ENGINE_COUNTERS, Group

SAMPLE_S = 2.0
NOW_S, HOUR_S = 10.0, 3600.0
GROUPS_S = 8.0
MAX_GROUPS = 1024
MAX_NAME, MAX_CLIENT = 60, 120
_NAMES = tuple(name for name, _ in ENGINE_COUNTERS)
_SOURCES = ("", "ngram_", "prediction_")


@dataclass(frozen=True, slots=True)
class _Sample:
    at_s: float
    totals: "array[int]"
    """In the order of _NAMES: what all engines have counted."""


def _ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 3) if whole > 0 else None


class Overview:
    """Samples of what engines count, every SAMPLE_S for an hour, and their last steps."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque(maxlen=int(HOUR_S / SAMPLE_S) + 1)
        self._groups: deque[Group] = deque(maxlen=MAX_GROUPS)
        self._edge_tokens: dict[int, int] = {}
        self._edge_rates: dict[int, float] = {}

    def steps(self, groups: Iterable[Group]) -> None:
        self._groups.extend(groups)

    def sample(self, router: Router, now_s: float) -> None:
        """To be called at least every SAMPLE_S."""
        if self._samples and now_s - self._samples[-1].at_s < SAMPLE_S:
            return
        since_s = now_s - self._samples[-1].at_s if self._samples else 0.0
        self._samples.append(_Sample(now_s, array("Q", router.engine_totals)))
        tokens = {edge: info.num_committed_tokens for edge, info in router.edges.items()}
        self._edge_rates = {
            edge: (number - self._edge_tokens.get(edge, number)) / since_s if since_s else 0.0
            for edge, number in tokens.items()
        }
        self._edge_tokens = tokens

    def view(
        self, router: Router, rtts_s: Mapping[int, float], now_s: float, has_names: bool = True
    ) -> dict[str, object]:
        """Everything that the page shows, ready for JSON. `rtts_s`: by edge, where it is known."""
        return {
            "models": sorted({engine.hello.model for engine in router.engines.values()}),
            "engines": len(router.engines),
            "requests": router.num_requests,
            "now": self._over(NOW_S),
            "hour": self._over(HOUR_S),
            "edges": [self._edge(edge, info, rtts_s.get(edge), has_names) for edge, info in router.edges.items()],
            "groups": self._recent(now_s),
        }

    def _recent(self, now_s: float) -> list[Sequence[float]]:
        """Milliseconds since each step's end, that it took; its requests, and their tokens verified and accepted."""
        groups = (group for group in self._groups if now_s - group.ended_s <= GROUPS_S)
        return [
            (
                round(1e3 * (now_s - group.ended_s)),
                round(1e3 * group.took_s, 1),
                group.requests,
                group.verified,
                group.accepted,
            )
            for group in groups
        ]

    def _over(self, seconds: float) -> dict[str, float | None]:
        """Rates and ratios over so long, or as long as anything is known; a rate over nothing is None."""
        if len(self._samples) < 2:
            return dict.fromkeys(self._figures(dict.fromkeys(_NAMES, 0), 0.0))
        last = self._samples[-1]
        first = next(sample for sample in self._samples if last.at_s - sample.at_s <= seconds or sample is last)
        if first is last:
            first = self._samples[-2]
        pairs = zip(_NAMES, last.totals, first.totals, strict=True)
        return self._figures({name: new - old for name, new, old in pairs}, last.at_s - first.at_s)

    def _figures(self, more: Mapping[str, int], seconds: float) -> dict[str, float | None]:
        verified = sum(more[f"{source}verified_tokens"] for source in _SOURCES)
        accepted = sum(more[f"{source}accepted_tokens"] for source in _SOURCES)
        plain = more["steps"] - sum(more[f"{source}verified_drafts"] for source in _SOURCES)
        return {
            "tokens_per_s": _ratio(more["committed_tokens"], seconds),
            "step_ms": _ratio(more["engine_step_us"] / 1e3, more["engine_steps"]),
            "requests_per_step": _ratio(more["steps"], more["engine_steps"]),
            "tokens_per_step": _ratio(more["committed_tokens"], more["steps"]),
            "speedup": _ratio(more["plain_decode_us"], more["decode_us"]),
            "acceptance": _ratio(accepted, verified),
            "from_edges": _ratio(more["accepted_tokens"], more["committed_tokens"]),
            "verified_per_s": _ratio(verified, seconds),
            "edge_share": _ratio(more["verified_drafts"], more["steps"]),
            "ngram_share": _ratio(more["ngram_verified_drafts"], more["steps"]),
            "prediction_share": _ratio(more["prediction_verified_drafts"], more["steps"]),
            "plain_share": _ratio(max(0, plain), more["steps"]),
            "holds_per_s": _ratio(more["holds"], seconds),
        }

    def _edge(self, edge: int, info: EdgeInfo, rtt_s: float | None, has_name: bool) -> dict[str, object]:
        return {
            "number": edge,
            "name": info.hello.name[:MAX_NAME] if has_name else "",
            "client": info.hello.client[:MAX_CLIENT] if has_name else "",
            "role": info.hello.role[:MAX_NAME],
            "rtt_ms": round(1e3 * rtt_s, 1) if rtt_s is not None else None,
            "requests": len(info.requests),
            "proposed": info.num_proposed_tokens,
            "accepted": info.num_accepted_tokens,
            "acceptance": _ratio(info.num_accepted_tokens, info.num_verified_tokens),
            "tokens_per_s": round(self._edge_rates.get(edge, 0.0), 1),
        }
