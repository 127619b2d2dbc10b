"""The `torch` kernel: the three branches in plain PyTorch, vectorised, chunked, differentiable, on any device.

Memory grows linearly with the tokens: attention runs in chunks of queries (or a key block at a time), keeps one
log-sum-exp a row and recomputes the probabilities in the backward. Keys are never expanded per query head.

Four ways to attend, chosen by shape:
* `_fused_attention`: PyTorch's fused attention under an explicit mask. Window and selected branch of short inputs.
* `_ChunkedAttention`: queries in chunks against a span of keys under an exact mask. The compressed branch, the window, and
  the selected branch while most keys are selected anyway.
* `nsa_cli.ops.by_block`: key blocks outside, the queries that selected each inside. Long inputs.
* `_gathered_attention`: the keys of each query gathered. A few queries against a long cache.

Shapes depend on data here and there, and torch.compile gains nothing but minutes of compiling: it leaves these functions
as they are and compiles the model around them.

`positions` [b or 1, t] are the queries' positions in their document; keys sit at 0 .. s - 1. Scores and softmax are in
float32, or float64 for float64 inputs. Letters as in `nsa_cli.ops`; r is a query head within its group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from nsa_cli.config import NSAConfig
from nsa_cli.ops.by_block import attend_by_block
from nsa_cli.ops.selection import pool_importance, select_blocks, visible_blocks

CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
"""Scores alive at a time. On a CPU a chunk should stay in the cache; on a GPU launches cost more than memory."""

FUSED_MASK_ELEMENTS = 2**26
"""Up to this many mask entries (bytes) fused attention takes the mask as a tensor, which the backward keeps."""

GATHER_QUERIES = 16
"""Up to this many query tokens a sequence (decoding) gather their keys instead of masking all of them."""

WINDOW_FUSED_UP_TO = 4
"""Up to this many windows of tokens the band is not cut into chunks."""

MASKED_UP_TO = 1024
"""Selected attention masks all keys while there are at most this many of them (4 times as many on a GPU, where the loop over
blocks costs launches); beyond, blocks go outside. On two cores, n 16, l' 64, forward: 1,024 keys 49 against 45 ms, 4,096 keys
502 against 197 ms; but with l' 16 at 256 keys 6 against 74 ms."""


def softmax_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


class Places:
    """The queries' positions [b or 1, t], and how far any chunk of them reaches, known on the host."""

    def __init__(self, q: Tensor, positions: Tensor | None) -> None:
        self.in_order = positions is None
        self.positions = torch.arange(q.shape[2], device=q.device)[None] if positions is None else positions
        if positions is not None:
            self._least, self._most = positions.amin(0).tolist(), positions.amax(0).tolist()

    def reach(self, start: int, stop: int) -> tuple[int, int]:
        """The least and the greatest position of the queries [start, stop)."""
        if self.in_order:
            return start, stop - 1
        return min(self._least[start:stop]), max(self._most[start:stop])


