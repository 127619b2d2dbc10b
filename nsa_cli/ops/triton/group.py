"""One query a sequence against its cache in one launch: a program has all of a group, its three branches and the selection.

For batches: there are as many programs as groups of heads, and each reads a group's keys one tile after another. What goes
through memory, block sums of the compressed keys and the selection, the same program reads again; nothing is merged. A tile's
keys are W sets, each of which has a warp, a running maximum, a sum and an output of its own, so that warps wait for each other
only where a branch ends.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_cli.ops.triton.attend import LEAST, LEAST_ROWS, blocks_seen, load_tile
from nsa_cli.ops.triton.device import cores
from nsa_cli.ops.triton.overlap import follow, overlap
from nsa_cli.ops.triton.problem import Problem, next_power_of_2
from nsa_cli.ops.triton.selection import top_blocks

DTYPES = (torch.bfloat16, torch.float16)
"""Exact float32 products take more registers than there are."""
MOST_DIM = 128
"""Two outputs of a wider head would not fit into them either."""
GROUPS = 0.7
"""Least groups a multiprocessor: below, several programs a group read faster."""
BLOCKS = 512
"""Most selection blocks of a sequence: beyond, compressed keys take most of the time, which shares of a group read as fast."""
WARPS = 4
"""Of a program, and sets of keys of a tile."""
STAGES = 3
"""Tiles on chip at a time, the one that comes in included."""
SET_BYTES = 2**12
"""Keys of a set."""
PART = 2**11
"""Block sums that importance adds up at a time."""
COMPARISONS = 2**12
"""Of scores with thresholds, at a time."""


@triton.jit
def load_sets(p_x, o_first, m_row, STEP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr):
    """[W, N, DP]: N rows, STEP apart, from each of the places o_first [W] on; zeros where m_row [W, N] is not."""
    o_d = tl.arange(0, DP)
    m_tile = m_row[:, :, None]
    if D != DP:
        m_tile = m_tile & (o_d < D)[None, None, :]
    o_tile = (tl.arange(0, N) * STEP)[:, None] + o_d[None, :]
    return tl.load(p_x + o_first[:, None, None] + o_tile[None, :, :], mask=m_tile, other=0.0, eviction_policy="evict_first")


@triton.jit
def load_queries(p_q, o_row, m_r, D: tl.constexpr, DP: tl.constexpr, W: tl.constexpr):
    """[W, M, DP]: the same rows for every set."""
    b_q = load_tile(p_q, o_row, m_r, D, DP, "evict_last")
    return tl.broadcast_to(b_q[None, :, :], (W, b_q.shape[0], DP))


@triton.jit
def more_keys(b_q, b_k, b_v, m_k, b_max, b_sum, b_o, scale, PRECISION: tl.constexpr):
    """Online softmax of W sets of keys, each for itself: (maximum, sum [W, M], o [W, M, E], p [W, M, N])."""
    b_s = tl.dot(b_q, tl.permute(b_k, (0, 2, 1)), input_precision=PRECISION) * scale
    b_s = tl.where(m_k[:, None, :], b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 2))
    b_p = tl.exp2(b_s - b_new[:, :, None])
    b_decay = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_decay + tl.sum(b_p, 2)
    b_o = b_o * b_decay[:, :, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
    return b_new, b_sum, b_o, b_p


@triton.jit
def set_weights(b_max, b_sum, gate):
    """What every set's o counts in the gated output of its branch [W, M], and the branch's log-sum-exp [M]."""
    top = tl.max(b_max, 0)
    b_weight = tl.exp2(b_max - top[None, :])
    total = tl.sum(b_sum * b_weight, 0)
    lse = tl.where(total > 0, top + tl.log2(tl.maximum(total, 1e-30)), float("inf"))
    return b_weight * (gate / tl.where(total > 0, total, float("inf")))[None, :], lse


@triton.jit
def importance(
    p_own, p_next, p_top, p_lse, o_j, count, R: tl.constexpr, RP: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr,
    RATIO: tl.constexpr, BJ: tl.constexpr, REACH: tl.constexpr,
):  # fmt: skip
    """imp of blocks o_j [WIDTH] from every head's sums of p over them; zero behind the last key."""
    b_score = tl.zeros([WIDTH], tl.float32)
    o_left = tl.maximum(o_j - 1, 0)
    for r in range(0, RP, PART):
        o_r = r + tl.arange(0, PART)
        m_own = (o_r < R)[:, None] & (o_j * RATIO < count)[None, :]
        b_lse = tl.load(p_lse + o_r, mask=o_r < R, other=float("inf"))[:, None]
        b_own = tl.load(p_own + o_r[:, None] * WIDTH + o_j[None, :], mask=m_own, other=0.0)
        b_top = tl.load(p_top + (o_j // BJ)[None, :] * R + o_r[:, None], mask=m_own, other=LEAST)
        b_part = b_own * tl.exp2(b_top - b_lse)
        if REACH > 0:
            m_next = (o_r < R)[:, None] & ((o_j > 0) & (o_left * RATIO < count))[None, :]
            b_next = tl.load(p_next + o_r[:, None] * WIDTH + o_left[None, :], mask=m_next, other=0.0)
            b_top = tl.load(p_top + (o_left // BJ)[None, :] * R + o_r[:, None], mask=m_next, other=LEAST)
            b_part += b_next * tl.exp2(b_top - b_lse)
        b_score += tl.sum(b_part, 0)
    return b_score


@triton.jit
def attend_group(
    p_q, p_q_cmp, p_k, p_v, p_k_cmp, p_v_cmp, p_k_win, p_v_win, p_gates, p_at, p_sums, p_indices, p_out, scale,
    stride_qb, stride_qh, stride_cqb, stride_cqh, stride_kb, stride_kg, stride_vb, stride_vg, stride_ckb, stride_ckg, stride_cvb,
    stride_cvg, stride_wkb, stride_wkg, stride_wvb, stride_wvg, stride_gb, stride_gh, stride_gr, KS: tl.constexpr,
    VS: tl.constexpr, CKS: tl.constexpr, CVS: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    RM: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, LENGTH: tl.constexpr,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr, RATIO: tl.constexpr, NUM: tl.constexpr, NUM_INIT: tl.constexpr,
    NUM_LOCAL: tl.constexpr, PLACES: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr,
    RING: tl.constexpr, W: tl.constexpr, N: tl.constexpr, WAYS: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """out, and the selected blocks, of one group: W sets of N keys at a time, the compressed ones first.

    sums: of every head, what each block gets from its own compressed keys and gives to the next block [2, R, WIDTH], both
    relative to the maximum of their set so far [SETS, R], and log-sum-exp [R]. Rows of keys and values are KS, VS, ... apart.
    """
    BJ: tl.constexpr = N // RATIO
    SETS: tl.constexpr = WIDTH // BJ
    REACH: tl.constexpr = LENGTH // STRIDE - 1
    i_bg = tl.program_id(0).to(tl.int64)
    i_b, i_g = i_bg // G, i_bg % G
    p_keys, p_values = p_k + i_b * stride_kb + i_g * stride_kg, p_v + i_b * stride_vb + i_g * stride_vg
    p_ck, p_cv = p_k_cmp + i_b * stride_ckb + i_g * stride_ckg, p_v_cmp + i_b * stride_cvb + i_g * stride_cvg
    p_wk, p_wv = p_k_win + i_b * stride_wkb + i_g * stride_wkg, p_v_win + i_b * stride_wvb + i_g * stride_wvg
    follow(OVERLAP)
    length = tl.load(p_at + i_b).to(tl.int32) + 1
    count = blocks_seen(length, LENGTH, STRIDE)
    o_r, o_w, o_n = tl.arange(0, RM), tl.arange(0, W), tl.arange(0, N)
    m_r = o_r < R
    b_q = load_queries(p_q_cmp, i_b * stride_cqb + (i_g * R + o_r) * stride_cqh, m_r, D, DK, W)
    p_gate = p_gates + i_b * stride_gb + (i_g * R + o_r) * stride_gh
    g_cmp = tl.load(p_gate, mask=m_r, other=0.0).to(tl.float32)
    g_slc = tl.load(p_gate + stride_gr, mask=m_r, other=0.0).to(tl.float32)
    g_win = tl.load(p_gate + 2 * stride_gr, mask=m_r, other=0.0).to(tl.float32)
    p_own = p_sums + i_bg * (R * (2 * WIDTH + SETS + 1))
    p_next = p_own + R * WIDTH
    p_top = p_next + R * WIDTH
    p_lse = p_top + R * SETS
    o_i = tl.arange(0, RATIO)
    own = tl.minimum(RATIO - o_i, REACH + 1).to(tl.float32)[None, None, None, :]
    right = tl.maximum(o_i - (RATIO - REACH - 1), 0).to(tl.float32)[None, None, None, :]
    b_max = tl.full([W, RM], LEAST, tl.float32)
    b_sum = tl.zeros([W, RM], tl.float32)
    b_o = tl.zeros([W, RM, DV], tl.float32)
    for i in range(0, tl.cdiv(count, W * N)):
        o_set = i * W + o_w
        m_c = o_set[:, None] * N + o_n[None, :] < count
        o_c = (o_set * N).to(tl.int64)
        b_k = load_sets(p_ck, o_c * CKS, m_c, CKS, D, DK, N)
        b_v = load_sets(p_cv, o_c * CVS, m_c, CVS, E, DV, N)
        b_max, b_sum, b_o, b_p = more_keys(b_q, b_k, b_v, m_c, b_max, b_sum, b_o, scale, PRECISION)
        tl.store(p_top + o_set[:, None] * R + o_r[None, :], b_max, mask=m_r[None, :])
        b_blocks = tl.reshape(b_p, (W, RM, BJ, RATIO))
        o_block = o_r[None, :, None] * WIDTH + (o_set[:, None] * BJ + tl.arange(0, BJ)[None, :])[:, None, :]
        tl.store(p_own + o_block, tl.sum(b_blocks * own, 3), mask=m_r[None, :, None])
        if REACH > 0:
            tl.store(p_next + o_block, tl.sum(b_blocks * right, 3), mask=m_r[None, :, None])
    b_weight, lse = set_weights(b_max, b_sum, g_cmp)
    b_out = b_o * b_weight[:, :, None]
    tl.store(p_lse + o_r, lse, mask=m_r)
    b_q = load_queries(p_q, i_b * stride_qb + (i_g * R + o_r) * stride_qh, m_r, D, DK, W)
    p_chosen = p_indices + i_bg * NUM
    tl.debug_barrier()  # every thread reads what others wrote
    o_j = tl.arange(0, WIDTH)
    b_score = importance(p_own, p_next, p_top, p_lse, o_j, count, R, RP, PART, WIDTH, RATIO, BJ, REACH)
    top_blocks(b_score, o_j, (length - 1) // BLOCK, p_chosen, NUM, NUM_INIT, NUM_LOCAL, PLACES, WAYS)
    tl.debug_barrier()
    start = 0 if RING else tl.maximum(length - WINDOW, 0)
    seen = tl.minimum(WINDOW, length)
    selected = tl.cdiv(tl.minimum(NUM, (length - 1) // BLOCK + 1) * BLOCK, W * N)
    window = tl.cdiv(seen, W * N)
    b_max = tl.full([W, RM], LEAST, tl.float32)
    b_sum = tl.zeros([W, RM], tl.float32)
    b_o = tl.zeros([W, RM, DV], tl.float32)
    o_a = o_w * N
    b_block = tl.load(p_chosen + o_a // BLOCK, mask=o_a < NUM * BLOCK, other=-1)
    for i in range(0, selected + window):
        is_selected = i < selected
        o_s = tl.where(is_selected, tl.maximum(b_block, 0) * BLOCK + o_a % BLOCK, start + o_a - selected * (W * N))
        end = tl.where(is_selected, tl.where(b_block >= 0, length, 0), start + seen)
        m_s = o_s[:, None] + o_n[None, :] < end[:, None]
        o_s = o_s.to(tl.int64)
        o_a += W * N  # the next tile's blocks are asked for before this one's keys
        b_block = tl.load(p_chosen + o_a // BLOCK, mask=o_a < NUM * BLOCK, other=-1)
        b_k = load_sets(tl.where(is_selected, p_keys, p_wk), o_s * KS, m_s, KS, D, DK, N)
        b_v = load_sets(tl.where(is_selected, p_values, p_wv), o_s * VS, m_s, VS, E, DV, N)
        if i == selected:
            b_weight, _ = set_weights(b_max, b_sum, g_slc)
            b_out += b_o * b_weight[:, :, None]
            b_max = tl.full([W, RM], LEAST, tl.float32)
            b_sum = tl.zeros([W, RM], tl.float32)
            b_o = tl.zeros([W, RM, DV], tl.float32)
        b_max, b_sum, b_o, _ = more_keys(b_q, b_k, b_v, m_s, b_max, b_sum, b_o, scale, PRECISION)
    b_weight, _ = set_weights(b_max, b_sum, g_win)
    b_all = tl.sum(b_out + b_o * b_weight[:, :, None], 0)
    o_e = tl.arange(0, DV)
    o_out = (i_bg * R + o_r)[:, None] * E + o_e[None, :]
    tl.store(p_out + o_out, b_all.to(p_out.dtype.element_ty), mask=m_r[:, None] & (o_e < E)[None, :])


def set_of(p: Problem) -> int:
    """Keys of a set, which is all or a part of one block."""
    block = p.config.select_block
    return min(block & -block, 32, max(LEAST_ROWS, SET_BYTES // (max(p.dk, p.dv) * p.dtype.itemsize)))


def fits(p: Problem, blocks: int, k: Tensor, v: Tensor, k_win: Tensor, v_win: Tensor) -> bool:
    """Whether `attend_in_one` takes such a call and is faster than kernels that share a group among programs. blocks: selection
    blocks of the caches."""
    n, ratio = set_of(p), p.config.select_block // p.config.compress_stride
    return (
        p.dtype in DTYPES
        and p.b * p.g >= GROUPS * cores(p.device)
        and p.r <= LEAST_ROWS
        and max(p.dk, p.dv) <= MOST_DIM
        and blocks <= BLOCKS
        and n >= LEAST_ROWS
        and n % ratio == 0
        and (k.stride(2), v.stride(2)) == (k_win.stride(2), v_win.stride(2))
    )


def attend_in_one(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, p: Problem, *, positions: Tensor,
    q_cmp: Tensor, k_win: Tensor, v_win: Tensor, ring: bool, blocks: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`decode.decode_attention` of a call that `fits`. blocks: selection blocks of the caches."""
    config, r, n, w = p.config, p.r, set_of(p), WARPS
    ratio = config.select_block // config.compress_stride
    width = max(16, next_power_of_2(blocks), w * n // ratio)
    sums = torch.empty(p.b * p.g, r * (2 * width + width * ratio // n + 1), dtype=torch.float32, device=p.device)
    indices = torch.empty(p.b, p.g, 1, config.num_selected, dtype=torch.int32, device=p.device)
    out = torch.empty(p.b, p.h, 1, p.e, dtype=p.dtype, device=p.device)
    attend_group[(p.b * p.g,)](
        q, q_cmp, k, v, k_cmp, v_cmp, k_win, v_win, gates, positions, sums, indices, out, p.scale_log2, *q.stride()[:2],
        *q_cmp.stride()[:2], *k.stride()[:2], *v.stride()[:2], *k_cmp.stride()[:2], *v_cmp.stride()[:2], *k_win.stride()[:2],
        *v_win.stride()[:2], gates.stride(0), gates.stride(1), gates.stride(3), KS=k.stride(2), VS=v.stride(2),
        CKS=k_cmp.stride(2), CVS=v_cmp.stride(2), G=p.g, R=r, RP=p.rp, RM=LEAST_ROWS, D=p.d, E=p.e, DK=p.dk, DV=p.dv,
        LENGTH=config.compress_block, STRIDE=config.compress_stride, BLOCK=config.select_block, RATIO=ratio,
        NUM=config.num_selected, NUM_INIT=config.num_init, NUM_LOCAL=config.num_local,
        PLACES=next_power_of_2(config.num_selected), WIDTH=width, WINDOW=config.window, RING=ring, W=w, N=n,
        WAYS=min(16, COMPARISONS // width), PART=min(p.rp, PART // width), PRECISION=p.precision,
        num_warps=WARPS, num_stages=STAGES, **overlap(p.device),
    )  # fmt: skip
    return out, indices
