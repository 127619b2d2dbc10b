"""Compressed attention on Hopper (Gluon), forward and query gradient: FlashAttention-3's plan.

A program is a multiprocessor's for the whole launch and takes units of work, 128 queries of one head, the longest first and
dealt in a snake (an even round from the first program to the last, an odd one back), so that all end together without atomics.
A producer warp brings queries, and keys and values through rings of buffers; two consumer warp groups have 64 queries each.
They go through the keys backwards: the tiles at the diagonal, which need a mask, come first. While the tensor cores make the
scores of a tile, a consumer takes the exponentials of the one before.

Forward, of tile j: S_j = q k_j^T is asked for, then o += P_(j+1) v_(j+1), then comes S_j's softmax. P crosses the step in
float32, since halves would be unpacked and packed again. A row's sum stays with the threads that have parts of it.
Gradient: S_j and do v_j^T are asked for, then dq += dS_(j+1) k_(j+1), then comes dS_j = P_j (do v_j^T - delta).

With SUMS, the forward leaves the importance of the selection blocks behind, head by head, in float16: to write and to read them
takes half the time of the second pass over the keys that `selection.block_importance` makes. The keys of a tile are in another
order then (`selection.spread_keys`), in which a block is one thread's. A head's sum errs by 2^-11 of itself, or by 2^-37 of the
row's total: less than what keys in bfloat16 or float16 leave uncertain, but more than the second pass, and blocks that are equal
in truth may not be. (Logits of 2^24 and more are too coarse for it.)

Triton puts a barrier of the four warps before each arrival at a barrier in memory, and around the writes that the copy engine
sends: the code relies on it.
`attend.attend_forward` and `attend.attend_dq` are the same functions for everything else.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment,var-annotated"

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from nsa_cli.ops.triton.attend import LEAST
from nsa_cli.ops.triton.device import cores
from nsa_cli.ops.triton.hopper import DTYPES, head_boxes, load_box, make_barriers, make_tiles, store_box
from nsa_cli.ops.triton.problem import Problem, cdiv
from nsa_cli.ops.triton.selection import SPREAD, WORD

ROWS = gl.constexpr(64)
"""Queries of a consumer: what the tensor cores' first side has at least."""
DIM = 128
"""Padded channels of keys and of values. With 64, half as many products come with the same exponentials: nothing is gained,
except with block sums, which spare the second pass."""
KEYS = {("forward", 64): (SPREAD.value, 4), ("forward", 128): (SPREAD.value, 2), ("dq", 128): (64, 4)}
"""By padded channels: keys of a tile, and how many tiles of them are on chip at a time."""
HEADROOM = gl.constexpr(12.0)
"""P is at most 2^HEADROOM, not 1: block sums, of at most 8 P, have float16's range below 2^15, not below 8."""
REGISTERS = (240, 24)
"""Of a thread of a consumer, and of the producer."""


@gluon.jit
def unit_of(i_round):
    """This program's unit of a round."""
    i, programs = gl.program_id(0), gl.num_programs(0)
    if i_round % 2 == 1:
        i = programs - 1 - i
    return i_round * programs + i


@gluon.jit
def key_bounds(o_t, OFFSET, p_start, p_base, LENGTH: gl.constexpr, STRIDE: gl.constexpr, PACKED: gl.constexpr):
    """`attend.key_bounds` of the compressed branch."""
    start, low = o_t * 0, o_t * 0
    if PACKED:
        start = gl.load(p_start + o_t)
        low = gl.load(p_base + o_t)
    o_p = o_t + OFFSET - start
    return low, low + gl.where(o_p >= LENGTH - 1, (o_p - LENGTH + 1) // STRIDE + 1, 0)


@gluon.jit
def tiles_of(
    i, T0, T1, N, OFFSET, GRID, p_start, p_base, UNITS: gl.constexpr, LENGTH: gl.constexpr, STRIDE: gl.constexpr,
    PACKED: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """Of unit i of the queries [T0, T1): batch entry, head, first query, first key, and its tiles of keys: how many, how many
    of the last ones and of the first ones need a mask."""
    i_bh = i % GRID
    t0 = T0 + (gl.cdiv(T1 - T0, 2 * ROWS) - 1 - i // GRID) * (2 * ROWS)
    from_key, all_to = key_bounds(t0, OFFSET, p_start, p_base, LENGTH, STRIDE, PACKED)
    all_from, to_key = key_bounds(gl.minimum(t0 + 2 * ROWS, N) - 1, OFFSET, p_start, p_base, LENGTH, STRIDE, PACKED)
    tiles = gl.maximum(gl.cdiv(to_key - from_key, BN), 1)
    late = gl.maximum(tiles - (all_to - from_key) // BN, 1)
    early = gl.minimum(gl.cdiv(all_from - from_key, BN), tiles - late)
    return i_bh // UNITS, i_bh % UNITS, t0, from_key, tiles, late, early


@gluon.jit
def ask(d_x, s_x, full, empty, stage, i_b, i_g, row, RING: gl.constexpr):
    """A tile of keys, or values, into the ring, once its buffer is empty."""
    slot = stage % RING
    mbarrier.wait(empty.index(slot), ((stage // RING) & 1) ^ 1)
    mbarrier.expect(full.index(slot), d_x.block_type.nbytes)
    load_box(d_x, [i_b, i_g, row, 0], full.index(slot), s_x.index(slot))


@gluon.jit
def ready(full, stage, RING: gl.constexpr):
    """Waits for the stage-th tile; where it lies."""
    slot = stage % RING
    mbarrier.wait(full.index(slot), (stage // RING) & 1)
    return slot


@gluon.jit
def visible(b_x, from_key, low, high, other, BN: gl.constexpr, PACKED: gl.constexpr, SUMS: gl.constexpr, MMA: gl.constexpr):
    """b_x where a row sees the key, `other` elsewhere."""
    o_n = gl.arange(0, BN, layout=gl.SliceLayout(0, MMA))
    if SUMS:
        o_n = (o_n // 2 % 4) * (BN // 4) + o_n // 8 * 2 + o_n % 2  # as `spread_keys` has them
    o_s = gl.expand_dims(from_key + o_n, 0)
    seen = o_s < gl.expand_dims(high, 1)
    if PACKED:
        seen = seen & (o_s >= gl.expand_dims(low, 1))
    return gl.where(seen, b_x, other)


@gluon.jit
def softmax(
    b_s, b_max, from_key, low, high, scale, BN: gl.constexpr, MASK: gl.constexpr, PACKED: gl.constexpr, SUMS: gl.constexpr,
    MMA: gl.constexpr,
):  # fmt: skip
    """P, the new maximum less HEADROOM (log2 units), and the factor for what came before."""
    if MASK:
        b_s = visible(b_s, from_key, low, high, float("-inf"), BN, PACKED, SUMS, MMA)
    b_new = gl.maximum(b_max, gl.max(b_s, 1) * scale - HEADROOM)
    return gl.exp2(b_s * scale - gl.expand_dims(b_new, 1)), b_new, gl.exp2(b_max - b_new)


@gluon.jit
def own_sums(b_p, BN: gl.constexpr):
    """[ROWS, 4]: of every 8 columns a thread has 2; the sums of what each thread has."""
    b_x = gl.permute(gl.reshape(b_p, (ROWS, BN // 8, 4, 2)), (0, 2, 1, 3))
    return gl.sum(gl.sum(b_x, 3), 2)


@gluon.jit
def store_sums(b_p, b_max, p_sums, p_marks, o_record, BN: gl.constexpr):
    """Stores a tile's record (`selection.select_from_sums`): the importance of its selection blocks in this head, what its last
    key adds to the next tile's first block, and b_max, which both are relative to. [ROWS, 4]: the sum of what a thread has.

    Where keys are spread, a thread's columns are BN / 4 keys side by side. A block has four, and shares its last one with the
    next block: its importance is 2 (p0 + p1 + p2) + p3, and p3 of the block before.
    """
    BLOCKS: gl.constexpr = BN // 16  # of a thread
    b_x = gl.permute(gl.reshape(b_p, (ROWS, BN // 8, 4, 2)), (0, 2, 1, 3))
    b_even, b_odd = gl.split(b_x)
    b_0, b_2 = gl.split(gl.reshape(b_even, (ROWS, 4, BLOCKS, 2)))
    b_1, b_3 = gl.split(gl.reshape(b_odd, (ROWS, 4, BLOCKS, 2)))
    last0246, last1357 = gl.split(gl.reshape(b_3, (ROWS, 4, BLOCKS // 2, 2)))
    last15, last37 = gl.split(gl.reshape(last1357, (ROWS, 4, BLOCKS // 4, 2)))
    last3, last7 = gl.split(last37)
    before = gl.inline_asm_elementwise(
        "shfl.sync.up.b32 $0, $1, 1, 0x1c00, 0xffffffff;", "=f,f", [last7], dtype=gl.float32, is_pure=True, pack=1
    )
    LANE: gl.constexpr = last7.type.layout
    o_lane = gl.expand_dims(gl.arange(0, 4, layout=gl.SliceLayout(0, LANE)), 0)
    left04 = gl.join(gl.where(o_lane > 0, before, 0.0), last3)
    last15 = gl.convert_layout(last15, left04.type.layout, assert_trivial=True)
    left0246 = gl.reshape(gl.join(left04, last15), (ROWS, 4, BLOCKS // 2))
    last0246 = gl.convert_layout(last0246, left0246.type.layout, assert_trivial=True)
    left = gl.reshape(gl.join(left0246, last0246), (ROWS, 4, BLOCKS))
    left = gl.convert_layout(left, b_3.type.layout, assert_trivial=True)
    b_three = b_0 + b_1 + b_2
    b_all = b_three + b_3
    b_sums = b_three + left + b_all
    WIDE: gl.constexpr = gl.DistributedLinearLayout(  # b_3's, with a row's registers side by side
        [[0, 0, 1], [0, 0, 2], [0, 0, 4], [8, 0, 0]], [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0]], [], [ROWS, 4, BLOCKS],
    )  # fmt: skip
    o_row = gl.expand_dims(gl.expand_dims(gl.convert_layout(o_record, gl.SliceLayout(1, gl.SliceLayout(2, WIDE))), 1), 2)
    o_part = gl.expand_dims(gl.expand_dims(gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, WIDE))), 0), 2)
    o_block = gl.expand_dims(gl.expand_dims(gl.arange(0, BLOCKS, layout=gl.SliceLayout(0, gl.SliceLayout(1, WIDE))), 0), 1)
    o_out = (o_row * 4 + o_part) * BLOCKS + o_block
    gl.store(p_sums + o_out, gl.convert_layout(b_sums.to(gl.float16), WIDE), mask=o_row >= 0)
    b_top = gl.expand_dims(gl.convert_layout(b_max, gl.SliceLayout(1, LANE), assert_trivial=True), 1)
    o_row = gl.expand_dims(gl.convert_layout(o_record, gl.SliceLayout(1, LANE), assert_trivial=True), 1)
    p_row, m_row = p_marks + (o_row * 2 + 0 * o_lane), (o_row >= 0) & (o_lane == 3)
    gl.store(p_row, b_top + gl.zeros_like(last7), mask=m_row)
    gl.store(p_row + 1, last7, mask=m_row)
    return gl.sum(b_all, 2)


@gluon.jit
def attend_step(
    s_q, s_k, s_v, full_k, full_v, empty_k, empty_v, stage, b_p, b_o, b_max, b_sum, p_sums, p_marks, o_record, from_key, low,
    high, scale, BN: gl.constexpr, RING: gl.constexpr, MASK: gl.constexpr, PACKED: gl.constexpr, SUMS: gl.constexpr,
    MMA: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Scores of a tile, P v of the one before, softmax of the scores."""
    slot = ready(full_k, stage, RING)
    zeros = gl.zeros([ROWS, BN], gl.float32, layout=MMA)
    s_next = warpgroup_mma(s_q, s_k.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    slot_v = ready(full_v, stage - 1, RING)
    b_half = gl.convert_layout(b_p.to(s_v.dtype), gl.DotOperandLayout(0, OUT, 2))
    o_next = warpgroup_mma(b_half, s_v.index(slot_v), b_o, is_async=True)
    b_s = warpgroup_mma_wait(1, [s_next])
    mbarrier.arrive(empty_k.index(slot), count=1)
    b_p, b_max, b_scale = softmax(b_s, b_max, from_key, low, high, scale, BN, MASK, PACKED, SUMS, MMA)
    own: gl.constexpr = gl.SliceLayout(1, b_sum.type.layout)
    b_sum = b_sum * gl.expand_dims(gl.convert_layout(b_scale, own, assert_trivial=True), 1)
    if SUMS:
        b_own = store_sums(b_p, b_max, p_sums, p_marks, o_record, BN)
        b_sum += gl.convert_layout(b_own, b_sum.type.layout, assert_trivial=True)
    else:
        b_sum += own_sums(b_p, BN)
    b_o = warpgroup_mma_wait(0, [o_next])
    mbarrier.arrive(empty_v.index(slot_v), count=1)
    b_o = b_o * gl.expand_dims(gl.convert_layout(b_scale, gl.SliceLayout(1, OUT)), 1)
    return b_p, b_o, b_max, b_sum


@gluon.jit
def forward_consumer(
    W: gl.constexpr, d_o, p_lse, p_sums, p_marks, p_start, p_base, s_q, s_k, s_v, s_o, s_o_box, full_q, full_k, full_v, empty_q,
    empty_k, empty_v, T0, T1, N, OFFSET, TILES, GRID, scale, UNITS: gl.constexpr, LENGTH: gl.constexpr, STRIDE: gl.constexpr,
    PACKED: gl.constexpr, SUMS: gl.constexpr, DV: gl.constexpr, BN: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """The W-th 64 queries of every unit."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    units = gl.cdiv(T1 - T0, 2 * ROWS) * GRID
    stage = 0
    for i_round in range(gl.cdiv(units, gl.num_programs(0))):
        i = unit_of(i_round)
        if i < units:
            i_b, i_h, t0, from_key, tiles, late, early = tiles_of(
                i, T0, T1, N, OFFSET, GRID, p_start, p_base, UNITS, LENGTH, STRIDE, PACKED, BN
            )
            o_t = t0 + W * ROWS + gl.arange(0, ROWS, layout=ROW)
            low, high = key_bounds(gl.minimum(o_t, N - 1), OFFSET, p_start, p_base, LENGTH, STRIDE, PACKED)
            o_record = (i_b * UNITS + i_h) * (T1 - T0) + o_t - T0
            o_record = gl.where(o_t < N, o_record * TILES + tiles - 1, -1)
            b_max = gl.full([ROWS], LEAST, gl.float32, layout=ROW)
            b_o = gl.zeros([ROWS, DV], gl.float32, layout=OUT)
            mbarrier.wait(full_q.index(W), i_round & 1)
            slot = ready(full_k, stage, RING)
            zeros = gl.zeros([ROWS, BN], gl.float32, layout=MMA)
            s_next = warpgroup_mma(s_q.index(W), s_k.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
            b_s = warpgroup_mma_wait(0, [s_next])
            mbarrier.arrive(empty_k.index(slot), count=1)
            at = from_key + (tiles - 1) * BN
            b_p, b_max, _ = softmax(b_s, b_max, at, low, high, scale, BN, True, PACKED, SUMS, MMA)
            if SUMS:
                b_sum = store_sums(b_p, b_max, p_sums, p_marks, o_record, BN)
            else:
                b_sum = own_sums(b_p, BN)
            stage += 1
            for _ in range(1, late):
                at -= BN
                o_record -= 1
                b_p, b_o, b_max, b_sum = attend_step(
                    s_q.index(W), s_k, s_v, full_k, full_v, empty_k, empty_v, stage, b_p, b_o, b_max, b_sum, p_sums, p_marks,
                    o_record, at, low, high, scale, BN, RING, True, PACKED, SUMS, MMA, OUT,
                )  # fmt: skip
                stage += 1
            for _ in range(late, tiles - early):
                o_record -= 1
                b_p, b_o, b_max, b_sum = attend_step(
                    s_q.index(W), s_k, s_v, full_k, full_v, empty_k, empty_v, stage, b_p, b_o, b_max, b_sum, p_sums, p_marks,
                    o_record, 0, low, high, scale, BN, RING, False, PACKED, SUMS, MMA, OUT,
                )  # fmt: skip
                stage += 1
            if PACKED:
                at = from_key + early * BN
                for _ in range(0, early):
                    at -= BN
                    b_p, b_o, b_max, b_sum = attend_step(
                        s_q.index(W), s_k, s_v, full_k, full_v, empty_k, empty_v, stage, b_p, b_o, b_max, b_sum, p_sums,
                        p_marks, o_record, at, low, high, scale, BN, RING, True, PACKED, SUMS, MMA, OUT,
                    )  # fmt: skip
                    stage += 1
            mbarrier.arrive(empty_q.index(W), count=1)
            b_half = gl.convert_layout(b_p.to(s_v.dtype), gl.DotOperandLayout(0, OUT, 2))
            b_all = gl.convert_layout(gl.sum(b_sum, 1), ROW)
            slot = ready(full_v, stage - 1, RING)
            o_next = warpgroup_mma(b_half, s_v.index(slot), b_o, is_async=True)
            b_one = gl.where(b_all > 0.0, b_all, 1.0)
            o_lse = (i_b.to(gl.int64) * N + o_t) * UNITS + i_h
            gl.store(p_lse + o_lse, gl.where(b_all > 0.0, b_max + gl.log2(b_one), float("inf")), mask=o_t < N)
            b_o = warpgroup_mma_wait(0, [o_next])
            mbarrier.arrive(empty_v.index(slot), count=1)
            b_o = b_o * gl.expand_dims(gl.convert_layout(1.0 / b_one, gl.SliceLayout(1, OUT)), 1)
            tma.store_wait(0)  # the buffer's last contents are on their way
            s_o.index(W).store(b_o.to(s_o.dtype))
            fence_async_shared()
            store_box(d_o, [i_b, i_h, t0 + W * ROWS, 0], s_o_box.index(W))
    tma.store_wait(0)


@gluon.jit
def gradient_step(
    s_q, s_do, s_k, s_v, full_k, full_v, empty_k, empty_v, stage, b_ds, b_dq, b_lse, b_delta, from_key, low, high, scale,
    BN: gl.constexpr, RING: gl.constexpr, FIRST: gl.constexpr, MASK: gl.constexpr, PACKED: gl.constexpr, MMA: gl.constexpr,
    OUT: gl.constexpr,
):  # fmt: skip
    """S and do v^T of a tile, dq of the one before (unless this is the FIRST), dS of this one."""
    slot = ready(full_k, stage, RING)
    zeros = gl.zeros([ROWS, BN], gl.float32, layout=MMA)
    s_next = warpgroup_mma(s_q, s_k.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    ready(full_v, stage, RING)
    dp_next = warpgroup_mma(s_do, s_v.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    if FIRST:
        b_s = warpgroup_mma_wait(1, [s_next])
    else:
        before = (stage - 1) % RING
        b_half = gl.convert_layout(b_ds.to(s_k.dtype), gl.DotOperandLayout(0, OUT, 2))
        dq_next = warpgroup_mma(b_half, s_k.index(before), b_dq, is_async=True)
        b_s = warpgroup_mma_wait(2, [s_next])
    b_p = gl.exp2(b_s * scale - gl.expand_dims(b_lse, 1))
    if MASK:
        b_p = visible(b_p, from_key, low, high, 0.0, BN, PACKED, False, MMA)
    if FIRST:
        b_dp = warpgroup_mma_wait(0, [dp_next])
    else:
        b_dp = warpgroup_mma_wait(1, [dp_next])
    mbarrier.arrive(empty_v.index(slot), count=1)
    b_ds = b_p * (b_dp - gl.expand_dims(b_delta, 1))
    if not FIRST:
        b_dq = warpgroup_mma_wait(0, [dq_next])
        mbarrier.arrive(empty_k.index(before), count=1)
    return b_ds, b_dq


@gluon.jit
def gradient_consumer(
    W: gl.constexpr, d_dq, p_lse, p_delta, p_gate, p_start, p_base, s_q, s_do, s_k, s_v, s_o, s_o_box, full_q, full_k, full_v,
    empty_q, empty_k, empty_v, N, OFFSET, GRID, scale, dq_scale, UNITS: gl.constexpr, LENGTH: gl.constexpr,
    STRIDE: gl.constexpr, PACKED: gl.constexpr, GATED: gl.constexpr, DK: gl.constexpr, BN: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """The W-th 64 queries of every unit."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DK, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    units = gl.cdiv(N, 2 * ROWS) * GRID
    stage = 0
    for i_round in range(gl.cdiv(units, gl.num_programs(0))):
        i = unit_of(i_round)
        if i < units:
            i_b, i_h, t0, from_key, tiles, late, early = tiles_of(
                i, 0, N, N, OFFSET, GRID, p_start, p_base, UNITS, LENGTH, STRIDE, PACKED, BN
            )
            o_t = t0 + W * ROWS + gl.arange(0, ROWS, layout=ROW)
            low, high = key_bounds(gl.minimum(o_t, N - 1), OFFSET, p_start, p_base, LENGTH, STRIDE, PACKED)
            o_row = (i_b.to(gl.int64) * N + o_t) * UNITS + i_h
            b_lse = gl.load(p_lse + o_row, mask=o_t < N, other=float("inf"))
            b_delta = gl.load(p_delta + o_row, mask=o_t < N, other=0.0)
            b_dq = gl.zeros([ROWS, DK], gl.float32, layout=OUT)
            mbarrier.wait(full_q.index(W), i_round & 1)
            at = from_key + (tiles - 1) * BN
            b_ds, b_dq = gradient_step(
                s_q.index(W), s_do.index(W), s_k, s_v, full_k, full_v, empty_k, empty_v, stage, b_dq, b_dq, b_lse, b_delta, at,
                low, high, scale, BN, RING, True, True, PACKED, MMA, OUT,
            )  # fmt: skip
            stage += 1
            for _ in range(1, late):
                at -= BN
                b_ds, b_dq = gradient_step(
                    s_q.index(W), s_do.index(W), s_k, s_v, full_k, full_v, empty_k, empty_v, stage, b_ds, b_dq, b_lse, b_delta,
                    at, low, high, scale, BN, RING, False, True, PACKED, MMA, OUT,
                )  # fmt: skip
                stage += 1
            for _ in range(late, tiles - early):
                b_ds, b_dq = gradient_step(
                    s_q.index(W), s_do.index(W), s_k, s_v, full_k, full_v, empty_k, empty_v, stage, b_ds, b_dq, b_lse, b_delta,
                    0, low, high, scale, BN, RING, False, False, PACKED, MMA, OUT,
                )  # fmt: skip
                stage += 1
            if PACKED:
                at = from_key + early * BN
                for _ in range(0, early):
                    at -= BN
                    b_ds, b_dq = gradient_step(
                        s_q.index(W), s_do.index(W), s_k, s_v, full_k, full_v, empty_k, empty_v, stage, b_ds, b_dq, b_lse,
                        b_delta, at, low, high, scale, BN, RING, False, True, PACKED, MMA, OUT,
                    )  # fmt: skip
                    stage += 1
            mbarrier.arrive(empty_q.index(W), count=1)
            before = (stage - 1) % RING
            b_half = gl.convert_layout(b_ds.to(s_k.dtype), gl.DotOperandLayout(0, OUT, 2))
            dq_next = warpgroup_mma(b_half, s_k.index(before), b_dq, is_async=True)
            b_factor = gl.full([ROWS], 1.0, gl.float32, layout=ROW) * dq_scale
            if GATED:
                b_factor *= gl.load(p_gate + o_row, mask=o_t < N, other=0.0)
            b_dq = warpgroup_mma_wait(0, [dq_next])
            mbarrier.arrive(empty_k.index(before), count=1)
            b_dq = b_dq * gl.expand_dims(gl.convert_layout(b_factor, gl.SliceLayout(1, OUT)), 1)
            tma.store_wait(0)  # the buffer's last contents are on their way
            s_o.index(W).store(b_dq.to(s_o.dtype))
            fence_async_shared()
            store_box(d_dq, [i_b, i_h, t0 + W * ROWS, 0], s_o_box.index(W))
    tma.store_wait(0)


@gluon.jit
def produce(
    d_q, d_do, d_k, d_v, p_start, p_base, s_q, s_do, s_k, s_v, full_q, full_k, full_v, empty_q, empty_k, empty_v, T0, T1, N,
    OFFSET, GRID, UNITS: gl.constexpr, SHARE: gl.constexpr, LENGTH: gl.constexpr, STRIDE: gl.constexpr, PACKED: gl.constexpr,
    BACKWARD: gl.constexpr, BN: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """All that the consumers read, in their order."""
    units = gl.cdiv(T1 - T0, 2 * ROWS) * GRID
    stage = 0
    for i_round in range(gl.cdiv(units, gl.num_programs(0))):
        i = unit_of(i_round)
        if i < units:
            i_b, i_h, t0, from_key, tiles, _, _ = tiles_of(
                i, T0, T1, N, OFFSET, GRID, p_start, p_base, UNITS, LENGTH, STRIDE, PACKED, BN
            )
            for w in gl.static_range(2):
                mbarrier.wait(empty_q.index(w), (i_round & 1) ^ 1)
                if BACKWARD:
                    mbarrier.expect(full_q.index(w), d_q.block_type.nbytes + d_do.block_type.nbytes)
                    load_box(d_do, [i_b, i_h, t0 + w * ROWS, 0], full_q.index(w), s_do.index(w))
                else:
                    mbarrier.expect(full_q.index(w), d_q.block_type.nbytes)
                load_box(d_q, [i_b, i_h, t0 + w * ROWS, 0], full_q.index(w), s_q.index(w))
            for j in range(tiles):
                row = from_key + (tiles - 1 - j) * BN
                ask(d_k, s_k, full_k, empty_k, stage, i_b, i_h // SHARE, row, RING)
                ask(d_v, s_v, full_v, empty_v, stage, i_b, i_h // SHARE, row, RING)
                stage += 1


@gluon.jit(do_not_specialize=["T0", "T1", "N", "OFFSET", "TILES", "GRID"])
def forward_tiles(
    d_q, d_k, d_v, d_o, p_lse, p_sums, p_marks, p_start, p_base, T0, T1, N, OFFSET, TILES, GRID, scale, UNITS: gl.constexpr,
    SHARE: gl.constexpr, LENGTH: gl.constexpr, STRIDE: gl.constexpr, PACKED: gl.constexpr, SUMS: gl.constexpr,
    DV: gl.constexpr, BN: gl.constexpr, RING: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """`attend.attend_forward` of compressed keys, one head a tile, for the queries [T0, T1). GRID: batch entries times heads."""
    s_q, s_q_box = make_tiles(d_q, 2)
    s_o, s_o_box = make_tiles(d_o, 2)
    s_k, s_k_box = make_tiles(d_k, RING)
    s_v, s_v_box = make_tiles(d_v, RING)
    full_q, empty_q = make_barriers(2, 1), make_barriers(2, 1)
    full_k, empty_k = make_barriers(RING, 1), make_barriers(RING, 2)
    full_v, empty_v = make_barriers(RING, 1), make_barriers(RING, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (forward_consumer, (
                0, d_o, p_lse, p_sums, p_marks, p_start, p_base, s_q, s_k, s_v, s_o, s_o_box, full_q, full_k, full_v, empty_q,
                empty_k, empty_v, T0, T1, N, OFFSET, TILES, GRID, scale, UNITS, LENGTH, STRIDE, PACKED, SUMS, DV, BN, RING,
            )),
            (forward_consumer, (
                1, d_o, p_lse, p_sums, p_marks, p_start, p_base, s_q, s_k, s_v, s_o, s_o_box, full_q, full_k, full_v, empty_q,
                empty_k, empty_v, T0, T1, N, OFFSET, TILES, GRID, scale, UNITS, LENGTH, STRIDE, PACKED, SUMS, DV, BN, RING,
            )),
            (produce, (
                d_q, d_q, d_k, d_v, p_start, p_base, s_q_box, s_q_box, s_k_box, s_v_box, full_q, full_k, full_v, empty_q,
                empty_k, empty_v, T0, T1, N, OFFSET, GRID, UNITS, SHARE, LENGTH, STRIDE, PACKED, False, BN, RING,
            )),
        ],
        [4, 1],
        REGISTERS,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["N", "OFFSET", "GRID"])
def dq_tiles(
    d_q, d_do, d_k, d_v, d_dq, p_lse, p_delta, p_gate, p_start, p_base, N, OFFSET, GRID, scale, dq_scale, UNITS: gl.constexpr,
    SHARE: gl.constexpr, LENGTH: gl.constexpr, STRIDE: gl.constexpr, PACKED: gl.constexpr, GATED: gl.constexpr, DK: gl.constexpr,
    BN: gl.constexpr, RING: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """`attend.attend_dq` of compressed keys, one head a tile. GRID: batch entries times heads."""
    s_q, s_q_box = make_tiles(d_q, 2)
    s_do, s_do_box = make_tiles(d_do, 2)
    s_o, s_o_box = make_tiles(d_dq, 2)
    s_k, s_k_box = make_tiles(d_k, RING)
    s_v, s_v_box = make_tiles(d_v, RING)
    full_q, empty_q = make_barriers(2, 1), make_barriers(2, 1)
    full_k, empty_k = make_barriers(RING, 1), make_barriers(RING, 2)
    full_v, empty_v = make_barriers(RING, 1), make_barriers(RING, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (gradient_consumer, (
                0, d_dq, p_lse, p_delta, p_gate, p_start, p_base, s_q, s_do, s_k, s_v, s_o, s_o_box, full_q, full_k, full_v,
                empty_q, empty_k, empty_v, N, OFFSET, GRID, scale, dq_scale, UNITS, LENGTH, STRIDE, PACKED, GATED, DK, BN,
                RING,
            )),
            (gradient_consumer, (
                1, d_dq, p_lse, p_delta, p_gate, p_start, p_base, s_q, s_do, s_k, s_v, s_o, s_o_box, full_q, full_k, full_v,
                empty_q, empty_k, empty_v, N, OFFSET, GRID, scale, dq_scale, UNITS, LENGTH, STRIDE, PACKED, GATED, DK, BN,
                RING,
            )),
            (produce, (
                d_q, d_do, d_k, d_v, p_start, p_base, s_q_box, s_do_box, s_k_box, s_v_box, full_q, full_k, full_v, empty_q,
                empty_k, empty_v, 0, N, N, OFFSET, GRID, UNITS, SHARE, LENGTH, STRIDE, PACKED, True, BN, RING,
            )),
        ],
        [4, 1],
        REGISTERS,
    )  # fmt: skip


def fits(p: Problem) -> bool:
    """Whether these kernels take a call (on a GPU that `has_tiles`)."""
    return p.dtype in DTYPES and p.dk == DIM and p.dv == DIM


def sums_fit(p: Problem) -> bool:
    """Whether the forward can store block sums: four compressed blocks a selection block, of which the last reaches into the
    next one (the paper's geometry), and no documents, whose tiles begin anywhere."""
    stride, tiles = p.config.compress_stride, cdiv(p.keys, p.config.compress_stride * SPREAD.value)
    paper = (p.config.compress_block, p.config.select_block) == (2 * stride, 4 * stride)
    numbers = p.b * p.h * 2 * ROWS.value * tiles * WORD.value  # of the smallest chunk
    return p.dtype in DTYPES and p.dk == p.dv and ("forward", p.dk) in KEYS and paper and not p.packed and numbers < 2**31


def _grid(p: Problem, rows: int) -> tuple[int]:
    return (min(cores(p.device), cdiv(rows, 2 * ROWS.value) * p.b * p.h),)


def _constants(p: Problem, way: str) -> dict[str, object]:
    keys, ring = KEYS[way, p.dk]
    return {
        "UNITS": p.h, "SHARE": p.r, "LENGTH": p.config.compress_block, "STRIDE": p.config.compress_stride, "PACKED": p.packed,
        "BN": keys, "RING": ring, "REGISTERS": REGISTERS, "num_warps": 4,
    }  # fmt: skip


class Sums(NamedTuple):
    """Asks for the queries [t0, t1) alone, and for their block sums, as `selection.select_from_sums` reads them: tiles of keys,
    and where the sums go. The keys and values are `selection.spread_keys`'s."""

    t0: int
    t1: int
    tiles: int
    sums: Tensor
    marks: Tensor


def attend_forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, p: Problem, sums: Sums | None = None) -> None:
    """`launch.attend_forward` of branch "cmp", for a call that `fits`."""
    keys, rows = SPREAD.value, ROWS.value
    tables = [lse if table is None else table for table in (p.table("start"), p.table("base"))]
    t0, t1, tiles, *records = sums or (0, p.n, 0, lse, lse)
    forward_tiles[_grid(p, t1 - t0)](
        head_boxes(q, rows, p.dk), head_boxes(k, keys, p.dk), head_boxes(v, keys, p.dv), head_boxes(out, rows, p.dv), lse,
        *records, *tables, t0, t1, p.n, p.offset, tiles, p.b * p.h, p.scale_log2, SUMS=sums is not None, DV=p.dv,
        **_constants(p, "forward"),
    )  # fmt: skip


def attend_dq(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, gate: Tensor | None, dq: Tensor, p: Problem
) -> None:
    """`launch.attend_dq` of branch "cmp", for a call that `fits`."""
    keys, rows = KEYS["dq", p.dk][0], ROWS.value
    tables = [lse if table is None else table for table in (p.table("start"), p.table("base"))]
    dq_tiles[_grid(p, p.n)](
        head_boxes(q, rows, p.dk), head_boxes(do, rows, p.dv), head_boxes(k, keys, p.dk), head_boxes(v, keys, p.dv),
        head_boxes(dq, rows, p.dk), lse, delta, delta if gate is None else gate, *tables, p.n, p.offset, p.b * p.h, p.scale_log2,
        p.scale, GATED=gate is not None, DK=p.dk, **_constants(p, "dq"),
    )  # fmt: skip
