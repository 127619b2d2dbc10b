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


def _lists(block_indices: Tensor, positions: Tensor, blocks: int, select_block: int) -> tuple[Tensor, list[int]]:
    """For one (b, g): the queries of every block, block after block and ascending inside, and each block's first place.

    Blocks that begin after the query are left out: each listed query sees at least the block's first key.
    """
    flat = block_indices.flatten()
    seen = flat * select_block <= positions[:, None].expand_as(block_indices).flatten()
    flat = torch.where((flat >= 0) & (flat < blocks) & seen, flat, blocks)
    order = flat.sort(stable=True).indices // block_indices.shape[-1]
    counts = torch.bincount(flat, minlength=blocks + 1)[:blocks]
    return order, [0, *counts.cumsum(0).tolist()]


def _blocks(order: Tensor, first: list[int], select_block: int, keys: int) -> Iterator[tuple[Tensor, slice]]:
    """(queries, keys) of every block that some query selected."""
    for j in range(len(first) - 1):
        if first[j] < first[j + 1]:
            yield order[first[j] : first[j + 1]], slice(j * select_block, min((j + 1) * select_block, keys))


def _edge(positions: Tensor, select_block: int) -> int:
    """How many of a block's queries may lie inside it and need a mask: its first l' while positions ascend, else all."""
    ascending = bool((positions[1:] > positions[:-1]).all())
    return select_block if ascending else len(positions)


def _hidden(queries: Tensor, span: slice, positions: Tensor) -> Tensor:
    """bool [rows, 1, keys of the block]: keys later than the query."""
    return torch.arange(span.start, span.stop, device=positions.device) > positions[queries][:, None, None]


def _with_column(x: Tensor, column: Tensor | float) -> Tensor:
    """x with one more column, so that a product subtracts a statistic of each row on the way."""
    more = column if isinstance(column, Tensor) else x.new_full((*x.shape[:-1], 1), column)
    return torch.cat([x, more], -1)


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
            at, edge = positions[i_b], _edge(positions[i_b], select_block)
            for i_g in range(g):
                order, first = _lists(block_indices[i_b, i_g], at, -(-keys // select_block), select_block)
                lists.append((order, first, edge))
                rows = (q[i_b, i_g].to(dtype) * scale).contiguous()
                k_all, v_all = k[i_b, i_g].to(dtype), _with_column(v[i_b, i_g].to(dtype), 1.0)
                top = torch.full((t, r, 1), -torch.inf, dtype=dtype, device=q.device)
                # The last column is the sum of the weights: it decays and grows as the outputs do.
                acc = torch.zeros(t, r, e + 1, dtype=dtype, device=q.device)
                for queries, span in _blocks(order, first, select_block, keys):
                    scores = (rows.index_select(0, queries).view(-1, d) @ k_all[span].mT).view(len(queries), r, -1)
                    scores[:edge].masked_fill_(_hidden(queries[:edge], span, at), -torch.inf)
                    old = top.index_select(0, queries)
                    new = torch.maximum(old, scores.amax(-1, keepdim=True))
                    p, decay = scores.sub_(new).exp_(), old.sub_(new).exp_()
                    weighted = (p.view(-1, p.shape[-1]) @ v_all[span]).view(len(queries), r, e + 1)
                    top.index_copy_(0, queries, new)
                    acc.index_copy_(0, queries, weighted.addcmul_(acc.index_select(0, queries), decay))
                total = acc[..., e:]
                empty = total == 0
                out[i_b, i_g] = acc[..., :e] / total.masked_fill(empty, 1.0)
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
            at = positions[i_b]
            for i_g in range(g):
                order, first, edge = ctx.lists[i_b * g + i_g]
                do = grads[0][i_b, i_g].to(dtype)
                # s - lse and dP - delta come out of the products: [q, -lse] [k, 1]^T and [do, -delta] [v, 1]^T.
                rows = _with_column(q[i_b, i_g].to(dtype) * ctx.scale, -lse[i_b, i_g])
                do = _with_column(do, -(do * out[i_b, i_g]).sum(-1, keepdim=True))
                k_all, v_all = _with_column(k[i_b, i_g].to(dtype), 1.0), _with_column(v[i_b, i_g].to(dtype), 1.0)
                acc = torch.zeros(*rows.shape[:2], d, dtype=dtype, device=q.device)
                for queries, span in _blocks(order, first, ctx.select_block, keys):
                    k_j, v_j = k_all[span], v_all[span]
                    q_rows = rows.index_select(0, queries).view(-1, d + 1)
                    do_rows = do.index_select(0, queries).view(-1, e + 1)
                    p = (q_rows @ k_j.mT).exp_().view(len(queries), r, -1)
                    p[:edge].masked_fill_(_hidden(queries[:edge], span, at), 0.0)
                    p = p.view(-1, p.shape[-1])
                    ds = (do_rows @ v_j.mT).mul_(p)
                    dv[i_b, i_g, span] = (p.mT @ do_rows[:, :e]).to(v.dtype)
                    dk[i_b, i_g, span] = (ds.mT @ q_rows[:, :d]).to(k.dtype)
                    # A query is in a block's list once, so this addition has one term a row: no order to depend on.
                    acc.index_add_(0, queries, (ds @ k_j[:, :d]).view(len(queries), r, d))
                dq[i_b, i_g] = acc * ctx.scale
        return dq, dk, dv, None, None, None, None
