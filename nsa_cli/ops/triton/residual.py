"""The residual stream of a decoding step, and the products that read it and add to it, each by the fastest kernel there is:

    3 to 128 rows on Hopper, bf16 or float16    `linear_tiles`, four launches a layer
    otherwise up to 4 rows                      `linear`, the same
    else                                        PyTorch, launches of their own for norms, activations and gates
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from nsa_cli.ops.triton.linear import can_multiply, linear

if TYPE_CHECKING:
    from nsa_cli.ops.triton.linear_tiles import Ahead, Tile

MOST_TILES = 2**10
"""More than `linear_tiles` makes of any result."""


@cache
def has_tiles(device: torch.device) -> bool:
    """Whether `linear_tiles` runs: on Hopper, with a Triton that has its language."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)


def find_tile(x: Tensor, weight: Tensor, gated: bool = False) -> Tile | None:
    """The tile for x weight^T, None if `linear_tiles` cannot or should not do it."""
    if not has_tiles(x.device):
        return None
    from nsa_cli.ops.triton import linear_tiles

    return linear_tiles.find_tile(x, weight, gated)


def make_counters(device: torch.device) -> Tensor:
    """What residual streams that follow each other on a CUDA stream may share."""
    return torch.zeros(MOST_TILES, dtype=torch.int32, device=device)


class Residual:
    """x [rows, dim], changed in place.

    norms: RMSNorm's weights [dim], for the first `project`, and for those behind each `add`. What is multiplied must not change
    meanwhile: it is read before the kernel launched last is done.
    """

    def __init__(self, x: Tensor, norms: Iterable[Tensor], eps: float, counters: Tensor) -> None:
        self.x, self.eps, self.counters = x, eps, counters
        self.norms = iter(norms)
        self.norm = next(self.norms)
        self.ahead: Ahead | None = None  # of this norm, where linear_tiles added last

    def project(
        self, weight: Tensor, *, act: str | None = None, gate_weight: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """act(n weight^T) [* n gate_weight^T], n = RMSNorm(x). act: "gelu", "silu", or none. out: of any dtype."""
        x, n, squares = self.x, None, None
        tile = find_tile(x, weight, gate_weight is not None)
        if tile is None and can_multiply(len(x), x.shape[1], x.dtype):
            return linear(x, weight, norm=self.norm, eps=self.eps, act=act, gate_weight=gate_weight, out=out)
        if tile is not None and self.ahead is not None:
            n, squares = self.ahead.scaled, self.ahead.squares
        else:
            n = F.rms_norm(x, self.norm.shape, self.norm, self.eps)
        if tile is not None:
            from nsa_cli.ops.triton.linear_tiles import linear_tiles

            return linear_tiles(
                n, weight, tile, counters=self.counters, squares=squares, eps=self.eps, act=act, gate_weight=gate_weight, out=out
            )[0]
        y = F.linear(n, weight)
        if act is not None:
            y = F.gelu(y) if act == "gelu" else F.silu(y)
        if gate_weight is not None:
            y = y * F.linear(n, gate_weight)
        return y if out is None else out.copy_(y)

    def add(self, y: Tensor, weight: Tensor) -> None:
        """x += y weight^T."""
        self.norm, self.ahead = next(self.norms), None
        tile = find_tile(y, weight)
        if tile is not None:
            from nsa_cli.ops.triton.linear_tiles import linear_tiles

            _, self.ahead = linear_tiles(y, weight, tile, counters=self.counters, add=self.x, out=self.x, norm=self.norm)
        elif can_multiply(len(y), y.shape[1], y.dtype):
            linear(y, weight, add=self.x, out=self.x)
        else:
            self.x.addmm_(y, weight.mT)
