"""Products of one to four rows with a weight matrix, with what stands before and behind them in the same launch.

A program makes some columns of the result for all rows and asks for all that it needs of the weights at once. Weights are
written by no kernel, so it does so before it waits for the kernel whose result is x. RMSNorm costs no launch: every program
reads all of x.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment,var-annotated"

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_cli.ops.triton.device import cores
from nsa_cli.ops.triton.overlap import overlap, release, wait
from nsa_cli.ops.triton.problem import cdiv, next_power_of_2

MOST_ROWS = 4
"""Of more rows, a BLAS library's product and launches of their own for norm and activation are faster, or `linear_tiles`."""
MOST_BYTES = 2**16
"""Of all rows, which are in the registers of eight warps."""
MOST_WEIGHTS = 2**14
"""Of a program, for the same reason."""
MOST_PROGRAMS = 16
"""A multiprocessor: a large vocabulary's programs have more columns instead."""


@triton.jit
def linear_rows(
    p_x, p_w, p_gate, p_norm, p_add, p_out, eps, ROWS: tl.constexpr, K: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BN columns of out = act(n w^T) [* n gate^T] [+ add], n = x or norm * x / sqrt(mean x^2 + eps). BK: K, rounded up.

    The grid's second axis: sets of x, w and out, each behind the one before."""
    release(OVERLAP)
    i_set = tl.program_id(1).to(tl.int64)
    p_x, p_w, p_out = p_x + i_set * (ROWS * K), p_w + i_set * (N * K), p_out + i_set * (ROWS * N)
    o_n, o_k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    m_n = o_n < N
    m_k = (o_k < K)[None, :]
    o_w = o_n.to(tl.int64)[:, None] * K + o_k[None, :]
    m_w = m_n[:, None] & m_k
    b_w = tl.load(p_w + o_w, mask=m_w, other=0.0, eviction_policy="evict_first")
    b_w2 = tl.load(p_gate + o_w, mask=m_w, other=0.0, eviction_policy="evict_first") if GATED else b_w
    b_norm = tl.load(p_norm + o_k[None, :], mask=m_k, other=0.0).to(tl.float32) if NORM else 1.0
    wait(OVERLAP)
    rows, adds = (), ()
    for i in tl.static_range(ROWS):
        rows = rows + (tl.load(p_x + i * K + o_k[None, :], mask=m_k, other=0.0),)  # noqa: RUF005
        adds = adds + (tl.load(p_add + i * N + o_n, mask=m_n, other=0.0) if ADD else 0.0,)  # noqa: RUF005
    for i in tl.static_range(ROWS):
        b_x = rows[i].to(tl.float32)  # [1, BK]
        root = tl.rsqrt(tl.sum(b_x * b_x, 1) / K + eps) if NORM else 1.0
        b_x *= b_norm
        b_y = tl.sum(b_w.to(tl.float32) * b_x, 1) * root
        if ACT == "gelu":
            b_y = 0.5 * b_y * (1.0 + tl.erf(b_y * 0.7071067811865476))
        elif ACT == "silu":
            b_y = b_y / (1.0 + tl.exp(-b_y))
        if GATED:
            b_y *= tl.sum(b_w2.to(tl.float32) * b_x, 1) * root
        if ADD:
            b_y += adds[i].to(tl.float32)
        tl.store(p_out + i * N + o_n, b_y.to(p_out.dtype.element_ty), mask=m_n)


@dataclass(frozen=True)
class Tile:
    """A program: columns of the result, and warps."""

    columns: int
    warps: int


def choose_tile(rows: int, inner: int, out: int, device: torch.device) -> Tile:
    """One row wants many small programs, 32 weights a thread; several rows, read by every program, want fewer."""
    width = next_power_of_2(inner)
    columns, weights = (4 if width <= 2**9 else 2, 32) if rows == 1 else (4 if width <= 2**11 else 2, 64)
    while columns > 1 and (cdiv(out, columns) < cores(device) or columns * width > MOST_WEIGHTS):
        columns //= 2
    while cdiv(out, columns) > MOST_PROGRAMS * cores(device) and 2 * columns * width <= MOST_WEIGHTS:
        columns *= 2
    return Tile(columns, max(1, min(8, columns * width // (32 * weights))))


def can_multiply(rows: int, inner: int, dtype: torch.dtype) -> bool:
    """Whether `linear` takes, and is worth taking for, x [rows, inner]."""
    return 0 < rows <= MOST_ROWS and rows * next_power_of_2(inner) * dtype.itemsize <= MOST_BYTES


def linear(
    x: Tensor, weight: Tensor, *, norm: Tensor | None = None, eps: float = 0.0, act: str | None = None,
    gate_weight: Tensor | None = None, add: Tensor | None = None, out: Tensor | None = None, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """y = act(n weight^T) [* n gate_weight^T] [+ add], with n = x, or with `norm` RMSNorm's norm * x / sqrt(mean x^2 + eps).

    x [rows, k]; weight, gate_weight [n, k]; norm [k]; add [rows, n]; out [rows, n] of any dtype, which may be add, but not x.
    Or several products at once, of nothing but x [sets, rows, k] and weight [sets, n, k]. act: "gelu", "silu", or none. All
    contiguous; sums and all between them are float32, and only y is rounded. Weights and norm are read before the kernel
    launched last is done: it must not write them.
    """
    (*sets, rows, inner), columns, device = x.shape, weight.shape[-2], x.device
    assert not sets or (gate_weight is None and norm is None and add is None)
    many = math.prod(sets)
    out = x.new_empty(*sets, rows, columns) if out is None else out
    tensors = (x, weight, weight if gate_weight is None else gate_weight, x if norm is None else norm)
    tensors = (*tensors, out if add is None else add, out)
    assert all(tensor.is_contiguous() for tensor in tensors)
    assert out.data_ptr() != x.data_ptr()  # whose columns all programs read
    tile = choose_tile(rows, inner, many * columns, device) if tile is None else tile
    linear_rows[(cdiv(columns, tile.columns), many)](
        *tensors, eps, ROWS=rows, K=inner, N=columns, BN=tile.columns, BK=next_power_of_2(inner), NORM=norm is not None, ACT=act,
        GATED=gate_weight is not None, ADD=add is not None, num_warps=tile.warps, **overlap(device),
    )  # fmt: skip
    return out
