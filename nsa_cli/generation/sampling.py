"""From logits to token ids: filters, Gumbel-max sampling, and noise that is a pure function of where it is used.

Every function here takes float32 logits `[.., vocab]` and changes nothing in place. A filter sets the logits it
removes to minus infinity and always leaves at least one. Where logits are equal, the lower token id counts as the
higher logit, so that the same logits give the same ids on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

# splitmix64 (Steele, Lea, Flood 2014)
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How continuations are drawn. Filters left at None are off; they act in the order of the fields, after
    temperature.

    temperature: divides the logits; 0 takes the most likely token. top_k: keep the k highest logits. filter_thres:
    keep the ceil((1 - thres) vocab) highest. top_p: keep the fewest tokens, likeliest first, whose probabilities
    reach p. min_p: keep tokens at least p times as likely as the likeliest. max_tokens: tokens of one continuation.
    continuations: how many each prompt gets. seed: with a prompt's index and a continuation's number it fixes the
    noise.

    Wrong values raise ValueError with the field, the value and the rule.
    """

    temperature: float = 0.8
    top_k: int | None = None
    filter_thres: float | None = None
    top_p: float | None = None
    min_p: float | None = None
    max_tokens: int = 256
    continuations: int = 1
    seed: int = 1337

    def __post_init__(self) -> None:
        self._number("temperature", 0.0, math.inf)
        if self.top_k is not None:
            self._integer("top_k", 1)
        if self.filter_thres is not None:
            self._number("filter_thres", 0.0, 1.0)
        if self.top_p is not None:
            self._number("top_p", 0.0, 1.0)
            self._require(self.top_p > 0, "top_p", "must be above 0")
        if self.min_p is not None:
            self._number("min_p", 0.0, 1.0)
        self._integer("max_tokens", 0)
        self._integer("continuations", 1)
        self._integer("seed", 0)

    def _require(self, ok: bool, field: str, rule: str) -> None:
        if not ok:
            raise ValueError(f"{field} = {getattr(self, field)!r}: {rule}")

    def _integer(self, field: str, low: int) -> None:
        value = getattr(self, field)
        ok = isinstance(value, int) and not isinstance(value, bool) and value >= low
        self._require(ok, field, f"must be an integer of at least {low}")

    def _number(self, field: str, low: float, high: float) -> None:
        value = getattr(self, field)
        ok = isinstance(value, (int, float)) and not isinstance(value, bool)
        ok = ok and math.isfinite(value) and low <= value <= high
        rule = f"of at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
        self._require(ok, field, f"must be a finite number {rule}")


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """(logits - max) / temperature, temperature > 0. The maximum becomes 0, so a tiny temperature cannot overflow to
    NaN."""
    shifted = logits - logits.amax(-1, keepdim=True)
    # (0 / t) stays 0 for every t > 0, but t below float32's range would become 0 / 0 inside the division.
    return shifted / max(temperature, torch.finfo(torch.float32).tiny)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep exactly the k highest logits (all, if there are no more than k); the lower id wins a tie at the edge."""
    if k >= logits.shape[-1]:
        return logits
    edge = logits.topk(k, dim=-1).values[..., -1:]
    above = logits > edge
    tied = logits == edge
    places = k - above.sum(-1, keepdim=True)
    keep = above | (tied & (tied.cumsum(-1) <= places))
    return logits.masked_fill(~keep, -math.inf)


def filter_thres_count(thres: float, vocab: int) -> int:
    """How many logits `filter_thres` keeps: max(1, ceil((1 - thres) vocab)), with thres taken as the decimal number
    it prints as: 0.7 of 10 leaves 3, where binary rounding would make it 4."""
    return max(1, math.ceil((1 - Fraction(str(thres))) * vocab))


def keep_filter_thres(logits: Tensor, thres: float) -> Tensor:
    """Keep the ceil((1 - thres) vocab) highest logits, at least one (`filter_thres` of lucidrains' `top_k`)."""
    return keep_top_k(logits, filter_thres_count(thres, logits.shape[-1]))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest tokens, likeliest first, whose probabilities add up to at least p (nucleus sampling, 0 < p <=
    1)."""
    if p >= 1:
        return logits
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs
    drop = before >= p
    # A p below float32's range would compare as 0 and drop even the likeliest.
    drop[..., 0] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, ids, drop), -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens whose probability is at least p times the highest one's (0 <= p <= 1)."""
    if p <= 0:
        return logits
    edge = logits.amax(-1, keepdim=True) + math.log(p)
    return logits.masked_fill(logits < edge, -math.inf)


def filter_logits(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Temperature and every filter of `config`; softmax of the result is the distribution that is sampled.

    Needs temperature > 0: greedy choice is `choose`'s.
    """
    logits = apply_temperature(logits, config.temperature)
    if config.top_k is not None:
        logits = keep_top_k(logits, config.top_k)
    if config.filter_thres is not None:
        logits = keep_filter_thres(logits, config.filter_thres)
    if config.top_p is not None:
        logits = keep_top_p(logits, config.top_p)
    if config.min_p is not None:
        logits = keep_min_p(logits, config.min_p)
    return logits


def choose(logits: Tensor, config: SamplingConfig, noise: Tensor | None) -> Tensor:
    """Token ids int64 [..]: argmax of the filtered logits + Gumbel noise `[.., vocab]` (Gumbel-max: an exact draw
    from their softmax); at temperature 0 the argmax of the logits, where noise is not used and may be None."""
    if config.temperature == 0:
        return logits.argmax(-1)
    assert noise is not None
    return (filter_logits(logits, config) + noise).argmax(-1)


def log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """The model's own log-probability of each id (nats, float32 [..]): log_softmax of the logits before temperature
    and filters."""
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit value."""
    return value - (1 << 64) if value >> 63 else value


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64; torch's own copies the sign bit."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def gumbel_noise(keys: Tensor, position: int, count: int, vocab: int) -> Tensor:
    """Gumbel noise of `count` positions from `position` on, float32 `[rows, count, vocab]`; keys int64 `[rows]`.

    -log(-log u), where u is the upper 52 bits of splitmix64(key + (position 2^32 + token + 1) golden), at the middle of
    its 2^-52 cell. Counter-based: a value depends on its key, position and token alone, whatever rows or devices work
    beside it.
    """
    device = keys.device
    places = torch.arange(position, position + count, device=device) << 32
    counter = places[:, None] + torch.arange(1, vocab + 1, device=device)
    bits = keys[:, None, None] + counter * _signed(_GOLDEN)
    bits = (bits ^ _shifted(bits, 30)) * _signed(_MIX_1)
    bits = (bits ^ _shifted(bits, 27)) * _signed(_MIX_2)
    bits = bits ^ _shifted(bits, 31)
    uniform = (_shifted(bits, 12).double() + 0.5) * 2.0**-52
    return uniform.log_().neg_().log_().neg_().float()


class GumbelSource:
    """The noise of several sequences that advance together, one position at a time.

    streams: one (prompt index, continuation number) a row. Noise is made for a run of positions at once, since for a
    small vocabulary the cost is in the calls and not in the numbers.
    """

    def __init__(self, seed: int, streams: Sequence[tuple[int, int]], vocab: int, device: torch.device) -> None:
        keys = [np.random.SeedSequence(seed, spawn_key=stream).generate_state(1, np.uint64)[0] for stream in streams]
        self._keys = torch.tensor([_signed(int(key)) for key in keys], dtype=torch.int64, device=device)
        self._vocab = vocab
        self._run = max(1, min(64, 16384 // vocab))
        self._start = 0
        self._noise: Tensor | None = None

    def at(self, position: int) -> Tensor:
        """Noise of one position, float32 `[rows, vocab]`."""
        if self._noise is None or not self._start <= position < self._start + self._run:
            self._start = position
            self._noise = gumbel_noise(self._keys, position, self._run, self._vocab)
        return self._noise[:, position - self._start]

    def select(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self._keys = self._keys[rows]
        self._noise = None if self._noise is None else self._noise[rows]
