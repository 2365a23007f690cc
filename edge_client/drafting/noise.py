"""The noise that the target adds when it samples, so that a draft can predict the sampled token. Pure.

At each position the target chooses the token with the greatest sum of log probability (at the request's temperature)
and Gumbel noise. The noise is a hash of the request's seed, the position and the token id, so an edge that knows the
seed knows the noise. A draft that adds the same noise to its own candidates agrees with the target more often (Daliri,
Musco and Suresh 2024, "Coupling without communication").

vLLM has two such hashes. Its CPU build uses SplitMix64 (Steele, Lea and Flood 2014) behind an MT19937 seeded as in
torch; the V2 model runner uses 32-bit MurmurHash3 (Appleby 2011). Both are in plain Python here, as an edge may have
nothing else.
"""

from collections.abc import Iterator, Sequence
from math import exp, log, log1p
from typing import Protocol

from edge_client.drafters import Candidate
from vllm_specedge.wire.sampling import MURMUR, SPLITMIX, Sampling

NUM_CANDIDATES = 64
"""Number of the draft's most probable tokens among which noise chooses."""
SHARPNESS = 1.25
"""How much more certain a target is than its draft: the factor on the draft's log probabilities. Measured with two
pairs of models and nine kinds of answers at temperatures 0.6 and 1 (benchmarks/LOG.md, 2026-11-27)."""
_MIN_CANDIDATES = 8
"""With fewer candidates, as from prompt lookup, the probabilities of other tokens are unknown."""
_MASK32, _MASK64 = 2**32 - 1, 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
_ROW_SEEDS = 2**31
_LEAST = 1e-30
_MURMUR_BYTES = 16
"""Length of the hashed input, which MurmurHash3 mixes in at the end."""


class Hash(Protocol):
    """A kind of noise, for one seed."""

    def key(self, position: int) -> int:
        """The part of the hash that all tokens at a position of the request share."""

    def gumbel(self, key: int, token: int) -> float:
        """The noise of a token id, Gumbel distributed."""


class SplitMix:
    """Kind 1: as vLLM's CPU build draws it (csrc/cpu, `fused_gumbel_argmax`)."""

    def __init__(self, sampling: Sampling) -> None:
        self._first = sampling.first
        self._words = _words(sampling.seed)
        self._row_seeds: list[int] = []

    def row_seed(self, position: int) -> int:
        """The 31 bits that the request's generator draws for the token at a position."""
        while len(self._row_seeds) <= position - self._first:
            next(self._words)  # torch draws 64 bits and uses the last 31
            self._row_seeds.append(next(self._words) % _ROW_SEEDS)
        return self._row_seeds[position - self._first]

    def key(self, position: int) -> int:
        return splitmix64(self.row_seed(position))

    def gumbel(self, key: int, token: int) -> float:
        bits = splitmix64(key + (token + 1) * _GAMMA & _MASK64) >> 11
        return -log(-log((bits + 0.5) * 2.0**-53))


class Murmur:
    """Kind 2: as the V2 model runner draws it (v1/worker/gpu/sample/gumbel.py, `murmur3_uniform32`)."""

    def __init__(self, sampling: Sampling) -> None:
        self._seed = _mixed(_mixed(0, sampling.seed & _MASK32), sampling.seed >> 32)

    def key(self, position: int) -> int:
        """vLLM's position is that of the previous token, whose logits are sampled."""
        return _mixed(self._seed, position - 1 & _MASK32)

    def gumbel(self, key: int, token: int) -> float:
        bits = _mixed(key, token) ^ _MURMUR_BYTES
        bits = (bits ^ bits >> 16) * 0x85EBCA6B & _MASK32
        bits = (bits ^ bits >> 13) * 0xC2B2AE35 & _MASK32
        return -log(-log1p(-((bits ^ bits >> 16) + 0.5) * 2.0**-32))


_KINDS: dict[int, type[SplitMix] | type[Murmur]] = {SPLITMIX: SplitMix, MURMUR: Murmur}


class Noise:
    """The noise of one request, and the draft's candidates with it."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._hash: Hash = _KINDS[sampling.noise](sampling)

    def chosen(
        self, candidates: Sequence[Candidate], position: int, limit: int, sharpness: float = SHARPNESS
    ) -> list[Candidate]:
        """The `limit` candidates that the target most probably chooses at a position, best first.

        `candidates`: most probable first. Their probabilities become a softmax over the noisy scores: the noise is
        known, but not how far the target's logits are from the draft's. `sharpness`: the factor on the draft's log
        probabilities, before noise is added.
        """
        if position < self._sampling.first or len(candidates) < _MIN_CANDIDATES:
            return list(candidates[:limit])
        key, gumbel = self._hash.key(position), self._hash.gumbel
        scores = [
            (sharpness * weight + gumbel(key, token), token) for token, weight in _weighted(candidates, self._sampling)
        ]
        best = max(score for score, _ in scores)
        total = sum(exp(score - best) for score, _ in scores)
        scores.sort(reverse=True)
        return [Candidate(token, exp(score - best) / total) for score, token in scores[:limit]]


def _weighted(candidates: Sequence[Candidate], sampling: Sampling) -> list[tuple[int, float]]:
    """Token ids that top-k and top-p leave, with their log probabilities at the temperature, up to a constant.

    Of all other tokens only the total probability is known: each counts as if it were as probable as the last.
    """
    others = 1.0 - sum(candidate.probability for candidate in candidates)
    if sampling.top_k:
        candidates = candidates[: sampling.top_k]
        others = 0.0 if sampling.top_k <= len(candidates) else others
    weights = [log(max(probability, _LEAST)) / sampling.temperature for _, probability in candidates]
    parts = [exp(weight - weights[0]) for weight in weights]
    num_others = max(0.0, others) / max(candidates[-1].probability, _LEAST)
    left, total, weighted = sampling.top_p * (sum(parts) + num_others * parts[-1]), 0.0, []
    for (token, _), weight, part in zip(candidates, weights, parts, strict=True):
        weighted.append((token, weight))
        total += part
        if total >= left:
            break
    return weighted


def splitmix64(number: int) -> int:
    """SplitMix64's 64-bit mixing function."""
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    number = (number ^ number >> 27) * 0x94D049BB133111EB & _MASK64
    return number ^ number >> 31


def _mixed(state: int, word: int) -> int:
    """MurmurHash3's 32-bit state after another 32-bit word."""
    word = word * 0xCC9E2D51 & _MASK32
    state ^= (word << 15 | word >> 17) * 0x1B873593 & _MASK32
    return (state << 13 & _MASK32 | state >> 19) * 5 + 0xE6546B64 & _MASK32


def _words(seed: int) -> Iterator[int]:
    """MT19937's 32-bit numbers, seeded with the last 32 bits, as torch does (ATen/core/MT19937RNGEngine.h)."""
    state = [seed & _MASK32]
    for index in range(1, 624):
        state.append(1812433253 * (state[-1] ^ state[-1] >> 30) + index & _MASK32)
    while True:
        for index in range(624):
            word = state[index] & 0x80000000 | state[(index + 1) % 624] & 0x7FFFFFFF
            state[index] = state[(index + 397) % 624] ^ word >> 1 ^ (word & 1) * 0x9908B0DF
        for number in state:
            word = number ^ number >> 11
            word ^= word << 7 & 0x9D2C5680
            word ^= word << 15 & 0xEFC60000
            yield word ^ word >> 18
