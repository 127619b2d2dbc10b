"""The residual stream of a decoding step, and the products that read it and add to it, each by the fastest kernel there is:

    3 to 128 rows on Hopper, bf16 or float16    `linear_tiles`, four launches a layer
    otherwise up to 4 rows                      `linear`, the same
    else                                        PyTorch, launches of their own for norms, activations and gates

`begin` makes it of the tokens; `multiply` makes other products of a step in the same ways.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from nsa_cli.ops.triton.device import has_tiles
from nsa_cli.ops.triton.linear import can_multiply, linear
from nsa_cli.ops.triton.overlap import overlap, release, wait
from nsa_cli.ops.triton.problem import next_power_of_2

if TYPE_CHECKING:
    from nsa_cli.ops.triton.linear_tiles import Tile

@dataclass(frozen=True)
class Ahead:
    """What the next product takes instead of RMSNorm's result: scaled = norm * x [rows, n], bfloat16, which has room for what is
    not divided by a root yet, and the sums of squares of x's rows, float32 [parts, rows], in parts."""

    scaled: Tensor
    squares: Tensor


MOST_TILES = 2**10
"""More than `linear_tiles` makes of any result."""


def find_tile(x: Tensor, weight: Tensor, gate_weight: Tensor | None = None) -> Tile | None:
    """The tile for x weight^T, None if `linear_tiles` cannot or should not do it."""
    if not has_tiles(x.device):
        return None
    from nsa_cli.ops.triton import linear_tiles

    return linear_tiles.find_tile(x, weight, gate_weight)


def make_counters(device: torch.device) -> Tensor:
    """What residual streams that follow each other on a CUDA stream may share."""
    return torch.zeros(MOST_TILES, dtype=torch.int32, device=device)


@triton.jit
def begin_kernel(
    p_ids, p_table, p_norm, p_lengths, p_at, p_x, p_scaled, p_squares, N: tl.constexpr, BN: tl.constexpr, AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row of x, its position, and with AHEAD what the first product takes of it."""
    release(OVERLAP)
    wait(OVERLAP)
    i = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BN)
    m_n = o_n < N
    b_x = tl.load(p_table + tl.load(p_ids + i) * N + o_n, mask=m_n, other=0.0)
    tl.store(p_x + i * N + o_n, b_x, mask=m_n)
    at = tl.load(p_lengths + i)
    tl.store(p_at + i, at)
    tl.store(p_lengths + i, at + 1)
    if AHEAD:
        b_x = b_x.to(tl.float32)
        b_norm = tl.load(p_norm + o_n, mask=m_n, other=0.0).to(tl.float32)
        tl.store(p_scaled + i * N + o_n, (b_x * b_norm).to(p_scaled.dtype.element_ty), mask=m_n)
        tl.store(p_squares + i, tl.sum(b_x * b_x, 0))


def begin(
    ids: Tensor, table: Tensor, lengths: Tensor, norms: Iterable[Tensor], eps: float, counters: Tensor
) -> tuple[Residual, Tensor]:
    """The stream that begins with table[ids], and its tokens' positions: lengths, which are one more from then on.

    ids, lengths int64 [rows]; table [vocabulary, dim]; norms, counters as in `Residual`."""
    (rows,), dim = ids.shape, table.shape[1]
    assert all(tensor.is_contiguous() for tensor in (ids, table, lengths))
    x, at = table.new_empty(rows, dim), torch.empty_like(lengths)
    stream, ahead = Residual(x, norms, eps, counters), None
    if has_tiles(x.device) and x.dtype == torch.bfloat16:
        ahead = Ahead(torch.empty_like(x), torch.empty(1, rows, dtype=torch.float32, device=x.device))
    begin_kernel[(rows,)](
        ids, table, stream.norm, lengths, at, x, x if ahead is None else ahead.scaled, x if ahead is None else ahead.squares,
        N=dim, BN=next_power_of_2(dim), AHEAD=ahead is not None, **overlap(x.device),
    )  # fmt: skip
    stream.ahead = ahead
    return stream, at


def multiply(x: Tensor, weight: Tensor, *, act: str | None, counters: Tensor) -> Tensor:
    """act(x weight^T), x [.., rows, k], weight [.., n, k], by the same kernels; act, counters and what is read early:
    `linear_tiles`."""
    tile = find_tile(x, weight)
    if tile is not None:
        from nsa_cli.ops.triton.linear_tiles import linear_tiles

        return linear_tiles(x, weight, tile, counters=counters, act=act)[0]
    if can_multiply(x.shape[-2], x.shape[-1], x.dtype):
        return linear(x, weight, act=act)
    return _activated(x @ weight.mT, act)


def _activated(y: Tensor, act: str | None) -> Tensor:
    return y if act is None else F.gelu(y) if act == "gelu" else F.silu(y)


class Residual:
    """x [rows, dim], changed in place.

    norms: RMSNorm's weights [dim], for the first `project`, and for those behind each `add`. What is multiplied must not change
    meanwhile: it is read before the kernel launched last is done.
    """

    def __init__(self, x: Tensor, norms: Iterable[Tensor], eps: float, counters: Tensor) -> None:
        self.x, self.eps, self.counters = x, eps, counters
        self.norms = iter(norms)
        self.norm = next(self.norms)
        self.ahead: Ahead | None = None  # of this norm, where linear_tiles added last, or `begin` did

    def project(
        self, weight: Tensor, *, act: str | None = None, gate_weight: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """act(n weight^T) [* n gate_weight^T], n = RMSNorm(x). act: "gelu", "silu", or none. out: of any dtype."""
        x, n, squares = self.x, None, None
        tile = find_tile(x, weight, gate_weight)
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
        y = _activated(F.linear(n, weight), act)
        if gate_weight is not None:
            y = y * F.linear(n, gate_weight)
        return y if out is None else out.copy_(y)

    def add(self, y: Tensor, weight: Tensor) -> None:
        """x += y weight^T."""
        self.norm, self.ahead = next(self.norms), None
        tile = find_tile(y, weight)
        if tile is not None:
            from nsa_cli.ops.triton.linear_tiles import linear_tiles

            norm = self.norm if self.x.dtype == torch.bfloat16 else None
            _, self.ahead = linear_tiles(y, weight, tile, counters=self.counters, add=self.x, out=self.x, norm=norm)
        elif can_multiply(len(y), y.shape[1], y.dtype):
            linear(y, weight, add=self.x, out=self.x)
        else:
            self.x.addmm_(y, weight.mT)
