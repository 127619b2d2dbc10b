"""Products of a decoding step: a few rows with a weight matrix, with what stands before and behind them in the same launch.

    linear_row     one row, or a few: some columns of the result a program, all that it needs of the weights on its way at once
    linear_tiles   up to 128 rows on tensor cores; where columns alone leave multiprocessors without work, programs share a
                   tile's inner dimension, and the last that is done with its part adds up all of them in their order

RMSNorm costs no launch: x times the norm's weight is multiplied, and what divides it is known when all of x has been read.
Weights are written by no kernel, so a program asks for them before it waits for the kernel whose result is x.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment,var-annotated"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from nsa_cli.ops.dispatch import interpreting
from nsa_cli.ops.triton.launch import cores
from nsa_cli.ops.triton.overlap import overlap, prefetch, release, wait
from nsa_cli.ops.triton.problem import cdiv, next_power_of_2

MOST_ROWS = 128
MOST_ROWS_OF_VECTORS = {2: 2, 4: 4}
"""That linear_row takes, by the bytes of a number."""
VECTOR = 2**13
"""Weights of a program of linear_row: 64 a thread."""
LONGEST = 2**14
"""Of a row for linear_row, all of which is in registers."""
MOST_TILES = 2**12
"""Tiles that have a counter."""


@triton.jit
def finish(b_y, b_gate, b_add, p_out, o_y, m_y, ACT: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr):
    """out = act(y) [* gate] [+ add]."""
    if ACT == "gelu":
        b_y = 0.5 * b_y * (1.0 + tl.erf(b_y * 0.7071067811865476))
    elif ACT == "silu":
        b_y = b_y / (1.0 + tl.exp(-b_y))
    if GATED:
        b_y *= b_gate
    if ADD:
        b_y += b_add.to(tl.float32)
    tl.store(p_out + o_y, b_y.to(p_out.dtype.element_ty), mask=m_y)


@triton.jit
def linear_row(
    p_x, p_w, p_gate, p_norm, p_add, p_out, eps, ROWS: tl.constexpr, K: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BN columns of all rows. BK: K, rounded up."""
    release(OVERLAP)
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
        b_gate = tl.sum(b_w2.to(tl.float32) * b_x, 1) * root if GATED else b_y
        finish(b_y, b_gate, adds[i], p_out, i * N + o_n, m_n, ACT, GATED, ADD)


