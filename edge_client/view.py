"""What a user sees of an edge: a panel on a terminal, a line in a log, and a summary at the end."""

from dataclasses import dataclass

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from edge_client.client import EdgeClient
from edge_client.drafting.speculation import SpeculationStats


@dataclass(slots=True)
class AcceptedRate:
    """Accepted tokens per second since the previous call."""

    before_s: float
    before: int = 0

    def __call__(self, client: EdgeClient, now_s: float) -> float:
        now = client.speculation.stats.accepted_tokens  # a new connection counts from 0
        rate = max(0, now - self.before) / max(now_s - self.before_s, 1e-9)
        self.before, self.before_s = now, now_s
        return rate


def status_line(client: EdgeClient, accepted_per_s: float) -> Text:
    """State, target and draft models, requests, acceptance rate and RTT, in one line."""
    return Text(
        f"{client.state} {client.model}".rstrip()
        + f" | {client.drafter.description} | {len(client.speculation)} requests | "
        f"acceptance {_acceptance(client)} | {accepted_per_s:.0f} accepted tokens/s | RTT {_rtt(client)}",
        no_wrap=True,
        overflow="ellipsis",
    )


def panel(client: EdgeClient, accepted_per_s: float, heat: str = "") -> Panel:
    """The same with the totals, to be redrawn in place. `heat`: text about the temperature cap, if any.

    "Saved" are the accepted tokens: the server took no extra step for them.
    """
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    requests, proposed, accepted = totals(client)
    rows.add_row("gateway", Text(f"{client.gateway.url}, {client.state}"))
    rows.add_row("model", Text(client.model or "-"))
    rows.add_row("draft", Text(client.drafter.description))
    rows.add_row("requests", f"{len(client.speculation)} now, {requests} in all")
    rows.add_row("acceptance", _acceptance(client))
    rows.add_row("tokens/s saved", f"{accepted_per_s:.0f}")
    rows.add_row("tokens", f"{proposed} proposed, {accepted} accepted")
    rows.add_row("round trip", _rtt(client))
    if heat:
        rows.add_row("temperature", heat)
    style = {"connected": "green"}.get(client.state, "yellow")
    return Panel(rows, title="edge-client", title_align="left", border_style=style, expand=False)


def heat(temperature_c: float | None, cap_c: float, share: float) -> str:
    """Text about the temperature cap; empty without one."""
    if not cap_c:
        return ""
    now = "-" if temperature_c is None else f"{temperature_c:.0f} °C"
    return f"{now}, cap {cap_c:.0f} °C, drafting {share:.0%} of the time"


def summary(client: EdgeClient) -> str:
    """The totals of this run, as a sentence."""
    requests, proposed, accepted = totals(client)
    return f"Drafted for {requests} requests: {proposed} tokens proposed, {accepted} accepted."


def totals(client: EdgeClient) -> tuple[int, int, int]:
    """Requests, proposed tokens and accepted tokens over all connections."""
    stats: list[SpeculationStats] = list(client.totals)
    if not any(each is client.speculation.stats for each in stats):
        stats.append(client.speculation.stats)
    return (
        sum(each.num_requests for each in stats),
        sum(each.proposed_tokens for each in stats),
        sum(each.accepted_tokens for each in stats),
    )


def _acceptance(client: EdgeClient) -> str:
    acceptance = client.speculation.stats.acceptance
    return "-" if acceptance is None else f"{acceptance:.0%}"


def _rtt(client: EdgeClient) -> str:
    return "-" if client.rtt_s is None else f"{client.rtt_s * 1000:.1f} ms"
