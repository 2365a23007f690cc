"""The cost model of the engine's steps, learnt while it serves. Pure: no clock.

Model: seconds = curve(tokens) + requests * a + context * b + prefilled * c, + requests * d if anything is verified, +
gap if the step is synchronous on an engine whose steps need not be. The curve is known at KNOTS and linear in between,
so it can be flat where weights are read from memory and steep where compute is full. d is the cost of vLLM's rejection
sampler, which processes the rows of all requests, with or without drafts. In the gap the device waits for the
scheduler. A Kalman filter estimates all together: a measurement at one size also moves the estimates of sizes around
it, less with distance (a Gaussian process over log2 tokens), and estimates without measurements become uncertain again.

Rule 1: one outlier has little effect: a surprise of more than MAX_SURPRISE deviations counts as noise.
Rule 2: more tokens count as faster only if that was measured: some kernels are slower for two rows than for four (56
and 40 ms on the test machine), and assuming otherwise would make further tokens look free.
Rule 3: sizes with many measurements are only updated now and then, as an update costs a tenth of a millisecond.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import log2, sqrt
from operator import mul

KNOTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 512, 1024, 2048, 4096, 8192)
PROFILED = (1, 4, 16, 64, 128, 256, 512, 1024)
"""Sizes to profile at start-up, as far as time allows."""
_NUM_KNOTS = len(KNOTS)
_REQUESTS, _CONTEXT, _PREFILLED, _VERIFYING, _SYNCHRONOUS = range(_NUM_KNOTS, _NUM_KNOTS + 5)
_NUM = _NUM_KNOTS + 5
CONTEXT_UNIT = 1024.0
MAX_SURPRISE = 3.0
FORGETTING = 1 / 2048
"""Share by which each step moves the uncertainty of estimates back towards the prior's."""
SETTLED, SETTLED_EVERY = 32, 4
"""After SETTLED steps of a size, only one of SETTLED_EVERY is used."""
_MIN_SEEN = 4
"""Steps of a size after which its own estimate is trusted."""
_NOISE_GAIN = 0.03
_FIRST_NOISE = 0.1
_MIN_NOISE = 0.01
_PROMPT_NOISE = 3.0
"""Noise factor of steps that prefill prompts: attention, new requests and much else take time in them."""
_PRIOR_SCALE = 0.5
"""Relative deviation of the prior's level: a profile leaves out sampling and much else."""
_PRIOR_OCTAVE = 0.3
"""Relative deviation of its growth from one size to twice that size."""
_PRIOR_KINK = 0.03
_PRIOR_CONTEXT, _PRIOR_REQUEST, _PRIOR_PREFILLED, _PRIOR_VERIFYING, _PRIOR_GAP = 0.02, 0.002, 0.002, 0.004, 0.1
"""Prior deviations of the extra cost of 1,024 tokens of context, a request, a prefilled token, a request in a step that
verifies, and the gap of a synchronous step, as shares of a step of one token."""
UNKNOWN_SLOPE = 1 / 128
"""Without a profile, the assumed cost of a token as a share of a step of one token."""


