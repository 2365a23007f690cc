"""Possible gain of running ahead under asynchronous scheduling, simulated: `python benchmarks/running_ahead.py`.

No step waits for the outcome of the previous one. Its drafts come from each request's proposal tree as of scheduling,
walked by the outcome of the step in flight at no cost: an upper bound for a walk on the device; the best of several
lengths. Compared with the shipping policy, which makes steps synchronous if that pays. Figures are speedups over the
same server without edges.
"""

from dataclasses import replace

from harness.results import Column, table

from vllm_specedge.engine.plan import StepPlan
from vllm_specedge.simulation.models import SERVERS
from vllm_specedge.simulation.run import Served, Simulation
from vllm_specedge.simulation.scenario import EdgeModel, Scenario

MAX_DRAFTS = (1, 2, 3, 5)
GAPS_S = (0.001, 0.003)
EDGES = ((0.020, 0.006), (0.020, 0.002), (0.005, 0.002))
"""Seconds of the round trip, and of a forward pass."""
TOKENS = {1: 1500, 8: 300}
"""Tokens of each client, by concurrent requests."""


class Ahead(Simulation):
    """Drafts after the tokens in flight, `max_draft` tokens per request."""

    max_draft = 1

    def _as_stepped(self, plan: StepPlan, is_synchronous: bool) -> StepPlan:
        del is_synchronous
        drafts = {}
        for request in self._running:
            if request.num_left == 1 and not request.is_done and (draft := self._behind(request)):
                drafts[request.id_] = draft
        return replace(plan, drafts=drafts, holds={}, wait_until_s=None)

    def _behind(self, request: Served) -> list[int]:
        drafted = self.driver._ledger.find(request.id_)
        node = drafted.tree._root if drafted is not None and drafted.tree.length == len(request.tokens) else None
        for token in self._decided(request):
            node = node.children.get(token) if node is not None else None
        draft: list[int] = []
        room = min(self.max_draft, request.end - len(request.tokens) - request.num_in_flight - 1)
        while node is not None and node.children and len(draft) < room:
            token, node = next(iter(node.children.items()))
            draft.append(token)
        return draft

    def _decided(self, request: Served) -> list[int]:
        """Output of the step in flight for a request."""
        parts = [part for step in self._in_flight for part in step.parts if part.request is request]
        return [token for part in parts if part.is_decided for token in self._verify(request, part.draft)]


def tokens_per_s(simulation: Simulation) -> float:
    return simulation.run().tokens_per_s


def ahead(scenario: Scenario, max_draft: int) -> Simulation:
    simulation = Ahead(scenario)
    simulation.max_draft = max_draft
    return simulation


def main() -> None:
    rows = []
    for server in ("a100-14b", "h100-8b"):
        for rtt_s, pass_s in EDGES:
            for acceptance in (0.75, 0.9):
                for requests, tokens in TOKENS.items():
                    edge = EdgeModel(pass_s=pass_s, acceptance=acceptance)
                    base = Scenario(SERVERS[server], requests, rtt_s, edge=edge, tokens=tokens, gap_s=GAPS_S[0])
                    plain = tokens_per_s(Simulation(replace(base, share=0.0)))
                    best = max(tokens_per_s(ahead(base, max_draft)) for max_draft in MAX_DRAFTS)
                    ours = [tokens_per_s(Simulation(replace(base, gap_s=gap_s))) for gap_s in GAPS_S]
                    where = (server, requests, 1e3 * rtt_s, 1e3 * pass_s, acceptance)
                    rows.append((*where, *(each / plain for each in (best, *ours))))
    titles = ("server", "requests", "RTT, ms", "pass, ms", "acceptance", "ahead", "ours, gap 1 ms", "ours, gap 3 ms")
    forms = ("", "", ".0f", ".0f", "", ".2f", ".2f", ".2f")
    columns = [
        Column(title, lambda row, at=index: row[at], form)  # type: ignore[misc]
        for index, (title, form) in enumerate(zip(titles, forms, strict=True))
    ]
    print(table(columns, rows))


if __name__ == "__main__":
    main()