@dataclass
class Mask(ABC):
    """Which keys a chunk of queries may see. keys: how many there are."""

    places: Places
    keys: int

    @abstractmethod
    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Keys [low, high) outside of which no query of [start, stop) sees anything."""

    @abstractmethod
    def visible(self, start: int, stop: int, low: int, high: int) -> Tensor:
        """bool [b or 1, g or 1, 1, stop - start, high - low]."""


@dataclass
class CompressedMask(Mask):
    """Block c is visible to position t iff c d + l - 1 <= t."""

    config: NSAConfig

    def span(self, start: int, stop: int) -> tuple[int, int]:
        return 0, min(self.config.num_compressed(self.places.reach(start, stop)[1] + 1), self.keys)

    def visible(self, start: int, stop: int, low: int, high: int) -> Tensor:
        count = visible_blocks(self.places.positions[:, start:stop], self.config)
        c = torch.arange(low, high, device=count.device)
        return (c < count[..., None])[:, None, None]


@dataclass
class WindowMask(Mask):
    """Keys t - w < s <= t."""

    window: int

    def span(self, start: int, stop: int) -> tuple[int, int]:
        least, most = self.places.reach(start, stop)
        high = min(most + 1, self.keys)
        return min(max(least - self.window + 1, 0), high), high

    def visible(self, start: int, stop: int, low: int, high: int) -> Tensor:
        t = self.places.positions[:, start:stop, None]
        s = torch.arange(low, high, device=t.device)
        return ((s <= t) & (s > t - self.window))[:, None, None]


@dataclass
class SelectedMask(Mask):
    """Keys s <= t of the blocks in block_indices [b, g, t, n]."""

    block_indices: Tensor
    select_block: int

    def span(self, start: int, stop: int) -> tuple[int, int]:
        return 0, min(self.places.reach(start, stop)[1] + 1, self.keys)

    def visible(self, start: int, stop: int, low: int, high: int) -> Tensor:
        indices = self.block_indices[:, :, start:stop]
        blocks = -(-high // self.select_block)
        beyond = torch.where((indices >= 0) & (indices < blocks), indices, blocks).long()
        chosen = indices.new_zeros((*indices.shape[:3], blocks + 1), dtype=torch.bool).scatter_(-1, beyond, True)
        s = torch.arange(low, high, device=indices.device)
        causal = s <= self.places.positions[:, start:stop, None]
        return (chosen[..., :blocks].repeat_interleave(self.select_block, -1)[..., low:high] & causal[:, None])[:, :, None]


def _query_chunk(batch_heads: int, keys: int, device: torch.device) -> int:
    return max(CHUNK_ELEMENTS.get(device.type, 2**22) // max(batch_heads * keys, 1), 16)


class _ChunkedAttention(torch.autograd.Function):
    """softmax(scale q k^T, over the visible keys) v, a chunk of queries at a time; rows that see nothing give 0.

    q [b, g, r, t, d], k [b, g, s, d], v [b, g, s, e] -> out [b, g, r, t, e], and with `selects` the block indices
    [b, g, t, n] decided by the chunk's probabilities (else an empty tensor).
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, chunk: int, selects: CompressedMask | None
    ) -> tuple[Tensor, Tensor]:
        b, g, r, t, _ = q.shape
        dtype = softmax_dtype(q)
        out = q.new_empty(b, g, r, t, v.shape[-1])
        lse = torch.empty(b, g, r, t, dtype=dtype, device=q.device)
        indices: list[Tensor] = []
        for start in range(0, t, chunk):
            stop = min(start + chunk, t)
            low, high = mask.span(start, stop)
            scores = _chunk_scores(q[:, :, :, start:stop], k[:, :, low:high], scale)
            scores = scores.masked_fill_(~mask.visible(start, stop, low, high), float("-inf"))
            top = scores.amax(-1, keepdim=True) if high > low else scores.new_full((*scores.shape[:-1], 1), -torch.inf)
            top = top.masked_fill_(top == -torch.inf, 0.0)
            p = scores.sub_(top).exp_()
            total = p.sum(-1, keepdim=True)
            empty = total == 0
            p = p.div_(total.masked_fill(empty, 1.0))
            out[:, :, :, start:stop] = _rows_times(p, v[:, :, low:high])
            row = torch.where(empty, torch.inf, top + total.log())
            lse[:, :, :, start:stop] = row[..., 0]
            if selects is not None:
                config, positions = selects.config, selects.places.positions[:, start:stop]
                blocks = config.num_select_blocks(selects.places.reach(start, stop)[1] + 1)
                indices.append(select_blocks(pool_importance(p.sum(2), blocks, config), positions, config))
        block_indices = torch.cat(indices, 2) if indices else q.new_empty(0, dtype=torch.int32)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask, ctx.scale, ctx.chunk = mask, scale, chunk
        ctx.mark_non_differentiable(block_indices)
        return out, block_indices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        mask, chunk = ctx.mask, ctx.chunk
        dtype, t = lse.dtype, q.shape[3]
        dq = torch.empty_like(q)
        dk = torch.zeros(k.shape, dtype=dtype, device=k.device)
        dv = torch.zeros(v.shape, dtype=dtype, device=v.device)
        for start in range(0, t, chunk):
            stop = min(start + chunk, t)
            low, high = mask.span(start, stop)
            rows = slice(start, stop)
            q_rows, do = q[:, :, :, rows], grads[0][:, :, :, rows].to(dtype)
            p = _chunk_scores(q_rows, k[:, :, low:high], ctx.scale).sub_(lse[:, :, :, rows, None]).exp_()
            p = p.masked_fill_(~mask.visible(start, stop, low, high), 0.0)
            delta = (do * out[:, :, :, rows]).sum(-1, keepdim=True)
            dv[:, :, low:high] += _columns_times(p, do)
            ds = _chunk_scores(do, v[:, :, low:high], 1.0).sub_(delta).mul_(p).mul_(ctx.scale)
            dq[:, :, :, rows] = _rows_times(ds, k[:, :, low:high])
            dk[:, :, low:high] += _columns_times(ds, q_rows.to(dtype))
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _chunk_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale q k^T: [b, g, r, t, d] and [b, g, s, d] -> [b, g, r, t, s]; a group's heads are rows of one product."""
    b, g, r, t, d = q.shape
    dtype = softmax_dtype(q)
    rows = q.to(dtype).reshape(b, g, r * t, d)
    if scale != 1.0:
        rows = rows * scale
    return (rows @ k.to(dtype).transpose(-1, -2)).view(b, g, r, t, k.shape[2])


