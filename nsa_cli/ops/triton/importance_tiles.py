"""Importance of selection blocks on Hopper (Gluon): keys stay in registers, the heads' queries stream past.

A tile is 256 compressed keys, 64 selection blocks, the first of which is the left neighbour of the others and is not written.
A unit is a tile and 64 queries of one group. Two consumer warp groups have 128 of the keys each, as the left operands of two
products, and go through the group's heads: S^T [64 keys, 64 queries] = k q^T, then exp2(S^T - lse) is added up. A head's queries
are on chip once for all 256 keys. While a consumer takes one half's exponentials, the other half's product runs: the chip's
tensor cores and its special function units, of which there is as much to do (256 cycles a half each), are busy together.

A program is a multiprocessor's for the whole launch; the units are dealt in turns, those of the same queries next to each other.
Besides the consumers there are, each a step ahead of them or behind:

  a producer of one warp: brings every head's queries through a ring of buffers
  a loader of one warp: gathers the next tile's keys, which need not be adjacent in packed documents, and the next unit's
  log-sum-exps and bounds of visible keys
  a writer of two warps: a block's own keys, and the left neighbour's that reach into it, become a score

Rows of a product lie in registers so that a thread has rows q and q + 8 of sixteen: these have keys 2 q and 2 q + 1, so that half
of what adds up a block's keys needs no other thread.

`selection.block_importance` is the same for everything else.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment,var-annotated"

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from nsa_cli.ops.triton.device import cores
from nsa_cli.ops.triton.hopper import DTYPES, head_boxes, load_box, make_barriers, make_tiles, view
from nsa_cli.ops.triton.problem import Problem, cdiv

ROWS = gl.constexpr(64)
"""Queries of a unit, keys of a product."""
STEP = gl.constexpr(4)
"""Places for a block's keys."""
PART = gl.constexpr(16)
"""Blocks of a product."""
TILE = gl.constexpr(64)
"""Blocks of a tile: two products of two consumers."""
HEADS = gl.constexpr(4)
"""Heads whose log-sum-exps are loaded at a time: 16 bytes."""
PANEL = gl.constexpr(64)
"""Channels that lie side by side on chip: 128 bytes."""
EIGHTH = gl.constexpr(8)
"""Of keys, strides are told in so many numbers, 16 bytes, which is what is copied at a time."""
LINE = gl.constexpr(16)
"""Keys that are loaded at a time, and queries whose scores are written."""
DIM = 128
"""Padded channels of a head."""
MOST_HEADS = 32
"""Of a group: what there is shared memory for."""
RING = 6
"""Tiles of queries on chip at a time."""
DEPTH = 0
"""Heads after which a consumer's products pause, 0: they do not. Two of its products are in flight at a time, or 0: one. (With 4
ptxas moves exponentials so far that it spills.)"""
LAG = 1500
"""Nanoseconds, about, that the second consumer begins later: the one's ends of units then fall into the other's middles."""
REGISTERS = (224, 56, 56, 56)
"""Of a thread of a consumer, the producer, the loader, the writer."""
MOST_UNITS = 4
"""Units whose keys are loaded once, at most."""
LEAST_ROUNDS = 12
"""Such items that a program should have, so that all end at about the same time."""


def _exponential(i: int, poly: bool) -> str:
    """PTX: of numbers i of eight, 2 ** x; `poly`: without the special function unit, as accurate."""
    if not poly:
        return f"ex2.approx.ftz.f32 ${i}, ${8 + i};"
    lines = [
        f"max.ftz.f32 x, ${8 + i}, 0fC2FC0000;",  # -126
        "add.rn.ftz.f32 t, x, 0f4B400000;",  # 1.5 * 2 ** 23: the last bits are x, rounded
        "sub.rn.ftz.f32 p, t, 0f4B400000;",
        "sub.rn.ftz.f32 x, x, p;",
        f"mov.f32 p, 0f{POLYNOMIAL[0]};",
        *(f"fma.rn.ftz.f32 p, p, x, 0f{c};" for c in POLYNOMIAL[1:]),
        "mov.b32 a, t;", "mov.b32 b, p;", "shl.b32 a, a, 23;", "add.s32 b, a, b;", f"mov.b32 ${i}, b;",
    ]  # fmt: skip
    return "{ .reg .f32 x, t, p; .reg .b32 a, b; " + " ".join(lines) + " }"


