"""One query a sequence against its cache: four kernels, each with as many programs as the chip can hold at once.

    compressed_split   a share of the compressed keys: partial output, and the shares' block sums for importance
    select_blocks      merged log-sum-exp, importance and the exact choice among all blocks, a program a group
    gather_split       64 keys of the selected blocks or of the window: partial output
    merge              the partials of all three branches, gated and added up, a program a head

Each key and value is read once: importance comes from the block sums of the first kernel, kept against the running maximum
of their tile, and is put right when the log-sum-exp is known. Lengths are read on the device and grids come from capacities, so
that a captured graph serves every length. No atomics: partials are added in the order of their places.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_cli.config import NSAConfig
from nsa_cli.ops.triton.attend import load_tile
from nsa_cli.ops.triton.launch import cores
from nsa_cli.ops.triton.problem import Problem
from nsa_cli.ops.triton.selection import top_blocks

LEAST = tl.constexpr(-1e30)
LEAST_ROWS = 16
"""Of a tile: tl.dot takes no fewer."""
PROGRAMS_A_CORE = 2
"""Programs of compressed_split that a multiprocessor should get: more splits make more partials to merge."""
GATHERED = 32
"""Keys of a tile of gather_split."""
TILE_BYTES = {2: 2**15, 4: 2**14}
"""Compressed keys on chip at a time, by the bytes of a number."""
WARPS = {2: 4, 4: 8}
"""Of the kernels with products: exact float32 ones take more registers."""


@triton.jit
def blocks_seen(length, LENGTH: tl.constexpr, STRIDE: tl.constexpr):
    """Complete compressed blocks of the first `length` tokens (the division of a negative number would round up)."""
    return tl.where(length >= LENGTH, (length - LENGTH) // STRIDE + 1, 0)


@triton.jit(do_not_specialize=["SPLITS", "PER", "TILES"])
def compressed_split(
    p_q, p_k, p_v, p_length, p_o, p_max, p_sum, p_top, p_own, p_next, SPLITS, PER, TILES, scale,
    stride_qb, stride_qh, stride_kb, stride_kg, stride_kc, stride_vb, stride_vg, stride_vc, G: tl.constexpr, R: tl.constexpr,
    RM: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, LENGTH: tl.constexpr,
    STRIDE: tl.constexpr, RATIO: tl.constexpr, STEP: tl.constexpr, BJ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Unnormalised o, running maximum and sum of PER tiles of one group's compressed keys.

    A tile is BJ selection blocks of STEP places (RATIO = l' / d of them used). For every head it leaves its own reference
    maximum (p_top), and for every block j the sums over its keys of p overlap(c, j) (p_own) and p overlap(c, j + 1) (p_next).
    """
    BN: tl.constexpr = BJ * STEP
    REACH: tl.constexpr = LENGTH // STRIDE - 1
    i_bg, i_split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    i_b, i_g = (i_bg // G).to(tl.int64), (i_bg % G).to(tl.int64)
    count = blocks_seen(tl.load(p_length + i_b).to(tl.int32), LENGTH, STRIDE)
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
        b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION) * scale
        b_s = tl.where(m_c[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])  # [RM, BN]
        b_decay = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_o = b_o * b_decay[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
        b_max = b_new
        o_row = (i_bg.to(tl.int64) * TILES + i_tile) * R + o_r
        tl.store(p_top + o_row, b_new, mask=m_r)
        b_blocks = tl.reshape(b_p, (RM, BJ, STEP))
        o_block = o_row[:, None] * BJ + tl.arange(0, BJ)[None, :]
        tl.store(p_own + o_block, tl.sum(b_blocks * own, 2), mask=m_r[:, None])
        if REACH > 0:
            tl.store(p_next + o_block, tl.sum(b_blocks * right, 2), mask=m_r[:, None])
    o_part = tl.program_id(0).to(tl.int64) * R + o_r
    tl.store(p_max + o_part, b_max, mask=m_r)
    tl.store(p_sum + o_part, b_sum, mask=m_r)
    o_e = tl.arange(0, DV)
    tl.store(p_o + o_part[:, None] * E + o_e[None, :], b_o, mask=m_r[:, None] & (o_e < E)[None, :])


@triton.jit(do_not_specialize=["SPLITS", "TILES"])
def select_blocks(
    p_length, p_max, p_sum, p_top, p_own, p_next, p_indices, SPLITS, TILES, G: tl.constexpr, R: tl.constexpr,
    LENGTH: tl.constexpr, STRIDE: tl.constexpr, RATIO: tl.constexpr, BLOCK: tl.constexpr, BJ: tl.constexpr, NUM: tl.constexpr,
    NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr, PLACES: tl.constexpr, SPLITS_UP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """imp[j] = sum over a group's heads of the merged block sums; the forced blocks and the most important others."""
    i_bg = tl.program_id(0)
    length = tl.load(p_length + i_bg // G).to(tl.int32)
    current = (length - 1) // BLOCK
    count = blocks_seen(length, LENGTH, STRIDE)
    o_j = tl.arange(0, WIDTH)
    m_own = (o_j <= current) & (o_j * RATIO < count)
    o_left = o_j - 1
    m_left = (o_left >= 0) & (o_left < current) & (o_left * RATIO < count)
    base = i_bg.to(tl.int64) * TILES
    o_own, o_next = base + o_j // BJ, base + o_left // BJ
    o_s = tl.arange(0, SPLITS_UP)
    o_split = (i_bg.to(tl.int64) * SPLITS + o_s) * R
    b_score = tl.zeros([WIDTH], tl.float32)
    for r in range(R):
        b_max = tl.load(p_max + o_split + r, mask=o_s < SPLITS, other=LEAST)
        b_sum = tl.load(p_sum + o_split + r, mask=o_s < SPLITS, other=0.0)
        top = tl.max(b_max, 0)
        total = tl.sum(b_sum * tl.exp2(b_max - top), 0)
        lse = tl.where(total > 0, top + tl.log2(tl.maximum(total, 1e-30)), float("inf"))
        b_part = tl.load(p_own + (o_own * R + r) * BJ + o_j % BJ, mask=m_own, other=0.0)
        b_top = tl.load(p_top + o_own * R + r, mask=m_own, other=LEAST)
        b_score += b_part * tl.exp2(b_top - lse)
        if LENGTH > STRIDE:
            b_part = tl.load(p_next + (o_next * R + r) * BJ + o_left % BJ, mask=m_left, other=0.0)
            b_top = tl.load(p_top + o_next * R + r, mask=m_left, other=LEAST)
            b_score += b_part * tl.exp2(b_top - lse)
    top_blocks(b_score, o_j, current, p_indices + i_bg.to(tl.int64) * NUM, NUM, NUM_INIT, NUM_LOCAL, PLACES)


@triton.jit(do_not_specialize=["TILES"])
def gather_split(
    p_q, p_k, p_v, p_k_win, p_v_win, p_indices, p_length, p_o, p_max, p_sum, TILES, scale, stride_qb, stride_qh, stride_kb,
    stride_kg, stride_ks, stride_vb, stride_vg, stride_vs, stride_wkb, stride_wkg, stride_wks, stride_wvb, stride_wvg, stride_wvs,
    G: tl.constexpr, R: tl.constexpr, RM: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK: tl.constexpr, NUM: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr, SELECTED_TILES: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Unnormalised o, maximum and sum of BN keys of one group: of the selected blocks, then of the window (a ring, or not)."""
    i_bg, i_tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i_b, i_g = (i_bg // G).to(tl.int64), (i_bg % G).to(tl.int64)
    length = tl.load(p_length + i_b).to(tl.int32)
    o_r, o_n = tl.arange(0, RM), tl.arange(0, BN)
    m_r = o_r < R
    if i_tile < SELECTED_TILES:
        o_a = i_tile * BN + o_n
        block = tl.load(p_indices + i_bg.to(tl.int64) * NUM + o_a // BLOCK, mask=o_a < NUM * BLOCK, other=-1)
        o_s = block * BLOCK + o_a % BLOCK
        m_s = (block >= 0) & (o_s < length)
        p_keys, p_values = p_k + i_b * stride_kb + i_g * stride_kg, p_v + i_b * stride_vb + i_g * stride_vg
        o_k, o_v = o_s.to(tl.int64) * stride_ks, o_s.to(tl.int64) * stride_vs
    else:
        o_a = (i_tile - SELECTED_TILES) * BN + o_n
        if RING:
            o_s = o_a
            m_s = (o_a < WINDOW) & (o_a < length)
        else:
            o_s = length - 1 - o_a
            m_s = (o_a < WINDOW) & (o_s >= 0)
        p_keys, p_values = p_k_win + i_b * stride_wkb + i_g * stride_wkg, p_v_win + i_b * stride_wvb + i_g * stride_wvg
        o_k, o_v = o_s.to(tl.int64) * stride_wks, o_s.to(tl.int64) * stride_wvs
    o_part = tl.program_id(0).to(tl.int64) * R + o_r
    if tl.sum(m_s.to(tl.int32), 0) > 0:
        b_q = load_tile(p_q, i_b * stride_qb + (i_g * R + o_r) * stride_qh, m_r, D, DK, "evict_last")
        b_k = load_tile(p_keys, o_k, m_s, D, DK, "evict_first")
        b_v = load_tile(p_values, o_v, m_s, E, DV, "evict_first")
        b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION) * scale
        b_s = tl.where(m_s[None, :], b_s, float("-inf"))
        b_max = tl.max(b_s, 1)
        b_p = tl.exp2(b_s - b_max[:, None])
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
        o_e = tl.arange(0, DV)
        tl.store(p_o + o_part[:, None] * E + o_e[None, :], b_o, mask=m_r[:, None] & (o_e < E)[None, :])
        tl.store(p_max + o_part, b_max, mask=m_r)
        tl.store(p_sum + o_part, tl.sum(b_p, 1), mask=m_r)
    else:
        tl.store(p_max + o_part, tl.full([RM], LEAST, tl.float32), mask=m_r)
        tl.store(p_sum + o_part, tl.zeros([RM], tl.float32), mask=m_r)


@triton.jit
def merge_parts(p_o, p_max, p_sum, first, parts, i_r, R: tl.constexpr, E: tl.constexpr, DV: tl.constexpr, UP: tl.constexpr):
    """One head's softmax output [DV] from its `parts` partials, those from `first` on; zeros if all are empty."""
    STEP: tl.constexpr = 16
    o_p, o_e = tl.arange(0, UP), tl.arange(0, DV)
    o_row = (first + o_p) * R + i_r
    b_sum = tl.load(p_sum + o_row, mask=o_p < parts, other=0.0)
    b_max = tl.load(p_max + o_row, mask=o_p < parts, other=LEAST)
    top = tl.max(b_max, 0)
    total = tl.sum(b_sum * tl.exp2(b_max - top), 0)
    b_o = tl.zeros([DV], tl.float32)
    for i in range(0, parts, STEP):
        o_i = i + tl.arange(0, STEP)
        o_part = (first + o_i) * R + i_r
        full = tl.load(p_sum + o_part, mask=o_i < parts, other=0.0) > 0
        b_weight = tl.exp2(tl.load(p_max + o_part, mask=full, other=LEAST) - top)
        b_part = tl.load(p_o + o_part[:, None] * E + o_e[None, :], mask=full[:, None] & (o_e < E)[None, :], other=0.0)
        b_o += tl.sum(b_part * b_weight[:, None], 0)
    return b_o / tl.where(total > 0, total, 1.0)


@triton.jit(do_not_specialize=["SPLITS", "TILES"])
def merge(
    p_cmp, p_cmp_max, p_cmp_sum, p_o, p_max, p_sum, p_gates, p_out, SPLITS, TILES, stride_gb, stride_gh, stride_gr,
    H: tl.constexpr, R: tl.constexpr, E: tl.constexpr, DV: tl.constexpr, SELECTED_TILES: tl.constexpr,
    SPLITS_UP: tl.constexpr, SELECTED_UP: tl.constexpr, WINDOW_UP: tl.constexpr,
):  # fmt: skip
    """o = g_cmp o_cmp + g_slc o_slc + g_win o_win of one head."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_bg, i_r = i_bh // R, i_bh % R
    b_cmp = merge_parts(p_cmp, p_cmp_max, p_cmp_sum, i_bg * SPLITS, SPLITS, i_r, R, E, DV, SPLITS_UP)
    b_slc = merge_parts(p_o, p_max, p_sum, i_bg * TILES, SELECTED_TILES, i_r, R, E, DV, SELECTED_UP)
    b_win = merge_parts(p_o, p_max, p_sum, i_bg * TILES + SELECTED_TILES, TILES - SELECTED_TILES, i_r, R, E, DV, WINDOW_UP)
    p_gate = p_gates + i_bh // H * stride_gb + i_bh % H * stride_gh
    b_o = b_cmp * tl.load(p_gate).to(tl.float32)
    b_o += b_slc * tl.load(p_gate + stride_gr).to(tl.float32)
    b_o += b_win * tl.load(p_gate + 2 * stride_gr).to(tl.float32)
    o_e = tl.arange(0, DV)
    tl.store(p_out + i_bh * E + o_e, b_o, mask=o_e < E)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, config: NSAConfig, *, lengths: Tensor,
    q_cmp: Tensor, k_win: Tensor | None, v_win: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`nsa_cli.ops.decode.decode_attention` with lengths, int64 [b], on the device: nothing waits for the host."""
    (b, h, _, d), g, e, device = q.shape, k.shape[1], v.shape[3], q.device
    size = q.element_size()
    p = Problem(config=config, b=b, h=h, g=g, n=1, d=d, e=e, dtype=q.dtype, device=device, scale=scale)
    r, block = p.r, config.select_block
    ratio = block // config.compress_stride
    step = triton.next_power_of_2(ratio)
    bj = max(1, min(128, TILE_BYTES[size] // (max(p.dk, p.dv) * size)) // step)
    blocks = config.num_select_blocks(k.shape[2])
    tiles = triton.cdiv(blocks, bj)
    splits = max(1, min(tiles, triton.cdiv(PROGRAMS_A_CORE * cores(device), b * g)))
    per = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, per)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    o_cmp, top, own, right = empty(b * g, splits, r, e), empty(b * g, tiles, r), *(empty(b * g, tiles, r, bj) for _ in "ab")
    cmp_max, cmp_sum = empty(b * g, splits, r), empty(b * g, splits, r)
    heads = {"G": g, "R": r, "RM": max(LEAST_ROWS, p.rp), "D": d, "E": e, "DK": p.dk, "DV": p.dv, "PRECISION": p.precision}
    shape = {"LENGTH": config.compress_block, "STRIDE": config.compress_stride, "RATIO": ratio}
    if k_cmp.shape[2] == 0:  # no block fits into this cache: any address will do, none is read
        k_cmp, v_cmp = k, v
    compressed_split[(b * g * splits,)](
        q_cmp, k_cmp, v_cmp, lengths, o_cmp, cmp_max, cmp_sum, top, own, right, splits, per, tiles, p.scale_log2,
        *q_cmp.stride()[:2], *k_cmp.stride()[:3], *v_cmp.stride()[:3], **heads, **shape, STEP=step, BJ=bj,
        num_warps=WARPS[size], num_stages=2 if size == 2 else 1,
    )  # fmt: skip
    indices = torch.empty(b, g, 1, config.num_selected, dtype=torch.int32, device=device)
    width = max(16, triton.next_power_of_2(blocks))
    ups = {"SPLITS_UP": triton.next_power_of_2(splits)}
    select_blocks[(b * g,)](
        lengths, cmp_max, cmp_sum, top, own, right, indices, splits, tiles, G=g, R=r, **shape, BLOCK=block, BJ=bj,
        NUM=config.num_selected, NUM_INIT=config.num_init, NUM_LOCAL=config.num_local,
        PLACES=triton.next_power_of_2(config.num_selected), **ups, WIDTH=width, num_warps=max(1, min(16, width // 256)),
    )  # fmt: skip
    ring = k_win is not None and v_win is not None
    keys, values = (k_win, v_win) if k_win is not None and v_win is not None else (k, v)
    selected, window = triton.cdiv(config.num_selected * block, GATHERED), triton.cdiv(config.window, GATHERED)
    o, top, total = empty(b * g, selected + window, r, e), *(empty(b * g, selected + window, r) for _ in "ab")
    gather_split[(b * g * (selected + window),)](
        q, k, v, keys, values, indices, lengths, o, top, total, selected + window, p.scale_log2, *q.stride()[:2],
        *k.stride()[:3], *v.stride()[:3], *keys.stride()[:3], *values.stride()[:3], **heads, BLOCK=block,
        NUM=config.num_selected, WINDOW=config.window, RING=ring, SELECTED_TILES=selected, BN=GATHERED, num_warps=WARPS[size],
    )  # fmt: skip
    out = torch.empty(b, h, 1, e, dtype=q.dtype, device=device)
    merge[(b * h,)](
        o_cmp, cmp_max, cmp_sum, o, top, total, gates, out, splits, selected + window, gates.stride(0), gates.stride(1),
        gates.stride(3), H=h, R=r, E=e, DV=p.dv, SELECTED_TILES=selected, **ups,
        SELECTED_UP=triton.next_power_of_2(selected), WINDOW_UP=triton.next_power_of_2(window), num_warps=4,
    )  # fmt: skip
    return out, indices


