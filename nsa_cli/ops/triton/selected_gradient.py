"""Selected attention's backward: one pass for dk, dv and dq, key blocks outside as in `selected.py`.

An item's dk and dv stay in registers and go to a float32 part of their own, added up in the items' order; an entry's dq goes
to a partial, added up by the finishing kernel, which has the forced blocks' and the window's products besides.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from nsa_cli.ops.triton.attend import INIT, LOCAL, WIN, gradient_keys, key_bounds, load_tile, row_offsets, store_tile
from nsa_cli.ops.triton.selected import most_places, place_is_full, unit_tile


@triton.jit(do_not_specialize=["LIST0", "LIST1", "ROW0", "N", "OFFSET", "UNITS_A_HEAD", "BLOCKS"])
def selected_gradient_parts(
    p_q, p_do, p_k, p_v, p_dq, p_dk, p_dv, p_lse, p_delta, p_gate, p_entries, p_ends, p_items, p_item_list, p_item_start,
    p_sel_start, p_sel_end, LIST0, LIST1, ROW0, N, OFFSET, UNITS_A_HEAD, BLOCKS, scale, dk_scale, stride_qb, stride_qh, stride_qt,
    stride_ob, stride_oh, stride_ot, stride_kb, stride_kg, stride_kt, stride_vb, stride_vg, stride_vt, G: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK: tl.constexpr, BS: tl.constexpr, SUB: tl.constexpr, FREE: tl.constexpr, ITEM: tl.constexpr, CAUSAL: tl.constexpr,
    PACKED: tl.constexpr, M: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """dk and dv of one item, in float32, and dq of every entry of it, in one pass."""
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
        b_k = load_tile(p_k, o_k, m_s, D, DK, "")
        b_v = load_tile(p_v, o_v, m_s, E, DV, "")
        b_dk = tl.zeros([BS, DK], tl.float32)
        b_dv = tl.zeros([BS, DV], tl.float32)
        o_m = tl.arange(0, M)
        o_r = o_m % RP
        o_head = i_g * R + o_r
        for e in tl.range(e0, e1, BQ, num_stages=STAGES):
            o_a = e + o_m // RP
            m_m = (o_a < e1) & (o_r < R)
            b_entry = tl.load(p_entries + o_a, mask=o_a < e1, other=0)
            o_t = b_entry // FREE - i_bg * N
            o_q = i_b * stride_qb + o_head.to(tl.int64) * stride_qh + o_t.to(tl.int64) * stride_qt
            o_o = i_b * stride_ob + o_head.to(tl.int64) * stride_oh + o_t.to(tl.int64) * stride_ot
            b_q = load_tile(p_q, o_q, m_m, D, DK, "")
            b_do = load_tile(p_do, o_o, m_m, E, DV, "")
            o_row = (i_b * N + o_t) * (G * R) + o_head
            b_lse = tl.load(p_lse + o_row, mask=m_m, other=float("inf"))
            b_delta = tl.load(p_delta + o_row, mask=m_m, other=0.0)
            b_p = tl.exp2(tl.dot(b_q, b_k.T, input_precision=PRECISION) * scale - b_lse[:, None])
            if GATED:
                b_p *= tl.load(p_gate + o_row, mask=m_m, other=0.0)[:, None]
            if CAUSAL:
                b_p = tl.where(m_s[None, :] & (o_s[None, :] <= o_t[:, None] + OFFSET), b_p, 0.0)
            elif BS * SUB != BLOCK:
                b_p = tl.where(m_s[None, :], b_p, 0.0)
            b_dp = tl.dot(b_do, b_v.T, input_precision=PRECISION)
            b_dv = tl.dot(tl.trans(b_p.to(b_do.dtype)), b_do, b_dv, input_precision=PRECISION)
            b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_q.dtype)
            b_dk = tl.dot(tl.trans(b_ds), b_q, b_dk, input_precision=PRECISION)
            o_part = ((b_entry.to(tl.int64) - ROW0 * FREE) * SUB + i_sub) * R + o_r
            b_dq = tl.dot(b_ds, b_k, input_precision=PRECISION)
            store_tile(p_dq, b_dq, o_part * D, m_m, D, DK, "")
        o_w = i_item.to(tl.int64) * BLOCK + o_i
        store_tile(p_dk, b_dk * dk_scale, o_w * D, o_i < BLOCK, D, DK, "")
        store_tile(p_dv, b_dv, o_w * E, o_i < BLOCK, E, DV, "")


@triton.jit(do_not_specialize=["UNIT0", "UNIT1", "N", "UNITS_A_HEAD", "BLOCKS"])
def selected_gradient_sum(
    p_dk, p_dv, p_dk_sum, p_dv_sum, p_items, p_sel_start, p_sel_end, UNIT0, UNIT1, N, UNITS_A_HEAD, BLOCKS, G: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, BS: tl.constexpr,
    SUB: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Adds a block's items among the units [UNIT0, UNIT1) to dk and dv [b, s, g, d] of N keys, in their order."""
    i_sub = tl.program_id(0) % SUB
    i_block = tl.program_id(0) // SUB % BLOCKS
    i_bg = UNIT0 // UNITS_A_HEAD + tl.program_id(0) // SUB // BLOCKS
    i_b, i_g = (i_bg // G).to(tl.int64), i_bg % G
    first, end = i_block * BLOCK, N
    if PACKED:
        first = tl.load(p_sel_start + i_block)
        end = tl.load(p_sel_end + i_block)
    o_i, o_d, o_e = i_sub * BS + tl.arange(0, BS), tl.arange(0, DK), tl.arange(0, DV)
    o_s = first + o_i
    m_s = ((o_i < BLOCK) & (o_s < end))[:, None]
    m_d, m_e = m_s & (o_d < D)[None, :], m_s & (o_e < E)[None, :]
    o_key = ((i_b * N + o_s) * G + i_g)[:, None]
    b_dk = tl.load(p_dk_sum + o_key * D + o_d[None, :], mask=m_d, other=0.0)
    b_dv = tl.load(p_dv_sum + o_key * E + o_e[None, :], mask=m_e, other=0.0)
    i_first = tl.load(p_items + UNIT0 * BLOCKS)
    for u in range(tl.maximum(UNIT0, i_bg * UNITS_A_HEAD), tl.minimum(UNIT1, (i_bg + 1) * UNITS_A_HEAD)):
        for w in range(tl.load(p_items + u * BLOCKS + i_block), tl.load(p_items + u * BLOCKS + i_block + 1)):
            o_w = ((w - i_first).to(tl.int64) * BLOCK + o_i)[:, None]
            b_dk += tl.load(p_dk + o_w * D + o_d[None, :], mask=m_d, other=0.0)
            b_dv += tl.load(p_dv + o_w * E + o_e[None, :], mask=m_e, other=0.0)
    tl.store(p_dk_sum + o_key * D + o_d[None, :], b_dk, mask=m_d)
    tl.store(p_dv_sum + o_key * E + o_e[None, :], b_dv, mask=m_e)


@triton.jit
def gradient_range(
    b_acc, b_q, b_do, b_lse, b_delta, b_gate, d_k, d_v, p_start, i_b, i_g, t0, t1, o_t, OFFSET, scale, BRANCH: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr,
    WINDOW: tl.constexpr, PACKED: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """b_acc plus dq, unscaled, of a tile's window, or its first, or newest, forced blocks."""
    low, high = key_bounds(o_t, OFFSET, p_start, p_start, BRANCH, 1, 1, BLOCK, NUM_INIT, NUM_LOCAL, WINDOW, PACKED)
    from_key, all_to = key_bounds(t0, OFFSET, p_start, p_start, BRANCH, 1, 1, BLOCK, NUM_INIT, NUM_LOCAL, WINDOW, PACKED)
    all_from, to_key = key_bounds(t1, OFFSET, p_start, p_start, BRANCH, 1, 1, BLOCK, NUM_INIT, NUM_LOCAL, WINDOW, PACKED)
    return gradient_keys(
        b_acc, b_q, b_do, b_lse, b_delta, b_gate, d_k, d_v, i_b, i_g, low, high, from_key, all_from, all_to, to_key, scale,
        DK, DV, BN, PRECISION, GATED,
    )  # fmt: skip


@triton.jit
def gradient_window(
    b_acc, b_q, b_do, d_k, d_v, p_lse, p_delta, p_gate, p_start, i_b, i_g, t0, t1, o_t, OFFSET, o_head, m_m, scale,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr,
    WINDOW: tl.constexpr, PACKED: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """b_acc plus dq, unscaled, of a tile's window."""
    b_lse = tl.load(p_lse + o_head, mask=m_m, other=float("inf"))
    b_delta = tl.load(p_delta + o_head, mask=m_m, other=0.0)
    b_gate = tl.load(p_gate + o_head, mask=m_m, other=0.0)
    return gradient_range(
        b_acc, b_q, b_do, b_lse, b_delta, b_gate, d_k, d_v, p_start, i_b, i_g, t0, t1, o_t, OFFSET, scale, WIN, DK, DV, BLOCK,
        NUM_INIT, NUM_LOCAL, WINDOW, PACKED, BN, PRECISION, GATED,
    )  # fmt: skip


@triton.jit
def gradient_selected(
    b_acc, b_q, b_do, d_k, d_v, p_dq, p_lse, p_delta, p_gate, p_indices, p_start, i_b, i_g, t0, t1, o_t, OFFSET, o_row, o_r,
    o_head, m_m, ROW0, scale, R: tl.constexpr, D: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
    NUM: tl.constexpr, FREE: tl.constexpr, SUB: tl.constexpr, NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr,
    WINDOW: tl.constexpr, PACKED: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """b_acc plus dq, unscaled, of a tile's forced blocks and of its partials, which are gated already."""
    if NUM_INIT + NUM_LOCAL > 0:
        b_lse = tl.load(p_lse + o_head, mask=m_m, other=float("inf"))
        b_delta = tl.load(p_delta + o_head, mask=m_m, other=0.0)
        b_gate = b_delta
        if GATED:
            b_gate = tl.load(p_gate + o_head, mask=m_m, other=0.0)
        if NUM_INIT > 0:
            b_acc = gradient_range(
                b_acc, b_q, b_do, b_lse, b_delta, b_gate, d_k, d_v, p_start, i_b, i_g, t0, t1, o_t, OFFSET, scale, INIT, DK, DV,
                BLOCK, NUM_INIT, NUM_LOCAL, WINDOW, PACKED, BN, PRECISION, GATED,
            )  # fmt: skip
        if NUM_LOCAL > 0:
            b_acc = gradient_range(
                b_acc, b_q, b_do, b_lse, b_delta, b_gate, d_k, d_v, p_start, i_b, i_g, t0, t1, o_t, OFFSET, scale, LOCAL, DK, DV,
                BLOCK, NUM_INIT, NUM_LOCAL, WINDOW, PACKED, BN, PRECISION, GATED,
            )  # fmt: skip
    if FREE > 0:
        o_part = (o_row - ROW0) * (FREE * SUB * R) + o_r
        for f in tl.range(0, most_places(t1, OFFSET, BLOCK, FREE, NUM_INIT, NUM_LOCAL, PACKED) * SUB, num_stages=STAGES):
            m_f = m_m & place_is_full(
                f // SUB, o_t, OFFSET, o_row, p_indices, p_start, BLOCK, NUM, FREE, NUM_INIT, NUM_LOCAL, PACKED
            )
            b_acc += load_tile(p_dq, (o_part + f * R) * D, m_f, D, DK, "evict_first").to(tl.float32)
    return b_acc


@triton.jit
def window_first(CORES):
    """Whether this program does its window before its partials: neighbours on a core should do different things at a time."""
    return (tl.program_id(0) + tl.program_id(0) // CORES) % 2 == 0


@triton.jit(do_not_specialize=["UNIT0", "ROW0", "N", "OFFSET", "UNITS_A_HEAD", "CHUNK", "CORES"])
def selected_gradient_finish(
    p_q, p_do, d_k, d_v, d_k_win, d_v_win, p_dq, p_part_dq, p_lse, p_delta, p_gate, p_win_lse, p_win_delta, p_win_gate,
    p_indices, p_start, UNIT0, ROW0, N, OFFSET, UNITS_A_HEAD, CHUNK, CORES, scale, dq_scale, stride_qb, stride_qh, stride_qt,
    stride_ob, stride_oh, stride_ot, stride_db, stride_dh, stride_dt,
    G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK: tl.constexpr, NUM: tl.constexpr, FREE: tl.constexpr, SUB: tl.constexpr, NUM_INIT: tl.constexpr,
    NUM_LOCAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, ADD: tl.constexpr, GATED: tl.constexpr, WINDOW_TOO: tl.constexpr,
):  # fmt: skip
    """dq of a tile of the selected branch, and of the window if WINDOW_TOO (in either order, see `window_first`).

    Added to what p_dq holds if ADD.
    """
    BQ: tl.constexpr = M // RP
    i_b, i_g, t0 = unit_tile(UNIT0, UNITS_A_HEAD, CHUNK, G, BQ)
    if t0 < N:
        t1 = tl.minimum(t0 + BQ, N) - 1
        o_m = tl.arange(0, M)
        o_row, o_r = t0 + o_m // RP, o_m % RP
        m_m = (o_row < N) & (o_r < R)
        o_t = tl.minimum(o_row, N - 1)
        o_row = (i_b * G + i_g).to(tl.int64) * N + o_t
        o_head = (i_b.to(tl.int64) * N + o_t) * (G * R) + i_g * R + o_r
        b_q = load_tile(p_q, row_offsets(i_b, i_g, o_t, o_r, stride_qb, stride_qh, stride_qt, R), m_m, D, DK, "")
        b_do = load_tile(p_do, row_offsets(i_b, i_g, o_t, o_r, stride_ob, stride_oh, stride_ot, R), m_m, E, DV, "")
        b_acc = tl.zeros([M, DK], tl.float32)
        if not WINDOW_TOO:
            b_acc = gradient_selected(
                b_acc, b_q, b_do, d_k, d_v, p_part_dq, p_lse, p_delta, p_gate, p_indices, p_start, i_b, i_g, t0, t1, o_t, OFFSET,
                o_row, o_r, o_head, m_m, ROW0, scale, R, D, DK, DV, BLOCK, NUM, FREE, SUB, NUM_INIT, NUM_LOCAL, WINDOW,
                PACKED, BN, STAGES, PRECISION, GATED,
            )  # fmt: skip
        else:
            if window_first(CORES):
                b_acc = gradient_window(
                    b_acc, b_q, b_do, d_k_win, d_v_win, p_win_lse, p_win_delta, p_win_gate, p_start, i_b, i_g, t0, t1, o_t,
                    OFFSET, o_head, m_m, scale, DK, DV, BLOCK, NUM_INIT, NUM_LOCAL, WINDOW, PACKED, BN, PRECISION, GATED,
                )  # fmt: skip
                b_acc = gradient_selected(
                    b_acc, b_q, b_do, d_k, d_v, p_part_dq, p_lse, p_delta, p_gate, p_indices, p_start, i_b, i_g, t0, t1, o_t,
                    OFFSET, o_row, o_r, o_head, m_m, ROW0, scale, R, D, DK, DV, BLOCK, NUM, FREE, SUB, NUM_INIT, NUM_LOCAL,
                    WINDOW, PACKED, BN, STAGES, PRECISION, GATED,
                )  # fmt: skip
            else:
                b_acc = gradient_selected(
                    b_acc, b_q, b_do, d_k, d_v, p_part_dq, p_lse, p_delta, p_gate, p_indices, p_start, i_b, i_g, t0, t1, o_t,
                    OFFSET, o_row, o_r, o_head, m_m, ROW0, scale, R, D, DK, DV, BLOCK, NUM, FREE, SUB, NUM_INIT, NUM_LOCAL,
                    WINDOW, PACKED, BN, STAGES, PRECISION, GATED,
                )  # fmt: skip
                b_acc = gradient_window(
                    b_acc, b_q, b_do, d_k_win, d_v_win, p_win_lse, p_win_delta, p_win_gate, p_start, i_b, i_g, t0, t1, o_t,
                    OFFSET, o_head, m_m, scale, DK, DV, BLOCK, NUM_INIT, NUM_LOCAL, WINDOW, PACKED, BN, PRECISION, GATED,
                )  # fmt: skip
        b_acc *= dq_scale
        o_dq = row_offsets(i_b, i_g, o_t, o_r, stride_db, stride_dh, stride_dt, R)
        if ADD:
            b_acc += load_tile(p_dq, o_dq, m_m, D, DK, "").to(tl.float32)
        store_tile(p_dq, b_acc, o_dq, m_m, D, DK, "")
