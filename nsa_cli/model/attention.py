"""Dense attention, and what one forward pass knows about its tokens.

Letters: b batch, t query token, s key token, h query head, g key/value head, d head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from nsa_cli.config import ModelConfig
from nsa_cli.model.cache import Cache, LayerCache
from nsa_cli.model.parallel import ContextParallel
from nsa_cli.model.rotary import Rotary, rotate

MASK_ELEMENTS = 2**25
"""Entries of the mask [t, s] of a pass behind a filled cache, a sequence: longer passes go in chunks."""


@dataclass
class Geometry:
    """Where the tokens of one forward pass stand; made once and shared by all layers.

    positions: int64 [t], or [b, t] behind a filled cache. angles: float32 [t, d] or [b, 1, t, d].
    cu_seqlens: packed documents, or None. block_starts: for packed documents, the first token of every compressed block;
    block_positions: each compressed block's first position in its document.
    cache: the sequences so far, or None. first: whether the cache is empty, so that the pass is an ordinary one.
    parallel: the processes that share the sequence, or None; positions are then those of this one's tokens.
    """

    rotary: Rotary
    positions: Tensor
    angles: Tensor
    cu_seqlens: Tensor | None = None
    block_starts: Tensor | None = None
    block_positions: Tensor | None = None
    cache: Cache | None = None
    first: bool = True
    parallel: ContextParallel | None = None

    def append(self, layer: LayerCache, name: str, x: Tensor) -> Tensor:
        """Write the pass's tokens x [b, g, t, d] into a buffer; all tokens so far [b, g, s, d] come back."""
        assert self.cache is not None
        cache, tokens = self.cache, x.shape[2]
        longest = cache.longest + tokens
        if cache.uniform:
            buffer = layer.write(name, x, None, slice(longest - tokens, longest), cache.capacity)
        else:
            rows = torch.arange(x.shape[0], device=x.device).repeat_interleave(tokens)
            flat = rearrange(x, "b g t d -> (b t) g d")
            buffer = layer.write(name, flat, rows, self.positions.flatten(), cache.capacity)
        return buffer[:, :, :longest]


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
        q = rotate(rearrange(self.to_q(x), "b t (h d) -> b h t d", h=self.heads), geometry.angles)
        k = rotate(rearrange(self.to_k(x), "b t (g d) -> b g t d", g=self.kv_heads), geometry.angles)
        v = rearrange(self.to_v(x), "b t (g d) -> b g t d", g=self.kv_heads)
        all_k, all_v = k, v
        if layer is not None:
            all_k, all_v = geometry.append(layer, "k", k), geometry.append(layer, "v", v)
        first, positions = geometry.first, geometry.positions
        if geometry.parallel is not None:
            return self.to_out(rearrange(self._shared(q, k, v, geometry.parallel), "b h t d -> b t (h d)"))
        out = self._causal(q, k, v, geometry.cu_seqlens) if first else self._cached(q, all_k, all_v, positions)
        return self.to_out(rearrange(out, "b h t d -> b t (h d)"))

    def _cached(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """q [b, h, t, d] at positions [b, t] against a cache; queries go in chunks that keep the mask small."""
        s, chunk = torch.arange(k.shape[2], device=q.device), max(MASK_ELEMENTS // k.shape[2], 1)
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

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        gqa, p = self.heads != self.kv_heads, self.dropout if self.training else 0.0
        if cu_seqlens is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p, enable_gqa=gqa)
        sizes = cu_seqlens.diff().tolist()
        documents = zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True)
        return torch.cat(
            [
                F.scaled_dot_product_attention(*qkv, is_causal=True, dropout_p=p, enable_gqa=gqa)
                for qkv in documents
                if qkv[0].shape[2] > 0
            ],
            2,
        )
