"""Importance and selection, vectorised: from compressed probabilities to block numbers (eq. 9 to 12).

No gradient flows through here. Works on any chunk of queries, whose positions are given.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from nsa_cli.config import NSAConfig

SORTED_UP_TO = 4096
"""Numbers that a stable sort orders sooner than several steps prepare them for `topk`."""


def visible_blocks(positions: Tensor, config: NSAConfig) -> Tensor:
    """How many compressed blocks a query at each position sees: (t - l + 1) // d + 1, or 0 below t = l - 1."""
    count = torch.div(positions - config.compress_block + 1, config.compress_stride, rounding_mode="floor") + 1
    return count.clamp(min=0)


def pool_importance(p_group: Tensor, select_blocks: int, config: NSAConfig) -> Tensor:
    """imp[.., j] = sum over c of p_group[.., c] * overlap(c, j), as a strided window of l' / d + l / d - 1 taps.

    p_group [.., c]: probabilities summed over the heads of a group. Block j meets the compressed blocks
    j l' / d + i for i = -(l / d - 1) .. l' / d - 1, and shares (min(i d + l, l') - max(i d, 0)) / d strides with each.
    """
    length, stride, block = config.compress_block, config.compress_stride, config.select_block
    reach, step = length // stride - 1, block // stride
    starts = range(-reach * stride, block, stride)
    taps = [(min(start + length, block) - max(start, 0)) / stride for start in starts]
    right = select_blocks * step - p_group.shape[-1]
    padded = F.pad(p_group, (reach, right))[..., : select_blocks * step + reach]
    return padded.unfold(-1, len(taps), step) @ _tensor(tuple(taps), padded.dtype, padded.device)


@lru_cache(maxsize=64)
def _tensor(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def select_blocks(importance: Tensor, positions: Tensor, config: NSAConfig) -> Tensor:
    """Eq. 11 and 12: int32 [b, g, t, n], ascending, -1 padded, from importance [b, g, t, j] >= 0.

    positions: int64 [b or 1, t]. Candidates are the blocks 0 .. cur, cur = t // l'; forced are the first num_init and the
    newest num_local of them; the other places go to the highest importance, equal importance to the lower block.
    """
    blocks = importance.shape[-1]
    j = torch.arange(blocks, device=importance.device)
    current = torch.div(positions, config.select_block, rounding_mode="floor")[:, None, :, None]
    candidate = j <= current
    forced = candidate & ((j < config.num_init) | (j > current - config.num_local))
    ranked = importance.masked_fill(forced, float("inf")).masked_fill(~candidate, float("-inf"))
    kept = min(config.num_selected, blocks)
    chosen = stable_top(ranked, kept)
    chosen = torch.where(chosen <= current, chosen, blocks).sort(-1).values
    chosen = torch.where(chosen < blocks, chosen, -1).int()
    return F.pad(chosen, (0, config.num_selected - kept), value=-1)


def stable_top(ranked: Tensor, kept: int) -> Tensor:
    """Indices of the `kept` largest of each row, the lower index first among equals."""
    if ranked.dtype != torch.float32 or ranked.numel() <= SORTED_UP_TO:
        return ranked.sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    # Non-negative floats order like their bits: with the index below them every key differs, so that topk, which is
    # several times faster than a sort, has no ties to break. -inf (no candidate) becomes -1, below every candidate.
    bits = torch.where(ranked >= 0, (ranked + 0.0).view(torch.int32), -1).long()
    j = torch.arange(ranked.shape[-1], device=ranked.device)
    return ((bits << 32) | (0x7FFFFFFF - j)).topk(kept, dim=-1).indices