@triton.jit(do_not_specialize=["ROWS"])
def linear_tiles(
    p_x, p_w, p_gate, p_norm, p_add, p_out, p_part, p_square, p_count, ROWS, eps, K: tl.constexpr, N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr,
    GATED: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BN columns of all rows, or with SPLITS a part of their sums."""
    PER: tl.constexpr = (K + BK * SPLITS - 1) // (BK * SPLITS)
    EVEN: tl.constexpr = K % (BK * SPLITS) == 0
    release(OVERLAP)
    i_tile, i_split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    o_m, o_n, o_k = tl.arange(0, BM), i_tile * BN + tl.arange(0, BN), i_split * (PER * BK) + tl.arange(0, BK)
    m_m, m_n = o_m < ROWS, o_n < N
    o_w = tl.minimum(o_n, N - 1).to(tl.int64)[:, None] * K
    if OVERLAP:
        prefetch_rows(p_w, o_w, i_split * (PER * BK), K, PER * BK)
        if GATED:
            prefetch_rows(p_gate, o_w, i_split * (PER * BK), K, PER * BK)
    wait(OVERLAP)
    o_y, m_y = o_m[:, None] * N + o_n[None, :], m_m[:, None] & m_n[None, :]
    b_add = tl.load(p_add + o_y, mask=m_y, other=0.0) if ADD and SPLITS == 1 else 0.0
    b_y = tl.zeros([BM, BN], tl.float32)
    b_gate = tl.zeros([BM, BN], tl.float32)
    b_square = tl.zeros([BM], tl.float32)
    for _ in range(PER):
        m_x, m_w = m_m[:, None], m_n[:, None]
        if not EVEN:
            m_x, m_w = m_x & (o_k < K)[None, :], m_w & (o_k < K)[None, :]
        b_x = tl.load(p_x + o_m[:, None] * K + o_k[None, :], mask=m_x, other=0.0)
        b_w = tl.load(p_w + o_w + o_k[None, :], mask=m_w, other=0.0)
        if NORM:
            b_f = b_x.to(tl.float32)
            b_square += tl.sum(b_f * b_f, 1)
            b_norm = tl.load(p_norm + o_k, mask=o_k < K, other=0.0).to(tl.float32)
            b_x = (b_f * b_norm[None, :]).to(b_x.dtype)
        b_y = tl.dot(b_x, b_w.T, b_y, input_precision=PRECISION)
        if GATED:
            b_w = tl.load(p_gate + o_w + o_k[None, :], mask=m_w, other=0.0)
            b_gate = tl.dot(b_x, b_w.T, b_gate, input_precision=PRECISION)
        o_k += BK
    if SPLITS == 1:
        if NORM:
            root = tl.rsqrt(b_square / K + eps)[:, None]
            b_y *= root
            b_gate *= root
        finish(b_y, b_gate, b_add, p_out, o_y, m_y, ACT, GATED, ADD)
    else:
        SIZE: tl.constexpr = BM * BN * (2 if GATED else 1)
        o_part = o_m[:, None] * BN + tl.arange(0, BN)[None, :]
        p_own = p_part + tl.program_id(0) * SIZE + o_part
        tl.store(p_own, b_y, mask=m_y)
        if GATED:
            tl.store(p_own + BM * BN, b_gate, mask=m_y)
        if NORM:
            tl.store(p_square + tl.program_id(0) * BM + o_m, b_square)
        tl.debug_barrier()  # all of the program's parts are written before its arrival is counted
        if tl.atomic_add(p_count + i_tile, 1, sem="acq_rel") == SPLITS - 1:
            b_y = tl.zeros([BM, BN], tl.float32)
            b_gate = tl.zeros([BM, BN], tl.float32)
            b_square = tl.zeros([BM], tl.float32)
            b_old = tl.load(p_add + o_y, mask=m_y, other=0.0) if ADD else 0.0
            for i in tl.static_range(SPLITS):
                p_other = p_part + (i_tile * SPLITS + i) * SIZE + o_part
                b_y += tl.load(p_other, mask=m_y, other=0.0, cache_modifier=".cg")
                if GATED:
                    b_gate += tl.load(p_other + BM * BN, mask=m_y, other=0.0, cache_modifier=".cg")
                if NORM:
                    b_square += tl.load(p_square + (i_tile * SPLITS + i) * BM + o_m, cache_modifier=".cg")
            if NORM:
                root = tl.rsqrt(b_square / K + eps)[:, None]
                b_y *= root
                b_gate *= root
            finish(b_y, b_gate, b_old, p_out, o_y, m_y, ACT, GATED, ADD)
            tl.store(p_count + i_tile, 0)


@triton.jit
def prefetch_rows(p_w, o_row, first, K: tl.constexpr, WIDTH: tl.constexpr):
    """Weights [first, first + WIDTH) of rows that begin at o_row, a line of 128 bytes a prefetch."""
    LINE: tl.constexpr = 1024 // p_w.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = triton.next_power_of_2((WIDTH + LINE - 1) // LINE)
    o_k = first + tl.minimum(tl.arange(0, LINES) * LINE, WIDTH - 1)
    prefetch(p_w + o_row + tl.minimum(o_k, K - 1)[None, :])


@dataclass(frozen=True)
class Tile:
    """A program: columns and inner places of a tile, programs that share one, warps, tiles on chip.

    inner: None is linear_row, with all of them.
    """

    columns: int
    inner: int | None
    splits: int = 1
    warps: int = 4
    stages: int = 4


def choose_tile(rows: int, inner: int, out: int, size: int, gated: bool, device: torch.device) -> Tile:
    """The tile that is taken where nobody chooses one. size: bytes of a number."""
    if rows <= MOST_ROWS_OF_VECTORS[size] and inner <= LONGEST:
        width = next_power_of_2(inner)
        columns = max(1, min(16, VECTOR * 2 // size // (1 + gated) // width))
        while columns > 1 and cdiv(out, columns) < 2 * cores(device):
            columns //= 2
        return Tile(columns, None, warps=max(1, min(8, columns * width * size // 2**12)))
    columns = 16 if rows <= 32 else 32
    splits = 1
    while cdiv(out, columns) * splits * 4 < cores(device) * 3 and inner // splits > 256 and splits < 8:
        splits *= 2
    return Tile(columns, 128, splits, 8 if rows > 64 else 4)


def make_counters(device: torch.device) -> Tensor:
    """What `linear` takes as counters."""
    return torch.zeros(MOST_TILES, dtype=torch.int32, device=device)


def can_multiply(x: Tensor, weight: Tensor) -> bool:
    """Whether kernels do x weight^T; otherwise PyTorch does."""
    rows, inner = x.shape
    if x.device.type != "cuda" and not interpreting():
        return False
    size = x.element_size()
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or rows == 0 or rows > MOST_ROWS:
        return False
    if rows <= MOST_ROWS_OF_VECTORS[size] and inner <= LONGEST:
        return True
    return size == 2 or x.device.type != "cuda"  # exact float32 products are the BLAS library's


def linear(
    x: Tensor, weight: Tensor, *, norm: Tensor | None = None, eps: float = 0.0, act: str | None = None,
    gate_weight: Tensor | None = None, add: Tensor | None = None, out: Tensor | None = None, counters: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """y = act(n weight^T) [* n gate_weight^T] [+ add], with n = x, or with `norm` RMSNorm's norm * x / sqrt(mean x^2 + eps).

    x [rows, k]; weight, gate_weight [n, k] in its dtype; norm [k], fastest in float32; add [rows, n]; out [rows, n] of any dtype,
    which may be add, but not x. act: "gelu", "silu", or none. Sums and all between them are float32, and only y is rounded.
    counters: int32 zeros, MOST_TILES of them, of this call and of others that follow it on the same stream; zeros again
    behind each. tile: of linear_tiles, instead of a choice by size.
    """
    rows, inner = x.shape
    columns, device, size = weight.shape[0], x.device, x.element_size()
    if tile is None:
        if not can_multiply(x, weight):
            return _by_torch(x, weight, norm, eps, act, gate_weight, add, out)
        tile = choose_tile(rows, inner, columns, size, gate_weight is not None, device)
    x, weight = x.contiguous(), weight.contiguous()
    gate = weight if gate_weight is None else gate_weight.contiguous()
    out = x.new_empty(rows, columns) if out is None else out
    assert out.is_contiguous()
    assert add is None or add.is_contiguous()
    assert out.data_ptr() != x.data_ptr()  # whose columns all programs read
    does = {"NORM": norm is not None, "ACT": act, "GATED": gate_weight is not None, "ADD": add is not None}
    tensors = (x, weight, gate, x if norm is None else norm, out if add is None else add, out)
    late, tiles = overlap(device), cdiv(columns, tile.columns)
    if tile.inner is None:
        linear_row[(tiles,)](
            *tensors, eps, ROWS=rows, K=inner, N=columns, BN=tile.columns, BK=next_power_of_2(inner), **does,
            num_warps=tile.warps, **late,
        )  # fmt: skip
        return out
    bm = max(16, next_power_of_2(rows))
    part = square = count = out
    if tile.splits > 1:
        part = torch.empty(
            tiles * tile.splits * bm * tile.columns * (2 if does["GATED"] else 1), dtype=torch.float32, device=device
        )
        square = torch.empty(tiles * tile.splits * bm, dtype=torch.float32, device=device) if norm is not None else out
        count = make_counters(device) if counters is None else counters
    linear_tiles[(tiles * tile.splits,)](
        *tensors, part, square, count, rows, eps, K=inner, N=columns, BM=bm, BN=tile.columns, BK=tile.inner,
        SPLITS=tile.splits, **does, PRECISION="ieee" if size == 4 else "tf32", num_warps=tile.warps, num_stages=tile.stages,
        **late,
    )  # fmt: skip
    return out


def _by_torch(
    x: Tensor, weight: Tensor, norm: Tensor | None, eps: float, act: str | None, gate_weight: Tensor | None, add: Tensor | None,
    out: Tensor | None,
) -> Tensor:  # fmt: skip
    if norm is not None:
        x = F.rms_norm(x, norm.shape, norm.to(x.dtype), eps)
    if add is not None and add is out and act is None and gate_weight is None:
        return out.addmm_(x, weight.mT)
    y = F.linear(x, weight)
    if act is not None:
        y = F.gelu(y) if act == "gelu" else F.silu(y)
    y = y if gate_weight is None else y * F.linear(x, gate_weight)
    y = y if add is None else y + add
    return y if out is None else out.copy_(y)
