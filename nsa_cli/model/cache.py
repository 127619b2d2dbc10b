"""The key/value cache: what a layer has to remember to decode one token at a time, and nothing else.

Dense: keys and values of every token. Sparse: the selected branch's keys and values of every token; the compressed blocks;
the last w tokens of the window branch and the last l - 1 tokens before compression, of which the next blocks will be made,
in rings (token s stands at place s % size). Keys and values that branches share are stored once: then the window has no ring,
and of the raw tokens only the keys before rotary are kept. `accounting.cache_bytes` is the formula, to the byte.

Buffers are [b, g, places, d], made in full at the first pass and grown by whole pages. Every row has a length of its own,
known on the host and on the device, so that no step waits for the device. What lies beyond a row's length is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_cli.config import ModelConfig

PAGE = 256
"""Tokens by whose multiples a full cache grows, at least by a quarter of what it holds."""


@dataclass(frozen=True)
class Span:
    """Where the tokens of one pass stand: row b's are positions starts[b] .. starts[b] + counts[b] - 1.

    starts, counts: on the host. first, number: the same int64 [b] on the device. A pass of t > counts[b] tokens is padded.
    """

    starts: list[int]
    counts: list[int]
    first: Tensor
    number: Tensor

    @property
    def uniform(self) -> bool:
        """Whether all rows are known to stand at the same place and to take as many tokens."""
        return len(set(self.starts)) == 1 and len(set(self.counts)) == 1

    @property
    def ends(self) -> list[int]:
        """Every row's length after the pass."""
        return [start + count for start, count in zip(self.starts, self.counts, strict=True)]


class LayerCache:
    """One layer's buffers by name."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, like: Tensor, places: int) -> Tensor:
        """The buffer `name` of at least `places` places, zeros where nothing was written; like: [b, g, .., d]."""
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape[2] < places:
            grown = like.new_zeros(like.shape[0], like.shape[1], places, like.shape[-1])
            if buffer is not None:
                grown[:, :, : buffer.shape[2]] = buffer
            buffer = self.buffers[name] = grown
        return buffer

    def append(self, name: str, x: Tensor, span: Span, capacity: int) -> Tensor:
        """Write x [b, g, t, d] at the span's positions; the whole buffer comes back.

        Padding is written too: beyond its row's length, where the next tokens overwrite it.
        """
        buffer, tokens = self.buffer(name, x, capacity), x.shape[2]
        if len(set(span.starts)) == 1:
            buffer[:, :, span.starts[0] : span.starts[0] + tokens] = x
        else:
            rows = torch.arange(x.shape[0], device=x.device)[:, None]
            buffer[rows, :, span.first[:, None] + torch.arange(tokens, device=x.device)] = x.transpose(1, 2).to(buffer.dtype)
        return buffer

    def put(self, name: str, x: Tensor, rows: Tensor, places: Tensor, capacity: int, like: Tensor) -> None:
        """Write x [m, g, d] at the pairs (rows[i], places[i])."""
        buffer = self.buffer(name, like, capacity)
        buffer[rows, :, places] = x.to(buffer.dtype)

    def remember(self, name: str, x: Tensor, span: Span, size: int) -> None:
        """Put the span's tokens x [b, g, t, d] into the ring `name` of `size` places, the newest over the oldest."""
        if size == 0:
            return
        ring = self.buffer(name, x, size)
        if span.uniform and x.shape[2] == 1 and span.counts[0]:
            ring.select(2, span.starts[0] % size).copy_(x[:, :, 0])
            return
        if span.uniform:
            kept, end = min(span.counts[0], size), span.ends[0]
            new = x[:, :, span.counts[0] - kept : span.counts[0]].to(ring.dtype)
            place = (end - kept) % size
            head = min(kept, size - place)
            ring[:, :, place : place + head] = new[:, :, :head]
            ring[:, :, : kept - head] = new[:, :, head:]
            return
        if x.shape[2] == 1 and all(span.counts):
            ring[torch.arange(len(ring), device=x.device), :, span.first % size] = x[:, :, 0].to(ring.dtype)
            return
        last = (span.first + span.number - 1)[:, None]
        newest = last - (last - torch.arange(size, device=x.device)) % size  # the newest position of every place
        source = (newest - span.first[:, None]).clamp(0, x.shape[2] - 1)[:, None, :, None].expand_as(ring)
        is_new = (newest >= span.first[:, None])[:, None, :, None]
        ring.copy_(torch.where(is_new, x.to(ring.dtype).gather(2, source), ring))

    def recent(self, name: str, x: Tensor, span: Span, size: int, keep: int) -> tuple[Tensor, Tensor]:
        """The last `keep` tokens of a ring, then the span's x [b, g, t, d], before x is remembered.

        Returns [b, g, keep' + t, d] and int64 [b], the position of each row's first place; rows shorter than `keep` start
        with their first token. keep' is less than `keep` where no row is longer.
        """
        if size == 0 or keep == 0:
            return x, span.first
        ring, tokens = self.buffer(name, x, size), x.shape[2]
        keep = min(keep, max(span.starts))
        base = (span.first - keep).clamp(min=0)
        if span.uniform:
            place = (span.starts[0] - keep) % size
            head = min(keep, size - place)
            return torch.cat([ring.narrow(2, place, head), ring.narrow(2, 0, keep - head), x.to(ring.dtype)], 2), base
        at = base[:, None] + torch.arange(keep + tokens, device=x.device)
        new = size + (at - span.first[:, None]).clamp(0, tokens - 1)
        source = torch.where(at < span.first[:, None], at % size, new)[:, None, :, None]
        both = torch.cat([ring, x.to(ring.dtype)], 2)
        return both.gather(2, source.expand(*both.shape[:2], -1, both.shape[3])), base