POLYNOMIAL = ("3AADDD0A", "3C1E7544", "3D635BA9", "3E75FCDE", "3F317215", "3F800000")
"""Of 2 ** x for -0.5 <= x <= 0.5, float32's bits."""
EXP2 = gl.constexpr(tuple(" ".join(_exponential(i, i < poly) for i in range(8)) for poly in range(5)))
"""By how many of eight exponentials are polynomials."""
EIGHT = gl.constexpr("=f,=f,=f,=f,=f,=f,=f,=f,f,f,f,f,f,f,f,f")


@gluon.jit
def blocks_of(t, t1, OFFSET, p_start, p_sel_base, BLOCK: gl.constexpr, PACKED: gl.constexpr):
    """[from, to): the blocks that one of the queries [t, t1) may choose."""
    from_block, to_block = 0, (t1 - 1 + OFFSET) // BLOCK + 1
    if PACKED:
        from_block = gl.load(p_sel_base + t)
        to_block = gl.load(p_sel_base + t1 - 1) + (t1 - 1 - gl.load(p_start + t1 - 1)) // BLOCK + 1
    return from_block, to_block


@gluon.jit
def items_of(
    i_row, mine, T0, T1, OFFSET, GRID, p_start, p_sel_base, BLOCK: gl.constexpr, PACKED: gl.constexpr, UNITS: gl.constexpr
):
    """A row of items, the last queries first: its first query, first tile, how many tiles; and how many items this program has,
    every so many from number `mine` on, and its first one's number in the next row.

    (Of a loop from `mine` on, inside the loop that changes `mine`, Triton 3.6 makes one that never changes it.)
    """
    programs = gl.num_programs(0)
    t0 = T0 + (gl.cdiv(T1 - T0, UNITS * ROWS) - 1 - i_row) * (UNITS * ROWS)
    from_block, to_block = blocks_of(t0, gl.minimum(t0 + UNITS * ROWS, T1), OFFSET, p_start, p_sel_base, BLOCK, PACKED)
    tile0 = from_block // (TILE - 1)
    tiles = gl.cdiv(to_block, TILE - 1) - tile0
    count = gl.maximum(gl.cdiv(tiles * GRID - mine, programs), 0)
    return t0, tile0, tiles, count, mine + count * programs - tiles * GRID


@gluon.jit
def unit_of(t, j0, T1, OFFSET, p_start, p_sel_base, BLOCK: gl.constexpr, PACKED: gl.constexpr):
    """Whether there is work for queries t .. and the tile with blocks j0 .., and the end of the blocks that matter."""
    work, to_block = t < T1, 0
    if work:
        from_block, to_block = blocks_of(t, gl.minimum(t + ROWS, T1), OFFSET, p_start, p_sel_base, BLOCK, PACKED)
        work = (j0 + 1 < to_block) & (j0 + TILE > from_block)
    return work, to_block


@gluon.jit
def keys_of(o_row, j0, KEYS, BLOCKS, p_sel_first, p_sel_last, RATIO: gl.constexpr, PACKED: gl.constexpr):
    """The keys in rows o_row of the tile with blocks j0 .., -1 for none."""
    o_n = o_row // 16 * 16 + o_row % 8 * 2 + o_row // 8 % 2
    o_j, o_i = j0 + o_n // STEP, o_n % STEP
    there = (o_j >= 0) & (o_j < BLOCKS) & (o_i < RATIO)
    o_c = o_j * RATIO + o_i
    if PACKED:
        o_c = gl.load(p_sel_first + o_j, mask=there, other=0) + o_i
        there = there & (o_c < gl.load(p_sel_last + o_j, mask=there, other=0))
    return gl.where(there & (o_c < KEYS), o_c, -1)