def _rows_times(p: Tensor, v: Tensor) -> Tensor:
    """p v: [b, g, r, t, s] and [b, g, s, e] -> [b, g, r, t, e]."""
    b, g, r, t, s = p.shape
    return (p.view(b, g, r * t, s) @ v.to(p.dtype)).view(b, g, r, t, v.shape[-1])


def _columns_times(p: Tensor, x: Tensor) -> Tensor:
    """p^T x, summed over the group's heads: [b, g, r, t, s] and [b, g, r, t, e] -> [b, g, s, e]."""
    b, g, r, t, s = p.shape
    return p.view(b, g, r * t, s).transpose(-1, -2) @ x.reshape(b, g, r * t, x.shape[-1])


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v by scaled_dot_product_attention; a group's heads are rows of one product.

    q [b, g, r, t, d]; visible bool [b or 1, g or 1, 1, t, s]. Rows that see nothing give 0.
    """
    b, g, r, t, d = q.shape
    sees = visible.any(-1, keepdim=True)
    mask = (visible | ~sees).expand(-1, -1, r, -1, -1).flatten(2, 3)
    out = F.scaled_dot_product_attention(q.reshape(b, g, r * t, d), k, v, attn_mask=mask, scale=scale)
    return out.view(b, g, r, t, -1).masked_fill(~sees, 0.0)


def _gathered_attention(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Softmax over each query's own list of keys: tokens int64 and visible bool [b, g or 1, t, m]; out [b, g, r, t, e]."""
    b, g = k.shape[:2]
    dtype = softmax_dtype(q)
    tokens = tokens.masked_fill(~visible, 0).expand(b, g, -1, -1)
    i_b = torch.arange(b, device=q.device)[:, None, None, None]
    i_g = torch.arange(g, device=q.device)[None, :, None, None]
    scores = torch.einsum("bgrtd,bgtmd->bgrtm", q.to(dtype) * scale, k[i_b, i_g, tokens].to(dtype))
    visible = visible[:, :, None]
    sees = visible.any(-1, keepdim=True)
    p = scores.masked_fill(~visible, float("-inf")).masked_fill(~sees, 0.0).softmax(-1).masked_fill(~visible, 0.0)
    return torch.einsum("bgrtm,bgtme->bgrte", p, v[i_b, i_g, tokens].to(dtype)).to(q.dtype)