class StepCost:
    """Seconds of the engine's steps."""

    def __init__(self, profile: Mapping[int, float] | None = None) -> None:
        """`profile`: seconds by number of tokens, measured at start-up; None: the first step sets the scale."""
        self._mean: list[float] = []
        self._prior: list[list[float]] = []
        self._covariance: list[list[float]] = []
        self._noise = _FIRST_NOISE
        self._curve: list[float] = []
        """The means at the knots; those without measurements are made to rise."""
        self._seen = [0] * _NUM_KNOTS
        if profile:
            sizes = sorted(profile)
            self._begin([_interpolated(sizes, [profile[size] for size in sizes], knot) for knot in KNOTS])

    def _begin(self, curve: Sequence[float]) -> None:
        rising = list(accumulate(curve, max))
        first = rising[0]
        self._mean = [*rising, *[0.0] * (_NUM - _NUM_KNOTS)]
        self._prior = [[0.0] * _NUM for _ in range(_NUM)]
        for i, one in enumerate(KNOTS):
            for j, other in enumerate(KNOTS):
                shared = _PRIOR_SCALE**2 + _PRIOR_OCTAVE**2 * log2(min(one, other))
                self._prior[i][j] = (shared + (_PRIOR_KINK**2 if i == j else 0.0)) * rising[i] * rising[j]
        for index, deviation in (
            (_REQUESTS, _PRIOR_REQUEST),
            (_CONTEXT, _PRIOR_CONTEXT),
            (_PREFILLED, _PRIOR_PREFILLED),
            (_VERIFYING, _PRIOR_VERIFYING),
            (_SYNCHRONOUS, _PRIOR_GAP),
        ):
            self._prior[index][index] = (deviation * first) ** 2
        self._covariance = [list(row) for row in self._prior]
        self._curve = list(rising)

    @property
    def parts_s(self) -> tuple[Sequence[float], float, float, float]:
        """Seconds of a step of each size in KNOTS; seconds added by each request, by each CONTEXT_UNIT of context, and
        by each request if something is verified. No sizes before any step was measured."""
        return self._curve, self._each_s(_REQUESTS), self._each_s(_CONTEXT), self._each_s(_VERIFYING)

    def _each_s(self, index: int) -> float:
        return max(0.0, self._mean[index]) if self._mean else 0.0

    @property
    def gap_s(self) -> float:
        """Seconds that a synchronous step is longer, on an engine whose steps need not be synchronous."""
        return self._each_s(_SYNCHRONOUS)

    def observe(
        self,
        requests: int,
        tokens: int,
        context: int,
        took_s: float,
        prefilled: int = 0,
        is_verifying: bool = False,
        has_gap: bool = False,
    ) -> None:
        """Record a step: `tokens` tokens, `prefilled` of them of prompts, for `requests` requests with `context` tokens
        in all, took `took_s`. `is_verifying`: it had draft tokens. `has_gap`: it was synchronous, and need not have
        been."""
        if tokens <= 0 or took_s <= 0.0:
            return
        if not self._mean:
            self._begin([took_s * (1 + UNKNOWN_SLOPE * knot) / (1 + UNKNOWN_SLOPE * tokens) for knot in KNOTS])
        weights = _weights(tokens)
        nearest = weights[0][0] if weights[0][1] > weights[1][1] else weights[1][0]
        self._seen[nearest] += 1
        if self._seen[nearest] > SETTLED and self._seen[nearest] % SETTLED_EVERY:
            return
        features = [*weights, (_REQUESTS, float(requests)), (_CONTEXT, context / CONTEXT_UNIT)]
        if prefilled:
            features.append((_PREFILLED, float(prefilled)))
        if is_verifying:
            features.append((_VERIFYING, float(requests)))
        if has_gap:
            features.append((_SYNCHRONOUS, 1.0))
        columns = [self._covariance[index] for index, _ in features]
        parts = [part for _, part in features]
        spread = [sum(map(mul, parts, column)) for column in zip(*columns, strict=True)]
        expected_s = max(sum(part * self._mean[index] for index, part in features), 1e-9)
        noise = (self._noise * (_PROMPT_NOISE if prefilled else 1.0) * expected_s) ** 2
        variance = sum(part * spread[index] for index, part in features) + noise
        surprise_s = took_s - expected_s
        believed_s = min(abs(surprise_s), MAX_SURPRISE * sqrt(variance))
        noisy = (believed_s**2 - (variance - noise)) / expected_s**2
        if not prefilled:
            self._noise = sqrt(max(_MIN_NOISE**2, self._noise**2 + _NOISE_GAIN * (noisy - self._noise**2)))
        # A larger surprise counts as noisier: it moves the estimates little, and makes nothing more certain.
        self._update(spread, max(variance, (surprise_s / MAX_SURPRISE) ** 2), surprise_s)

    def _update(self, spread: Sequence[float], variance: float, surprise_s: float) -> None:
        by = surprise_s / variance
        self._mean = [mean + each * by for mean, each in zip(self._mean, spread, strict=True)]
        for row, prior, each in zip(self._covariance, self._prior, spread, strict=True):
            gain = each / variance
            row[:] = [
                value - gain * other + FORGETTING * (before - value)
                for value, other, before in zip(row, spread, prior, strict=True)
            ]
        least = 1e-9
        for index, seen in enumerate(self._seen):
            mean = self._mean[index]
            least = max(1e-9, mean) if seen >= _MIN_SEEN else max(least, mean)
            self._curve[index] = least

    def __call__(self, requests: int, tokens: int, context: int, prefilled: int = 0) -> float:
        """Seconds of a step that verifies nothing; 0 before any step was measured."""
        if not self._mean or tokens <= 0:
            return 0.0
        beside = (
            requests * self._each_s(_REQUESTS)
            + context / CONTEXT_UNIT * self._each_s(_CONTEXT)
            + prefilled * self._mean[_PREFILLED]
        )
        return max(1e-6, on_curve(self._curve, tokens) + beside)

    def verifying_s(self, requests: int) -> float:
        """Seconds that a step of this many requests is longer because something is verified, however little, without
        the gap."""
        return requests * self._each_s(_VERIFYING)

    def growth(self, tokens: int, more: int) -> list[float]:
        """Seconds that a step of `tokens` tokens is longer with 1, 2, ... `more` further ones (no `verifying_s`)."""
        if not self._mean or more <= 0:
            return [0.0] * max(0, more)
        base = on_curve(self._curve, max(1, tokens))
        longer: list[float] = []
        at = max(1, tokens)
        while len(longer) < more:
            index = min(_NUM_KNOTS - 2, bisect_right(KNOTS, at) - 1)
            slope = (self._curve[index + 1] - self._curve[index]) / (KNOTS[index + 1] - KNOTS[index])
            end = at + more - len(longer)
            if index < _NUM_KNOTS - 2:
                end = min(end, KNOTS[index + 1])
            start = self._curve[index] - base - slope * KNOTS[index]
            longer += [start + slope * size for size in range(at + 1, end + 1)]
            at = end
        return longer


def on_curve(curve: Sequence[float], tokens: int) -> float:
    """Linear interpolation between the values at KNOTS; past the last, extrapolation from the last two."""
    (low, part), (high, other) = _weights(tokens)
    return part * curve[low] + other * curve[high]


def _weights(tokens: int) -> tuple[tuple[int, float], tuple[int, float]]:
    """The two knots around a size, with their weights."""
    low = min(_NUM_KNOTS - 2, bisect_right(KNOTS, tokens) - 1)
    part = (tokens - KNOTS[low]) / (KNOTS[low + 1] - KNOTS[low])
    return (low, 1.0 - part), (low + 1, part)


def _interpolated(sizes: Sequence[int], seconds: Sequence[float], size: int) -> float:
    """Linear interpolation of a profile, extrapolated on both ends."""
    if len(sizes) == 1:
        return seconds[0] * (1 + UNKNOWN_SLOPE * size) / (1 + UNKNOWN_SLOPE * sizes[0])
    high = min(len(sizes) - 1, max(1, bisect_right(sizes, size)))
    low = high - 1
    slope = (seconds[high] - seconds[low]) / (sizes[high] - sizes[low])
    return max(seconds[low] + slope * (size - sizes[low]), min(seconds) / 2)
