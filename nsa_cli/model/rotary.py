"""Rotary positions that stay right at any length: the only place that turns a position into an angle.

rotary-embedding-torch supplies the pairing of channels; the angles are made here, position * theta^(-2i/D) in float64 and
taken modulo 2 pi before they are rounded to float32, so that cos and sin are within float32 rounding of a float64 computation
at position 131,072 as at 0 (float32 angles are off by 4.8e-3 there). The package's own `rotate_queries_or_keys` makes
positions in the tensor's dtype and is never used. Cosines and sines are made once a pass (compressed blocks' where they are
turned), by an operator that torch.compile does not look into: it would make them, float64 angles and all, again in every kernel
that turns something.
"""

from __future__ import annotations

import math

import torch
from rotary_embedding_torch.rotary_embedding_torch import RotaryEmbedding, rotate_half
from torch import Tensor


def _cos_sin(angles: Tensor) -> Tensor:
    return torch.stack((angles.cos(), angles.sin()))


_cos_sin_op = torch.library.custom_op("nsa::cos_sin", _cos_sin, mutates_args=())


@_cos_sin_op.register_fake
def _(angles: Tensor) -> Tensor:
    return angles.new_empty(2, *angles.shape)


class Rotary:
    """Angles for head dim `dim_head` and base `theta`. Not a module: nothing of it is trained, cast or saved."""

    def __init__(self, dim_head: int, theta: float) -> None:
        with torch.device("cpu"):
            exponents = torch.arange(0, dim_head, 2, dtype=torch.float64) / dim_head
            frequencies = self._frequencies = torch.tensor(theta, dtype=torch.float64) ** -exponents
            self._turns: Tensor | None = None
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

    def turns(self, device: torch.device) -> Tensor:
        """float64 [d / 2 + 1] for kernels that make angles themselves: each pair's turns a token, and 2 pi."""
        if self._turns is None or self._turns.device != device:
            turns = torch.cat([self._frequencies / (2 * math.pi), self._frequencies.new_tensor([2 * math.pi])])
            self._turns = turns.to(device)
        return self._turns

    def cos_sin(self, positions: Tensor) -> Tensor:
        """Integer positions [..] -> float32 cosines and sines [2, .., d] of their angles."""
        make = _cos_sin_op if torch.compiler.is_compiling() else _cos_sin  # calling the operator loads the compiler
        both: Tensor = make(self.angles(positions))
        return both


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [b, h, t, d] turned by cos_sin [2, t, d] or [2, b, 1, t, d], computed in float32 at least; x's dtype comes back."""
    cos, sin = cos_sin
    return (x * cos + rotate_half(x) * sin).to(x.dtype)
