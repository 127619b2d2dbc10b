"""The definition as code: one function an equation (arXiv 2502.11089), on whole score matrices.

Nothing is chunked, fused or clever, and memory grows with the square of the tokens: this is what every kernel is compared
with. Computes in float32, or in float64 for float64 inputs. Layouts as in `nsa_cli.ops`; r is a query head within its group.
"""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from torch import Tensor

from nsa_cli.config import NSAConfig


def compressed_visibility(tokens: int, blocks: int, config: NSAConfig) -> Tensor:
    """bool [t, c]: block c is visible to token t iff its last token is not in the future, c d + l - 1 <= t (section 2)."""
    t, c = torch.arange(tokens), torch.arange(blocks)
    return c * config.compress_stride + config.compress_block - 1 <= t[:, None]


def masked_softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the last axis among the visible entries; a row that sees nothing is all zeros, with zero gradient."""
    sees = visible.any(-1, keepdim=True)
    scores = scores.masked_fill(~visible, float("-inf")).masked_fill(~sees, 0.0)
    return scores.softmax(-1).masked_fill(~visible, 0.0)


def scores(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """scale * q . k in float32 or float64: q [b, h, t, d], k [b, g, s, d] -> [b, g, r, t, s]; query head h reads head h // G."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q = rearrange(q, "b (g r) t d -> b g r t d", g=k.shape[1])
    return torch.einsum("bgrtd,bgsd->bgrts", q.to(dtype), k.to(dtype)) * scale


def attend(probabilities: Tensor, v: Tensor) -> Tensor:
    """Weighted sum of values: [b, g, r, t, s] and [b, g, s, d] -> [b, h, t, d]."""
    out = torch.einsum("bgrts,bgsd->bgrtd", probabilities, v.to(probabilities.dtype))
    return rearrange(out, "b g r t d -> b (g r) t d")


def compressed_probabilities(q: Tensor, k_cmp: Tensor, config: NSAConfig, *, scale: float | None = None) -> Tensor:
    """Eq. 8: p_cmp[t, h, :] = softmax over the visible c of scale * q[t, h] . k_cmp[c, h // G]; [b, g, r, t, c]."""
    visible = compressed_visibility(q.shape[2], k_cmp.shape[2], config).to(q.device)
    return masked_softmax(scores(q, k_cmp, scale), visible)


def overlap(blocks: int, select_blocks: int, config: NSAConfig) -> Tensor:
    """float64 [c, j]: the number of tokens that compressed block c and selection block j share, over d (section 3)."""
    c = torch.arange(blocks)[:, None] * config.compress_stride
    j = torch.arange(select_blocks)[None, :] * config.select_block
    shared = torch.minimum(c + config.compress_block, j + config.select_block) - torch.maximum(c, j)
    return shared.clamp(min=0).double() / config.compress_stride


def importance(p_cmp: Tensor, tokens: int, config: NSAConfig) -> Tensor:
    """Eq. 9 and 10: imp[t, g, j] = sum over the group's heads and over c of p_cmp * overlap(c, j); [b, g, t, j]."""
    weights = overlap(p_cmp.shape[-1], config.num_select_blocks(tokens), config).to(p_cmp)
    return torch.einsum("bgrtc,cj->bgtj", p_cmp.detach(), weights)


def select(imp: Tensor, config: NSAConfig) -> Tensor:
    """Eq. 11 and 12: the forced blocks and the most important of the others; int32 [b, g, t, n], ascending, -1 padded.

    Candidates of token t are the blocks 0 .. t // l'; equal importance goes to the lower block (a stable sort).
    """
    t, j = torch.arange(imp.shape[2], device=imp.device), torch.arange(imp.shape[3], device=imp.device)
    current = (t // config.select_block)[:, None]
    candidate = j <= current
    forced = candidate & ((j < config.num_init) | (j > current - config.num_local))
    ranked = imp.masked_fill(forced, float("inf")).masked_fill(~candidate, float("-inf"))
    order = ranked.sort(dim=-1, descending=True, stable=True).indices[..., : config.num_selected]
    beyond = imp.shape[3]
    order = torch.where(order <= current, order, beyond).sort(-1).values
    padding = order.new_full((*order.shape[:3], config.num_selected - order.shape[3]), beyond)
    order = torch.cat([order, padding], -1)
    return torch.where(order < beyond, order, -1).int()


def compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, config: NSAConfig, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Branch `cmp` and the selection it decides: (o_cmp [b, h, t, d], block_indices [b, g, t, n])."""
    p_cmp = compressed_probabilities(q, k_cmp, config, scale=scale)
    return attend(p_cmp, v_cmp).to(q.dtype), select(importance(p_cmp, q.shape[2], config), config)


def selected_visibility(block_indices: Tensor, keys: int, config: NSAConfig) -> Tensor:
    """bool [b, g, t, s]: token s <= t lies in one of the query's selected blocks (section 5)."""
    t, s = torch.arange(block_indices.shape[2]), torch.arange(keys)
    chosen = (block_indices[..., None] == (s // config.select_block).to(block_indices.device)).any(-2)
    return chosen & (s <= t[:, None]).to(block_indices.device)


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, config: NSAConfig, *, scale: float | None = None
) -> Tensor:
    """Branch `slc`: softmax over the tokens s <= t of the selected blocks; [b, h, t, d]."""
    visible = selected_visibility(block_indices, k.shape[2], config)[:, :, None]
    return attend(masked_softmax(scores(q, k, scale), visible), v).to(q.dtype)


def window_attention(q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, *, scale: float | None = None) -> Tensor:
    """Branch `win`: softmax over t - w < s <= t; [b, h, t, d]."""
    t, s = torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)
    visible = (s <= t) & (s > t - config.window)
    return attend(masked_softmax(scores(q, k, scale), visible), v).to(q.dtype)


def combine(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
    """Eq. 5: o = g_cmp o_cmp + g_slc o_slc + g_win o_win; gates [b, h, t, 3]."""
    return gates[..., 0:1] * o_cmp + gates[..., 1:2] * o_slc + gates[..., 2:3] * o_win


def mean_compress(x: Tensor, config: NSAConfig) -> Tensor:
    """Eq. 7 with phi = mean: [b, g, s, d] -> [b, g, c, d], block c over the tokens [c d, c d + l)."""
    if x.shape[2] < config.compress_block:
        return x[:, :, :0]
    return reduce(x.unfold(2, config.compress_block, config.compress_stride), "b g c d l -> b g c d", "mean")


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    config: NSAConfig,
    *,
    q_cmp: Tensor | None = None,
    k_win: Tensor | None = None,
    v_win: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The three branches, gated and summed; arguments as in `nsa_cli.ops.nsa_attention`."""
    o_cmp, block_indices = compressed_attention(q if q_cmp is None else q_cmp, k_cmp, v_cmp, config, scale=scale)
    o_slc = selected_attention(q, k, v, block_indices, config, scale=scale)
    o_win = window_attention(q, k if k_win is None else k_win, v if v_win is None else v_win, config, scale=scale)
    return combine(o_cmp, o_slc, o_win, gates).to(q.dtype)
