"""The `flex` kernel: window and selected attention through PyTorch's FlexAttention, on a CUDA GPU.

FlexAttention skips blocks of 128 x 128 scores that a mask leaves empty; selections are per query, so it computes many
scores that the mask then hides. It is the portable fused path; the compressed branch is the torch kernel's.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nsa_cli.config import NSAConfig
from nsa_cli.errors import ExitCode, NsaError


def require(q: Tensor) -> None:
    """Raise NsaError (exit 5) unless FlexAttention can take this tensor, saying why and what can."""
    remedy = "use --kernel torch, which runs everywhere"
    if q.device.type != "cuda":
        message = f"the flex kernel trains on a CUDA GPU only, and the tensors are on {q.device.type}"
        raise NsaError(message, remedy, ExitCode.UNAVAILABLE)
    if q.dtype == torch.float64:
        raise NsaError("the flex kernel has no float64", remedy, ExitCode.UNAVAILABLE)
    if q.shape[-1] < 16:
        raise NsaError(f"the flex kernel needs a head dim of at least 16, got {q.shape[-1]}", remedy, ExitCode.UNAVAILABLE)


@lru_cache(maxsize=1)
def _compiled() -> tuple[Any, Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, batch: int | None, heads: int | None, scale: float) -> Tensor:
    attention, block_mask = _compiled()
    blocks = block_mask(mask, batch, heads, q.shape[2], k.shape[2], device=q.device)
    out: Tensor = attention(q, k, v, block_mask=blocks, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out


def window_attention(q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, *, scale: float) -> Tensor:
    """Branch `win`: softmax over t - w < s <= t; [b, h, t, e]."""
    require(q)
    window = config.window

    def mask(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (s <= t) & (s > t - window)

    return _attend(q, k, v, mask, None, None, scale)


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, config: NSAConfig, *, scale: float
) -> Tensor:
    """Branch `slc`: softmax over the tokens s <= t of the selected blocks; [b, h, t, e]. Memory: t * s / l' bits a group."""
    require(q)
    group, block = q.shape[1] // k.shape[1], config.select_block
    blocks = config.num_select_blocks(k.shape[2])
    wanted = torch.where((block_indices >= 0) & (block_indices < blocks), block_indices, blocks).long()
    chosen = wanted.new_zeros((*wanted.shape[:3], blocks + 1), dtype=torch.bool).scatter_(-1, wanted, True)

    def mask(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return chosen[b, h // group, t, s // block] & (s <= t)

    return _attend(q, k, v, mask, q.shape[0], q.shape[1], scale)
