"""`group` on Hopper (Gluon): the copy engine brings keys, tensor cores multiply tiles of them, a warp group is a program.

A group's tiles of keys follow one another in one ring of buffers: the compressed ones, the window's, those of the selected
blocks. The window is asked for before the selection is known, so that memory has work meanwhile. A product's rows are keys and
its columns are heads, since the first side of the tensor cores has 64 rows: s = k q^T, and o = v^T p.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment,var-annotated"

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa_cli.ops.triton.attend import LEAST
from nsa_cli.ops.triton.device import cores
from nsa_cli.ops.triton.hopper import DTYPES, barrier, layout_of, load_box, view
from nsa_cli.ops.triton.linear_tiles import release, wait
from nsa_cli.ops.triton.overlap import overlap
from nsa_cli.ops.triton.problem import Problem, next_power_of_2

HEADS = (8, 16)
"""Columns of a product, of which a group's heads fill some."""
DIMS = (64, 128)
"""Padded channels of keys and of values."""
PANEL = 64
"""Channels that lie side by side on chip."""
TILE_BYTES = (2**15, 2**14)
"""Most of a tile's keys, where a multiprocessor has one program, and where it has two."""
STAGES = 3
"""Tiles on chip at a time."""
SCORES = 2**11
"""Probabilities of keys that importance adds up at a time: 16 of a thread."""
INFINITY = gl.constexpr(0x7F800000)
"""Its bits: the greatest that a score may have, NaN's included."""
BLOCKS = 2**10
"""Most selection blocks: every thread has a share of all."""
RATIO = 8
"""Most compressed keys of a selection block."""
KEY_BYTES = 1_900_000
"""Of a group's keys, for each group that a multiprocessor has: at most. A group takes as long as it has tiles, however few groups
there are; of few groups with much to read, several programs a group read faster."""


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def overlaps(k: gl.constexpr, RATIO: gl.constexpr, REACH: gl.constexpr):
    """How many strides the k-th key that reaches into a block shares with it."""
    rest: gl.constexpr = RATIO + REACH - k
    least: gl.constexpr = k + 1 if k + 1 < rest else rest
    return least if least < REACH + 1 else REACH + 1


@gluon.jit
def ask(d_k, d_v, s_k, s_v, full_k, full_v, stage, row, RING: gl.constexpr):
    """A tile of adjacent keys, from `row` on."""
    slot = stage % RING
    mbarrier.expect(full_k.index(slot), d_k.block_type.nbytes)
    load_box(d_k, [row, 0], full_k.index(slot), s_k.index(slot))
    mbarrier.expect(full_v.index(slot), d_v.block_type.nbytes)
    load_box(d_v, [row, 0], full_v.index(slot), s_v.index(slot))