@gluon.jit
def ready(full, stage, RING: gl.constexpr):
    """Waits for the stage-th tile; where it lies."""
    slot = stage % RING
    mbarrier.wait(full.index(slot), (stage // RING) & 1)
    return slot


@gluon.jit
def free(empty, stage, RING: gl.constexpr):
    """Waits until the stage-th tile's place is free; where that is."""
    slot = stage % RING
    mbarrier.wait(empty.index(slot), ((stage // RING) & 1) ^ 1)
    return slot


@gluon.jit
def product(b_k, s_q, MMA: gl.constexpr):
    """k q^T, which is asked for."""
    zeros = gl.zeros([ROWS, ROWS], gl.float32, layout=MMA)
    return warpgroup_mma(b_k, s_q.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def weights(b_s, s_lse, scale, POLY: gl.constexpr, MMA: gl.constexpr):
    """The keys' probabilities."""
    b_x = b_s * scale - gl.expand_dims(s_lse.load(gl.SliceLayout(0, MMA)), 0)
    return gl.inline_asm_elementwise(EXP2[POLY], EIGHT, [b_x], gl.float32, False, 8)  # in this order: not pure


@gluon.jit
def put_blocks(
    b_p, o_c, low, high, s_own, s_right, RATIO: gl.constexpr, REACH: gl.constexpr, PACKED: gl.constexpr, MMA: gl.constexpr
):
    """What a product's keys give to their own blocks, and to the next ones."""
    o_c = gl.expand_dims(gl.where(o_c < 0, 0x7FFFFFFF, o_c), 1)
    seen = o_c < gl.expand_dims(high, 0)
    if PACKED:
        seen = seen & (o_c >= gl.expand_dims(low, 0))
    b_p = gl.where(seen, b_p, 0.0)
    o_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, MMA))
    o_i = o_row % 2 * 2 + o_row // 8 % 2
    own = gl.minimum(RATIO - o_i, REACH + 1).to(gl.float32)
    b_x = gl.reshape(b_p * gl.expand_dims(own, 1), (4, 2, 4, 2, ROWS))  # warp, key's low bit, block, key's high bit, query
    b_x = gl.sum(gl.sum(b_x, 1), 2)
    s_own.store(gl.reshape(b_x, (PART, ROWS)))
    if REACH > 0:
        right = gl.maximum(o_i - (RATIO - REACH - 1), 0).to(gl.float32)
        b_x = gl.reshape(b_p * gl.expand_dims(right, 1), (4, 2, 4, 2, ROWS))
        b_x = gl.sum(gl.sum(b_x, 1), 2)
        s_right.store(gl.reshape(b_x, (PART, ROWS)))


@gluon.jit
def consume(
    W: gl.constexpr, p_start, p_sel_base, p_sel_first, p_sel_last, s_q, s_k, s_lse, s_bounds, s_own, s_right, full_q, full_k,
    full_l, full_s, empty_q, empty_k, empty_l, empty_s, T0, T1, OFFSET, KEYS, BLOCKS, GRID, scale, R: gl.constexpr,
    RATIO: gl.constexpr, REACH: gl.constexpr, BLOCK: gl.constexpr, PACKED: gl.constexpr, UNITS: gl.constexpr,
    RING: gl.constexpr, DEPTH: gl.constexpr, POLY: gl.constexpr, LAG: gl.constexpr,
):  # fmt: skip
    """Products W and W + 2 of every tile."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    ACROSS: gl.constexpr = gl.SliceLayout(0, MMA)
    o_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, MMA))
    if W == 1 and LAG > 0:
        gl.inline_asm_elementwise("nanosleep.u32 $1; mov.b32 $0, $1;", "=r,r", [T0 * 0 + LAG], gl.int32, False, 1)
    stage, i_item, i_unit, mine = 0, 0, 0, gl.program_id(0)
    for i_row in range(gl.cdiv(T1 - T0, UNITS * ROWS)):
        t0, tile0, tiles, count, following = items_of(
            i_row, mine, T0, T1, OFFSET, GRID, p_start, p_sel_base, BLOCK, PACKED, UNITS
        )
        for n in range(count):  # see items_of
            i = mine + n * gl.num_programs(0)
            j0 = (tile0 + i % tiles) * (TILE - 1) - 1
            ready(full_k, i_item, 1)
            b_k0 = s_k.index(W).load(LEFT)
            b_k1 = s_k.index(W + 2).load(LEFT)
            mbarrier.arrive(empty_k.index(0), count=1)
            i_item += 1
            for u in range(UNITS):
                t = t0 + u * ROWS
                work, to_block = unit_of(t, j0, T1, OFFSET, p_start, p_sel_base, BLOCK, PACKED)
                if work:
                    slot_l = ready(full_l, i_unit, 2)
                    b_p0 = gl.zeros([ROWS, ROWS], gl.float32, layout=MMA)
                    b_p1 = gl.zeros([ROWS, ROWS], gl.float32, layout=MMA)
                    j_own = j0 + W * PART
                    if j_own + 2 * PART < to_block:
                        if DEPTH > 0:
                            for r in range(0, R, DEPTH):
                                slot = ready(full_q, stage, RING)
                                s_0 = product(b_k0, s_q.index(slot), MMA)
                                for d in gl.static_range(DEPTH):
                                    s_1 = product(b_k1, s_q.index(slot), MMA)
                                    b_s = warpgroup_mma_wait(1, [s_0])
                                    s_row = s_lse.index(slot_l * R + r + d)
                                    b_p0 += weights(b_s, s_row, scale, POLY, MMA)
                                    done = slot
                                    stage += 1
                                    if d + 1 < DEPTH:
                                        slot = ready(full_q, stage, RING)
                                        s_0 = product(b_k0, s_q.index(slot), MMA)
                                        b_s = warpgroup_mma_wait(1, [s_1])
                                    else:
                                        ready(full_q, stage - 1, RING)  # it is; a branch, else ptxas waits too early
                                        b_s = warpgroup_mma_wait(0, [s_1])
                                    mbarrier.arrive(empty_q.index(done), count=1)
                                    b_p1 += weights(b_s, s_row, scale, POLY, MMA)
                        else:
                            slot = ready(full_q, stage, RING)
                            s_0 = product(b_k0, s_q.index(slot), MMA)
                            for r in range(R - 1):
                                b_s = warpgroup_mma_wait(0, [s_0])
                                s_1 = product(b_k1, s_q.index(slot), MMA)
                                ready(full_q, stage, RING)  # it is; a branch, else ptxas spreads the product's parts
                                s_row = s_lse.index(slot_l * R + r)
                                b_p0 += weights(b_s, s_row, scale, POLY, MMA)
                                done = slot
                                stage += 1
                                slot = ready(full_q, stage, RING)
                                b_s = warpgroup_mma_wait(0, [s_1])
                                s_0 = product(b_k0, s_q.index(slot), MMA)
                                mbarrier.arrive(empty_q.index(done), count=1)
                                b_p1 += weights(b_s, s_row, scale, POLY, MMA)
                            b_s = warpgroup_mma_wait(0, [s_0])
                            s_1 = product(b_k1, s_q.index(slot), MMA)
                            ready(full_q, stage, RING)
                            s_row = s_lse.index(slot_l * R + R - 1)
                            b_p0 += weights(b_s, s_row, scale, POLY, MMA)
                            ready(full_q, stage, RING)
                            b_s = warpgroup_mma_wait(0, [s_1])
                            mbarrier.arrive(empty_q.index(slot), count=1)
                            b_p1 += weights(b_s, s_row, scale, POLY, MMA)
                            stage += 1
                    else:
                        for r in range(R):
                            slot = ready(full_q, stage, RING)
                            if j_own < to_block:
                                s_0 = product(b_k0, s_q.index(slot), MMA)
                                b_s = warpgroup_mma_wait(0, [s_0])
                                b_p0 += weights(b_s, s_lse.index(slot_l * R + r), scale, POLY, MMA)
                            mbarrier.arrive(empty_q.index(slot), count=1)
                            stage += 1
                    low, high = s_bounds.index(slot_l * 2).load(ACROSS), s_bounds.index(slot_l * 2 + 1).load(ACROSS)
                    mbarrier.arrive(empty_l.index(slot_l), count=1)
                    free(empty_s, i_unit, 1)
                    o_c = keys_of(o_row, j_own, KEYS, BLOCKS, p_sel_first, p_sel_last, RATIO, PACKED)
                    put_blocks(b_p0, o_c, low, high, s_own.index(W), s_right.index(W), RATIO, REACH, PACKED, MMA)
                    o_c = keys_of(o_row, j_own + 2 * PART, KEYS, BLOCKS, p_sel_first, p_sel_last, RATIO, PACKED)
                    put_blocks(b_p1, o_c, low, high, s_own.index(W + 2), s_right.index(W + 2), RATIO, REACH, PACKED, MMA)
                    mbarrier.arrive(full_s.index(0), count=1)
                    i_unit += 1
        mine = following


@gluon.jit
def produce(
    d_q, p_start, p_sel_base, s_q, full_q, empty_q, T0, T1, OFFSET, GRID, G: gl.constexpr, R: gl.constexpr, BLOCK: gl.constexpr,
    PACKED: gl.constexpr, UNITS: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Every unit's queries, head by head."""
    stage, mine = 0, gl.program_id(0)
    for i_row in range(gl.cdiv(T1 - T0, UNITS * ROWS)):
        t0, tile0, tiles, count, following = items_of(
            i_row, mine, T0, T1, OFFSET, GRID, p_start, p_sel_base, BLOCK, PACKED, UNITS
        )
        for n in range(count):  # see items_of
            i = mine + n * gl.num_programs(0)
            j0 = (tile0 + i % tiles) * (TILE - 1) - 1
            i_bg = i // tiles
            for u in range(UNITS):
                t = t0 + u * ROWS
                work, _ = unit_of(t, j0, T1, OFFSET, p_start, p_sel_base, BLOCK, PACKED)
                if work:
                    for r in range(R):
                        slot = free(empty_q, stage, RING)
                        mbarrier.expect(full_q.index(slot), d_q.block_type.nbytes)
                        load_box(d_q, [i_bg // G, i_bg % G * R + r, t, 0], full_q.index(slot), s_q.index(slot))
                        stage += 1
        mine = following


@gluon.jit
def load(
    p_k, p_lse, p_start, p_base, p_sel_base, p_sel_first, p_sel_last, s_k, s_lse, s_bounds, full_k, full_l, empty_k, empty_l,
    T0, T1, N, OFFSET, KEYS, BLOCKS, GRID, stride_kb, stride_kg, stride_ks, G: gl.constexpr, R: gl.constexpr,
    LENGTH: gl.constexpr, STRIDE: gl.constexpr, RATIO: gl.constexpr, BLOCK: gl.constexpr, PACKED: gl.constexpr,
    UNITS: gl.constexpr,
):  # fmt: skip
    """Every item's keys, every unit's log-sum-exps and bounds."""
    PANELS: gl.constexpr = s_k.shape[2] // PANEL
    LINES: gl.constexpr = ROWS // LINE
    ROW: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    FLAT: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    BESIDE: gl.constexpr = gl.BlockedLayout([1, HEADS], [32, 1], [1, 1], [1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    PART_OF_PANEL: gl.constexpr = gl.NVMMASharedLayout.get_default_for([LINE, PANEL], s_k.dtype)
    s_lines = view(s_k, s_k.dtype, [TILE * STEP // ROWS * PANELS * LINES, LINE, PANEL], PART_OF_PANEL)
    s_heads = view(s_lse, gl.float32, [2 * R // HEADS, HEADS, ROWS], PLAIN)
    i_item, i_unit, mine = 0, 0, gl.program_id(0)
    for i_row in range(gl.cdiv(T1 - T0, UNITS * ROWS)):
        t0, tile0, tiles, count, following = items_of(
            i_row, mine, T0, T1, OFFSET, GRID, p_start, p_sel_base, BLOCK, PACKED, UNITS
        )
        for n in range(count):  # see items_of
            i = mine + n * gl.num_programs(0)
            j0 = (tile0 + i % tiles) * (TILE - 1) - 1
            i_bg = i // tiles
            i_b, i_g = (i_bg // G).to(gl.int64), i_bg % G
            free(empty_k, i_item, 1)
            p_k_own = p_k + (i_b * stride_kb + i_g.to(gl.int64) * stride_kg) * EIGHTH
            for i_line in range(TILE * STEP // LINE):
                o_row = i_line * LINE + gl.arange(0, LINE, layout=gl.SliceLayout(1, ROW))
                o_c = keys_of(o_row, j0, KEYS, BLOCKS, p_sel_first, p_sel_last, RATIO, PACKED)
                o_k = gl.expand_dims(gl.maximum(o_c, 0).to(gl.int64) * stride_ks * EIGHTH, 1)
                o_k = o_k + gl.expand_dims(gl.arange(0, PANEL, layout=gl.SliceLayout(0, ROW)), 0)
                for c in gl.static_range(PANELS):
                    s_line = s_lines.index((i_line // LINES * PANELS + c) * LINES + i_line % LINES)
                    async_copy.async_copy_global_to_shared(s_line, p_k_own + (o_k + c * PANEL))
            async_copy.commit_group()
            async_copy.wait_group(0)
            mbarrier.arrive(full_k.index(0), count=1)
            i_item += 1
            for u in range(UNITS):
                t = t0 + u * ROWS
                work, _ = unit_of(t, j0, T1, OFFSET, p_start, p_sel_base, BLOCK, PACKED)
                if work:
                    slot = free(empty_l, i_unit, 2)
                    o_t = t + gl.arange(0, ROWS, layout=gl.SliceLayout(1, BESIDE))
                    o_head = gl.arange(0, HEADS, layout=gl.SliceLayout(0, BESIDE))
                    o_lse = gl.expand_dims(o_t * (G * R), 1) + gl.expand_dims(o_head, 0)
                    p_lse_own = p_lse + i_b * N * (G * R) + i_g * R
                    there = gl.expand_dims(o_t, 1) < N
                    for c in gl.static_range(R // HEADS):
                        b_lse = gl.load(p_lse_own + o_lse + c * HEADS, mask=there, other=float("inf"))
                        s_heads.index(slot * (R // HEADS) + c).store(gl.permute(b_lse, (1, 0)))
                    o_t = gl.minimum(t + gl.arange(0, ROWS, layout=FLAT), N - 1)
                    start, low = o_t * 0, o_t * 0
                    if PACKED:
                        start = gl.load(p_start + o_t)
                        low = gl.load(p_base + o_t)
                    o_p = o_t + OFFSET - start
                    s_bounds.index(slot * 2).store(low)
                    high = low + gl.where(o_p >= LENGTH - 1, (o_p - LENGTH + 1) // STRIDE + 1, 0)
                    s_bounds.index(slot * 2 + 1).store(high)
                    mbarrier.arrive(full_l.index(slot), count=1)
                    i_unit += 1
        mine = following


@gluon.jit
def write(
    p_scores, p_start, p_sel_base, s_own, s_right, full_s, empty_s, T0, T1, OFFSET, BLOCKS, GRID, REACH: gl.constexpr,
    BLOCK: gl.constexpr, PACKED: gl.constexpr, UNITS: gl.constexpr,
):  # fmt: skip
    """Every unit's scores."""
    LINES: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [2, 1], [1, 0])
    s_own_all = view(s_own, gl.float32, [TILE, ROWS], s_own.layout)
    s_right_all = view(s_right, gl.float32, [TILE, ROWS], s_right.layout)
    o_b = gl.arange(0, TILE, layout=gl.SliceLayout(0, LINES))
    o_line = gl.arange(0, LINE, layout=gl.SliceLayout(1, LINES))
    o_left = gl.expand_dims(gl.maximum(o_b - 1, 0), 0) + gl.expand_dims(o_line * 0, 1)
    i_unit, mine = 0, gl.program_id(0)
    for i_row in range(gl.cdiv(T1 - T0, UNITS * ROWS)):
        t0, tile0, tiles, count, following = items_of(
            i_row, mine, T0, T1, OFFSET, GRID, p_start, p_sel_base, BLOCK, PACKED, UNITS
        )
        for n in range(count):  # see items_of
            i = mine + n * gl.num_programs(0)
            j0 = (tile0 + i % tiles) * (TILE - 1) - 1
            i_bg = i // tiles
            for u in range(UNITS):
                t = t0 + u * ROWS
                work, to_block = unit_of(t, j0, T1, OFFSET, p_start, p_sel_base, BLOCK, PACKED)
                if work:
                    ready(full_s, i_unit, 1)
                    o_j = j0 + o_b
                    wanted = gl.expand_dims((o_j > j0) & (o_j < gl.minimum(to_block, BLOCKS)), 0)
                    p_own = p_scores + (i_bg.to(gl.int64) * (T1 - T0) + t - T0) * BLOCKS
                    for c in gl.static_range(ROWS // LINE):
                        b_x = s_own_all.slice(c * LINE, LINE, dim=1).permute((1, 0)).load(LINES)
                        if REACH > 0:
                            b_right = s_right_all.slice(c * LINE, LINE, dim=1).permute((1, 0)).load(LINES)
                            b_x += gl.gather(b_right, o_left, 1)
                        o_t = c * LINE + o_line
                        o_score = gl.expand_dims(o_t * BLOCKS, 1) + gl.expand_dims(o_j, 0)
                        gl.store(p_own + o_score, b_x, mask=gl.expand_dims(t + o_t < T1, 1) & wanted)
                    mbarrier.arrive(empty_s.index(0), count=1)
                    i_unit += 1
        mine = following


@gluon.jit(do_not_specialize=["T0", "T1", "N", "OFFSET", "KEYS", "GRID"])
def importance_tiles(
    d_q, p_k, p_lse, p_scores, p_start, p_base, p_sel_base, p_sel_first, p_sel_last, T0, T1, N, OFFSET, KEYS, BLOCKS, GRID,
    scale, stride_kb, stride_kg, stride_ks, G: gl.constexpr, R: gl.constexpr, LENGTH: gl.constexpr, STRIDE: gl.constexpr,
    BLOCK: gl.constexpr, PACKED: gl.constexpr, UNITS: gl.constexpr, RING: gl.constexpr, DEPTH: gl.constexpr,
    POLY: gl.constexpr, LAG: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """`selection.block_importance`. GRID: batch entries times groups. UNITS: of an item, which is units of one tile."""
    RATIO: gl.constexpr = BLOCK // STRIDE
    REACH: gl.constexpr = LENGTH // STRIDE - 1
    dtype: gl.constexpr = d_q.dtype
    WIDTH: gl.constexpr = d_q.block_shape[3]
    KEY: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, WIDTH], dtype)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    TURNED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 16, [1, 0])
    s_q, s_q_box = make_tiles(d_q, RING)
    s_k = gl.allocate_shared_memory(dtype, [4, ROWS, WIDTH], KEY)
    s_lse = gl.allocate_shared_memory(gl.float32, [2 * R, ROWS], PLAIN)
    s_bounds = gl.allocate_shared_memory(gl.int32, [4, ROWS], PLAIN)
    s_own = gl.allocate_shared_memory(gl.float32, [4, PART, ROWS], TURNED)
    s_right = gl.allocate_shared_memory(gl.float32, [4, PART, ROWS], TURNED)
    full_q, empty_q = make_barriers(RING, 1), make_barriers(RING, 2)
    full_k, empty_k = make_barriers(1, 1), make_barriers(1, 2)
    full_l, empty_l = make_barriers(2, 1), make_barriers(2, 2)
    full_s, empty_s = make_barriers(1, 2), make_barriers(1, 1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (
                0, p_start, p_sel_base, p_sel_first, p_sel_last, s_q, s_k, s_lse, s_bounds, s_own, s_right, full_q, full_k,
                full_l, full_s, empty_q, empty_k, empty_l, empty_s, T0, T1, OFFSET, KEYS, BLOCKS, GRID, scale, R, RATIO, REACH,
                BLOCK, PACKED, UNITS, RING, DEPTH, POLY, LAG,
            )),
            (consume, (
                1, p_start, p_sel_base, p_sel_first, p_sel_last, s_q, s_k, s_lse, s_bounds, s_own, s_right, full_q, full_k,
                full_l, full_s, empty_q, empty_k, empty_l, empty_s, T0, T1, OFFSET, KEYS, BLOCKS, GRID, scale, R, RATIO, REACH,
                BLOCK, PACKED, UNITS, RING, DEPTH, POLY, LAG,
            )),
            (produce, (
                d_q, p_start, p_sel_base, s_q_box, full_q, empty_q, T0, T1, OFFSET, GRID, G, R, BLOCK, PACKED, UNITS, RING,
            )),
            (load, (
                p_k, p_lse, p_start, p_base, p_sel_base, p_sel_first, p_sel_last, s_k, s_lse, s_bounds, full_k, full_l,
                empty_k, empty_l, T0, T1, N, OFFSET, KEYS, BLOCKS, GRID, stride_kb, stride_kg, stride_ks, G, R, LENGTH, STRIDE,
                RATIO, BLOCK, PACKED, UNITS,
            )),
            (write, (
                p_scores, p_start, p_sel_base, s_own, s_right, full_s, empty_s, T0, T1, OFFSET, BLOCKS, GRID, REACH, BLOCK,
                PACKED, UNITS,
            )),
        ],
        [4, 1, 1, 2],
        REGISTERS,
    )  # fmt: skip


def fits(p: Problem) -> bool:
    """Whether `block_importance` here takes a call (on a GPU that `has_tiles`)."""
    ratio = p.config.select_block // p.config.compress_stride
    heads = HEADS.value
    return (
        p.dtype in DTYPES
        and p.d == DIM
        and p.r % heads == 0 and heads <= p.r <= MOST_HEADS
        and STEP.value // 2 < ratio <= STEP.value
        and p.config.compress_block // p.config.compress_stride <= ratio
        and max(p.n * p.h, p.n * p.select_blocks, p.keys + TILE.value * p.config.select_block) < 2**31
        and p.b * p.g * (p.select_blocks // (TILE.value - 1) + 2) < 2**20
    )  # fmt: skip


def block_importance(
    q: Tensor, k_cmp: Tensor, lse: Tensor, scores: Tensor, t0: int, t1: int, p: Problem, *, units: int = 0, ring: int = RING,
    depth: int = DEPTH, poly: int = 0, lag: int = LAG, registers: tuple[int, ...] = REGISTERS, programs: int = 0,
) -> None:  # fmt: skip
    """`launch.block_importance`, for a call that `fits`.

    units, ring, depth, poly, lag, registers, programs: for measuring. poly: of eight exponentials so many are polynomials.
    """
    config, rows = p.config, ROWS.value
    programs = programs or cores(p.device)
    if not units:
        tiles = cdiv(p.config.num_select_blocks(t1 + p.offset), TILE.value - 1)
        units = MOST_UNITS
        while units > 1 and p.b * p.g * tiles * cdiv(t1 - t0, rows * units) < LEAST_ROUNDS * programs:
            units //= 2
    tables = [p.table(name) for name in ("start", "base", "sel_base", "sel_first", "sel_last")]
    strides = [stride // EIGHTH.value for stride in k_cmp.stride()[:3]]
    importance_tiles[(programs,)](
        head_boxes(q, rows, p.dk), k_cmp, lse, scores, *(lse if table is None else table for table in tables), t0, t1, p.n,
        p.offset, k_cmp.shape[2], p.select_blocks, p.b * p.g, p.scale_log2, *strides, G=p.g, R=p.r,
        LENGTH=config.compress_block, STRIDE=config.compress_stride, BLOCK=config.select_block, PACKED=p.packed, UNITS=units,
        RING=ring, DEPTH=depth, POLY=poly, LAG=lag, REGISTERS=registers, num_warps=4,
    )  # fmt: skip
