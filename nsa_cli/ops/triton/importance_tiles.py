"""Importance of selection blocks on Hopper (Gluon): `selection.block_importance` with exponentials beside products.

A unit of work is 64 queries and two neighbouring tiles of compressed keys, one of each consumer warp group. The keys stay on
chip while the queries of the group's heads stream past, brought by a producer warp; while the tensor cores make one head's
scores, a consumer takes the exponentials of the head before, and adds them up in registers. Both consumers read the same
queries: half the bytes that each would read alone. A program is a multiprocessor's for the whole launch; the keys of its next
unit come while it works on one.

Later queries see more keys. So that all programs have as many units, rows of a rectangle are counted, in which the last
queries' tiles stand before the first queries', the last but one's before the second's, and so on.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment,var-annotated"

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from nsa_cli.ops.triton.device import cores
from nsa_cli.ops.triton.hopper import DTYPES, head_boxes, load_box, make_barriers, make_tiles
from nsa_cli.ops.triton.problem import Problem

ROWS = gl.constexpr(64)
"""Queries of a unit."""
KEYS = gl.constexpr(128)
"""Compressed keys of a consumer's tile."""
RING = gl.constexpr(4)
"""Heads' queries on chip at a time."""
DIMS = (64, 128)
REGISTERS = (240, 24)
"""Of a thread of a consumer, and of the producer."""


@gluon.jit
def pairs_of(i_tile, T0, T1, OFFSET, BLOCK: gl.constexpr, TILE: gl.constexpr):
    """Pairs of key tiles that a tile of queries sees; each key tile but for its first block, its left neighbour's last."""
    t1 = gl.minimum(T0 + (i_tile + 1) * ROWS, T1) - 1
    return gl.cdiv((t1 + OFFSET) // BLOCK + 1, 2 * (TILE - 1))


@gluon.jit
def width_of(T0, T1, OFFSET, BLOCK: gl.constexpr, TILE: gl.constexpr):
    """Places of a row of the rectangle: the pairs of two tiles of queries, of any two in one row nearly as many."""
    last = gl.cdiv(T1 - T0, ROWS) - 1
    return pairs_of(0, T0, T1, OFFSET, BLOCK, TILE) + pairs_of(last, T0, T1, OFFSET, BLOCK, TILE) + 2


@gluon.jit
def places_of(T0, T1, OFFSET, GRID, BLOCK: gl.constexpr, TILE: gl.constexpr):
    """Places of the rectangle, a few of which are no unit."""
    return (gl.cdiv(T1 - T0, ROWS) + 1) // 2 * GRID * width_of(T0, T1, OFFSET, BLOCK, TILE)


@gluon.jit
def unit_of(i, T0, T1, OFFSET, GRID, BLOCK: gl.constexpr, TILE: gl.constexpr):
    """(batch entry and group, tile of queries, pair of key tiles, whether there is such a unit) of a place."""
    width = width_of(T0, T1, OFFSET, BLOCK, TILE)
    i_pair, i_row = i % width, i // width
    i_bg, i_row = i_row % GRID, i_row // GRID
    late = gl.cdiv(T1 - T0, ROWS) - 1 - i_row
    count = pairs_of(late, T0, T1, OFFSET, BLOCK, TILE)
    first = i_pair < count
    other = (late != i_row) & (i_pair - count < pairs_of(i_row, T0, T1, OFFSET, BLOCK, TILE))
    return i_bg, gl.where(first, late, i_row), gl.where(first, i_pair, i_pair - count), first | other


@gluon.jit
def consume(
    W: gl.constexpr, p_lse, p_scores, s_q, s_k, full_q, empty_q, full_k, empty_k, T0, T1, N, OFFSET, KEYS_IN_ALL, BLOCKS, GRID,
    scale, G: gl.constexpr, R: gl.constexpr, LENGTH: gl.constexpr, STRIDE: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """The W-th key tile of every unit."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    COLUMN: gl.constexpr = gl.SliceLayout(0, MMA)
    RATIO: gl.constexpr = BLOCK // STRIDE
    REACH: gl.constexpr = LENGTH // STRIDE - 1
    TILE: gl.constexpr = KEYS // RATIO
    zeros = gl.zeros([ROWS, KEYS], gl.float32, layout=MMA)
    places = places_of(T0, T1, OFFSET, GRID, BLOCK, TILE)
    stage = 0
    done = 0
    for i in range(gl.program_id(0), places, gl.num_programs(0)):
        i_bg, i_tile, i_pair, real = unit_of(i, T0, T1, OFFSET, GRID, BLOCK, TILE)
        if real:
            i_b, i_g = i_bg // G, i_bg % G
            t0 = T0 + i_tile * ROWS
            j0 = (2 * i_pair + W) * (TILE - 1) - 1
            o_t = t0 + gl.arange(0, ROWS, layout=ROW)
            m_t = o_t < T1
            p_row = p_lse + (i_b.to(gl.int64) * N + o_t) * (G * R) + i_g * R
            b_lse = gl.load(p_row, mask=m_t, other=float("inf"))
            b_next = gl.load(p_row + 1, mask=m_t & (R > 1), other=float("inf"))
            slot_k = done % 2
            mbarrier.wait(full_k.index(2 * W + slot_k), (done // 2) & 1)
            s_own = s_k.index(2 * W + slot_k).permute((1, 0))
            slot = stage % RING
            mbarrier.wait(full_q.index(slot), (stage // RING) & 1)
            s_next = warpgroup_mma(s_q.index(slot), s_own, zeros, use_acc=False, is_async=True)
            b_s = warpgroup_mma_wait(0, [s_next])
            mbarrier.arrive(empty_q.index(slot), count=1)
            stage += 1
            b_p = gl.zeros([ROWS, KEYS], gl.float32, layout=MMA)
            for r in range(1, R):
                slot = stage % RING
                mbarrier.wait(full_q.index(slot), (stage // RING) & 1)
                s_next = warpgroup_mma(s_q.index(slot), s_own, zeros, use_acc=False, is_async=True)
                b_after = gl.load(p_row + r + 1, mask=m_t & (r + 1 < R), other=float("inf"))
                b_p += gl.exp2(b_s * scale - gl.expand_dims(b_lse, 1))
                b_lse = b_next
                b_next = b_after
                b_s = warpgroup_mma_wait(0, [s_next])
                mbarrier.arrive(empty_q.index(slot), count=1)
                stage += 1
            mbarrier.arrive(empty_k.index(2 * W + slot_k), count=1)
            done += 1
            b_p += gl.exp2(b_s * scale - gl.expand_dims(b_lse, 1))
            o_p = o_t + OFFSET
            high = gl.where(o_p >= LENGTH - 1, (o_p - LENGTH + 1) // STRIDE + 1, 0)  # keys that a query sees
            o_c = j0 * RATIO + gl.arange(0, KEYS, layout=COLUMN)
            m_c = (o_c >= 0) & (o_c < KEYS_IN_ALL)
            seen = gl.expand_dims(m_c, 0) & (gl.expand_dims(o_c, 0) < gl.expand_dims(high, 1))
            b_p = gl.reshape(gl.where(seen, b_p, 0.0), (ROWS, TILE, RATIO))
            INSIDE: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, b_p.type.layout))
            o_i = gl.expand_dims(gl.expand_dims(gl.arange(0, RATIO, layout=INSIDE), 0), 1)
            b_score = gl.sum(b_p * gl.minimum(RATIO - o_i, REACH + 1).to(gl.float32), 2)
            SUMS: gl.constexpr = b_score.type.layout
            o_j = gl.arange(0, TILE, layout=gl.SliceLayout(0, SUMS))
            if REACH > 0:
                b_right = gl.sum(b_p * gl.maximum(o_i - (RATIO - REACH - 1), 0).to(gl.float32), 2)
                o_left = gl.expand_dims(gl.maximum(o_j - 1, 0), 0) + gl.zeros([ROWS, 1], gl.int32, layout=SUMS)
                b_score += gl.gather(b_right, o_left, 1)
            o_q = t0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
            o_row = i_bg.to(gl.int64) * (T1 - T0) + (o_q - T0)
            o_score = gl.expand_dims(o_row * BLOCKS, 1) + gl.expand_dims(j0 + o_j, 0)
            m_score = gl.expand_dims(o_q < T1, 1) & gl.expand_dims((o_j > 0) & (j0 + o_j < BLOCKS), 0)
            gl.store(p_scores + o_score, b_score, mask=m_score)


@gluon.jit
def produce(
    d_q, d_k, s_q, s_k, full_q, empty_q, full_k, empty_k, T0, T1, OFFSET, GRID, G: gl.constexpr, R: gl.constexpr,
    STRIDE: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """All that the consumers read, in their order."""
    RATIO: gl.constexpr = BLOCK // STRIDE
    TILE: gl.constexpr = KEYS // RATIO
    places = places_of(T0, T1, OFFSET, GRID, BLOCK, TILE)
    stage = 0
    done = 0
    for i in range(gl.program_id(0), places, gl.num_programs(0)):
        i_bg, i_tile, i_pair, real = unit_of(i, T0, T1, OFFSET, GRID, BLOCK, TILE)
        if real:
            i_b, i_g = i_bg // G, i_bg % G
            for w in gl.static_range(2):
                slot_k = 2 * w + done % 2
                mbarrier.wait(empty_k.index(slot_k), ((done // 2) & 1) ^ 1)
                mbarrier.expect(full_k.index(slot_k), d_k.block_type.nbytes)
                row = ((2 * i_pair + w) * (TILE - 1) - 1) * RATIO  # below 0 for the first tile: zeros
                load_box(d_k, [i_b, i_g, row, 0], full_k.index(slot_k), s_k.index(slot_k))
            for r in range(R):
                slot = stage % RING
                mbarrier.wait(empty_q.index(slot), ((stage // RING) & 1) ^ 1)
                mbarrier.expect(full_q.index(slot), d_q.block_type.nbytes)
                load_box(d_q, [i_b, i_g * R + r, T0 + i_tile * ROWS, 0], full_q.index(slot), s_q.index(slot))
                stage += 1
            done += 1


@gluon.jit(do_not_specialize=["T0", "T1", "N", "OFFSET", "KEYS_IN_ALL", "BLOCKS", "GRID"])
def importance_tiles(
    d_q, d_k, p_lse, p_scores, T0, T1, N, OFFSET, KEYS_IN_ALL, BLOCKS, GRID, scale, G: gl.constexpr, R: gl.constexpr,
    LENGTH: gl.constexpr, STRIDE: gl.constexpr, BLOCK: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """imp[t, j] of the queries [T0, T1) and of all blocks that they may choose among. GRID: batch entries times groups."""
    s_q, s_q_box = make_tiles(d_q, RING)
    s_k, s_k_box = make_tiles(d_k, 4)  # two of each consumer
    full_q, empty_q = make_barriers(RING, 1), make_barriers(RING, 2)
    full_k, empty_k = make_barriers(4, 1), make_barriers(4, 1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (
                0, p_lse, p_scores, s_q, s_k, full_q, empty_q, full_k, empty_k, T0, T1, N, OFFSET, KEYS_IN_ALL, BLOCKS, GRID,
                scale, G, R, LENGTH, STRIDE, BLOCK,
            )),
            (consume, (
                1, p_lse, p_scores, s_q, s_k, full_q, empty_q, full_k, empty_k, T0, T1, N, OFFSET, KEYS_IN_ALL, BLOCKS, GRID,
                scale, G, R, LENGTH, STRIDE, BLOCK,
            )),
            (produce, (
                d_q, d_k, s_q_box, s_k_box, full_q, empty_q, full_k, empty_k, T0, T1, OFFSET, GRID, G, R, STRIDE, BLOCK,
            )),
        ],
        [4, 1],
        REGISTERS,
    )  # fmt: skip


def fits(p: Problem) -> bool:
    """Whether this kernel takes a call (on a GPU that `has_tiles`)."""
    config = p.config
    ratio = config.select_block // config.compress_stride
    return (
        p.dtype in DTYPES and p.dk in DIMS and not p.packed and ratio & (ratio - 1) == 0 and 4 * ratio <= KEYS.value
       
    )  # fmt: skip


def block_importance(q: Tensor, k_cmp: Tensor, lse: Tensor, scores: Tensor, t0: int, t1: int, p: Problem) -> None:
    """Writes the importance [b, g, t1 - t0, blocks] of the queries [t0, t1), for a call that `fits`."""
    config = p.config
    importance_tiles[(cores(p.device),)](
        head_boxes(q, ROWS.value, p.dk), head_boxes(k_cmp, KEYS.value, p.dk), lse, scores, t0, t1, p.n, p.offset, k_cmp.shape[2],
        p.select_blocks, p.b * p.g, p.scale_log2, G=p.g, R=p.r, LENGTH=config.compress_block, STRIDE=config.compress_stride,
        BLOCK=config.select_block, REGISTERS=REGISTERS, num_warps=4,
    )  # fmt: skip
