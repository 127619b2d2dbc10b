"""Native Sparse Attention as a layer: projections, compression, gates, cache; the algorithm itself is in nsa_cli.ops.

Branches are always in the order cmp, slc, win. With branch_kv "independent", to_k and to_v make three key/value sets, one
after another; with "shared", one serves all three. Rotary turns q and k of slc and win; the compressed branch sees them
unturned (compress_rope "none") or turned at each block's first position ("block").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from nsa_cli.config import ModelConfig
from nsa_cli.model.attention import Geometry, join_heads, split_heads
from nsa_cli.model.cache import Cache, LayerCache, Span
from nsa_cli.model.compress import make_compression
from nsa_cli.model.parallel import ContextParallel
from nsa_cli.model.rotary import rotate
from nsa_cli.ops import compressed_attention, selected_attention, window_attention
from nsa_cli.ops.decode import decode_attention
from nsa_cli.ops.dispatch import nsa_attention_and_selection

Recorder = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Takes q_cmp [b, h, t, d], k_cmp [b, g, c, d], block_indices [b, g, t, n] and gates [b, h, t, 3] of one pass."""


class SparseAttention(nn.Module):
    """The three branches over one query, gated per token, head and branch: g = sigmoid(W x + b), b starting at 0.

    Dropout acts on the gates: a branch of a head is left out for a token. It stands where dense attention drops
    probabilities, and regularises as well: best validation loss of `small` on tinyshakespeare 1.43 with it, 1.48 without.
    """

    def __init__(self, config: ModelConfig, kernel: str) -> None:
        super().__init__()
        assert config.nsa is not None
        self.nsa, self.kernel = config.nsa, kernel
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.sets = 3 if config.nsa.branch_kv == "independent" else 1
        inner, kv = config.heads * config.dim_head, config.kv_heads * config.dim_head
        self.to_q = nn.Linear(config.dim, inner, bias=False)
        self.to_k = nn.Linear(config.dim, self.sets * kv, bias=False)
        self.to_v = nn.Linear(config.dim, self.sets * kv, bias=False)
        self.to_out = nn.Linear(inner, config.dim, bias=False)
        self.compress_k = make_compression(config.nsa, config.kv_heads, config.dim_head)
        self.compress_v = make_compression(config.nsa, config.kv_heads, config.dim_head)
        self.to_gates = nn.Linear(config.dim, 3 * config.heads)
        self.gate_dropout = nn.Dropout(config.dropout)
        self.gate_mean: Tensor | None = None
        self.recorder: Recorder | None = None

    def forward(self, x: Tensor, geometry: Geometry, layer: LayerCache | None = None) -> Tensor:
        """[b, t, dim] -> [b, t, dim]."""
        q = split_heads(self.to_q(x), self.heads)
        k_raw, k_slc, k_win = self._branches(self.to_k(x))
        v_raw, v_slc, v_win = self._branches(self.to_v(x))
        gates = split_heads(self.to_gates(x).sigmoid(), self.heads)
        if self.training:
            self.gate_mean = gates.detach().float().mean((0, 1, 2))
        gates = self.gate_dropout(gates)
        turned, k_slc, k_win = self._rotate(q, k_slc, k_win, geometry.cos_sin)
        q_cmp = turned if self.nsa.compress_rope == "block" else q
        new = Tokens(k_raw, v_raw, k_slc, v_slc, k_win, v_win)
        if geometry.parallel is not None:
            k_raw, v_raw, k_slc, *more = geometry.parallel.gather(*(new[:3] if self.sets == 1 else new))
            v_slc, k_win, v_win = more or (v_raw, k_slc, v_raw)
        if geometry.first:
            k_cmp = self._compress_keys(k_raw, geometry)
            v_cmp = self.compress_v.compress(v_raw, geometry.block_starts, self.kernel).to(turned.dtype)
            k_cmp = k_cmp.to(turned.dtype)
            keys = (k_slc, v_slc, k_win, v_win, k_cmp, v_cmp)
            if geometry.parallel is not None:
                out, block_indices = self._shared(turned, q_cmp, gates, keys, geometry.parallel)
            else:
                out, block_indices = nsa_attention_and_selection(
                    turned, k_slc, v_slc, k_cmp, v_cmp, gates, self.nsa, q_cmp=q_cmp, k_win=k_win, v_win=v_win,
                    kernel=self.kernel, cu_seqlens=geometry.cu_seqlens,
                )  # fmt: skip
            if layer is not None:
                self._fill(geometry, layer, new, k_cmp, v_cmp)
        else:
            assert layer is not None
            attend = self._decode if x.shape[1] == 1 else self._continue
            out, block_indices, k_cmp = attend(geometry, layer, turned, q_cmp, new, gates)
        if self.recorder is not None:
            self.recorder(q_cmp, k_cmp, block_indices, gates)
        return self.to_out(join_heads(out))

    def _shared(
        self, q: Tensor, q_cmp: Tensor, gates: Tensor, keys: tuple[Tensor, ...], parallel: ContextParallel
    ) -> tuple[Tensor, Tensor]:
        """Each of this process's two pieces against the tokens up to its end."""
        parts = []
        for i, (start, stop) in enumerate(parallel.ranges(keys[0].shape[2])):
            k, v, k_win, v_win = (x[:, :, :stop] for x in keys[:4])
            k_cmp, v_cmp = (x[:, :, : self.nsa.num_compressed(stop)] for x in keys[4:])
            piece, piece_cmp, piece_gates = (x.chunk(2, 2)[i] for x in (q, q_cmp, gates))
            parts.append(
                nsa_attention_and_selection(
                    piece, k, v, k_cmp, v_cmp, piece_gates, self.nsa, q_cmp=piece_cmp, k_win=k_win, v_win=v_win,
                    kernel=self.kernel, offset=start,
                )
            )  # fmt: skip
        out, block_indices = (torch.cat(each, 2) for each in zip(*parts, strict=True))
        return out, block_indices

    def _branches(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys (or values) of cmp, slc and win, each [b, g, t, d]."""
        heads = split_heads(x, self.sets * self.kv_heads)
        if self.sets == 1:
            return heads, heads, heads
        cmp, slc, win = heads.split(self.kv_heads, 1)
        return cmp, slc, win

    def _rotate(self, q: Tensor, k_slc: Tensor, k_win: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q and the keys of slc and win at their positions; a single token's in one go, as calls are all that it costs."""
        if q.shape[2] > 1:
            k_slc = rotate(k_slc, cos_sin)
            return rotate(q, cos_sin), k_slc, (rotate(k_win, cos_sin) if self.sets == 3 else k_slc)
        both = rotate(torch.cat([q, k_slc, k_win] if self.sets == 3 else [q, k_slc], 1), cos_sin)
        turned, k_slc, *rest = both.split((self.heads, *[self.kv_heads] * (2 if self.sets == 3 else 1)), 1)
        return turned, k_slc, rest[0] if rest else k_slc

    def _compress_keys(self, k_raw: Tensor, geometry: Geometry) -> Tensor:
        """phi_k of every block of k_raw [b, g, t, d], turned at its first position if compress_rope asks for it."""
        k_cmp = self.compress_k.compress(k_raw, geometry.block_starts, self.kernel)
        if self.nsa.compress_rope == "none" or k_cmp.shape[2] == 0:
            return k_cmp
        starts = geometry.block_positions
        if starts is None:
            starts = torch.arange(k_cmp.shape[2], device=k_cmp.device) * self.nsa.compress_stride
        return rotate(k_cmp, geometry.rotary.cos_sin(starts))

    def _block_capacity(self, cache: Cache) -> int:
        return self.nsa.num_compressed(cache.capacity)

    def _fill(self, geometry: Geometry, layer: LayerCache, new: Tokens, k_cmp: Tensor, v_cmp: Tensor) -> None:
        """Store a first pass. Blocks that reach into padding are overwritten once they are complete."""
        cache, span = geometry.cache, geometry.span
        assert cache is not None
        assert span is not None
        capacity = self._block_capacity(cache)
        for name, x in (("k_cmp", k_cmp), ("v_cmp", v_cmp)):
            layer.buffer(name, x, capacity)[:, :, : x.shape[2]] = x
        layer.append("k_slc", new.k_slc, span, cache.capacity)
        layer.append("v_slc", new.v_slc, span, cache.capacity)
        self._remember(layer, new, span)

    def _remember(self, layer: LayerCache, new: Tokens, span: Span) -> None:
        """The rings take the pass's tokens."""
        pending, window = self.nsa.compress_block - 1, self.nsa.window
        layer.remember("k_raw_ring", new.k_raw, span, pending)
        if self.sets == 3:
            layer.remember("v_raw_ring", new.v_raw, span, pending)
            layer.remember("k_win_ring", new.k_win, span, window)
            layer.remember("v_win_ring", new.v_win, span, window)

    def _store(self, geometry: Geometry, layer: LayerCache, new: Tokens) -> tuple[Cache, Span, list[Tensor]]:
        """Cache the pass's tokens and the blocks they complete, but for the rings: (cache, span, [k, v, k_cmp, v_cmp])."""
        cache, span = geometry.cache, geometry.span
        assert cache is not None
        assert span is not None
        names = (("k_slc", new.k_slc), ("v_slc", new.v_slc))
        whole = [layer.append(name, x, span, cache.capacity) for name, x in names]
        whole += [layer.buffer(name, new.k_slc, self._block_capacity(cache)) for name in ("k_cmp", "v_cmp")]
        self._compress_new(geometry, layer, new, span, self._block_capacity(cache))
        return cache, span, whole

    def _continue(
        self, geometry: Geometry, layer: LayerCache, q: Tensor, q_cmp: Tensor, new: Tokens, gates: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Several tokens behind a filled cache: (out, block_indices, k_cmp)."""
        _, span, (k, v, k_cmp, v_cmp) = self._store(geometry, layer, new)
        nsa, tokens = self.nsa, max(span.starts) + q.shape[2]
        k_cmp, v_cmp = (x[:, :, : nsa.num_compressed(tokens)] for x in (k_cmp, v_cmp))
        k, v = k[:, :, :tokens], v[:, :, :tokens]
        if self.kernel == "triton" and span.uniform and span.counts[0] == q.shape[2]:
            k_win, v_win = self._window_in_place(layer, new, span)
            self._remember(layer, new, span)
            out, block_indices = nsa_attention_and_selection(
                q, k, v, k_cmp, v_cmp, gates, nsa, q_cmp=q_cmp, k_win=k_win, v_win=v_win, kernel=self.kernel,
                offset=span.starts[0],
            )  # fmt: skip
            return out, block_indices, k_cmp
        options: dict[str, Any] = {"kernel": self.kernel, "positions": geometry.positions}
        o_cmp, block_indices = compressed_attention(q_cmp, k_cmp, v_cmp, nsa, **options)
        o_slc = selected_attention(q, k, v, block_indices, nsa, **options)
        if self.sets == 3:
            k, base = layer.recent("k_win_ring", new.k_win, span, nsa.window, nsa.window - 1)
            v, _ = layer.recent("v_win_ring", new.v_win, span, nsa.window, nsa.window - 1)
            options["positions"] = geometry.positions - base[:, None]
        o_win = window_attention(q, k, v, nsa, **options)
        self._remember(layer, new, span)
        g_cmp, g_slc, g_win = gates.unsqueeze(-1).unbind(-2)
        return (g_cmp * o_cmp + g_slc * o_slc + g_win * o_win).to(q.dtype), block_indices, k_cmp

    def _window_in_place(self, layer: LayerCache, new: Tokens, span: Span) -> tuple[Tensor | None, Tensor | None]:
        """The window's keys and values that this pass sees, at their positions; zeros before. None if they are slc's."""
        if self.sets == 1:
            return None, None
        size, found = self.nsa.window, []
        for name, x in (("k_win_ring", new.k_win), ("v_win_ring", new.v_win)):
            recent, _ = layer.recent(name, x, span, size, size - 1)
            whole = x.new_zeros(*x.shape[:2], span.ends[0], x.shape[3])
            whole[:, :, span.ends[0] - recent.shape[2] :] = recent
            found.append(whole)
        return found[0], found[1]

    def _decode(
        self, geometry: Geometry, layer: LayerCache, q: Tensor, q_cmp: Tensor, new: Tokens, gates: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token behind a filled cache: (out, block_indices, k_cmp)."""
        _, span, (k, v, k_cmp, v_cmp) = self._store(geometry, layer, new)
        self._remember(layer, new, span)
        out, block_indices = decode_attention(
            q, k, v, k_cmp, v_cmp, gates, self.nsa, lengths=[start + 1 for start in span.starts], positions=span.first,
            q_cmp=q_cmp, k_win=layer.buffers.get("k_win_ring"), v_win=layer.buffers.get("v_win_ring"), kernel=self.kernel,
        )  # fmt: skip
        return out, block_indices, k_cmp

    def _compress_new(self, geometry: Geometry, layer: LayerCache, new: Tokens, span: Span, capacity: int) -> None:
        """Compress the blocks that this pass completes, and store them."""
        nsa, pending = self.nsa, self.nsa.compress_block - 1
        if span.uniform and new.k_raw.shape[2] == 1:
            count = nsa.num_compressed(span.ends[0])
            if count > nsa.num_compressed(span.starts[0]):
                self._compress_one(geometry, layer, new, span, count - 1, capacity)
            return
        pairs = [
            (row, block)
            for row, (start, end) in enumerate(zip(span.starts, span.ends, strict=True))
            for block in range(nsa.num_compressed(start), nsa.num_compressed(end))
        ]
        if not pairs:
            return
        rows, blocks = torch.tensor(pairs).to(new.k_raw.device).unbind(-1)
        starts = blocks * nsa.compress_stride
        inside = starts[:, None] + torch.arange(nsa.compress_block, device=starts.device)
        k, base = layer.recent("k_raw_ring", new.k_raw, span, pending, pending)
        at, recent = rows[:, None], inside - base[rows][:, None]
        if self.sets == 3:
            v_new = layer.recent("v_raw_ring", new.v_raw, span, pending, pending)[0][at, :, recent]
        else:
            v_new = layer.buffers["v_slc"][at, :, inside]
        k_new, v_new = (rearrange(x, "p l g d -> p g 1 l d") for x in (k[at, :, recent], v_new))
        k_cmp, v_cmp = self.compress_k(k_new), self.compress_v(v_new)
        if nsa.compress_rope == "block":
            k_cmp = rotate(k_cmp, geometry.rotary.cos_sin(starts)[:, :, None, None])
        layer.put("k_cmp", k_cmp[:, :, 0], rows, blocks, capacity, new.k_slc)
        layer.put("v_cmp", v_cmp[:, :, 0], rows, blocks, capacity, new.v_slc)

    def _compress_one(
        self, geometry: Geometry, layer: LayerCache, new: Tokens, span: Span, block: int, capacity: int
    ) -> None:
        """Compress the block that ends with this token, the same in every row."""
        pending, end = self.nsa.compress_block - 1, span.ends[0]
        k = layer.recent("k_raw_ring", new.k_raw, span, pending, pending)[0]
        if self.sets == 3:
            v = layer.recent("v_raw_ring", new.v_raw, span, pending, pending)[0]
        else:
            v = layer.buffers["v_slc"][:, :, end - pending - 1 : end]
        k_cmp, v_cmp = self.compress_k(k[:, :, None]), self.compress_v(v[:, :, None])
        if self.nsa.compress_rope == "block":
            k_cmp = rotate(k_cmp, geometry.rotary.cos_sin((span.first - pending)[:, None])[:, :, None])
        for name, x in (("k_cmp", k_cmp), ("v_cmp", v_cmp)):
            layer.buffer(name, new.k_slc, capacity).select(2, block).copy_(x[:, :, 0])


class Tokens(NamedTuple):
    """Keys and values [b, g, t, d] of one pass: before compression and rotary, of the selected branch, of the window."""

    k_raw: Tensor
    v_raw: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor
