"""Selected attention: key blocks outside, the queries that chose each inside (`index.py`).

The cost does not depend on the group's size. An item holds one block's K and V and walks through at most ITEM of its queries,
M / RP tokens times a group's heads a step; what it finds goes to a partial of its own for every (place, query, head), in the
input's dtype, and the finishing kernel adds a query's partials up in the order of their places, after the forced blocks,
which are two contiguous ranges and need no index. Free blocks lie in the past and are not masked; where a query's own block
is not forced (CAUSAL), it may be among them. Partials exist for a chunk of units at a time. A block that is too large for the
chip is taken in SUB parts of BS keys, each with partials of its own.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from nsa_cli.ops.triton.attend import (
    INIT,
    LOCAL,
    WIN,
    attend_keys,
    key_bounds,
    load_tile,
    row_offsets,
    store_tile,
)


@triton.jit(do_not_specialize=["LIST0", "LIST1", "ROW0", "ROWS", "N", "OFFSET", "UNITS_A_HEAD", "BLOCKS"])
def selected_parts(
    p_q, p_k, p_v, p_o, p_lse, p_entries, p_ends, p_items, p_item_list, p_item_start, p_sel_start, p_sel_end,
    LIST0, LIST1, ROW0, ROWS, N, OFFSET, UNITS_A_HEAD, BLOCKS, scale, stride_qb, stride_qh, stride_qt, stride_kb, stride_kg,
    stride_kt, stride_vb, stride_vg, stride_vt, G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, BS: tl.constexpr,
    SUB: tl.constexpr, FREE: tl.constexpr, ITEM: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Normalised o and log-sum-exp of every entry of one item."""
    i_item, i_sub = tl.program_id(0) // SUB, tl.program_id(0) % SUB
    i_w = tl.load(p_items + LIST0) + i_item
    if i_w < tl.load(p_items + LIST1):
        BQ: tl.constexpr = M // RP
        i_list = tl.load(p_item_list + i_w)
        e0 = tl.load(p_item_start + i_w)
        e1 = tl.minimum(e0 + ITEM, tl.load(p_ends + i_list + 1))
        i_block = i_list % BLOCKS
        i_bg = i_list // BLOCKS // UNITS_A_HEAD
        i_b, i_g = (i_bg // G).to(tl.int64), i_bg % G
        first, end = i_block * BLOCK, N + OFFSET
        if PACKED:
            first = tl.load(p_sel_start + i_block)
            end = tl.load(p_sel_end + i_block)
        o_i = i_sub * BS + tl.arange(0, BS)
        o_s = (first + o_i).to(tl.int64)
        m_s = (o_i < BLOCK) & (o_s < end)
        o_k = i_b * stride_kb + i_g * stride_kg + o_s * stride_kt
        o_v = i_b * stride_vb + i_g * stride_vg + o_s * stride_vt
        b_k = load_tile(p_k, o_k, m_s, D, DK, "evict_last")
        b_v = load_tile(p_v, o_v, m_s, E, DV, "evict_last")
        o_m = tl.arange(0, M)
        o_r = o_m % RP
        o_head = i_b * stride_qb + (i_g * R + o_r).to(tl.int64) * stride_qh
        b_next = tl.load(p_entries + e0 + o_m // RP, mask=e0 + o_m // RP < e1, other=0)
        for e in tl.range(e0, e1, BQ, num_stages=1):
            o_a = e + o_m // RP
            m_m = (o_a < e1) & (o_r < R)
            b_entry = b_next
            b_next = tl.load(p_entries + o_a + BQ, mask=o_a + BQ < e1, other=0)  # ahead: a gather waits for it
            o_row = b_entry // FREE
            o_t = o_row - i_bg * N
            b_q = load_tile(p_q, o_head + o_t.to(tl.int64) * stride_qt, m_m, D, DK, "evict_last")
            b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION)  # [M, BS]
            if CAUSAL:
                b_s = tl.where(m_s[None, :] & (o_s[None, :] <= o_t[:, None] + OFFSET), b_s, float("-inf"))
            elif BS * SUB != BLOCK:
                b_s = tl.where(m_s[None, :], b_s, float("-inf"))
            b_max = tl.maximum(tl.max(b_s, 1) * scale, -1e30)
            b_p = tl.exp2(b_s * scale - b_max[:, None])
            b_sum = tl.sum(b_p, 1)
            b_o = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION) * (1.0 / tl.maximum(b_sum, 1.0))[:, None]
            o_part = (((b_entry % FREE) * SUB + i_sub).to(tl.int64) * ROWS + (o_row - ROW0)) * RP + o_r
            store_tile(p_o, b_o, o_part * EP, m_m, E, DV, "evict_first")
            tl.store(p_lse + o_part, b_max + tl.log2(b_sum), mask=m_m)


@triton.jit
def unit_tile(UNIT0, UNITS_A_HEAD, CHUNK, G: tl.constexpr, BQ: tl.constexpr):
    """(b, g, first token) of this program's tile of queries, in a launch over the units from UNIT0 on."""
    tiles = tl.cdiv(CHUNK, BQ)
    i_unit = UNIT0 + tl.program_id(0) // tiles
    i_bg = i_unit // UNITS_A_HEAD
    t0 = i_unit % UNITS_A_HEAD * CHUNK + tl.program_id(0) % tiles * BQ
    return i_bg // G, i_bg % G, t0


@triton.jit
def place_is_full(
    o_f, o_t, OFFSET, o_row, p_indices, p_start, BLOCK: tl.constexpr, NUM: tl.constexpr, FREE: tl.constexpr,
    NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Whether free place o_f of each query has a partial: `index.chosen_blocks`' rule."""
    start = o_t * 0
    if PACKED:
        start = tl.load(p_start + o_t)
    current = (o_t + OFFSET - start) // BLOCK
    if NUM_INIT + NUM_LOCAL > 0:
        full = (o_f < FREE) & (o_f < current + 1 - NUM_INIT - NUM_LOCAL)
    else:
        block = tl.load(p_indices + o_row * NUM + o_f, mask=o_f < FREE, other=-1)
        full = (block >= 0) & (block <= current)
    return full


@triton.jit
def most_places(
    t1, OFFSET, BLOCK: tl.constexpr, FREE: tl.constexpr, NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr, PACKED: tl.constexpr
):
    """A bound on the full places of a tile's queries, of which t1 is the last."""
    count = t1 * 0 + FREE
    if (NUM_INIT + NUM_LOCAL > 0) & (not PACKED):
        count = tl.minimum(tl.maximum((t1 + OFFSET) // BLOCK + 1 - NUM_INIT - NUM_LOCAL, 0), FREE)
    return count


@triton.jit
def attend_range(
    b_q, b_acc, b_max, b_sum, d_k, d_v, p_start, i_b, i_g, t0, t1, o_t, OFFSET, scale, BRANCH: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, BLOCK: tl.constexpr, NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr, WINDOW: tl.constexpr,
    PACKED: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One online softmax over a tile's window, or its first, or newest, forced blocks."""
    low, high = key_bounds(o_t, OFFSET, p_start, p_start, BRANCH, 1, 1, BLOCK, NUM_INIT, NUM_LOCAL, WINDOW, PACKED)
    from_key, all_to = key_bounds(t0, OFFSET, p_start, p_start, BRANCH, 1, 1, BLOCK, NUM_INIT, NUM_LOCAL, WINDOW, PACKED)
    all_from, to_key = key_bounds(t1, OFFSET, p_start, p_start, BRANCH, 1, 1, BLOCK, NUM_INIT, NUM_LOCAL, WINDOW, PACKED)
    b_acc, b_max, b_sum = attend_keys(
        b_q, b_acc, b_max, b_sum, d_k, d_v, i_b, i_g, low, high, from_key, all_from, all_to, to_key, scale,
        DK, DV, BN, PRECISION,
    )  # fmt: skip
    return b_acc, b_max, b_sum


@triton.jit
def finish_window(
    b_q, d_k, d_v, p_win, p_win_lse, p_start, i_b, i_g, t0, t1, o_t, OFFSET, o_out, o_lse, m_m, scale, E: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr,
    WINDOW: tl.constexpr, PACKED: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile's window branch."""
    b_max = tl.full([M], -1e30, tl.float32)
    b_sum = tl.zeros([M], tl.float32)
    b_acc = tl.zeros([M, DV], tl.float32)
    b_acc, b_max, b_sum = attend_range(
        b_q, b_acc, b_max, b_sum, d_k, d_v, p_start, i_b, i_g, t0, t1, o_t, OFFSET, scale, WIN, DK, DV, BLOCK, NUM_INIT,
        NUM_LOCAL, WINDOW, PACKED, BN, PRECISION,
    )  # fmt: skip
    b_acc = b_acc / b_sum[:, None]  # a query sees itself: b_sum > 0
    store_tile(p_win, b_acc, o_out, m_m, E, DV, "")
    tl.store(p_win_lse + o_lse, b_max + tl.log2(b_sum), mask=m_m)
    return b_acc


@triton.jit
def finish_selected(
    b_q, d_k, d_v, p_out, p_lse, p_indices, d_o, p_part_lse, p_start, i_b, i_g, t0, t1, o_t, OFFSET, o_row, i_part, ROWS,
    o_out, o_lse, m_m, scale, RP: tl.constexpr, E: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
    NUM: tl.constexpr, FREE: tl.constexpr, SUB: tl.constexpr, PLACES: tl.constexpr, NUM_INIT: tl.constexpr,
    NUM_LOCAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile's selected branch: its forced blocks, then its partials in the order of their places."""
    b_max = tl.full([M], -1e30, tl.float32)
    b_sum = tl.zeros([M], tl.float32)
    b_acc = tl.zeros([M, DV], tl.float32)
    if NUM_INIT > 0:
        b_acc, b_max, b_sum = attend_range(
            b_q, b_acc, b_max, b_sum, d_k, d_v, p_start, i_b, i_g, t0, t1, o_t, OFFSET, scale, INIT, DK, DV, BLOCK, NUM_INIT,
            NUM_LOCAL, WINDOW, PACKED, BN, PRECISION,
        )  # fmt: skip
    if NUM_LOCAL > 0:
        b_acc, b_max, b_sum = attend_range(
            b_q, b_acc, b_max, b_sum, d_k, d_v, p_start, i_b, i_g, t0, t1, o_t, OFFSET, scale, LOCAL, DK, DV, BLOCK, NUM_INIT,
            NUM_LOCAL, WINDOW, PACKED, BN, PRECISION,
        )  # fmt: skip
    if FREE > 0:
        o_m = tl.arange(0, M)
        o_f = tl.arange(0, PLACES)[None, :]
        full = place_is_full(
            o_f // SUB, o_t[:, None], OFFSET, o_row[:, None], p_indices, p_start, BLOCK, NUM, FREE, NUM_INIT, NUM_LOCAL, PACKED
        )
        full = full & m_m[:, None]
        b_lse = tl.load(p_part_lse + o_m[:, None] + o_f * (ROWS * RP), mask=full, other=float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_lse, 1))
        b_scale = tl.exp2(b_max - b_new)
        b_max = b_new
        b_sum = b_sum * b_scale + tl.sum(tl.exp2(b_lse - b_max[:, None]), 1)
        b_acc = b_acc * b_scale[:, None]
        places = most_places(t1, OFFSET, BLOCK, FREE, NUM_INIT, NUM_LOCAL, PACKED) * SUB
        whole = places * 0  # of the first places every real row has a partial: what is unwritten reaches no other row
        if NUM_INIT + NUM_LOCAL > 0:
            whole = tl.minimum(tl.min(tl.where(m_m, tl.sum(full.to(tl.int32), 1), FREE * SUB), 0), places)
        for f in tl.range(0, whole, num_stages=STAGES):
            b_p = tl.exp2(tl.load(p_part_lse + o_m + f * (ROWS * RP), mask=m_m, other=float("-inf")) - b_max)
            b_acc += b_p[:, None] * d_o.load([0, f, i_part, 0]).reshape(M, DV).to(tl.float32)
        for f in tl.range(whole, places, num_stages=1):
            m_f = m_m & place_is_full(
                f // SUB, o_t, OFFSET, o_row, p_indices, p_start, BLOCK, NUM, FREE, NUM_INIT, NUM_LOCAL, PACKED
            )
            b_p = tl.exp2(tl.load(p_part_lse + o_m + f * (ROWS * RP), mask=m_f, other=float("-inf")) - b_max)
            b_o = d_o.load([0, f, i_part, 0]).reshape(M, DV)
            b_acc += tl.where(m_f[:, None], b_p[:, None] * b_o.to(tl.float32), 0.0)
    seen = b_sum > 0.0
    b_one = tl.where(seen, b_sum, 1.0)
    tl.store(p_lse + o_lse, tl.where(seen, b_max + tl.log2(b_one), float("inf")), mask=m_m)
    store_tile(p_out, b_acc / b_one[:, None], o_out, m_m, E, DV, "")


@triton.jit(do_not_specialize=["UNIT0", "ROW0", "ROWS", "N", "OFFSET", "UNITS_A_HEAD", "CHUNK"])
def selected_finish(
    p_q, d_k, d_v, d_k_win, d_v_win, p_out, p_total, p_cmp, p_win, p_gates, p_indices, d_o, p_part_lse, p_lse, p_win_lse,
    p_start, UNIT0, ROW0, ROWS, N, OFFSET, UNITS_A_HEAD, CHUNK, scale, stride_qb, stride_qh, stride_qt, stride_ob, stride_oh,
    stride_ot, stride_gb, stride_gh, stride_gt, stride_gr,
    G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK: tl.constexpr, NUM: tl.constexpr, FREE: tl.constexpr, SUB: tl.constexpr, PLACES: tl.constexpr,
    NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, M: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, COMBINE: tl.constexpr,
):  # fmt: skip
    """o of a tile from its forced blocks and its partials.

    With COMBINE also the window branch, o_win, and total = g_cmp o_cmp + g_slc o + g_win o_win. All four outputs
    have the same strides. Three programs share a multiprocessor if this takes no more than 168 registers: hence one
    order of things, partials through a descriptor, and 32 bits for a row's place in its tile.
    """
    BQ: tl.constexpr = M // RP
    i_b, i_g, t0 = unit_tile(UNIT0, UNITS_A_HEAD, CHUNK, G, BQ)
    if t0 < N:
        i_row = (i_b * G + i_g).to(tl.int64) * N + t0
        i_lse = (i_b.to(tl.int64) * N + t0) * (G * R) + i_g * R
        p_indices += i_row * NUM
        i_part = ((i_row - ROW0) * RP).to(tl.int32)
        if FREE > 0:
            p_part_lse += i_part
        p_lse += i_lse
        p_win_lse += i_lse
        i_out = i_b.to(tl.int64) * stride_ob + (i_g * R).to(tl.int64) * stride_oh + t0.to(tl.int64) * stride_ot
        p_out += i_out
        p_total += i_out
        p_cmp += i_out
        p_win += i_out
        p_gates += i_b.to(tl.int64) * stride_gb + (i_g * R).to(tl.int64) * stride_gh + t0.to(tl.int64) * stride_gt
        t1 = tl.minimum(t0 + BQ, N) - 1
        o_m = tl.arange(0, M)
        o_row, o_r = o_m // RP, o_m % RP
        m_m = (t0 + o_row < N) & (o_r < R)
        o_t = tl.minimum(t0 + o_row, N - 1)
        o_row = o_t - t0
        o_lse = o_row * (G * R) + o_r
        o_out = o_row * stride_ot + o_r * stride_oh
        b_q = load_tile(p_q, row_offsets(i_b, i_g, o_t, o_r, stride_qb, stride_qh, stride_qt, R), m_m, D, DK, "")
        finish_selected(
            b_q, d_k, d_v, p_out, p_lse, p_indices, d_o, p_part_lse, p_start, i_b, i_g, t0, t1, o_t, OFFSET, o_row, i_part, ROWS,
            o_out, o_lse, m_m, scale, RP, E, DK, DV, BLOCK, NUM, FREE, SUB, PLACES, NUM_INIT, NUM_LOCAL, WINDOW, PACKED, M, BN,
            STAGES, PRECISION,
        )  # fmt: skip
        if COMBINE:
            tl.debug_barrier()  # what this program's threads wrote may be read by others of them
            b_acc = finish_window(
                b_q, d_k_win, d_v_win, p_win, p_win_lse, p_start, i_b, i_g, t0, t1, o_t, OFFSET, o_out, o_lse, m_m, scale, E, DK,
                DV, BLOCK, NUM_INIT, NUM_LOCAL, WINDOW, PACKED, M, BN, PRECISION,
            )  # fmt: skip
            o_gate = o_row.to(tl.int64) * stride_gt + o_r.to(tl.int64) * stride_gh
            b_gate = tl.load(p_gates + o_gate + 2 * stride_gr, mask=m_m, other=0.0).to(tl.float32)
            b_acc = b_gate[:, None] * b_acc
            b_gate = tl.load(p_gates + o_gate, mask=m_m, other=0.0).to(tl.float32)
            b_acc += b_gate[:, None] * load_tile(p_cmp, o_out, m_m, E, DV, "").to(tl.float32)
            b_gate = tl.load(p_gates + o_gate + stride_gr, mask=m_m, other=0.0).to(tl.float32)
            b_acc += b_gate[:, None] * load_tile(p_out, o_out, m_m, E, DV, "").to(tl.float32)
            store_tile(p_total, b_acc, o_out, m_m, E, DV, "")
