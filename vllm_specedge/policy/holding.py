"""Which requests are left out of the next step because their drafts are expected soon, and when all wait.

Everything is measured in tokens: a draft is worth waiting for if its expected tokens exceed those not generated
meanwhile.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from vllm_specedge.policy.acceptance import Acceptance
from vllm_specedge.policy.edge_record import EdgeRecord
from vllm_specedge.policy.situation import Awaited, Candidate, HoldLimits, Situation, cautious


def awaited(record: EdgeRecord, own: Acceptance, since_s: float, limit: int, limits: HoldLimits) -> Awaited | None:
    """The draft expected from an edge for a request that has had none since `since_s`; None: none is expected.

    In mode `wait` an answer is expected from every edge, regardless of its record.
    """
    limit_s = since_s + limits.hold_limit_s
    if limits.mode == "wait":
        return Awaited(since_s, limit_s, (), 0.0, 1.0)
    answer_s, length = record.answer_s.mean, record.length.mean
    if answer_s is None or length is None or record.num_misses >= limits.max_misses:
        return None
    survivals = own.survivals(min(limit, max(1, round(length))))
    first = own.rates[0]
    kept = first + (1.0 - first) * (record.hit.mean or 0.0)
    late_s = min(since_s + record.late_after_s, limit_s)
    return Awaited(since_s + answer_s, late_s, survivals, kept, record.punctual.mean or 0.0)


_Waiting: TypeAlias = tuple[Candidate, Awaited]


@dataclass(frozen=True, slots=True)
class _Prices:
    """The value of time."""

    step_s: float
    """Seconds of a plain step with all requests."""
    saved_s: float
    """Seconds that it is shorter with one request less."""
    rate: float
    """Tokens per second."""
    growth_s: Sequence[float]
    """Seconds that the step is longer with 1, 2, ... more draft tokens."""
    excess: float
    """Tokens per request that an average step makes beyond a plain one."""
    verifying_s: float
    """Seconds that the step is longer because it verifies at all."""

    def value(self, survivals: Sequence[float]) -> float:
        """Tokens gained by verifying a draft, less the cost of verification; 0: it would not be verified."""
        best = total = 0.0
        for survival, growth_s in zip(survivals, self.growth_s, strict=False):
            total += survival
            best = max(best, total - self.rate * cautious(growth_s))
        return best


def holding(situation: Situation, lengths: Mapping[str, int]) -> tuple[dict[str, float], float | None]:
    """The requests to leave out of a step that verifies these `lengths`, and until when at most; and until when all
    wait, if no request is to run before: then nothing is verified."""
    rows, load, limits = situation.rows, situation.load, situation.limits
    waiting = [
        (row, row.awaited)
        for row in rows
        if row.key not in lengths and row.awaited is not None and situation.now_s < row.awaited.late_s
    ]
    if not waiting or load.prefill or load.is_pressed:
        return {}, None
    if limits.mode == "wait":
        holds = {row.key: draft.late_s for row, draft in waiting}
        return holds, min(holds.values()) if len(waiting) == len(rows) and not load.num_others else None
    prices = _prices(situation, waiting, sum(lengths.values()))
    if prices is None:
        return {}, None
    longest_s = min(situation.longest_s(rows, prices.step_s), prices.step_s * limits.max_stretch)
    wait_until_s = _wait(situation, waiting, prices, longest_s)
    if wait_until_s is not None:
        return dict.fromkeys((row.key for row in rows), wait_until_s), wait_until_s
    return _left_out(situation, waiting, prices, longest_s), None


def _prices(situation: Situation, waiting: Sequence[_Waiting], num_verified: int) -> _Prices | None:
    num_rows, speedup = situation.num_rows, situation.speedup
    step_s = situation.plain_s(num_rows, num_rows)
    if step_s <= 0.0:
        return None
    return _Prices(
        step_s=step_s,
        saved_s=step_s - situation.plain_s(num_rows - 1, num_rows - 1),
        rate=max(1.0, speedup) * num_rows / step_s,
        growth_s=situation.cost.growth(num_rows + num_verified, max(len(draft.survivals) for _, draft in waiting)),
        excess=max(0.0, speedup - 1.0),
        verifying_s=0.0 if num_verified else situation.verifying_s,
    )


def _wait(situation: Situation, waiting: Sequence[_Waiting], prices: _Prices, longest_s: float) -> float | None:
    """Until when all wait for drafts, or None to run now. `longest_s`: limit of a step and the wait before it.

    Waiting w seconds costs rate * w tokens. For each draft that arrives meanwhile it gains the draft's value times the
    probability that going on without it would spoil it. It also avoids a plain step, which makes less than an average
    one (the renewal argument for one request: wait if value * (1 - kept) > rate * w - kept * (speedup - 1)).
    """
    now_s = situation.now_s
    oldest_s = min(row.since_s for row in situation.rows)
    least_s = prices.step_s + prices.verifying_s + sum(prices.growth_s[:1])
    limit_s = oldest_s + min(situation.limits.hold_limit_s, longest_s - least_s)
    best, best_until_s, gain = 0.0, None, -prices.rate * prices.verifying_s
    for draft in sorted((draft for _, draft in waiting), key=lambda draft: draft.arrives_s):
        value = prices.value(draft.survivals)
        if value > 0.0:
            gain += draft.punctual * (value * (1.0 - draft.kept) + draft.kept * prices.excess)
        wait_s = max(0.0, draft.arrives_s - now_s)
        tail_s = (1.0 - draft.punctual) * max(0.0, draft.late_s - now_s - wait_s)
        if now_s + wait_s > limit_s or limit_s <= now_s:
            break
        if gain - prices.rate * (wait_s + tail_s) > best:
            best, best_until_s = gain - prices.rate * (wait_s + tail_s), min(draft.late_s, limit_s)
    return best_until_s


def _left_out(situation: Situation, waiting: Sequence[_Waiting], prices: _Prices, longest_s: float) -> dict[str, float]:
    """The requests to hold, and until when: their drafts will be there when this step ends, and gain more than a plain
    token now.

    Leaving a row out makes the step shorter; if the server is compute-bound, that is worth nearly the token that the
    row would make. So groups form: while one is verified, the edges of the others draft.
    """
    end_s = situation.now_s + prices.step_s
    left_out = []
    for row, draft in waiting:
        waits_s = end_s - row.since_s
        is_too_long = waits_s > situation.limits.hold_limit_s or waits_s + prices.step_s > longest_s
        if is_too_long or draft.arrives_s > end_s:
            continue
        value = prices.value(draft.survivals)
        if value > 0.0 and draft.punctual * value * (1.0 - draft.kept) > 1.0 - prices.rate * prices.saved_s:
            left_out.append((draft.arrives_s, row.order, row.key))
    if len(left_out) == len(situation.rows):  # some have to run meanwhile: those whose drafts arrive last
        left_out = sorted(left_out)[: len(situation.rows) // 2]
    return {key: end_s for _, _, key in left_out}
