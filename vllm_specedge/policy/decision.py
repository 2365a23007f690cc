"""What the next step verifies, and who waits for a draft. Pure: plain values in, a decision out; no clock, no vLLM.

Everything is counted in tokens: a second is worth `rate` of them, what the server makes in one. So a draft token is
worth verifying if the chance that it is right exceeds what the step grows by, and a draft is worth waiting for if what
it brings exceeds what is not made meanwhile.

Rule 1: what rises expected tokens per second is done, nothing else; a server that is full verifies nothing.
Rule 2: whoever has to be served first is not delayed: while prompts are computed or wait nobody is held, and drafts get
only what they leave of the step; of the cache, see book.Row.
Rule 3: nobody is held longer than HoldLimits.hold_limit_s after its last token, whoever it is held for.
Rule 4: the order in which rows are given changes nothing; among equals the more important, then the older comes first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from math import inf
from typing import TypeAlias

from vllm_specedge.policy.acceptance import Acceptance
from vllm_specedge.policy.edge_record import EdgeRecord
from vllm_specedge.policy.probing import Probe
from vllm_specedge.policy.step_cost import StepCost

MODES = ("auto", "wait", "never-wait", "budget")
"""All that pays; hold every request until its draft is there and verify all of it (the paper's way); never hold, and
verify all; never hold, and verify what pays."""
HOLDING_MODES, BUDGET_MODES = ("auto", "wait"), ("auto", "budget")
CAUTION = 1.15
"""What verifying takes counts as so many times as long: much of the work around it is done in no step (the gateway's,
the edges' on a shared machine), and of many estimates the best ones are the luckiest. Where drafts just about pay, they
then are left out, and what is lost by that is small; without it that is where a server gets slower."""
LEAST_GAIN = 0.03
"""Part of a plain step's tokens a second that verifying is to bring at least. Where less is expected, what
was expected too much loses more than what is gained: in simulation 2 to 4 % at 16 requests on a CPU, for 1 or 2."""
FAST = 2.0
"""So many times the tokens per second of a plain step make up for chunks that come after longer pauses."""
PROBE_PART = 8
"""A probe verifies one draft token for so many requests."""


@dataclass(frozen=True, slots=True)
class HoldLimits:
    """What an operator sets. `hold_limit_s` 0 never holds; `mode` is one of MODES."""

    hold_limit_s: float = 0.1
    mode: str = "auto"
    max_misses: int = 2
    """After so many late answers in a row an edge is not waited for until it is in time again."""
    max_slowdown: float = 1.15
    """Nobody's tokens may come slower by more than this because of drafts, its own or others'."""
    max_stretch: float = 1.5
    """No step may take more than so many times what it takes without drafts, the wait before it included, unless it
    gives tokens FAST times as fast."""


@dataclass(frozen=True, slots=True)
class Awaited:
    """A draft that is expected for a request that has none."""

    arrives_s: float
    late_s: float
    """Then it is not waited for any more."""
    survivals: Sequence[float]
    """Of its tokens, as Row has them."""
    kept: float
    """The chance that it is of use although the request goes on by a token before it comes."""
    punctual: float
    """The chance that it comes before `late_s`."""


def awaited(record: EdgeRecord, own: Acceptance, since_s: float, limit: int, limits: HoldLimits) -> Awaited | None:
    """What is expected of an edge for a request that came to be without a draft at `since_s`; None: nothing.

    In mode `wait` an answer is expected of any edge, whatever its record says.
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


@dataclass(frozen=True, slots=True)
class Candidate:
    """A running request that could decode in the next step."""

    key: str
    order: int
    """Older ones have smaller numbers."""
    since_s: float
    """When its last token was decided."""
    priority: int = 0
    """As vLLM's: smaller is more important."""
    survivals: Sequence[float] = ()
    """Of the draft that is there: for each token the chance that the target says it and all before it."""
    awaited: Awaited | None = None
    speedup: float = 1.0
    """How fast its tokens come of late, over how fast they would come without drafts."""
    waited_s: float = 0.0
    """So long it was held since then."""


@dataclass(frozen=True, slots=True)
class Load:
    """What else there is to do for the engine."""

    context: int = 0
    """Tokens in the caches of the requests that could decode."""
    num_others: int = 0
    """Requests that decode plainly in any case, beside the candidates."""
    prefill: int = 0
    """Tokens of prompts that this step computes."""
    is_pressed: bool = False
    """Requests wait to be admitted: nobody is held."""
    room: int = 1 << 30
    """Tokens that fit into a step."""
    probe: Probe = Probe.NONE
    step_limit_s: float = inf
    """The shortest target for inter-token latency among the requests that could decode."""


@dataclass(slots=True)
class Decision:
    """For each candidate that is in neither: decode plainly."""

    lengths: dict[str, int] = field(default_factory=dict)
    """Draft tokens to verify."""
    holds: dict[str, float] = field(default_factory=dict)
    """Left out of the step, until when at most."""
    wait_until_s: float | None = None
    """Nobody runs before, unless a draft arrives: then all are in `holds`."""


def decide(
    candidates: Sequence[Candidate],
    load: Load,
    cost: StepCost,
    speedup: float,
    limits: HoldLimits,
    now_s: float,
) -> Decision:
    """What the next step does. `speedup`: tokens per second of late, over those of plain steps of the same size."""
    rows = sorted(candidates, key=lambda row: (row.priority, row.order))
    decision = Decision(_budget(rows, load, cost, limits))
    if limits.mode in HOLDING_MODES and rows:
        _hold(rows, load, cost, speedup, limits, now_s, decision)
    return decision


# -- what is verified ----------------------------------------------------------------------------------------------

_Token: TypeAlias = tuple[float, int, int]
"""Survival, negative so that the best sort first; index of its row; how deep it is in the draft."""


def _budget(rows: Sequence[Candidate], load: Load, cost: StepCost, limits: HoldLimits) -> dict[str, int]:
    """Draft tokens by request: those most probably right, as long as more of them make more tokens per second."""
    num_rows = len(rows) + load.num_others
    tokens = [
        (-survival, index, depth) for index, row in enumerate(rows) for depth, survival in enumerate(row.survivals)
    ]
    if not tokens:
        return {}
    tokens.sort()
    tokens = tokens[: max(0, load.room - num_rows - load.prefill)]
    if limits.mode in BUDGET_MODES:
        number = _best(tokens, rows, load, cost, limits)
        tokens = tokens[: _num_probed(num_rows) if not number and load.probe is Probe.FORCED else number]
    lengths: dict[str, int] = {}
    for _, index, _ in tokens:
        key = rows[index].key
        lengths[key] = lengths.get(key, 0) + 1
    return lengths


def _longest_s(rows: Sequence[Candidate], load: Load, step_s: float, limits: HoldLimits) -> float:
    """How long a step may take, which takes `step_s` without drafts, for these rows, in which nothing is verified.

    A step that is longer by others' drafts slows a request that has none. One whose drafts were right of late has its
    tokens sooner all the same; the others are to have theirs no later than `max_slowdown` allows.
    """
    slowest = 1.0 if load.num_others else max(1.0, min((row.speedup for row in rows), default=inf))
    return min(step_s * limits.max_slowdown * slowest, load.step_limit_s)


def _best(
    tokens: Sequence[_Token],
    rows: Sequence[Candidate],
    load: Load,
    cost: StepCost,
    limits: HoldLimits,
) -> int:
    """How many of the tokens, most probable first, give most tokens per second."""
    num_rows = len(rows) + load.num_others
    size = num_rows + load.prefill
    step_s = cost(num_rows, size, load.context, load.prefill)
    if not step_s:
        return len(tokens)
    if load.probe is Probe.PLAIN:
        return 0
    waited_s = max(row.waited_s for row in rows)
    stretch_s = step_s * limits.max_stretch - waited_s
    verifying_s = cost.verifying_s(num_rows)
    growth_s = [verifying_s + growth for growth in cost.growth(size, len(tokens))]
    best = len(tokens)
    # Fewer tokens may leave more rows without any, for whom the step may take less long.
    while best:
        verified = {index for _, index, _ in tokens[:best]}
        plain = [row for index, row in enumerate(rows) if index not in verified]
        longest_s = _longest_s(plain, load, step_s, limits) - waited_s
        number = _scan(tokens[:best], growth_s, _Step(size, step_s, waited_s, longest_s, stretch_s))
        if not number and load.probe is Probe.VERIFY:
            number = _fitting(growth_s[: _num_probed(num_rows)], min(longest_s, stretch_s) - step_s)
        if number in (0, best) or step_s + growth_s[number - 1] <= _longest_s(rows, load, step_s, limits) - waited_s:
            return number
        best = number
    return 0


def _num_probed(num_rows: int) -> int:
    return max(1, num_rows // PROBE_PART)


def _fitting(growth_s: Sequence[float], most_s: float) -> int:
    """How many of the first tokens make the step longer by no more."""
    return sum(1 for _ in takewhile(lambda growth: growth <= most_s, growth_s))


def _cautious(growth_s: float) -> float:
    """What is gained by a step that becomes shorter is not thought to be more than it is."""
    return growth_s * CAUTION if growth_s > 0.0 else growth_s


@dataclass(frozen=True, slots=True)
class _Step:
    """A step before any draft is in it."""

    size: int
    """Tokens."""
    plain_s: float
    waited_s: float
    """So long the one of its rows that was held longest has waited for it."""
    longest_s: float
    """What it may take with drafts, whoever has none."""
    stretch_s: float
    """What it may take if it does not make tokens come FAST times as fast."""


def _scan(tokens: Sequence[_Token], growth_s: Sequence[float], step: _Step) -> int:
    """How many of the tokens make most tokens a second; `growth_s`: how much longer the step takes with 1, 2, ..."""
    # Tokens of prompts count as made: else they would make drafts look cheap, whose time they pay for.
    best, best_rate, expected = 0, (1.0 + LEAST_GAIN) * step.size / step.plain_s, float(step.size)
    for number, (growth, token) in enumerate(zip(growth_s, tokens, strict=False), 1):
        expected -= token[0]
        took_s = step.plain_s + growth
        if took_s > step.longest_s:
            continue  # a larger step may be shorter (stepcost.py, rule 2)
        total_s = step.plain_s + _cautious(growth)
        if took_s > step.stretch_s and expected * step.plain_s < FAST * step.size * (step.waited_s + total_s):
            continue
        if expected > best_rate * total_s * (1 + 1e-9):
            best, best_rate = number, expected / total_s
    return best


# -- who waits -----------------------------------------------------------------------------------------------------

_Waiting: TypeAlias = tuple[Candidate, Awaited]


@dataclass(frozen=True, slots=True)
class _Prices:
    """What time is worth."""

    step_s: float
    """A plain step of all."""
    saved_s: float
    """How much shorter it is with one request less."""
    rate: float
    """Tokens a second."""
    growth_s: Sequence[float]
    """How much longer the step takes with 1, 2, ... draft tokens more."""
    excess: float
    """Tokens that an average step makes beyond a plain one, for each request."""
    verifying_s: float
    """How much longer the step takes because it verifies at all."""

    def value(self, survivals: Sequence[float]) -> float:
        """Tokens that a draft brings when it is verified, less what its verification takes; 0: it would not be."""
        best = total = 0.0
        for survival, growth_s in zip(survivals, self.growth_s, strict=False):
            total += survival
            best = max(best, total - self.rate * _cautious(growth_s))
        return best


def _hold(
    rows: Sequence[Candidate],
    load: Load,
    cost: StepCost,
    speedup: float,
    limits: HoldLimits,
    now_s: float,
    decision: Decision,
) -> None:
    waiting = [
        (row, row.awaited)
        for row in rows
        if row.key not in decision.lengths and row.awaited is not None and now_s < row.awaited.late_s
    ]
    if not waiting or load.prefill or load.is_pressed:
        return
    if limits.mode == "wait":
        decision.holds = {row.key: draft.late_s for row, draft in waiting}
        if len(waiting) == len(rows) and not load.num_others:
            decision.wait_until_s = min(decision.holds.values())
        return
    prices = _prices(rows, waiting, load, cost, speedup, sum(decision.lengths.values()))
    if prices is None:
        return
    longest_s = min(_longest_s(rows, load, prices.step_s, limits), prices.step_s * limits.max_stretch)
    moment = _Moment(rows, waiting, prices, longest_s, limits.hold_limit_s, now_s)
    decision.wait_until_s = _wait(moment)
    if decision.wait_until_s is not None:
        decision.holds = dict.fromkeys((row.key for row in rows), decision.wait_until_s)
        decision.lengths = {}
        return
    decision.holds = _left_out(moment)


def _prices(
    rows: Sequence[Candidate],
    waiting: Sequence[_Waiting],
    load: Load,
    cost: StepCost,
    speedup: float,
    num_verified: int,
) -> _Prices | None:
    num_rows = len(rows) + load.num_others
    step_s = cost(num_rows, num_rows, load.context)
    if step_s <= 0.0:
        return None
    return _Prices(
        step_s=step_s,
        saved_s=step_s - cost(num_rows - 1, num_rows - 1, load.context),
        rate=max(1.0, speedup) * num_rows / step_s,
        growth_s=cost.growth(num_rows + num_verified, max(len(draft.survivals) for _, draft in waiting)),
        excess=max(0.0, speedup - 1.0),
        verifying_s=0.0 if num_verified else cost.verifying_s(num_rows),
    )


@dataclass(frozen=True, slots=True)
class _Moment:
    """What is to be decided about: who could run, and who of them could wait."""

    rows: Sequence[Candidate]
    waiting: Sequence[_Waiting]
    prices: _Prices
    longest_s: float
    """What a step may take, and what waiting for it takes."""
    hold_limit_s: float
    now_s: float


def _wait(moment: _Moment) -> float | None:
    """Until when all wait for drafts, or None to run now.

    Waiting w seconds costs rate * w. It brings, for each draft that comes meanwhile, what it is worth times the chance
    that going on without it would spoil it; and it avoids a plain step, which makes less than an average one (the
    renewal argument for one request: wait if value * (1 - kept) > rate * w - kept * (speedup - 1)).
    """
    prices, now_s = moment.prices, moment.now_s
    oldest_s = min(row.since_s for row in moment.rows)
    least_s = prices.step_s + prices.verifying_s + sum(prices.growth_s[:1])
    limit_s = oldest_s + min(moment.hold_limit_s, moment.longest_s - least_s)
    best, best_until_s, gain = 0.0, None, -prices.rate * prices.verifying_s
    for draft in sorted((draft for _, draft in moment.waiting), key=lambda draft: draft.arrives_s):
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


def _left_out(moment: _Moment) -> dict[str, float]:
    """Those to hold, and until when: their drafts will be there when this step ends, for more than a plain token now.

    A row left out makes the step shorter; where compute is full that is worth nearly the token that the row makes. So
    groups form: while one is verified, the others' edges draft.
    """
    prices = moment.prices
    end_s = moment.now_s + prices.step_s
    left_out = []
    for row, draft in moment.waiting:
        waits_s = end_s - row.since_s
        if draft.arrives_s > end_s or waits_s > moment.hold_limit_s or waits_s + prices.step_s > moment.longest_s:
            continue
        value = prices.value(draft.survivals)
        if value > 0.0 and draft.punctual * value * (1.0 - draft.kept) > 1.0 - prices.rate * prices.saved_s:
            left_out.append((draft.arrives_s, row.order, row.key))
    if len(left_out) == len(moment.rows):  # somebody has to run meanwhile: those whose drafts come last
        left_out = sorted(left_out)[: len(moment.rows) // 2]
    return {key: end_s for _, _, key in left_out}
