"""What the next step verifies: the most probable draft tokens, as long as they raise tokens per second."""

from collections.abc import Sequence
from itertools import takewhile
from typing import TypeAlias

from vllm_specedge.policy.probing import Probe
from vllm_specedge.policy.situation import BUDGET_MODES, FAST, Situation, cautious

LEAST_GAIN = 0.03
"""Minimum expected gain of verifying, as a share of a plain step's tokens per second. Below it, wrong expectations lose
more than right ones gain: in simulation 2 to 4 % at 16 requests on a CPU, for a gain of 1 or 2."""
PROBE_PART = 8
"""A probe verifies one draft token per this many requests."""

_Token: TypeAlias = tuple[float, int, int]
"""Survival, negated so that the best sort first; index of its row; depth in the draft."""


def budget(situation: Situation) -> dict[str, int]:
    """Number of draft tokens to verify by request: the most probable ones, as long as more raise tokens per second."""
    rows, load, num_rows = situation.rows, situation.load, situation.num_rows
    tokens = [
        (-survival, index, depth) for index, row in enumerate(rows) for depth, survival in enumerate(row.survivals)
    ]
    if not tokens:
        return {}
    tokens.sort()
    tokens = tokens[: max(0, load.room - num_rows - load.prefill)]
    if situation.limits.mode in BUDGET_MODES:
        number = _best(tokens, situation)
        tokens = tokens[: _num_probed(num_rows) if not number and load.probe is Probe.FORCED else number]
    lengths: dict[str, int] = {}
    for _, index, _ in tokens:
        key = rows[index].key
        lengths[key] = lengths.get(key, 0) + 1
    return lengths


def _best(tokens: Sequence[_Token], situation: Situation) -> int:
    """How many of the tokens (most probable first) to verify for the most tokens per second."""
    rows, load, num_rows = situation.rows, situation.load, situation.num_rows
    size = num_rows + load.prefill
    step_s = situation.plain_s(num_rows, size, load.prefill)
    if not step_s:
        return len(tokens)
    if load.probe is Probe.PLAIN:
        return 0
    waited_s = max(row.waited_s for row in rows)
    stretch_s = step_s * situation.limits.max_stretch - waited_s
    verifying_s = situation.verifying_s
    growth_s = [verifying_s + growth for growth in situation.cost.growth(size, len(tokens))]
    best = len(tokens)
    # Fewer tokens may leave more rows without any, which lowers the limit of the step.
    while best:
        verified = {index for _, index, _ in tokens[:best]}
        plain = [row for index, row in enumerate(rows) if index not in verified]
        longest_s = situation.longest_s(plain, step_s) - waited_s
        number = _scan(tokens[:best], growth_s, size, step_s, waited_s, longest_s, stretch_s)
        if not number and load.probe is Probe.VERIFY:
            most_s = min(longest_s, stretch_s) - step_s
            number = sum(1 for _ in takewhile(most_s.__ge__, growth_s[: _num_probed(num_rows)]))
        if number in (0, best) or step_s + growth_s[number - 1] <= situation.longest_s(rows, step_s) - waited_s:
            return number
        best = number
    return 0


def _num_probed(num_rows: int) -> int:
    return max(1, num_rows // PROBE_PART)


def _scan(
    tokens: Sequence[_Token],
    growth_s: Sequence[float],
    size: int,
    plain_s: float,
    waited_s: float,
    longest_s: float,
    stretch_s: float,
) -> int:
    """How many of the tokens give the most tokens per second.

    A step of `size` tokens takes `plain_s`, and `growth_s` longer with 1, 2, ... of these tokens; one of its rows has
    waited `waited_s`. It may take `longest_s`, and only `stretch_s` unless it makes tokens come FAST times as fast.
    """
    # Prompt tokens count as generated: else they would pay for the drafts' time and make these look cheap.
    best, best_rate, expected = 0, (1.0 + LEAST_GAIN) * size / plain_s, float(size)
    for number, (growth, token) in enumerate(zip(growth_s, tokens, strict=False), 1):
        expected -= token[0]
        took_s = plain_s + growth
        if took_s > longest_s:
            continue  # a larger step may be shorter (step_cost.py, rule 2)
        total_s = plain_s + cautious(growth)
        if took_s > stretch_s and expected * plain_s < FAST * size * (waited_s + total_s):
            continue
        if expected > best_rate * total_s * (1 + 1e-9):
            best, best_rate = number, expected / total_s
    return best
