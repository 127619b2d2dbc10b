"""Rotary positions that stay right at any length: the only place that turns a position into an angle.

rotary-embedding-torch supplies the pairing of channels and the rotation; the angles are made here, position * theta^(-2i/D)
in float64 and taken modulo 2 pi before they are rounded to float32, so that cos and sin are within float32 rounding of a
float64 computation at position 131,072 as at 0 (float32 angles are off by 4.8e-3 there). The package's own
`rotate_queries_or_keys` makes positions in the tensor's dtype and is never used.
"""

from __future__ import annotations

import math

import torch
from rotary_embedding_torch.rotary_embedding_torch import RotaryEmbedding, apply_rotary_emb
from torch import Tensor


class Rotary:
    """Angles for head dim `dim_head` and base `theta`. Not a module: nothing of it is trained, cast or saved."""

    def __init__(self, dim_head: int, theta: float) -> None:
        with torch.device("cpu"):
            exponents = torch.arange(0, dim_head, 2, dtype=torch.float64) / dim_head
            frequencies = torch.tensor(theta, dtype=torch.float64) ** -exponents
            # The package divides by dim - 2 for a rescaling that is off here; its frequencies are the ones given.
            width = max(dim_head, 4)
            self._embedding = RotaryEmbedding(width, custom_freqs=frequencies, cache_if_possible=False, cache_max_seq_len=1)

    def to(self, device: torch.device) -> None:
        """Where `angles` computes; it goes there by itself, but inside torch.compile at the price of a second compilation."""
        self._embedding.to(device)

    def angles(self, positions: Tensor) -> Tensor:
        """Integer positions [..] -> float32 angles [.., d] in [0, 2 pi), each pair of channels sharing one."""
        if self._embedding.freqs.device != positions.device:
            self.to(positions.device)
        angles: Tensor = self._embedding(positions.double()).detach()
        return angles.remainder(2 * math.pi).float()


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x [b, h, t, d] turned by angles [t, d] or [b, 1, t, d], computed in float32 at least; x's dtype comes back."""
    turned: Tensor = apply_rotary_emb(angles, x)
    return turned
