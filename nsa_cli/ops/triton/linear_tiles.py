"""Products of 3 to 128 rows with a weight matrix on Hopper's tensor cores (Gluon): decoding steps of a batch.

A program makes a tile of the result, or a part of its sums. It asks for all of its weights at once, before it waits for the
kernel whose result is x, and holds them in shared memory. Then x comes through a ring of buffers, while tensor cores multiply
what has come. Programs are few and large: what all of them read of x is what bounds them, and where they leave multiprocessors
free, the next kernel's programs load their weights.

RMSNorm costs no launch: who adds to the residual stream also writes norm * x and the sums of squares of its tile's rows, by
which the next product's rows are divided.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment,var-annotated"

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa_cli.ops.triton.device import cores
from nsa_cli.ops.triton.hopper import DTYPES, barrier, layout_of, load_box
from nsa_cli.ops.triton.overlap import overlap
from nsa_cli.ops.triton.problem import cdiv, next_power_of_2
from nsa_cli.ops.triton.residual import Ahead

release, wait = tl.extra.cuda.gdc_launch_dependents, tl.extra.cuda.gdc_wait

LEAST_ROWS, MOST_ROWS = 3, 128
"""For one or two, `linear` is faster."""
CHUNK = 128
"""Of the inner dimension: a buffer."""
CHIP = 222 * 2**10
"""Bytes of a program's buffers."""


@gluon.jit
def activated(b_y, b_gate, ACT: gl.constexpr, GATED: gl.constexpr):
    """act(b_y) [* b_gate]."""
    if ACT == "gelu":
        b_y = 0.5 * b_y * (1.0 + gl.erf(b_y * 0.7071067811865476))
    elif ACT == "silu":
        b_y = b_y / (1.0 + gl.exp(-b_y))
    if GATED:
        b_y *= b_gate
    return b_y


@gluon.jit
def load_all(d_w, s_w, full, n0, k0, CHUNKS: gl.constexpr, BK: gl.constexpr):
    """Asks for all of a program's weights."""
    for i in gl.static_range(CHUNKS):
        mbarrier.expect(full.index(i), d_w.block_type.nbytes)
        load_box(d_w, [n0, k0 + i * BK], full.index(i), s_w.index(i))


