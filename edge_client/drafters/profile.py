"""The time of a draft model's forward passes on this machine, by their rows: measured once, before it drafts."""

import statistics
from collections.abc import Callable, Iterator, Mapping

from edge_client.drafters import Drafter

WIDTHS = (1, 2, 4, 8)
NUM_PASSES = 5
MAX_SECONDS = 3.0
"""Time limit for all widths together: a slow model is profiled with fewer passes, at least two per width."""
CONTEXT_TOKENS = 64
"""Context length at which passes are timed."""

TOKEN_S = 0.1
"""Maximum seconds to draft one token for every request of an edge: slower drafts are hardly worth verifying."""
MAX_REQUESTS = 16

Clock = Callable[[], float]


def profile(drafter: Drafter, clock: Clock) -> dict[int, float]:
    """Median seconds of a pass by its rows, up to the drafter's maximum. Raises what the model's code raises.

    The first pass of each width does not count: it may compile something or allocate memory.
    """
    sequence = drafter.open()
    num_context = min(CONTEXT_TOKENS, drafter.max_context_tokens - 1)
    sequence.append(range(1, 1 + num_context), 1)
    widths = [rows for rows in WIDTHS if rows <= drafter.max_width]

    def run(rows: int) -> None:
        if rows == 1:
            sequence.append([1], 1)
        else:
            sequence.branch(range(1, 1 + rows), [num_context - 1] * rows, 1)

    def durations(rows: int) -> Iterator[float]:
        until_s = clock() + MAX_SECONDS / len(widths)
        for number in range(NUM_PASSES + 1):
            started_s = clock()
            if number > 1 and started_s > until_s:
                return
            run(rows)
            yield clock() - started_s
            sequence.keep(num_context)

    return {rows: statistics.median(list(durations(rows))[1:]) for rows in widths}


def in_words(times: Mapping[int, float]) -> str:
    """A profile in words."""
    told = [f"{1e3 * took_s:.1f} ms for {rows} row{'s' if rows > 1 else ''}" for rows, took_s in times.items()]
    return ", ".join(told) + (" (no wider passes)" if len(told) == 1 else "")


def requests_at_once(times: Mapping[int, float], is_sharing: bool) -> int:
    """The number of requests that an edge with this profile can draft for fast enough.

    `is_sharing`: whether requests share a pass; else each needs its own.
    """
    row_s = min(took_s / rows for rows, took_s in times.items()) if is_sharing else times[1]
    return max(1, min(MAX_REQUESTS, int(TOKEN_S / max(row_s, 1e-6))))
