"""One query a sequence against its cache: what a decoding step computes, with torch's own operators.

The same function as `nsa_attention` at each row's last position, on a cache's buffers: as large as their capacity, with the
window in a ring. What cannot be seen is neither read nor masked where all rows have one length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nsa_cli.config import NSAConfig
from nsa_cli.ops.selection import pool_importance, select_blocks, stable_top

CHIP_BYTES = 2**16
"""Compressed keys, or values, of one selection block that Triton's kernels take: larger ones are torch's."""


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    config: NSAConfig,
    *,
    lengths: Sequence[int],
    positions: Tensor,
    q_cmp: Tensor | None = None,
    k_win: Tensor | None = None,
    v_win: Tensor | None = None,
    scale: float | None = None,
    kernel: str = "torch",
) -> tuple[Tensor, Tensor]:
    """o = g_cmp o_cmp + g_slc o_slc + g_win o_win (eq. 5 of arXiv 2502.11089) of each sequence's newest token.

    q, q_cmp: [b, h, 1, d] (q_cmp is q if left out). k, v: [b, g, s, d], the selected branch's cache, of which row b's first
    lengths[b] >= 1 tokens exist, the query's own included. k_cmp, v_cmp: [b, g, c, d], its complete blocks first.
    k_win, v_win: rings [b, g, w, d] with token s at place s % w; left out, the window is read from k and v.
    gates: [b, h, 1, 3], in the order cmp slc win. lengths: on the host; positions: int64 [b], lengths - 1 on the device, all
    that kernel "triton" looks at. kernel: a resolved name; only "triton" has kernels of its own for this, others are "torch".
    Returns out [b, h, 1, d] in q's dtype and block_indices int32 [b, g, 1, n]. Scores and softmax are float32 at least.
    """
    (b, h, _, d), g = q.shape, k.shape[1]
    scale = d**-0.5 if scale is None else scale
    if kernel == "triton" and fits(config, max(d, v.shape[3]), q.element_size()):
        from nsa_cli.ops.triton import decode

        return decode.decode_attention(
            q, k, v, k_cmp, v_cmp, gates, config, positions=positions, q_cmp=q if q_cmp is None else q_cmp, k_win=k_win,
            v_win=v_win, scale=scale,
        )  # fmt: skip
    rows = q.reshape(b, g, h // g, d)
    uniform = min(lengths) == max(lengths)
    p, o_cmp = _compressed(rows if q_cmp is None else q_cmp.reshape(rows.shape), k_cmp, v_cmp, config, lengths, positions, scale)
    indices = _select(p, config, lengths, positions, (b, g))
    o_slc = _selected(rows, k, v, indices[:, :, 0], config, lengths, positions, scale)
    if k_win is None or v_win is None:
        k_win, v_win, seen = _window_of(k, v, config.window, lengths, positions)
    elif uniform:
        kept = min(lengths[0], config.window)
        k_win, v_win, seen = k_win[:, :, :kept], v_win[:, :, :kept], None
    else:
        seen = (torch.arange(config.window, device=q.device) <= positions[:, None])[:, None, None]
    o_win = F.scaled_dot_product_attention(rows, k_win, v_win, attn_mask=seen, scale=scale)
    weights = gates.reshape(b, g, h // g, 3)
    out = o_slc * weights[..., 1:2] + o_win * weights[..., 2:]
    if o_cmp is not None:
        out = out + o_cmp.to(out.dtype) * weights[..., :1]
    return out.to(q.dtype).reshape(b, h, 1, -1), indices


def fits(config: NSAConfig, width: int, itemsize: int) -> bool:
    """Whether the compressed keys of one selection block, which a kernel takes at a time, fit on a chip (rounded up)."""
    ratio = config.select_block // config.compress_stride
    return (1 << (ratio - 1).bit_length()) * max(16, 1 << (width - 1).bit_length()) * itemsize <= CHIP_BYTES


def _compressed(
    rows: Tensor, k_cmp: Tensor, v_cmp: Tensor, config: NSAConfig, lengths: Sequence[int], positions: Tensor, scale: float
) -> tuple[Tensor | None, Tensor | None]:
    """Probabilities [b, g, r, c] over the complete blocks, and the branch's output; None where there is no block yet."""
    count = config.num_compressed(max(lengths))
    if count == 0:
        return None, None
    dtype = torch.promote_types(rows.dtype, torch.float32)
    scores = (rows.to(dtype) * scale) @ k_cmp[:, :, :count].to(dtype).mT
    if min(lengths) == max(lengths):
        p = scores.softmax(-1)
    else:
        ends = torch.arange(count, device=rows.device) * config.compress_stride + config.compress_block - 1
        hidden = (ends > positions[:, None])[:, None, None]
        # A row that sees no block gets zeros, not the mean of what is hidden.
        p = scores.masked_fill(hidden, torch.finfo(dtype).min).softmax(-1).masked_fill(hidden, 0.0)
    return p, p @ v_cmp[:, :, :count].to(dtype)


