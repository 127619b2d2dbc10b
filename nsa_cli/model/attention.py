"""Dense attention, and what one forward pass knows about its tokens.

Letters: b batch, t query token, s key token, h query head, g key/value head, d head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa_cli.config import ModelConfig
from nsa_cli.model.cache import Cache, LayerCache, Span
from nsa_cli.model.parallel import ContextParallel
from nsa_cli.model.rotary import Rotary, rotate

MASK_ELEMENTS = 2**25
"""Entries of the mask [t, s] of a pass behind a filled cache, a sequence: longer passes go in chunks."""
_ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""What attends to documents of any length: cuDNN, PyTorch's first choice on some GPUs, builds a plan for each new length."""


@dataclass
class Geometry:
    """Where the tokens of one forward pass stand; made once and shared by all layers.

    positions: int64 [t], or [b, t] behind a filled cache. cos_sin: float32 [2, t, d] or [2, b, 1, t, d], for `rotate`.
    cu_seqlens: packed documents, or None; ends: the same on the host. block_starts: for packed documents, the first token of
    every compressed block; block_positions: each compressed block's first position in its document.
    cache: the sequences so far, or None; span: where in it the pass's tokens go. first: whether the cache is empty, so that
    the pass is an ordinary one.
    parallel: the processes that share the sequence, or None; positions are then those of this one's tokens.
    """

    rotary: Rotary
    positions: Tensor
    cos_sin: Tensor
    cu_seqlens: Tensor | None = None
    block_starts: Tensor | None = None
    block_positions: Tensor | None = None
    cache: Cache | None = None
    span: Span | None = None
    first: bool = True
    ends: list[int] | None = None
    parallel: ContextParallel | None = None


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[b, t, h d] -> [b, h, t, d], a view."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[b, h, t, d] -> [b, t, h d]."""
    return x.transpose(1, 2).flatten(2)


class DenseAttention(nn.Module):
    """Causal grouped-query attention with rotary positions, through PyTorch's scaled_dot_product_attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = config.heads * config.dim_head
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.to_q = nn.Linear(config.dim, inner, bias=False)
        self.to_k = nn.Linear(config.dim, config.kv_heads * config.dim_head, bias=False)
        self.to_v = nn.Linear(config.dim, config.kv_heads * config.dim_head, bias=False)
        self.to_out = nn.Linear(inner, config.dim, bias=False)
        self.dropout = config.dropout

    def forward(self, x: Tensor, geometry: Geometry, layer: LayerCache | None = None) -> Tensor:
        """[b, t, dim] -> [b, t, dim]."""
        q = rotate(split_heads(self.to_q(x), self.heads), geometry.cos_sin)
        k = rotate(split_heads(self.to_k(x), self.kv_heads), geometry.cos_sin)
        v = split_heads(self.to_v(x), self.kv_heads)
        if geometry.parallel is not None:
            return self.to_out(join_heads(self._shared(q, k, v, geometry.parallel)))
        if layer is None:
            return self.to_out(join_heads(self._causal(q, k, v, geometry.ends)))
        cache, span = geometry.cache, geometry.span
        assert cache is not None
        assert span is not None
        all_k, all_v = (layer.append(name, new, span, cache.capacity) for name, new in (("k", k), ("v", v)))
        if geometry.first:
            out = self._causal(q, k, v, geometry.ends)
        else:
            tokens = max(span.starts) + x.shape[1]
            out = self._cached(q, all_k[:, :, :tokens], all_v[:, :, :tokens], geometry.positions, span)
        return self.to_out(join_heads(out))

    def _cached(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, span: Span) -> Tensor:
        """q [b, h, t, d] at positions [b, t] against a cache; queries go in chunks that keep the mask small."""
        s, chunk = torch.arange(k.shape[2], device=q.device), max(MASK_ELEMENTS // k.shape[2], 1)
        if q.shape[2] == 1:
            # A group's heads as the rows of one product; rows of one length see all there is.
            rows = q.view(q.shape[0], self.kv_heads, -1, q.shape[3])
            seen = None if span.uniform else s <= positions[:, None, None]
            return F.scaled_dot_product_attention(rows, k, v, attn_mask=seen).reshape(q.shape)
        return torch.cat(
            [
                F.scaled_dot_product_attention(
                    q_chunk, k, v, attn_mask=s <= at[:, None, :, None], enable_gqa=self.heads != self.kv_heads
                )
                for q_chunk, at in zip(q.split(chunk, 2), positions.split(chunk, 1), strict=True)
            ],
            2,
        )

    def _shared(self, q: Tensor, k: Tensor, v: Tensor, parallel: ContextParallel) -> Tensor:
        """This process's queries against the keys of all: each of its two pieces is the end of a causal triangle, and so is
        any part of one. On a CPU, where the mask is a tensor, they go in parts that keep it small."""
        from torch.nn.attention.bias import causal_lower_right  # it loads torch's compiler

        k, v = parallel.gather(k, v)
        gqa, p = self.heads != self.kv_heads, self.dropout if self.training else 0.0
        outs = []
        for piece, (start, stop) in zip(q.chunk(2, 2), parallel.ranges(k.shape[2]), strict=True):
            part = stop - start if q.is_cuda else max(MASK_ELEMENTS // stop, 1)
            for queries in piece.split(part, 2):
                start += queries.shape[2]
                mask = causal_lower_right(queries.shape[2], start)
                keys, values = k[:, :, :start], v[:, :, :start]
                outs.append(F.scaled_dot_product_attention(queries, keys, values, mask, dropout_p=p, enable_gqa=gqa))
        return torch.cat(outs, 2)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, ends: list[int] | None) -> Tensor:
        gqa, p = self.heads != self.kv_heads, self.dropout if self.training else 0.0
        if ends is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p, enable_gqa=gqa)
        sizes = [stop - start for start, stop in pairwise(ends)]
        documents = zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True)
        with sdpa_kernel(_ANY_LENGTH):
            return torch.cat(
                [
                    F.scaled_dot_product_attention(*qkv, is_causal=True, dropout_p=p, enable_gqa=gqa)
                    for qkv in documents
                    if qkv[0].shape[2] > 0
                ],
                2,
            )
