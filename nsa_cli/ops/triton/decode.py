"""One query a sequence against its cache: four kernels, each with as many programs as the chip can hold at once.

    attend_split       a share of the compressed keys: partial output, and the shares' block sums for importance
    block_scores       merged log-sum-exp and importance of some blocks
    select_blocks      the exact choice, a kernel of its own among more blocks than gather_split has room for
    gather_split       a share of the selected blocks, after the exact choice among all, or of the window: partial output
    merge              the partials of all three branches, gated and added up

Each key and value is read once: importance comes from the block sums of the first kernel, kept against the running maximum
of their tile, and is put right when the log-sum-exp is known. Lengths are read on the device and grids come from capacities, so
that a captured graph serves every length. No atomics: partials are added in the order of their places. Dense attention is the
first kernel, over all keys, and the last. A launch that waits for another takes 2 to 4 us however little it does, and what it
reads one thing after another is most of that: so each kernel asks for all that it can at once, for some of it before the
kernel before it is done (`overlap`): what this call was given, and what attend_split left, once that is two launches back.
Batches take one launch instead, in which a program has all of a group: on Hopper with the more groups the more each has to read
(`group_tiles`), else with a group for most multiprocessors (`group`).
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_cli.config import NSAConfig
from nsa_cli.ops.triton import group
from nsa_cli.ops.triton.attend import LEAST, LEAST_ROWS, blocks_seen, load_tile
from nsa_cli.ops.triton.device import cores, has_tiles
from nsa_cli.ops.triton.overlap import follow, overlap
from nsa_cli.ops.triton.problem import LOG2E, Problem, cdiv, next_power_of_2, padded_dim
from nsa_cli.ops.triton.selection import top_blocks

SPLIT_BYTES = {2: 2**15, 4: 2**14}
"""Keys on chip at a time in attend_split, by the bytes of a number."""
GATHER_BYTES = {2: 2**14, 4: 2**13}
"""The same in gather_split: tiles come from many places, and several programs hide that better than larger ones."""
WARPS = {2: 4, 4: 8}
"""Of the kernels with products: exact float32 ones take more registers."""
SPLIT_STAGES = {2: 2, 4: 1}
GATHER_STAGES = {2: 3, 4: 1}
"""Tiles on chip at a time, the one that comes in included."""
MOST_SPLITS = 64
"""Of dense attention's keys: beyond, merging takes longer than reading."""
CHOICE_WIDTH = 2048
"""Scores of which each program of gather_split can make the selection; of more, select_blocks makes it."""
WAYS = {"gather": (4, 2**12), "select": (1, 2**15)}
"""Thresholds that scores are compared with at a time, at least, and comparisons, at most."""
CORE_BYTES = 226 * 2**10
"""On-chip memory of a multiprocessor, and what a program takes beside its tiles."""
PROGRAM_BYTES = 8 * 2**10
MOST_PARTS = tl.constexpr(64)
"""Partials of a head's compressed branch that merge has at a time."""
SUMS = 2**10
"""Block sums, of heads, that a program of block_scores has."""
MERGED = {"thread": 64, "program": 2**12}
"""Numbers of partials that merge has a thread, and of several heads a program."""