def _select(
    p: Tensor | None, config: NSAConfig, lengths: Sequence[int], positions: Tensor, shape: tuple[int, int]
) -> Tensor:
    """Block indices int32 [b, g, 1, n]: `selection.select_blocks`, in fewer steps where all rows have one length."""
    blocks, uniform = config.num_select_blocks(max(lengths)), min(lengths) == max(lengths)
    if blocks <= config.num_selected and uniform:
        every = torch.arange(config.num_selected, dtype=torch.int32, device=positions.device)
        return every.masked_fill_(every >= blocks, -1).expand(*shape, 1, -1)
    if p is None:
        importance = torch.zeros(*shape, 1, blocks, device=positions.device)
    else:
        importance = pool_importance(p.sum(2, keepdim=True), blocks, config)
    if not uniform:
        return select_blocks(importance, positions[:, None], config)
    forced = [*range(config.num_init), *range(blocks - config.num_local, blocks)]
    chosen = torch.tensor(forced, device=positions.device).expand(*shape, 1, -1)
    if free := config.num_selected - len(forced):
        best = stable_top(importance[..., config.num_init : blocks - config.num_local], free)
        chosen = torch.cat([chosen, best + config.num_init], -1).sort(-1).values
    return chosen.int()


def _selected(
    rows: Tensor, k: Tensor, v: Tensor, indices: Tensor, config: NSAConfig, lengths: Sequence[int], positions: Tensor,
    scale: float,
) -> Tensor:  # fmt: skip
    """Attention over the tokens of the blocks indices [b, g, n]: [b, g, r, d]."""
    (b, g), places, size = rows.shape[:2], k.shape[2], config.select_block
    blocks = min(config.num_select_blocks(max(lengths)), config.num_selected)
    if blocks < config.num_selected:
        indices = indices.sort(-1, descending=True).values[..., :blocks].flip(-1)
    tokens = (indices.long()[..., None] * size + torch.arange(size, device=rows.device)).flatten(-2)
    if min(lengths) == max(lengths) and config.num_local > 0:
        # Every place is filled, and the last one with the query's own block, of which the future is cut off.
        tokens, seen = tokens[..., : (blocks - 1) * size + (lengths[0] - 1) % size + 1], None
    else:
        at = positions[:, None, None]
        seen = ((tokens >= 0) & (tokens <= at))[:, :, None]
        tokens = tokens.clamp(min=0).minimum(at)
    source = (tokens + torch.arange(b * g, device=rows.device).view(b, g, 1) * places).flatten()
    keys, values = (x.reshape(b * g * places, -1).index_select(0, source).view(b, g, -1, x.shape[-1]) for x in (k, v))
    return F.scaled_dot_product_attention(rows, keys, values, attn_mask=seen, scale=scale)


def _window_of(
    k: Tensor, v: Tensor, window: int, lengths: Sequence[int], positions: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The window's keys and values in the selected branch's cache, and which of them are seen (None: all)."""
    if min(lengths) == max(lengths):
        span = slice(max(0, lengths[0] - window), lengths[0])
        return k[:, :, span], v[:, :, span], None
    kept = min(window, max(lengths))
    tokens = positions[:, None] + torch.arange(1 - kept, 1, device=k.device)
    source = tokens.clamp(min=0)[:, None, :, None]
    keys, values = (x.gather(2, source.expand(*x.shape[:2], -1, x.shape[3])) for x in (k, v))
    return keys, values, (tokens >= 0)[:, None, None]
