"""Selected attention with the key blocks outside: each block meets, at once, the queries that selected it.

Gathering a query's n blocks moves n l' keys a query and multiplies G rows with them; gathering a block's queries moves
G rows a (query, block) pair and makes one large product of them, so the cost hardly depends on G. The running maximum,
sum and output of the online softmax are kept per query row and updated block by block, in ascending order: no partial
results are stored, and the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor


def attend_by_block(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, positions: Tensor, select_block: int, scale: float
) -> Tensor:
    """q [b, g, r, t, d], k [b, g, s, d], v [b, g, s, e], block_indices [b, g, t, n], positions [b, t] -> [b, g, r, t, e]."""
    rows = rearrange(q, "b g r t d -> b g t r d")
    out: Tensor = _ByBlock.apply(rows, k, v, block_indices, positions, select_block, scale)
    return rearrange(out, "b g t r d -> b g r t d")


def _lists(block_indices: Tensor, blocks: int) -> tuple[Tensor, list[int]]:
    """For one (b, g): the queries of every block, block after block and ascending inside, and each block's first place."""
    flat = block_indices.flatten()
    flat = torch.where((flat >= 0) & (flat < blocks), flat, blocks)
    order = flat.sort(stable=True).indices // block_indices.shape[-1]
    counts = torch.bincount(flat, minlength=blocks + 1)[:blocks]
    return order, [0, *counts.cumsum(0).tolist()]


def _blocks(order: Tensor, first: list[int], select_block: int, keys: int) -> Iterator[tuple[Tensor, slice]]:
    """(queries, keys) of every block that some query selected."""
    for j in range(len(first) - 1):
        if first[j] < first[j + 1]:
            yield order[first[j] : first[j + 1]], slice(j * select_block, min((j + 1) * select_block, keys))


def _hidden(queries: Tensor, span: slice, positions: Tensor) -> Tensor:
    """bool [rows, 1, keys of the block]: keys later than the query."""
    return torch.arange(span.start, span.stop, device=positions.device) > positions[queries][:, None, None]


class _ByBlock(torch.autograd.Function):
    """Rows are [b, g, t, r, d], so that a query's heads lie together."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, positions: Tensor, select_block: int, scale: float
    ) -> Tensor:
        b, g, t, r, d = q.shape
        keys, e = k.shape[2], v.shape[-1]
        dtype = torch.promote_types(q.dtype, torch.float32)
        out = q.new_empty(b, g, t, r, e)
        lse = torch.empty(b, g, t, r, 1, dtype=dtype, device=q.device)
        lists = []
        for i_b in range(b):
            for i_g in range(g):
                order, first = _lists(block_indices[i_b, i_g], -(-keys // select_block))
                lists.append((order, first))
                rows, at = (q[i_b, i_g].to(dtype) * scale).contiguous(), positions[i_b]
                top = torch.full((t, r, 1), -torch.inf, dtype=dtype, device=q.device)
                total = torch.zeros_like(top)
                acc = torch.zeros(t, r, e, dtype=dtype, device=q.device)
                for queries, span in _blocks(order, first, select_block, keys):
                    k_j, v_j = k[i_b, i_g, span].to(dtype), v[i_b, i_g, span].to(dtype)
                    scores = (rows[queries].view(-1, d) @ k_j.mT).view(len(queries), r, -1)
                    scores = scores.masked_fill_(_hidden(queries, span, at), -torch.inf)
                    old = top[queries]
                    new = torch.maximum(old, scores.amax(-1, keepdim=True))
                    # A row that has seen nothing yet has no maximum to subtract: -inf - 0 keeps its weights at 0.
                    shift = new.masked_fill(new == -torch.inf, 0.0)
                    p, decay = scores.sub_(shift).exp_(), (old - shift).exp_()
                    top[queries] = new
                    total[queries] = total[queries] * decay + p.sum(-1, keepdim=True)
                    acc[queries] = acc[queries] * decay + (p.view(-1, p.shape[-1]) @ v_j).view(len(queries), r, e)
                empty = total == 0
                out[i_b, i_g] = acc / total.masked_fill(empty, 1.0)
                lse[i_b, i_g] = torch.where(empty, torch.inf, top + total.log())
        ctx.save_for_backward(q, k, v, positions, out, lse)
        ctx.lists, ctx.select_block, ctx.scale = lists, select_block, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, positions, out, lse = ctx.saved_tensors
        b, g, _, r, d = q.shape
        keys, e, dtype = k.shape[2], v.shape[-1], lse.dtype
        dq = torch.zeros_like(q)
        dk = torch.zeros_like(k)
        dv = torch.zeros_like(v)
        for i_b in range(b):
            for i_g in range(g):
                order, first = ctx.lists[i_b * g + i_g]
                rows, at = (q[i_b, i_g].to(dtype) * ctx.scale).contiguous(), positions[i_b]
                do, row_lse = grads[0][i_b, i_g].to(dtype).contiguous(), lse[i_b, i_g]
                delta = (do * out[i_b, i_g]).sum(-1, keepdim=True)
                acc = torch.zeros_like(rows)
                for queries, span in _blocks(order, first, ctx.select_block, keys):
                    k_j, v_j = k[i_b, i_g, span].to(dtype), v[i_b, i_g, span].to(dtype)
                    q_rows, do_rows = rows[queries].view(-1, d), do[queries].view(-1, e)
                    p = (q_rows @ k_j.mT).view(len(queries), r, -1).sub_(row_lse[queries]).exp_()
                    p = p.masked_fill_(_hidden(queries, span, at), 0.0)
                    ds = (do_rows @ v_j.mT).view_as(p).sub_(delta[queries]).mul_(p).view(-1, p.shape[-1])
                    dv[i_b, i_g, span] = (p.view_as(ds).mT @ do_rows).to(v.dtype)
                    dk[i_b, i_g, span] = (ds.mT @ q_rows).to(k.dtype)
                    # A query is in a block's list once, so this addition has one term a row: no order to depend on.
                    acc[queries] += (ds @ k_j).view(len(queries), r, d)
                dq[i_b, i_g] = acc * ctx.scale
        return dq, dk, dv, None, None, None, None