@gluon.jit(do_not_specialize=["rows", "parts"])
def linear_tiles_kernel(
    d_x, d_w, d_gate, p_squares, p_add, p_out, p_norm, p_next, p_next_squares, p_part, p_count, rows, parts, eps,
    K: gl.constexpr, N: gl.constexpr, PARTS_UP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    SPLITS: gl.constexpr, STAGES: gl.constexpr, SWAP: gl.constexpr, SCALED: gl.constexpr, ACT: gl.constexpr,
    GATED: gl.constexpr, ADD: gl.constexpr, NEXT: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """BM x BN of out = act(s x w^T) [* s x gate^T] [+ add], s = 1 or 1 / sqrt(squares / K + eps), squares summed over parts.

    SWAP: the product is w x^T, since its first side has 64 rows. SPLITS: programs that share a tile's inner dimension; the
    last that is done adds up all parts in their order. NEXT: next = norm * out, and the sums of squares of out's tile.
    The grid's last axis: sets of x, w and out, each behind the one before.
    """
    if OVERLAP:
        release()
    CHUNKS: gl.constexpr = (K + BK * SPLITS - 1) // (BK * SPLITS)
    RING: gl.constexpr = STAGES if STAGES < CHUNKS else CHUNKS
    TM: gl.constexpr = BN if SWAP else BM  # the product's rows and columns
    TN: gl.constexpr = BM if SWAP else BN
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TN, 16])
    PER: gl.constexpr = BM * BN // 128
    VECTOR: gl.constexpr = 8 if PER >= 8 else PER
    ACROSS: gl.constexpr = BN // VECTOR if BN // VECTOR < 32 else 32
    flat: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    LANES: gl.constexpr = BM if BM < 32 else 32
    down: gl.constexpr = gl.BlockedLayout([1, 1], [32 // LANES, LANES], [4, 1], [1, 0])
    gl.static_assert(TM == 64)
    i_tile, i_split = gl.program_id(0) // SPLITS, gl.program_id(0) % SPLITS
    m0, n0, k0 = gl.program_id(1) * BM, i_tile * BN, i_split * (CHUNKS * BK)
    i_set = gl.program_id(2)
    x0, w0 = i_set * rows + m0, i_set * N + n0  # what a box has of the next set is not stored
    p_out += i_set.to(gl.int64) * rows * N
    s_w = gl.allocate_shared_memory(d_w.dtype, [CHUNKS, BN, BK], d_w.layout)
    s_x = gl.allocate_shared_memory(d_w.dtype, [RING, BM, BK], d_x.layout)
    full_w = gl.allocate_shared_memory(gl.int64, [CHUNKS, 1], mbarrier.MBarrierLayout())
    full_x = gl.allocate_shared_memory(gl.int64, [CHUNKS, 1], mbarrier.MBarrierLayout())
    if GATED:
        s_gate = gl.allocate_shared_memory(d_w.dtype, [CHUNKS, BN, BK], d_w.layout)
        full_gate = gl.allocate_shared_memory(gl.int64, [CHUNKS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CHUNKS):
        mbarrier.init(full_w.index(i), count=1)
        mbarrier.init(full_x.index(i), count=1)
        if GATED:
            mbarrier.init(full_gate.index(i), count=1)
    fence_async_shared()
    load_all(d_w, s_w, full_w, w0, k0, CHUNKS, BK)
    if GATED:
        load_all(d_gate, s_gate, full_gate, w0, k0, CHUNKS, BK)
    o_r, o_c = gl.arange(0, BM, layout=gl.SliceLayout(1, flat)), n0 + gl.arange(0, BN, layout=gl.SliceLayout(0, flat))
    o_y = gl.expand_dims(m0 + o_r, 1) * N + gl.expand_dims(o_c, 0)
    m_y = gl.expand_dims(m0 + o_r < rows, 1) & gl.expand_dims(o_c < N, 0)
    if NEXT:
        b_norm = gl.load(p_norm + o_c, mask=o_c < N, other=0.0).to(gl.float32)
    if OVERLAP:
        wait()
    for i in gl.static_range(RING):
        mbarrier.expect(full_x.index(i), d_x.block_type.nbytes)
        load_box(d_x, [x0, k0 + i * BK], full_x.index(i), s_x.index(i))
    if SCALED:
        o_part, o_lane = gl.arange(0, PARTS_UP, layout=gl.SliceLayout(1, down)), gl.arange(0, BM, layout=gl.SliceLayout(0, down))
        m_squares = gl.expand_dims(o_part < parts, 1) & gl.expand_dims(m0 + o_lane < rows, 0)
        o_squares = gl.expand_dims(o_part, 1) * rows + gl.expand_dims(m0 + o_lane, 0)
        b_squares = gl.load(p_squares + o_squares, mask=m_squares, other=0.0)
    if ADD:
        b_add = gl.load(p_add + o_y, mask=m_y, other=0.0).to(gl.float32)
    acc = gl.zeros([TM, TN], gl.float32, layout=mma)
    acc_gate = acc
    for i in gl.static_range(CHUNKS):
        mbarrier.wait(full_w.index(i), 0)
        if GATED:
            mbarrier.wait(full_gate.index(i), 0)
        mbarrier.wait(full_x.index(i), 0)
        s_now = s_x.index(i % RING)
        if SWAP:
            acc = warpgroup_mma(s_w.index(i), s_now.permute((1, 0)), acc, is_async=True)
            if GATED:
                acc_gate = warpgroup_mma(s_gate.index(i), s_now.permute((1, 0)), acc_gate, is_async=True)
        else:
            acc = warpgroup_mma(s_now, s_w.index(i).permute((1, 0)), acc, is_async=True)
            if GATED:
                acc_gate = warpgroup_mma(s_now, s_gate.index(i).permute((1, 0)), acc_gate, is_async=True)
        if i > 0 and i - 1 + RING < CHUNKS:  # the buffer before is free when its products are done
            if GATED:
                acc, acc_gate = warpgroup_mma_wait(2, [acc, acc_gate])
            else:
                acc = warpgroup_mma_wait(1, [acc])
            barrier()
            mbarrier.expect(full_x.index(i - 1 + RING), d_x.block_type.nbytes)
            load_box(d_x, [x0, k0 + (i - 1 + RING) * BK], full_x.index(i - 1 + RING), s_x.index((i - 1) % RING))
    if GATED:
        acc, acc_gate = warpgroup_mma_wait(0, [acc, acc_gate])
    else:
        acc = warpgroup_mma_wait(0, [acc])
    b_y = gl.convert_layout(gl.permute(acc, (1, 0)) if SWAP else acc, flat)
    b_gate = b_y
    if GATED:
        b_gate = gl.convert_layout(gl.permute(acc_gate, (1, 0)) if SWAP else acc_gate, flat)
    last = True
    if SPLITS > 1:
        SIZE: gl.constexpr = BM * BN * (2 if GATED else 1)
        TILES: gl.constexpr = (N + BN - 1) // BN
        i_all = (i_set * TILES + i_tile) * gl.num_programs(1) + gl.program_id(1)
        p_own = p_part + i_all.to(gl.int64) * (SPLITS * SIZE) + gl.expand_dims(o_r, 1) * BN + gl.expand_dims(o_c - n0, 0)
        gl.store(p_own + i_split * SIZE, b_y, mask=m_y)
        if GATED:
            gl.store(p_own + i_split * SIZE + BM * BN, b_gate, mask=m_y)
        barrier()  # all of the program's part is written before its arrival is counted
        last = gl.atomic_add(p_count + i_all, 1, sem="acq_rel") == SPLITS - 1
        if last:
            gl.store(p_count + i_all, 0)
            b_y = gl.zeros([BM, BN], gl.float32, layout=flat)
            if GATED:
                b_gate = gl.zeros([BM, BN], gl.float32, layout=flat)
            for i in gl.static_range(SPLITS):
                b_y += gl.load(p_own + i * SIZE, mask=m_y, other=0.0, cache_modifier=".cg")
                if GATED:
                    b_gate += gl.load(p_own + i * SIZE + BM * BN, mask=m_y, other=0.0, cache_modifier=".cg")
    if last:
        if SCALED:
            root = gl.rsqrt(gl.convert_layout(gl.sum(b_squares, 0), gl.SliceLayout(1, flat)) / K + eps)
            b_y *= gl.expand_dims(root, 1)
            if GATED:
                b_gate *= gl.expand_dims(root, 1)
        b_y = activated(b_y, b_gate, ACT, GATED)
        if ADD:
            b_y += b_add
        b_out = b_y.to(p_out.dtype.element_ty)
        gl.store(p_out + o_y, b_out, mask=m_y)
        if NEXT:
            b_y = b_out.to(gl.float32)
            gl.store(p_next + o_y, (b_y * gl.expand_dims(b_norm, 0)).to(p_next.dtype.element_ty), mask=m_y)
            gl.store(p_next_squares + i_tile * rows + m0 + o_r, gl.sum(b_y * b_y, 1), mask=m0 + o_r < rows)


@dataclass(frozen=True)
class Tile:
    """A program: rows and columns of the result, programs that share its inner dimension, buffers of x."""

    rows: int
    columns: int
    splits: int
    stages: int


def choose_tile(rows: int, inner: int, columns: int, gated: bool, cores: int, sets: int = 1) -> Tile | None:
    """None where a BLAS library is faster: more programs than multiprocessors, or than two for each of up to 32 rows."""
    shapes = [(64, 32, 2**16), (64, 32, 2**17)] if rows > 32 else []
    shapes += [(high, 64, 2**17) for high in (64, 32, 16, 8) if high < 2 * rows or high == 8]
    for high, wide, held in shapes:  # bytes of weights
        a_chunk = wide * CHUNK * 2 * (1 + gated)
        splits = cdiv(inner, CHUNK * (held // a_chunk))
        programs = sets * cdiv(columns, wide) * cdiv(rows, high) * splits
        if programs > (2 if rows <= 32 else 1) * cores:
            continue
        if programs >= cores // 5 or high == 8:
            chunks = cdiv(inner, CHUNK * splits)
            return Tile(high, wide, splits, min(chunks, (CHIP - chunks * a_chunk) // (high * CHUNK * 2)))
    return None


def find_tile(x: Tensor, weight: Tensor, gate_weight: Tensor | None) -> Tile | None:
    """The tile for x weight^T, None if `linear_tiles` cannot or should not do it."""
    *sets, rows, inner = x.shape
    if not LEAST_ROWS <= rows <= MOST_ROWS or x.dtype not in DTYPES or inner % 8 != 0:
        return None
    given = (x, weight, x if gate_weight is None else gate_weight)
    if any(tensor.data_ptr() % 16 != 0 for tensor in given):  # rows must be fit for the copy engine
        return None
    return choose_tile(rows, inner, weight.shape[-2], gate_weight is not None, cores(x.device), math.prod(sets))


def linear_tiles(
    x: Tensor, weight: Tensor, tile: Tile, *, counters: Tensor, squares: Tensor | None = None, eps: float = 0.0,
    act: str | None = None, gate_weight: Tensor | None = None, add: Tensor | None = None, out: Tensor | None = None,
    norm: Tensor | None = None,
) -> tuple[Tensor, Ahead | None]:  # fmt: skip
    """y = act(s x weight^T) [* s x gate_weight^T] [+ add], s = 1, or with squares [parts, rows] 1 / sqrt(sum / k + eps).

    x [rows, k]; weight, gate_weight [n, k]; add [rows, n]; out [rows, n] of any dtype, which may be add, but not x. With norm
    [n] also what the next product takes. Or several products at once, of nothing but x [sets, rows, k] and weight [sets, n, k].
    counters: int32 zeros, one a tile at least, of this call and of those that follow it on the same stream; zeros again behind
    each. Weights and norm are read before the kernel launched last is done.
    """
    (*sets, rows, inner), columns, device = x.shape, weight.shape[-2], x.device
    assert not sets or all(other is None for other in (squares, gate_weight, add, norm))
    many = math.prod(sets)
    out = x.new_empty(*sets, rows, columns) if out is None else out
    assert all(tensor.is_contiguous() for tensor in (x, weight, out, gate_weight, add) if tensor is not None)
    assert out.data_ptr() != x.data_ptr()  # whose columns all programs read
    tiles, high = cdiv(columns, tile.columns), cdiv(rows, tile.rows)
    assert many * tiles * high <= len(counters)
    ahead = None
    if norm is not None:
        ahead = Ahead(x.new_empty(rows, columns), torch.empty(tiles, rows, dtype=torch.float32, device=device))
    part = out
    if tile.splits > 1:
        size = many * tiles * high * tile.splits * tile.rows * tile.columns * (1 if gate_weight is None else 2)
        part = torch.empty(size, dtype=torch.float32, device=device)
    parts = 1 if squares is None else len(squares)
    d_w = _boxes(weight, tile.columns)
    linear_tiles_kernel[(tiles * tile.splits, high, many)](
        _boxes(x, tile.rows), d_w, d_w if gate_weight is None else _boxes(gate_weight, tile.columns),
        out if squares is None else squares, out if add is None else add, out, out if norm is None else norm,
        out if ahead is None else ahead.scaled, out if ahead is None else ahead.squares, part, counters, rows, parts, eps,
        K=inner, N=columns, PARTS_UP=max(32, next_power_of_2(parts)), BM=tile.rows, BN=tile.columns, BK=CHUNK, SPLITS=tile.splits,
        STAGES=tile.stages, SWAP=tile.columns == 64, SCALED=squares is not None, ACT=act, GATED=gate_weight is not None,
        ADD=add is not None, NEXT=norm is not None, num_warps=4, **overlap(device),
    )  # fmt: skip
    return out, ahead


def _boxes(x: Tensor, rows: int) -> TensorDescriptor:
    """x [.., k] in boxes of rows x CHUNK, zeros outside."""
    x = x.view(-1, x.shape[-1])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, CHUNK], layout_of(rows, CHUNK, dtype=x.dtype))