@gluon.jit
def ask_blocks(
    d_k, d_v, s_k, s_v, full_k, full_v, stage, row, first, o_j, b_place, PARTS: gl.constexpr, BOX: gl.constexpr,
    PANEL: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, BLOCK: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """A tile of the chosen blocks' keys, from the first-th on. s_k, s_v: boxes, of which PARTS one below the other are a panel of
    a tile. b_place: of block o_j among the chosen ones, -1 of others."""
    slot = stage % RING
    mbarrier.expect(full_k.index(slot), PARTS * (DK // PANEL) * d_k.block_type.nbytes)
    mbarrier.expect(full_v.index(slot), PARTS * (DV // PANEL) * d_v.block_type.nbytes)
    for i in gl.static_range(PARTS):
        o_key = first + i * BOX
        block = gl.max(gl.where(b_place == o_key // BLOCK, o_j, 0), 0)
        place = row + block * BLOCK + o_key % BLOCK
        for j in gl.static_range(DK // PANEL):
            load_box(d_k, [place, j * PANEL], full_k.index(slot), s_k.index((slot * (DK // PANEL) + j) * PARTS + i))
        for j in gl.static_range(DV // PANEL):
            load_box(d_v, [place, j * PANEL], full_v.index(slot), s_v.index((slot * (DV // PANEL) + j) * PARTS + i))


@gluon.jit
def ask_adjacent(
    d_ck, d_cv, d_kw, d_vw, s_k, s_v, full_k, full_v, stage, compressed, row_compressed, row_window, TILE: gl.constexpr,
    RING: gl.constexpr,
):  # fmt: skip
    """The stage-th tile of those that need no choice: first the compressed ones, then the window's."""
    if stage < compressed:
        ask(d_ck, d_cv, s_k, s_v, full_k, full_v, stage, row_compressed + stage * TILE, RING)
    else:
        ask(d_kw, d_vw, s_k, s_v, full_k, full_v, stage, row_window + (stage - compressed) * TILE, RING)


@gluon.jit
def ask_chosen(
    d_kw, d_vw, d_k, d_v, s_k, s_v, s_k_boxes, s_v_boxes, full_k, full_v, stage, compressed, before, row_window, row, o_j,
    b_place, TILE: gl.constexpr, PARTS: gl.constexpr, BOX: gl.constexpr, PANEL: gl.constexpr, DK: gl.constexpr,
    DV: gl.constexpr, BLOCK: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """The stage-th tile behind the compressed ones: the window's, then those of the chosen blocks."""
    if stage < before:
        ask(d_kw, d_vw, s_k, s_v, full_k, full_v, stage, row_window + (stage - compressed) * TILE, RING)
    else:
        ask_blocks(
            d_k, d_v, s_k_boxes, s_v_boxes, full_k, full_v, stage, row, (stage - before) * TILE, o_j, b_place, PARTS, BOX, PANEL,
            DK, DV, BLOCK, RING,
        )  # fmt: skip


@gluon.jit
def largest(b_s, TILE: gl.constexpr, COLUMNS: gl.constexpr, MMA: gl.constexpr):
    """The maximum of every column: each warp's own, then all four warps' by one exchange."""
    OWN: gl.constexpr = [[0, 1], [1, 0], [2, 0]] if COLUMNS == 8 else [[0, 1], [0, 8], [1, 0], [2, 0]]
    EACH: gl.constexpr = gl.DistributedLinearLayout(
        OWN, [[0, 2], [0, 4], [0, 0], [0, 0], [0, 0]], [[0, 0], [0, 0]], [], [4, COLUMNS]
    )
    b_warp = gl.max(gl.max(gl.reshape(b_s, (TILE // 64, 4, 16, COLUMNS)), 2), 0)
    return gl.convert_layout(gl.max(gl.convert_layout(b_warp, EACH), 0), gl.SliceLayout(0, MMA))


@gluon.jit
def attend_tile(
    s_q, s_k, s_v, s_p, full_k, full_v, phase, seen, b_max, b_total, b_o, scale, TILE: gl.constexpr, COLUMNS: gl.constexpr,
    MMA: gl.constexpr, FLAT: gl.constexpr,
):  # fmt: skip
    """Online softmax of the first `seen` keys of a tile: (maximum [COLUMNS], sum by rows [TILE, COLUMNS], o^T [DV, COLUMNS],
    scores). With other keys' values zeroed on chip, what they hold in memory does not count."""
    mbarrier.wait(full_k, phase)
    b_s = warpgroup_mma(s_k, s_q.permute((1, 0)), gl.zeros([TILE, COLUMNS], gl.float32, layout=MMA), is_async=True)
    b_s = warpgroup_mma_wait(0, [b_s])
    o_key = gl.arange(0, TILE, layout=gl.SliceLayout(1, MMA))
    b_s = gl.where(gl.expand_dims(o_key < seen, 1), b_s * scale, float("-inf"))
    b_new = gl.maximum(b_max, largest(b_s, TILE, COLUMNS, MMA))
    b_p = gl.exp2(b_s - gl.expand_dims(b_new, 0))
    b_decay = gl.expand_dims(gl.exp2(b_max - b_new), 0)
    s_p.store(gl.permute(b_p.to(s_p.dtype), (1, 0)))
    mbarrier.wait(full_v, phase)
    if seen < TILE:
        b_v = s_v.load(FLAT)
        o_v = gl.arange(0, TILE, layout=gl.SliceLayout(1, FLAT))
        s_v.store(gl.where(gl.expand_dims(o_v < seen, 1), b_v, gl.zeros_like(b_v)))
    fence_async_shared()
    barrier()  # all warps have p, and are done with the tile before: with its buffers of keys and values, and of p
    b_o = warpgroup_mma(s_v.permute((1, 0)), s_p.permute((1, 0)), b_o * b_decay, is_async=True)
    b_total = b_total * b_decay + b_p
    b_o = warpgroup_mma_wait(0, [b_o])
    return b_new, b_total, b_o, b_s


@gluon.jit
def weight(b_max, b_total, gate):
    """What o counts in the gated output of its branch, and the branch's log-sum-exp: [COLUMNS]."""
    total = gl.sum(b_total, 0)
    lse = gl.where(total > 0, b_max + gl.log2(gl.maximum(total, 1e-30)), float("inf"))
    return gate / gl.where(total > 0, total, float("inf")), lse


@gluon.jit
def choose(
    b_score, o_j, current, p_chosen, NUM: gl.constexpr, NUM_INIT: gl.constexpr, NUM_LOCAL: gl.constexpr, PLACES: gl.constexpr,
    WHOLE: gl.constexpr,
):  # fmt: skip
    """`selection.top_blocks`, three thresholds at a time; every warp has all scores, so that none waits for another."""
    forced = (o_j <= current) & ((o_j < NUM_INIT) | (o_j > current - NUM_LOCAL))
    candidate = (o_j <= current) & (forced == 0)
    bits = gl.where(candidate, gl.minimum(gl.maximum(b_score.to(gl.int32, bitcast=True), 0), INFINITY), -1)
    count_forced = gl.sum(forced.to(gl.int32), 0)
    candidates = current + 1 - count_forced
    places = NUM - count_forced
    low = 0
    count = candidates  # of bits >= low
    if candidates > places:
        high = gl.max(bits, 0) + 1
        low = gl.min(gl.where(candidate, bits, 0x7FFFFFFF), 0)
        while (count != places) & (high - low > 1):
            step = gl.maximum((high - low) // 4, 1)
            above_1 = gl.sum((bits >= low + step).to(gl.int32), 0)
            above_2 = gl.sum((bits >= low + 2 * step).to(gl.int32), 0)
            above_3 = gl.sum((bits >= low + 3 * step).to(gl.int32), 0)
            count = gl.where(above_1 >= places, above_1, count)
            count = gl.where(above_2 >= places, above_2, count)
            count = gl.where(above_3 >= places, above_3, count)
            passed = (above_1 >= places).to(gl.int32) + (above_2 >= places).to(gl.int32) + (above_3 >= places).to(gl.int32)
            low += passed * step
            high = gl.where(passed < 3, low + step, high)
    chosen = bits >= low
    if count > places:
        equal = (bits == low).to(gl.int32)
        above = count - gl.sum(equal, 0)
        chosen = (bits > low) | ((equal > 0) & (gl.associative_scan(equal, 0, add) <= places - above))
    if places <= 0:
        chosen = bits > 0x7FFFFFFE
    chosen = (chosen & candidate) | forced
    b_place = gl.where(chosen, gl.associative_scan(chosen.to(gl.int32), 0, add) - 1, -1)
    gl.store(p_chosen + b_place, o_j, mask=chosen)
    o_n = gl.arange(0, PLACES, layout=WHOLE)
    taken = count_forced + gl.minimum(places, candidates)
    gl.store(p_chosen + o_n, gl.full([PLACES], -1, gl.int32, layout=WHOLE), mask=(o_n >= taken) & (o_n < NUM))
    return b_place, taken


@gluon.jit(do_not_specialize=["rows", "rows_window", "rows_compressed"])
def attend_group_tiles(
    d_k, d_v, d_kw, d_vw, d_ck, d_cv, p_q, p_q_cmp, p_gates, p_at, p_scores, p_indices, p_out, scale, rows, rows_window,
    rows_compressed, stride_qb, stride_qh, stride_cqb, stride_cqh, stride_gb, stride_gh, stride_gr, G: gl.constexpr,
    R: gl.constexpr, RP: gl.constexpr, COLUMNS: gl.constexpr, D: gl.constexpr, E: gl.constexpr, DK: gl.constexpr,
    DV: gl.constexpr, LENGTH: gl.constexpr, STRIDE: gl.constexpr, BLOCK: gl.constexpr, RATIO: gl.constexpr, NUM: gl.constexpr,
    NUM_INIT: gl.constexpr, NUM_LOCAL: gl.constexpr, PLACES: gl.constexpr, WIDTH: gl.constexpr, WINDOW: gl.constexpr,
    IN_RING: gl.constexpr, TILE: gl.constexpr, BOX: gl.constexpr, PANEL: gl.constexpr, RING: gl.constexpr, SCORES: gl.constexpr,
    EARLY: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """`group.attend_group` of one group i. d_k, d_v: keys and values [rows, d] in boxes of BOX rows and PANEL channels, the other
    d_* in tiles; a group's begin at rows i, rows_window i, rows_compressed i. scores: of compressed keys [WIDTH RATIO, R]."""
    REACH: gl.constexpr = LENGTH // STRIDE - 1
    PARTS: gl.constexpr = TILE // BOX
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
    QUERIES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DK, DK // 8], [4, 1], [1, 0])
    VECTOR: gl.constexpr = RP if RP < 4 else 4
    KEYS: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 * VECTOR // RP, RP // VECTOR], [4, 1], [1, 0])
    WHOLE: gl.constexpr = gl.BlockedLayout([WIDTH // 32], [32], [4], [0])
    ONCE: gl.constexpr = WIDTH if WIDTH * RP <= SCORES else SCORES // RP
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: gl.constexpr = d_k.dtype
    i_bg = gl.program_id(0)
    i_b, i_g = i_bg // G, i_bg % G
    s_k = gl.allocate_shared_memory(dtype, [RING, TILE, DK], d_ck.layout)
    s_v = gl.allocate_shared_memory(dtype, [RING, TILE, DV], d_cv.layout)
    s_k_boxes = view(s_k, dtype, [RING * (DK // PANEL) * PARTS, BOX, PANEL], d_k.layout)
    s_v_boxes = view(s_v, dtype, [RING * (DV // PANEL) * PARTS, BOX, PANEL], d_v.layout)
    s_q = gl.allocate_shared_memory(dtype, [2, COLUMNS, DK], gl.NVMMASharedLayout.get_default_for([COLUMNS, DK], dtype))
    s_p = gl.allocate_shared_memory(dtype, [2, COLUMNS, TILE], gl.NVMMASharedLayout.get_default_for([COLUMNS, TILE], dtype))
    s_score = gl.allocate_shared_memory(gl.float32, [WIDTH // ONCE, ONCE], PLAIN)
    full_k = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    full_v = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(RING):
        mbarrier.init(full_k.index(i), count=1)
        mbarrier.init(full_v.index(i), count=1)
    fence_async_shared()
    barrier()
    if OVERLAP and not EARLY:
        wait()
        release()
    length = gl.load(p_at + i_b).to(gl.int32) + 1
    count = gl.where(length >= LENGTH, (length - LENGTH) // STRIDE + 1, 0)
    current = (length - 1) // BLOCK
    seen = gl.minimum(WINDOW, length)
    start = 0 if IN_RING else gl.maximum(length - WINDOW, 0)
    compressed, window = gl.cdiv(count, TILE), gl.cdiv(seen, TILE)
    before = compressed + window
    total = before + gl.cdiv(gl.minimum(NUM, current + 1) * BLOCK, TILE)
    row, row_compressed, row_window = i_bg * rows, i_bg * rows_compressed, i_bg * rows_window + start
    asked = 0
    if OVERLAP and EARLY:
        while asked < gl.minimum(RING, compressed - 1):
            ask(d_ck, d_cv, s_k, s_v, full_k, full_v, asked, row_compressed + asked * TILE, RING)
            asked += 1
        wait()
        release()
    o_h = gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, QUERIES))
    o_d = gl.arange(0, DK, layout=gl.SliceLayout(0, QUERIES))
    m_q = gl.expand_dims(o_h < R, 1) & gl.expand_dims(o_d < D, 0)
    p_group = p_q_cmp + i_b.to(gl.int64) * stride_cqb + i_g * R * stride_cqh
    b_q_cmp = gl.load(p_group + gl.expand_dims(o_h * stride_cqh, 1) + gl.expand_dims(o_d, 0), mask=m_q, other=0.0)
    p_group = p_q + i_b.to(gl.int64) * stride_qb + i_g * R * stride_qh
    b_q = gl.load(p_group + gl.expand_dims(o_h * stride_qh, 1) + gl.expand_dims(o_d, 0), mask=m_q, other=0.0)
    o_r = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, MMA))
    m_r = o_r < R
    p_gate = p_gates + i_b.to(gl.int64) * stride_gb + (i_g * R + o_r) * stride_gh
    g_cmp = gl.load(p_gate, mask=m_r, other=0.0).to(gl.float32)
    g_slc = gl.load(p_gate + stride_gr, mask=m_r, other=0.0).to(gl.float32)
    g_win = gl.load(p_gate + 2 * stride_gr, mask=m_r, other=0.0).to(gl.float32)
    while asked < gl.minimum(RING, before):
        ask_adjacent(
            d_ck, d_cv, d_kw, d_vw, s_k, s_v, full_k, full_v, asked, compressed, row_compressed, row_window, TILE, RING
        )
        asked += 1
    s_q.index(0).store(b_q_cmp)
    s_q.index(1).store(b_q)
    fence_async_shared()
    barrier()
    p_group_scores = p_scores + i_bg.to(gl.int64) * (WIDTH * RATIO * R)
    o_key = gl.arange(0, TILE, layout=gl.SliceLayout(1, MMA))
    b_max = gl.full([COLUMNS], LEAST, gl.float32, layout=gl.SliceLayout(0, MMA))
    b_total = gl.zeros([TILE, COLUMNS], gl.float32, layout=MMA)
    b_o = gl.zeros([DV, COLUMNS], gl.float32, layout=MMA)
    for i in range(0, compressed):
        slot = i % RING
        b_max, b_total, b_o, b_s = attend_tile(
            s_q.index(0), s_k.index(slot), s_v.index(slot), s_p.index(i % 2), full_k.index(slot), full_v.index(slot),
            (i // RING) & 1, count - i * TILE, b_max, b_total, b_o, scale, TILE, COLUMNS, MMA, FLAT,
        )  # fmt: skip
        if asked < gl.minimum(before, i + RING):
            ask_adjacent(
                d_ck, d_cv, d_kw, d_vw, s_k, s_v, full_k, full_v, asked, compressed, row_compressed, row_window, TILE, RING
            )
            asked += 1
        o_score = gl.expand_dims((i * TILE + o_key) * R, 1) + gl.expand_dims(o_r, 0)
        m_score = gl.expand_dims(i * TILE + o_key < count, 1) & gl.expand_dims(m_r, 0)
        gl.store(p_group_scores + o_score, b_s, mask=m_score)
    b_weight, lse = weight(b_max, b_total, g_cmp)
    b_out = b_o * gl.expand_dims(b_weight, 0)
    lse = gl.min(gl.reshape(gl.where(m_r, lse, float("inf")), (COLUMNS // RP, RP)), 0)
    b_lse = gl.expand_dims(gl.convert_layout(lse, gl.SliceLayout(0, KEYS)), 0)
    barrier()  # every thread reads what others wrote
    for i in range(0, current // ONCE + 1):
        o_j = i * ONCE + gl.arange(0, ONCE, layout=gl.SliceLayout(1, KEYS))
        o_p = gl.arange(0, RP, layout=gl.SliceLayout(0, KEYS))
        b_score = gl.zeros([ONCE], gl.float32, layout=gl.SliceLayout(1, KEYS))
        for k in gl.static_range(REACH + RATIO):
            o_c = o_j * RATIO + (k - REACH)
            m_c = gl.expand_dims((o_c >= 0) & (o_c < count), 1) & gl.expand_dims(o_p < R, 0)
            b_s = gl.load(p_group_scores + gl.expand_dims(o_c * R, 1) + gl.expand_dims(o_p, 0), mask=m_c, other=float("-inf"))
            b_score += gl.sum(gl.exp2(b_s - b_lse), 1) * overlaps(k, RATIO, REACH)
        s_score.index(i).store(b_score)
    barrier()
    o_j = gl.arange(0, WIDTH, layout=WHOLE)
    b_score = view(s_score, gl.float32, [WIDTH], PLAIN).load(WHOLE)
    b_place, taken = choose(b_score, o_j, current, p_indices + i_bg * NUM, NUM, NUM_INIT, NUM_LOCAL, PLACES, WHOLE)
    keys = taken * BLOCK  # of the chosen blocks, of which the last may be the one that is not full yet
    if gl.max(gl.where(b_place >= 0, o_j, 0), 0) == current:
        keys += length - (current + 1) * BLOCK
    while asked < gl.minimum(total, compressed + RING):
        ask_chosen(
            d_kw, d_vw, d_k, d_v, s_k, s_v, s_k_boxes, s_v_boxes, full_k, full_v, asked, compressed, before, row_window, row,
            o_j, b_place, TILE, PARTS, BOX, PANEL, DK, DV, BLOCK, RING,
        )  # fmt: skip
        asked += 1
    b_max = gl.full([COLUMNS], LEAST, gl.float32, layout=gl.SliceLayout(0, MMA))
    b_total = gl.zeros([TILE, COLUMNS], gl.float32, layout=MMA)
    b_o = gl.zeros([DV, COLUMNS], gl.float32, layout=MMA)
    for i in range(compressed, total):
        if i == before:
            b_weight, _ = weight(b_max, b_total, g_win)
            b_out += b_o * gl.expand_dims(b_weight, 0)
            b_max = gl.full([COLUMNS], LEAST, gl.float32, layout=gl.SliceLayout(0, MMA))
            b_total = gl.zeros([TILE, COLUMNS], gl.float32, layout=MMA)
            b_o = gl.zeros([DV, COLUMNS], gl.float32, layout=MMA)
        slot = i % RING
        left = gl.where(i < before, seen + compressed * TILE, keys + before * TILE) - i * TILE
        b_max, b_total, b_o, _ = attend_tile(
            s_q.index(1), s_k.index(slot), s_v.index(slot), s_p.index(i % 2), full_k.index(slot), full_v.index(slot),
            (i // RING) & 1, left, b_max, b_total, b_o, scale, TILE, COLUMNS, MMA, FLAT,
        )  # fmt: skip
        if asked < gl.minimum(total, i + RING):
            ask_chosen(
                d_kw, d_vw, d_k, d_v, s_k, s_v, s_k_boxes, s_v_boxes, full_k, full_v, asked, compressed, before, row_window, row,
                o_j, b_place, TILE, PARTS, BOX, PANEL, DK, DV, BLOCK, RING,
            )  # fmt: skip
            asked += 1
    b_weight, _ = weight(b_max, b_total, g_slc)
    b_out += b_o * gl.expand_dims(b_weight, 0)
    b_all = gl.convert_layout(gl.permute(b_out, (1, 0)), FLAT)
    o_h = gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, FLAT))
    o_e = gl.arange(0, DV, layout=gl.SliceLayout(0, FLAT))
    p_own = p_out + (i_bg.to(gl.int64) * R + gl.expand_dims(o_h, 1)) * E + gl.expand_dims(o_e, 0)
    gl.store(p_own, b_all.to(p_out.dtype.element_ty), mask=gl.expand_dims(o_h < R, 1) & gl.expand_dims(o_e < E, 0))


def fits(p: Problem, blocks: int, pairs: tuple[tuple[Tensor, Tensor], ...]) -> bool:
    """Whether `attend_in_one` takes such a call and is the fastest. blocks: selection blocks of the caches; pairs: all keys with
    their values."""
    config = p.config
    ratio = config.select_block // config.compress_stride
    keys = blocks * ratio + config.window + config.num_selected * config.select_block
    return (
        p.dtype in DTYPES
        and p.r <= HEADS[1]
        and p.dk in DIMS
        and p.dv in DIMS
        and blocks <= BLOCKS
        and config.select_block % 16 == 0
        and ratio <= RATIO
        and keys * max(p.dk, p.dv) * p.dtype.itemsize * cores(p.device) <= KEY_BYTES * p.b * p.g
        and all(_is_flat(x) for pair in pairs for x in pair)
        and all(_rows(k) == _rows(v) for k, v in pairs)
    )


def tile_of(p: Problem) -> tuple[int, int]:
    """Keys of a tile, and of a box of the selected blocks'."""
    config = p.config
    tile = next_power_of_2(max(config.window, config.num_selected * config.select_block))
    most = TILE_BYTES[p.b * p.g > cores(p.device)]
    tile = max(64, min(256, tile, most // (max(p.dk, p.dv) * p.dtype.itemsize)))
    return tile, min(config.select_block & -config.select_block, tile)


def _rows(x: Tensor) -> int:
    """From a head of x [b, g, s, d] to the next."""
    return x.stride(1) // max(1, x.stride(2))


def _is_flat(x: Tensor) -> bool:
    """Whether x [b, g, s, d] is fit for the copy engine as rows of d."""
    b, g, s, d = x.shape
    whole, group, row, one = x.stride()
    rows = _rows(x)
    return (
        one == 1
        and row % 8 == 0
        and row >= d
        and rows >= s
        and group == rows * row
        and (b == 1 or whole == g * group)
        and b * g * rows < 2**31
        and x.data_ptr() % 16 == 0
    )


def attend_in_one(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, p: Problem, *, positions: Tensor,
    q_cmp: Tensor, k_win: Tensor, v_win: Tensor, ring: bool, blocks: int, early: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`group.attend_in_one` of a call that `fits`."""
    config, device = p.config, p.device
    tile, box = tile_of(p)
    ratio, width = config.select_block // config.compress_stride, max(32, next_power_of_2(blocks))
    scores = torch.empty(p.b * p.g, width * ratio, p.r, dtype=torch.float32, device=device)
    indices = torch.empty(p.b, p.g, 1, config.num_selected, dtype=torch.int32, device=device)
    out = torch.empty(p.b, p.h, 1, p.e, dtype=p.dtype, device=device)
    rows, rows_window, rows_compressed = (_rows(x) for x in (k, k_win, k_cmp))
    attend_group_tiles[(p.b * p.g,)](
        _boxes(k, box, PANEL), _boxes(v, box, PANEL), _boxes(k_win, tile, p.dk), _boxes(v_win, tile, p.dv),
        _boxes(k_cmp, tile, p.dk), _boxes(v_cmp, tile, p.dv), q, q_cmp, gates, positions, scores, indices, out, p.scale_log2,
        rows, rows_window, rows_compressed, *q.stride()[:2], *q_cmp.stride()[:2], gates.stride(0), gates.stride(1),
        gates.stride(3), G=p.g, R=p.r, RP=p.rp, COLUMNS=HEADS[p.rp > HEADS[0]], D=p.d, E=p.e, DK=p.dk, DV=p.dv,
        LENGTH=config.compress_block, STRIDE=config.compress_stride, BLOCK=config.select_block, RATIO=ratio,
        NUM=config.num_selected, NUM_INIT=config.num_init, NUM_LOCAL=config.num_local,
        PLACES=next_power_of_2(config.num_selected), WIDTH=width, WINDOW=config.window, IN_RING=ring, TILE=tile, BOX=box,
        PANEL=PANEL, RING=STAGES, SCORES=SCORES, EARLY=early, num_warps=4, **overlap(device),
    )  # fmt: skip
    return out, indices


def _boxes(x: Tensor, rows: int, dim: int) -> TensorDescriptor:
    """x [b, g, s, d] as rows, in boxes of `rows` x dim, zeros outside."""
    b, g, s, d = x.shape
    shape = [(b * g - 1) * _rows(x) + s, d]
    return TensorDescriptor(x, shape, [x.stride(2), 1], [rows, dim], layout_of(rows, dim, dtype=x.dtype))