@triton.jit
def one_more(b_q, b_k, b_v, m_k, b_max, b_sum, b_o, scale, PRECISION: tl.constexpr):
    """Online softmax: (running maximum, sum, unnormalised o, p [M, N]) with one more tile of keys."""
    b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION) * scale
    b_s = tl.where(m_k[None, :], b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_p = tl.exp2(b_s - b_new[:, None])
    b_decay = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    b_o = b_o * b_decay[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
    return b_new, b_sum, b_o, b_p


@triton.jit
def store_part(p_o, p_max, p_sum, b_o, b_max, b_sum, o_part, m_r, E: tl.constexpr, DV: tl.constexpr):
    """One split's rows o_part."""
    tl.store(p_max + o_part, b_max, mask=m_r)
    tl.store(p_sum + o_part, b_sum, mask=m_r)
    o_e = tl.arange(0, DV)
    tl.store(p_o + o_part[:, None] * E + o_e[None, :], b_o, mask=m_r[:, None] & (o_e < E)[None, :])


@triton.jit(do_not_specialize=["SPLITS", "PER", "TILES"])
def attend_split(
    p_q, p_k, p_v, p_at, p_o, p_max, p_sum, p_top, p_own, p_next, SPLITS, PER, TILES, scale,
    stride_qb, stride_qh, stride_kb, stride_kg, stride_kc, stride_vb, stride_vg, stride_vc, G: tl.constexpr, R: tl.constexpr,
    RM: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, LENGTH: tl.constexpr,
    STRIDE: tl.constexpr, RATIO: tl.constexpr, STEP: tl.constexpr, BJ: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Unnormalised o, running maximum and sum of PER tiles of one group's compressed keys.

    A tile is BJ selection blocks of STEP places (RATIO = l' / d of them used). With SUMS, it leaves for every head its own
    reference maximum (p_top), and for every block j the sums over its keys of p overlap(c, j) (p_own) and p overlap(c, j + 1)
    (p_next). Without, and with blocks of one token, it is dense attention.
    """
    BN: tl.constexpr = BJ * STEP
    REACH: tl.constexpr = LENGTH // STRIDE - 1
    follow(OVERLAP)
    i_bg, i_split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    i_b, i_g = (i_bg // G).to(tl.int64), (i_bg % G).to(tl.int64)
    count = blocks_seen(tl.load(p_at + i_b).to(tl.int32) + 1, LENGTH, STRIDE)
    o_r, o_n = tl.arange(0, RM), tl.arange(0, BN)
    m_r = o_r < R
    b_q = load_tile(p_q, i_b * stride_qb + (i_g * R + o_r) * stride_qh, m_r, D, DK, "evict_last")  # [RM, DK]
    o_i = o_n % STEP
    own = tl.minimum(RATIO - tl.arange(0, STEP), REACH + 1).to(tl.float32)[None, None, :]
    right = tl.maximum(tl.arange(0, STEP) - (RATIO - REACH - 1), 0).to(tl.float32)[None, None, :]
    b_max = tl.full([RM], LEAST, tl.float32)
    b_sum = tl.zeros([RM], tl.float32)
    b_o = tl.zeros([RM, DV], tl.float32)
    last = tl.minimum((i_split + 1) * PER, tl.cdiv(count, BJ * RATIO))
    for i_tile in range(i_split * PER, last):
        o_c = (i_tile * BJ + o_n // STEP) * RATIO + o_i
        m_c = (o_i < RATIO) & (o_c < count)
        o_c = o_c.to(tl.int64)
        b_k = load_tile(p_k, i_b * stride_kb + i_g * stride_kg + o_c * stride_kc, m_c, D, DK, "evict_first")
        b_v = load_tile(p_v, i_b * stride_vb + i_g * stride_vg + o_c * stride_vc, m_c, E, DV, "evict_first")
        b_max, b_sum, b_o, b_p = one_more(b_q, b_k, b_v, m_c, b_max, b_sum, b_o, scale, PRECISION)
        if SUMS:
            o_row = (i_bg.to(tl.int64) * TILES + i_tile) * R + o_r
            tl.store(p_top + o_row, b_max, mask=m_r)
            b_blocks = tl.reshape(b_p, (RM, BJ, STEP))
            o_block = o_row[:, None] * BJ + tl.arange(0, BJ)[None, :]
            tl.store(p_own + o_block, tl.sum(b_blocks * own, 2), mask=m_r[:, None])
            if REACH > 0:
                tl.store(p_next + o_block, tl.sum(b_blocks * right, 2), mask=m_r[:, None])
    o_part = tl.program_id(0).to(tl.int64) * R + o_r
    store_part(p_o, p_max, p_sum, b_o, b_max, b_sum, o_part, m_r, E, DV)


@triton.jit(do_not_specialize=["SPLITS", "TILES", "PARTS", "WIDTH"])
def block_scores(
    p_at, p_max, p_sum, p_top, p_own, p_next, p_scores, SPLITS, TILES, PARTS, WIDTH, G: tl.constexpr, R: tl.constexpr,
    RP: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr, RATIO: tl.constexpr, BLOCK: tl.constexpr, BJ: tl.constexpr,
    BT: tl.constexpr, SPLITS_UP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The merged block sums of BT tiles, added up over a group's heads: what block j gets from its own keys (scores[0, j]) and
    from those of block j - 1 (scores[1, j]), of which imp[j] is the sum; zeros behind the last key. scores [2, WIDTH] a group;
    [1, 0] is not written."""
    i_bg, i_part = (tl.program_id(0) // PARTS).to(tl.int64), tl.program_id(0) % PARTS
    at = tl.load(p_at + i_bg // G).to(tl.int32)
    follow(OVERLAP)
    if i_part * BT * BJ <= at // BLOCK:
        o_t = i_part * BT + tl.arange(0, BT)
        count = blocks_seen(at + 1, LENGTH, STRIDE)
        o_r, o_i, o_s = tl.arange(0, RP), tl.arange(0, BJ), tl.arange(0, SPLITS_UP)
        m_r = o_r < R
        o_row = (i_bg * TILES + o_t)[:, None] * R + o_r[None, :]
        m_row = (o_t * (BJ * RATIO) < count)[:, None] & m_r[None, :]
        o_sum = o_row[:, :, None] * BJ + o_i[None, None, :]
        b_own = tl.load(p_own + o_sum, mask=m_row[:, :, None], other=0.0)  # all is asked for before anything is waited for
        b_next = tl.zeros_like(b_own)
        if LENGTH > STRIDE:
            b_next = tl.load(p_next + o_sum, mask=m_row[:, :, None], other=0.0)
        b_top = tl.load(p_top + o_row, mask=m_row, other=LEAST)
        o_split = (i_bg * SPLITS + o_s)[:, None] * R + o_r[None, :]
        m_split = (o_s < SPLITS)[:, None] & m_r[None, :]
        b_max = tl.load(p_max + o_split, mask=m_split, other=LEAST)
        b_sum = tl.load(p_sum + o_split, mask=m_split, other=0.0)
        top = tl.max(b_max, 0)
        total = tl.sum(b_sum * tl.exp2(b_max - top[None, :]), 0)
        lse = tl.where(total > 0, top + tl.log2(tl.maximum(total, 1e-30)), float("inf"))
        b_weight = tl.exp2(b_top - lse[None, :])[:, :, None]
        o_j = o_t[:, None] * BJ + o_i[None, :]
        p_own_score = p_scores + i_bg * 2 * WIDTH
        tl.store(p_own_score + o_j, tl.sum(b_own * b_weight, 1), mask=o_j < WIDTH)
        if LENGTH > STRIDE:
            tl.store(p_own_score + WIDTH + 1 + o_j, tl.sum(b_next * b_weight, 1), mask=o_j + 1 < WIDTH)


@triton.jit
def stored_scores(p_scores, i_bg, o_j, WIDTH: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr):
    """imp of blocks o_j as block_scores left it; without meaning beyond the query's own block."""
    p_score = p_scores + i_bg.to(tl.int64) * 2 * WIDTH + o_j
    b_score = tl.load(p_score)
    if LENGTH > STRIDE:
        b_score += tl.where(o_j > 0, tl.load(p_score + WIDTH), 0.0)
    return b_score


@triton.jit
def select_blocks(
    p_at, p_scores, p_indices, G: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
    NUM: tl.constexpr, NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr, PLACES: tl.constexpr, WIDTH: tl.constexpr,
    WAYS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The selection of one group, of more blocks than a program of gather_split has room for."""
    i_bg = tl.program_id(0)
    current = tl.load(p_at + i_bg // G).to(tl.int32) // BLOCK
    follow(OVERLAP)
    o_j = tl.arange(0, WIDTH)
    b_score = stored_scores(p_scores, i_bg, o_j, WIDTH, LENGTH, STRIDE)
    top_blocks(b_score, o_j, current, p_indices + i_bg.to(tl.int64) * NUM, NUM, NUM_INIT, NUM_LOCAL, PLACES, WAYS)


@triton.jit(do_not_specialize=["PARTS", "PER_SELECTED", "PER_WINDOW", "SELECTED_PARTS"])
def gather_split(
    p_q, p_k, p_v, p_k_win, p_v_win, p_scores, p_indices, p_at, p_o, p_max, p_sum, PARTS, SELECTED_PARTS, PER_SELECTED,
    PER_WINDOW, scale, stride_qb, stride_qh, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs, stride_wkb,
    stride_wkg, stride_wks, stride_wvb, stride_wvg, stride_wvs, G: tl.constexpr, R: tl.constexpr, RM: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, NUM: tl.constexpr,
    WINDOW: tl.constexpr, RING: tl.constexpr, BN: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr,
    NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr, PLACES: tl.constexpr, WIDTH: tl.constexpr, WAYS: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Unnormalised o, maximum and sum of some tiles of one group: of the selected blocks, or of the window (a ring, or not).

    The first SELECTED_PARTS of a group's PARTS programs have PER_SELECTED tiles of the selected blocks each, the others
    PER_WINDOW of the window. These wait for nothing; those make the selection, each for itself: that takes less time than
    another launch. indices [groups, SELECTED_PARTS, NUM], or, with WIDTH 0, as select_blocks left them, [groups, NUM].
    """
    SELECTED_TILES: tl.constexpr = (NUM * BLOCK + BN - 1) // BN
    WINDOW_TILES: tl.constexpr = (WINDOW + BN - 1) // BN
    i_bg, i_part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    i_b, i_g = (i_bg // G).to(tl.int64), (i_bg % G).to(tl.int64)
    length = tl.load(p_at + i_b).to(tl.int32) + 1
    o_r, o_n = tl.arange(0, RM), tl.arange(0, BN)
    m_r = o_r < R
    b_q = load_tile(p_q, i_b * stride_qb + (i_g * R + o_r) * stride_qh, m_r, D, DK, "evict_last")
    b_max = tl.full([RM], LEAST, tl.float32)
    b_sum = tl.zeros([RM], tl.float32)
    b_o = tl.zeros([RM, DV], tl.float32)
    is_selected = i_part < SELECTED_PARTS
    p_chosen = p_indices + i_bg.to(tl.int64) * NUM
    if WIDTH > 0:
        p_chosen = p_indices + (i_bg.to(tl.int64) * SELECTED_PARTS + i_part) * NUM
    if is_selected:
        follow(OVERLAP)
        if WIDTH > 0:
            o_j = tl.arange(0, WIDTH)
            b_score = stored_scores(p_scores, i_bg, o_j, WIDTH, LENGTH, STRIDE)
            top_blocks(b_score, o_j, (length - 1) // BLOCK, p_chosen, NUM, NUM_INIT, NUM_LOCAL, PLACES, WAYS)
            tl.debug_barrier()  # every thread reads what others wrote
        p_keys, p_values = p_k + i_b * stride_kb + i_g * stride_kg, p_v + i_b * stride_vb + i_g * stride_vg
        step_k, step_v = stride_ks, stride_vs
        first = i_part * PER_SELECTED
        last = tl.minimum(first + PER_SELECTED, SELECTED_TILES)
    else:
        p_keys, p_values = p_k_win + i_b * stride_wkb + i_g * stride_wkg, p_v_win + i_b * stride_wvb + i_g * stride_wvg
        step_k, step_v = stride_wks, stride_wvs
        first = (i_part - SELECTED_PARTS) * PER_WINDOW
        last = tl.minimum(first + PER_WINDOW, WINDOW_TILES)
    o_a = first * BN + o_n
    chosen = tl.where(is_selected, NUM * BLOCK, 0)
    b_block = tl.load(p_chosen + o_a // BLOCK, mask=o_a < chosen, other=-1)
    for _ in range(first, last):
        o_s = b_block * BLOCK + o_a % BLOCK
        m_s = (b_block >= 0) & (o_s < length)
        o_win = o_a if RING else tl.maximum(length - 1 - o_a, 0)
        o_s = tl.where(is_selected, o_s, o_win).to(tl.int64)
        m_s = tl.where(is_selected, m_s, (o_a < WINDOW) & (o_a < length))
        o_a += BN  # the next tile's blocks are asked for before this one's keys
        b_block = tl.load(p_chosen + o_a // BLOCK, mask=o_a < chosen, other=-1)
        b_k = load_tile(p_keys, o_s * step_k, m_s, D, DK, "evict_first")
        b_v = load_tile(p_values, o_s * step_v, m_s, E, DV, "evict_first")
        b_max, b_sum, b_o, _ = one_more(b_q, b_k, b_v, m_s, b_max, b_sum, b_o, scale, PRECISION)
    if i_part >= SELECTED_PARTS:
        follow(OVERLAP)
    o_part = tl.program_id(0).to(tl.int64) * R + o_r
    store_part(p_o, p_max, p_sum, b_o, b_max, b_sum, o_part, m_r, E, DV)


@triton.jit
def load_parts(p_o, p_max, p_sum, i_bg, i_r, m_h, ALL, first, o_e, R: tl.constexpr, E: tl.constexpr, UP: tl.constexpr):
    """At most UP of some heads' ALL partials, from `first` on: channels o_e [BH, UP, BE], maximum and sum [BH, UP]."""
    o_p = first + tl.arange(0, UP)
    o_row = ((i_bg * ALL)[:, None] + o_p[None, :]) * R + i_r[:, None]
    m_row = m_h[:, None] & (o_p < ALL)[None, :]
    m_o = m_row[:, :, None] & (o_e < E)[None, None, :]
    b_o = tl.load(p_o + o_row[:, :, None] * E + o_e[None, None, :], mask=m_o, other=0.0, cache_modifier=".cg")
    b_max = tl.load(p_max + o_row, mask=m_row, other=LEAST, cache_modifier=".cg")
    b_sum = tl.load(p_sum + o_row, mask=m_row, other=0.0, cache_modifier=".cg")
    return b_o, b_max, b_sum


@triton.jit
def branch_weights(b_max, b_sum, m_part):
    """What partials [BH, UP] count in their branch, m_part [1, UP]; all zeros where it is empty."""
    top = tl.max(tl.where(m_part, b_max, LEAST), 1)
    b_weight = tl.where(m_part, tl.exp2(b_max - top[:, None]), 0.0)
    total = tl.sum(b_sum * b_weight, 1)
    return b_weight / tl.where(total > 0, total, float("inf"))[:, None]


@triton.jit(do_not_specialize=["HEADS", "SPLITS", "PARTS", "SELECTED_PARTS"])
def merge(
    p_cmp, p_cmp_max, p_cmp_sum, p_o, p_max, p_sum, p_gates, p_out, HEADS, SPLITS, PARTS, SELECTED_PARTS, stride_gb, stride_gh,
    stride_gr, H: tl.constexpr, R: tl.constexpr, E: tl.constexpr, BH: tl.constexpr, BE: tl.constexpr, SPLITS_UP: tl.constexpr,
    PARTS_UP: tl.constexpr, BRANCHES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """o = g_cmp o_cmp + g_slc o_slc + g_win o_win, BE channels of BH heads; o_cmp alone if BRANCHES is 1.

    Of three branches, the first is merged before the last kernel, gather_split, is waited for."""
    STEP: tl.constexpr = SPLITS_UP if SPLITS_UP <= MOST_PARTS else MOST_PARTS
    i_bh = tl.program_id(0).to(tl.int64) * BH + tl.arange(0, BH)
    i_bg, i_r, m_h = i_bh // R, i_bh % R, i_bh < HEADS
    o_e = tl.program_id(1) * BE + tl.arange(0, BE)
    if BRANCHES == 1:
        follow(OVERLAP)
    else:
        p_gate = p_gates + i_bh // H * stride_gb + i_bh % H * stride_gh
        g_cmp = tl.load(p_gate, mask=m_h, other=0.0).to(tl.float32)
        g_slc = tl.load(p_gate + stride_gr, mask=m_h, other=0.0).to(tl.float32)
        g_win = tl.load(p_gate + 2 * stride_gr, mask=m_h, other=0.0).to(tl.float32)
    if SPLITS_UP == STEP:
        b_part, b_max, b_sum = load_parts(p_cmp, p_cmp_max, p_cmp_sum, i_bg, i_r, m_h, SPLITS, 0, o_e, R, E, STEP)
        b_weight = branch_weights(b_max, b_sum, (tl.arange(0, STEP) < SPLITS)[None, :])
        b_o = tl.sum(b_part * b_weight[:, :, None], 1)
    else:
        top = tl.full([BH], LEAST, tl.float32)
        total = tl.zeros([BH], tl.float32)
        b_o = tl.zeros([BH, BE], tl.float32)
        for i in range(0, SPLITS, STEP):
            b_part, b_max, b_sum = load_parts(p_cmp, p_cmp_max, p_cmp_sum, i_bg, i_r, m_h, SPLITS, i, o_e, R, E, STEP)
            new = tl.maximum(top, tl.max(b_max, 1))
            decay = tl.exp2(top - new)
            b_weight = tl.exp2(b_max - new[:, None])
            total = total * decay + tl.sum(b_sum * b_weight, 1)
            b_o = b_o * decay[:, None] + tl.sum(b_part * b_weight[:, :, None], 1)
            top = new
        b_o = b_o / tl.where(total > 0, total, 1.0)[:, None]
    if BRANCHES == 3:
        b_o = b_o * g_cmp[:, None]
        follow(OVERLAP)
        b_part, b_max, b_sum = load_parts(p_o, p_max, p_sum, i_bg, i_r, m_h, PARTS, 0, o_e, R, E, PARTS_UP)
        m_slc = (tl.arange(0, PARTS_UP) < SELECTED_PARTS)[None, :]
        b_weight = branch_weights(b_max, b_sum, m_slc) * g_slc[:, None]
        b_weight += branch_weights(b_max, b_sum, m_slc == 0) * g_win[:, None]
        b_o += tl.sum(b_part * b_weight[:, :, None], 1)
    tl.store(p_out + i_bh[:, None] * E + o_e[None, :], b_o, mask=m_h[:, None] & (o_e < E)[None, :])


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, config: NSAConfig, *, positions: Tensor,
    q_cmp: Tensor, k_win: Tensor | None, v_win: Tensor | None, scale: float, early: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`nsa_cli.ops.decode.decode_attention`, with all that the host knows from the tensors' shapes: nothing waits for it.

    early: the kernel launched last follows (`overlap`), and of positions, k_cmp and v_cmp it writes no more than each sequence's
    last complete block, so that the rest may be read while it runs."""
    (b, h, _, d), g, e, device = q.shape, k.shape[1], v.shape[3], q.device
    p = Problem(config=config, b=b, h=h, g=g, n=1, d=d, e=e, dtype=q.dtype, device=device, scale=scale)
    blocks, late = config.num_select_blocks(k.shape[2]), overlap(device)
    if k_cmp.shape[2] == 0:  # no block fits into this cache: any address will do, none is read
        k_cmp, v_cmp = k, v
    ring = k_win is not None and v_win is not None
    keys, values = (k_win, v_win) if k_win is not None and v_win is not None else (k, v)
    one: dict[str, Any] = {"positions": positions, "q_cmp": q_cmp, "k_win": keys, "v_win": values, "ring": ring, "blocks": blocks}
    if has_tiles(device):
        from nsa_cli.ops.triton import group_tiles

        if group_tiles.fits(p, blocks, ((k, v), (k_cmp, v_cmp), (keys, values))):
            return group_tiles.attend_in_one(q, k, v, k_cmp, v_cmp, gates, p, **one, early=early)
    if group.fits(p, blocks, k, v, keys, values):
        return group.attend_in_one(q, k, v, k_cmp, v_cmp, gates, p, **one)
    size, groups = q.element_size(), b * g
    r, block, widest = p.r, config.select_block, max(p.dk, p.dv) * size
    ratio = block // config.compress_stride
    step = next_power_of_2(ratio)
    bj = max(1, min(128, SPLIT_BYTES[size] // widest) // step)
    while bj > 1 and bj * step > 32 and groups * cdiv(blocks, bj) < cores(device):  # few rows: short ways
        bj //= 2
    tiles = cdiv(blocks, bj)
    splits, per = _share(tiles, groups, _programs(SPLIT_STAGES[size] - 1, 2 * bj * step * widest, device))
    heads = {"G": g, "R": r, "RM": max(LEAST_ROWS, p.rp), "D": d, "E": e, "DK": p.dk, "DV": p.dv, "PRECISION": p.precision}
    shape = {"LENGTH": config.compress_block, "STRIDE": config.compress_stride, "RATIO": ratio}
    top, own, right = _floats(device, (groups, tiles, r), *((groups, tiles, r, bj),) * 2)
    o_cmp, cmp_max, cmp_sum = _floats(device, (groups, splits, r, e), *((groups, splits, r),) * 2)
    attend_split[(groups * splits,)](
        q_cmp, k_cmp, v_cmp, positions, o_cmp, cmp_max, cmp_sum, top, own, right, splits, per, tiles, p.scale_log2,
        *q_cmp.stride()[:2], *k_cmp.stride()[:3], *v_cmp.stride()[:3], **heads, **shape, STEP=step, BJ=bj, SUMS=True,
        num_warps=WARPS[size], num_stages=SPLIT_STAGES[size], **late,
    )  # fmt: skip
    width, splits_up, bt = max(16, next_power_of_2(tiles * bj)), next_power_of_2(splits), 1
    (scores,) = _floats(device, (groups, 2, width))
    while 2 * bt * p.rp * bj <= SUMS and groups * cdiv(tiles, 2 * bt) >= cores(device):
        bt *= 2
    block_scores[(groups * cdiv(tiles, bt),)](
        positions, cmp_max, cmp_sum, top, own, right, scores, splits, tiles, cdiv(tiles, bt), width, G=g, R=r, RP=p.rp, **shape,
        BLOCK=block, BJ=bj, BT=bt, SPLITS_UP=splits_up, num_warps=4, **late,
    )  # fmt: skip
    bn = max(16, min(64, GATHER_BYTES[size] // widest))
    while bn > 32 and groups * cdiv(config.num_selected * block, bn) < 2 * cores(device):
        bn //= 2
    selected, window = (cdiv(tokens, bn) for tokens in (config.num_selected * block, config.window))
    programs, most = _programs(GATHER_STAGES[size] - 1, 2 * bn * widest, device), 1
    while groups * (cdiv(selected, most) + cdiv(window, most)) > programs and most < max(selected, window):
        most += 1
    selected, per_selected = _even(selected, most)
    window, per_window = _even(window, most)
    choice = {
        "LENGTH": config.compress_block, "STRIDE": config.compress_stride, "BLOCK": block, "NUM": config.num_selected,
        "NUM_INIT": config.num_init, "NUM_LOCAL": config.num_local, "PLACES": next_power_of_2(config.num_selected),
    }  # fmt: skip
    fused = width <= CHOICE_WIDTH
    indices = torch.empty(b, g, selected if fused else 1, config.num_selected, dtype=torch.int32, device=device)
    if not fused:
        select_blocks[(groups,)](
            positions, scores, indices, G=g, **choice, WIDTH=width, WAYS=_ways("select", width),
            num_warps=max(1, min(16, width // 128)), **late,
        )  # fmt: skip
    o, part_max, part_sum = _floats(device, (groups, selected + window, r, e), *((groups, selected + window, r),) * 2)
    gather_split[(groups * (selected + window),)](
        q, k, v, keys, values, scores, indices, positions, o, part_max, part_sum, selected + window, selected, per_selected,
        per_window, p.scale_log2, *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        **heads, **choice, WINDOW=config.window, RING=ring, BN=bn, WIDTH=width if fused else 0, WAYS=_ways("gather", width),
        num_warps=WARPS[size], num_stages=GATHER_STAGES[size], **late,
    )  # fmt: skip
    out = torch.empty(b, h, 1, e, dtype=q.dtype, device=device)
    ups = {"SPLITS_UP": splits_up, "PARTS_UP": next_power_of_2(selected + window)}
    grid, shares = _merging(b * h, p.dv, e, ups, device)
    merge[grid](
        o_cmp, cmp_max, cmp_sum, o, part_max, part_sum, gates, out, b * h, splits, selected + window, selected,
        gates.stride(0), gates.stride(1), gates.stride(3), H=h, R=r, E=e, **ups, **shares, BRANCHES=3, **late,
    )  # fmt: skip
    return out, indices[:, :, :1]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, positions: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale) v of one query a sequence, q [b, h, 1, d], over the tokens up to positions, int64 [b], of the cache
    k, v [b, g, s, d]: out [b, h, 1, d]."""
    (b, h, _, d), (g, places, e), device, size = q.shape, v.shape[1:], q.device, q.element_size()
    r, dk, dv, late = h // g, padded_dim(d), padded_dim(e), overlap(q.device)
    bn = max(16, min(128, SPLIT_BYTES[size] // (max(dk, dv) * size)))
    tiles = cdiv(places, bn)
    splits, per = _share(tiles, b * g, _programs(SPLIT_STAGES[size] - 1, bn * (dk + dv) * size, device))
    splits, per = _even(tiles, max(per, cdiv(tiles, MOST_SPLITS)))
    o, top, total = _floats(device, (b * g, splits, r, e), *((b * g, splits, r),) * 2)
    attend_split[(b * g * splits,)](
        q, k, v, positions, o, top, total, top, top, top, splits, per, tiles, scale * LOG2E, *q.stride()[:2], *k.stride()[:3],
        *v.stride()[:3], G=g, R=r, RM=max(LEAST_ROWS, next_power_of_2(r)), D=d, E=e, DK=dk, DV=dv,
        PRECISION="ieee" if size == 4 else "tf32", LENGTH=1, STRIDE=1, RATIO=bn, STEP=bn, BJ=1, SUMS=False,
        num_warps=WARPS[size], num_stages=SPLIT_STAGES[size], **late,
    )  # fmt: skip
    out = torch.empty(b, h, 1, e, dtype=q.dtype, device=device)
    ups = {"SPLITS_UP": next_power_of_2(splits), "PARTS_UP": 0}
    grid, shares = _merging(b * h, dv, e, ups, device)
    merge[grid](
        o, top, total, o, top, total, q, out, b * h, splits, splits, splits, 0, 0, 0, H=h, R=r, E=e, **ups, **shares, BRANCHES=1,
        **late,
    )  # fmt: skip
    return out


def _programs(buffers: int, tile: int, device: torch.device) -> int:
    """How many programs the chip holds at once that have `buffers` tiles of `tile` bytes on chip."""
    return max(1, min(8, CORE_BYTES // (buffers * tile + PROGRAM_BYTES))) * cores(device)


def _share(tiles: int, groups: int, programs: int) -> tuple[int, int]:
    """Into how many of the programs a group's tiles go, and how many tiles each of them has."""
    return _even(tiles, cdiv(tiles, max(1, min(tiles, programs // groups))))


def _even(tiles: int, most: int) -> tuple[int, int]:
    """As few parts of at most `most` tiles as there need be, and the tiles of each."""
    parts = cdiv(tiles, most)
    per = cdiv(tiles, parts)
    return cdiv(tiles, per), per


def _ways(kernel: str, width: int) -> int:
    least, comparisons = WAYS[kernel]
    return max(least, min(16, comparisons // width))


def _merging(heads: int, dim: int, e: int, ups: dict[str, int], device: torch.device) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid of merge, and the channels and heads of a program: few channels of few heads, several heads of many."""
    be, bh = dim if heads >= 2 * cores(device) else min(dim, 32), 1
    parts = min(ups["SPLITS_UP"], MOST_PARTS.value) + ups["PARTS_UP"]
    while 2 * bh * parts * be <= MERGED["program"] and heads >= 16 * bh * cores(device):
        bh *= 2
    warps = max(1, min(8, next_power_of_2(bh * parts * be // (32 * MERGED["thread"]))))
    return (cdiv(heads, bh), cdiv(e, be)), {"BH": bh, "BE": be, "num_warps": warps}


def _floats(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes]