@dataclass(frozen=True)
class Mark:
    """A place in every row to which `Cache.back_to` can return: lengths, on the host and the device, and the rings' content."""

    lengths: list[int]
    at: Tensor
    rings: list[dict[str, Tensor]]


class Cache:
    """What `Transformer.make_cache` returns and `Transformer.forward(ids, cache=...)` extends.

    host_lengths: tokens that every sequence of the batch holds; lengths: the same int64 [b] on the model's device.
    capacity: tokens a sequence that there is room for. `Step` reads lengths on the device and counts them in place.
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int, device: torch.device) -> None:
        self.config = config
        self.layers = [LayerCache() for _ in range(config.depth)]
        self.device = device
        self.capacity = max(capacity, 1)
        self.host_lengths = [0] * batch
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)

    @property
    def longest(self) -> int:
        return max(self.host_lengths, default=0)

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers take."""
        return sum(b.numel() * b.element_size() for layer in self.layers for b in layer.buffers.values())

    @property
    def itemsize(self) -> int:
        """Bytes of one number; 0 of an empty cache."""
        return next((b.element_size() for layer in self.layers for b in layer.buffers.values()), 0)

    def room(self, tokens: int) -> int:
        """The capacity that `tokens` tokens a sequence ask for: this one, or more by whole pages and a quarter at least, so that
        growing costs little."""
        if tokens <= self.capacity:
            return self.capacity
        return -(-max(tokens, self.capacity + self.capacity // 4) // PAGE) * PAGE

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens a sequence in every buffer that is made or written from now on."""
        self.capacity = self.room(tokens)

    def span(self, tokens: int, counts: Sequence[int] | None = None) -> Span:
        """Where the next `tokens` tokens of every row go, of which the first counts[b] are real; room is made for them."""
        number = [tokens] * len(self.host_lengths) if counts is None else [int(n) for n in counts]
        if len(number) != len(self.host_lengths) or not all(0 <= n <= tokens for n in number):
            rule = f"{len(self.host_lengths)} numbers between 0 and {tokens}, the tokens of the pass"
            raise ValueError(f"counts = {number}: must be {rule}")
        self.reserve(self.longest + tokens)
        if counts is None:
            there = torch.full_like(self.lengths, tokens)
        else:
            there = torch.tensor(number, dtype=torch.int64).to(self.device)
        return Span(list(self.host_lengths), number, self.lengths, there)

    def advance(self, span: Span) -> None:
        """Count the span's tokens, once all layers hold them."""
        self.host_lengths = span.ends
        self.lengths += span.number  # in place: a captured graph reads and counts them there

    def mark(self) -> Mark:
        """Where every row stands now. Costs a copy of the rings."""
        rings = [{n: b.clone() for n, b in layer.buffers.items() if n.endswith("_ring")} for layer in self.layers]
        return Mark(list(self.host_lengths), self.lengths.clone(), rings)

    def back_to(self, mark: Mark) -> None:
        """Take back every token since the mark: the cache goes on as if they had never come."""
        assert len(mark.lengths) == len(self.host_lengths), "a mark of another cache"
        for layer, rings in zip(self.layers, mark.rings, strict=True):
            for name, ring in rings.items():
                layer.buffers[name].copy_(ring)
        self.host_lengths = list(mark.lengths)
        self.lengths.copy_(mark.at)

    def select(self, rows: Tensor | Sequence[int]) -> Cache:
        """A cache of the given rows of the batch, in that order, each as often as named."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        chosen = Cache(self.config, 0, self.capacity, self.device)
        chosen.host_lengths = [self.host_lengths[i] for i in index.tolist()]
        index = index.to(self.device)
        chosen.lengths = self.lengths[index]
        for mine, theirs in zip(chosen.layers, self.layers, strict=True):
            mine.buffers = {name: buffer.index_select(0, index) for name, buffer in theirs.buffers.items()}
        return chosen