def _grouped(q: Tensor, kv_heads: int) -> Tensor:
    return rearrange(q, "b (g r) t d -> b g r t d", g=kv_heads)


def _ungrouped(out: Tensor) -> Tensor:
    return rearrange(out, "b g r t d -> b (g r) t d")


def compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, config: NSAConfig, *, scale: float, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Branch `cmp` and the selection it decides: (o_cmp [b, h, t, e], block_indices int32 [b, g, t, n])."""
    mask = CompressedMask(Places(q, positions), k_cmp.shape[2], config)
    chunk = _query_chunk(q.shape[0] * q.shape[1], k_cmp.shape[2], q.device)
    out, block_indices = _ChunkedAttention.apply(_grouped(q, k_cmp.shape[1]), k_cmp, v_cmp, mask, scale, chunk, mask)
    return _ungrouped(out), block_indices


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    config: NSAConfig,
    *,
    scale: float,
    positions: Tensor | None = None,
) -> Tensor:
    """Branch `slc`: softmax over the tokens s <= t of the selected blocks; [b, h, t, e]."""
    b, h, t, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    grouped = _grouped(q, k.shape[1])
    if positions is not None and t <= GATHER_QUERIES:
        blocks = config.num_select_blocks(keys)
        if config.num_selected > blocks:  # a short cache has fewer blocks than places
            block_indices = block_indices.sort(-1, descending=True).values[..., :blocks]
        inside = torch.arange(config.select_block, device=q.device)
        tokens = (block_indices[..., None].long() * config.select_block + inside).flatten(-2)
        visible = (tokens >= 0) & (tokens <= positions[:, None, :, None]) & (tokens < keys)
        return _ungrouped(_gathered_attention(grouped, k, v, tokens, visible, scale))
    places = Places(q, positions)
    if keys > MASKED_UP_TO * (4 if q.device.type == "cuda" else 1):
        at = places.positions.expand(b, t)
        return _ungrouped(attend_by_block(grouped, k, v, block_indices, at, config.select_block, scale))
    mask = SelectedMask(places, keys, block_indices, config.select_block)
    if b * h * t * keys <= FUSED_MASK_ELEMENTS:
        return _ungrouped(_fused_attention(grouped, k, v, mask.visible(0, t, 0, keys), scale))
    chunk = _query_chunk(b * h, keys, q.device)
    return _ungrouped(_ChunkedAttention.apply(grouped, k, v, mask, scale, chunk, None)[0])


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, *, scale: float, positions: Tensor | None = None
) -> Tensor:
    """Branch `win`: softmax over t - w < s <= t; [b, h, t, e]."""
    b, h, t, keys, window = q.shape[0], q.shape[1], q.shape[2], k.shape[2], config.window
    grouped = _grouped(q, k.shape[1])
    if positions is not None and t <= GATHER_QUERIES:
        tokens = positions[:, None, :, None] + torch.arange(1 - min(window, keys), 1, device=q.device)
        visible = (tokens >= 0) & (tokens < keys)
        return _ungrouped(_gathered_attention(grouped, k, v, tokens, visible, scale))
    mask = WindowMask(Places(q, positions), keys, window)
    if positions is None and t <= WINDOW_FUSED_UP_TO * window and h // k.shape[1] * t * keys <= FUSED_MASK_ELEMENTS:
        return _ungrouped(_fused_attention(grouped, k, v, mask.visible(0, t, 0, keys), scale))
    # A chunk of c queries computes c - 1 scores a row in vain, at the corners of the band: short chunks waste less, which
    # pays on a CPU (16,384 tokens, w 512: chunks of 128 take 0.52 s, of 512 0.99 s); a GPU minds the launches more.
    longest = max(window if q.device.type == "cuda" else window // 4, 64)
    chunk = min(_query_chunk(b * h, min(2 * window, keys), q.device), longest)
    return _ungrouped(_ChunkedAttention.apply(grouped, k, v, mask, scale, chunk, None)[0])
