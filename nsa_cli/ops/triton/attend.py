"""Attention of every query over one contiguous range of keys, forward and backward.

Three of the operator's parts are of this kind: the compressed branch, the window, and the forced blocks of the selected
branch (the newest ones and the first ones). `key_bounds` gives a query its range, `query_bounds` a key the queries that
see it; both never decrease, so a tile's range runs from its first row's to its last row's, and only tiles at an edge are
masked. Packed documents come in through the bounds alone.

A tile of M rows is M / RP query tokens of one unit of heads: either the R heads of a group (RP is R rounded up to a power of
two), so that K and V are read once for the whole group, or a single head (R = RP = 1; SHARE units have the same keys). UNITS is
their number in a batch entry. Tiles that stream past (K, V, and in `attend_dkv` q and do) come through the copy engine's
descriptors, whose unit dimensions stand first; a group's tile that stays is loaded by pointers. Triton 3.6 would take it
from a descriptor's box of several dimensions to registers, which spills, and was seen to be wrong (D 64, a group's
rows, two key tiles); one head's box stays in shared memory, where operands belong. Scores are in log2 units: `scale` has
log2(e) in it.
In the backward, with the gate g of the branch and delta = rowsum(do * o): dv = (g P)^T do, dS = g P (do V^T - delta),
dq = scale dS K, dk = scale dS^T Q.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

CMP = tl.constexpr(0)
"""Compressed keys: the blocks that are complete at the query."""
WIN = tl.constexpr(1)
"""The w newest tokens."""
LOCAL = tl.constexpr(2)
"""The num_local newest selection blocks, up to the query."""
INIT = tl.constexpr(3)
"""The first num_init selection blocks, as far as they are not LOCAL."""
BRANCHES = {"cmp": CMP, "win": WIN, "local": LOCAL, "init": INIT, "first": CMP}
"""As launches name them. "first": keys to which tables give their ranges of queries, as they do to packed compressed ones."""
LEAST = tl.constexpr(-1e30)
"""Where running maxima start."""
LEAST_ROWS = 16
"""Of a tile: tl.dot takes no fewer."""


@triton.jit
def blocks_seen(length, LENGTH: tl.constexpr, STRIDE: tl.constexpr):
    """Complete compressed blocks of the first `length` tokens (the division of a negative number would round up)."""
    return tl.where(length >= LENGTH, (length - LENGTH) // STRIDE + 1, 0)


@triton.jit
def row_offsets(i_b, i_u, o_t, o_r, stride_b, stride_h, stride_t, R: tl.constexpr):
    """Where a tile's rows begin in a tensor [b, h, t, d]."""
    o_head = (i_u * R + o_r).to(tl.int64)
    return i_b.to(tl.int64) * stride_b + o_head * stride_h + o_t.to(tl.int64) * stride_t


@triton.jit
def tile_mask(m_row, D: tl.constexpr, DP: tl.constexpr):
    """[M, DP], or [M, 1] where no column is padding."""
    m_tile = m_row[:, None]
    if D != DP:
        m_tile = m_tile & (tl.arange(0, DP) < D)[None, :]
    return m_tile


@triton.jit
def load_tile(p_x, o_row, m_row, D: tl.constexpr, DP: tl.constexpr, EVICT: tl.constexpr):
    """[M, DP] from rows that begin at o_row; zeros beyond."""
    p_tile = p_x + o_row[:, None] + tl.arange(0, DP)[None, :]
    return tl.load(p_tile, mask=tile_mask(m_row, D, DP), other=0.0, eviction_policy=EVICT)


@triton.jit
def store_tile(p_x, b_x, o_row, m_row, D: tl.constexpr, DP: tl.constexpr, EVICT: tl.constexpr):
    """The opposite of `load_tile`, in p_x's dtype."""
    p_tile = p_x + o_row[:, None] + tl.arange(0, DP)[None, :]
    tl.store(p_tile, b_x.to(p_x.dtype.element_ty), mask=tile_mask(m_row, D, DP), eviction_policy=EVICT)


@triton.jit
def load_rows(d_x, i_b, i_u, t0, RP: tl.constexpr, M: tl.constexpr, D: tl.constexpr):
    """The tile [M, D] of a unit's rows from token t0 on; zeros beyond the tensor."""
    if RP == 1:
        b_x = d_x.load([i_b, i_u, t0, 0])
    else:
        b_x = d_x.load([i_b, i_u, t0, 0, 0])
    return b_x.reshape(M, D)


@triton.jit
def load_queries(x, i_b, i_u, t0, o_row, m_row, RP: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """A tile that stays: from a descriptor where a unit is one head, from a pointer where it is a group."""
    if RP == 1:
        b_x = x.load([i_b, i_u, t0, 0]).reshape(M, DP)
    else:
        b_x = load_tile(x, o_row, m_row, D, DP, "")
    return b_x


@triton.jit
def store_queries(x, b_x, i_b, i_u, t0, o_row, m_row, RP: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """The opposite of `load_queries`."""
    if RP == 1:
        x.store([i_b, i_u, t0, 0], b_x.to(x.dtype).reshape(1, 1, M, DP))
    else:
        store_tile(x, b_x, o_row, m_row, D, DP, "")


@triton.jit
def key_bounds(
    o_t, OFFSET, p_start, p_base, BRANCH: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
    NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Keys [low, high) that query o_t (a scalar or a block of tokens), which is token o_t + OFFSET, attends to."""
    start = o_t * 0
    if PACKED:
        start = tl.load(p_start + o_t)
    o_a = o_t + OFFSET
    o_p = o_a - start
    if BRANCH == CMP:
        low = start * 0
        if PACKED:
            low = tl.load(p_base + o_t)
        # Triton's // truncates toward zero: without the guard a query below l - 1 would see block 0.
        high = low + tl.where(o_p >= LENGTH - 1, (o_p - LENGTH + 1) // STRIDE + 1, 0)
    elif BRANCH == WIN:
        low = tl.maximum(o_a - WINDOW + 1, start)
        high = o_a + 1
    else:
        high = o_a + 1
        low = tl.minimum(start + tl.maximum(o_p // BLOCK - NUM_LOCAL + 1, 0) * BLOCK, high)
        if BRANCH == INIT:
            high = tl.minimum(low, start + NUM_INIT * BLOCK)
            low = start
    return low, high


@triton.jit
def query_bounds(
    o_s, N, OFFSET, p_start, p_end, p_first, p_last, BRANCH: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK: tl.constexpr, NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Queries [low, high) that see key o_s: the inverse of `key_bounds`."""
    if BRANCH == CMP:
        if PACKED:
            low = tl.load(p_first + o_s)
            high = tl.load(p_last + o_s)
        else:
            low = tl.minimum(tl.maximum(o_s * STRIDE + LENGTH - 1 - OFFSET, 0), N)
            high = o_s * 0 + N
    else:
        start = o_s * 0
        high = o_s * 0 + N + OFFSET
        if PACKED:
            start = tl.load(p_start + o_s)
            high = tl.load(p_end + o_s)
        low = o_s
        if BRANCH == WIN:
            high = tl.minimum(high, o_s + WINDOW)
        else:
            block = (o_s - start) // BLOCK
            local = tl.minimum(tl.maximum(start + (block + NUM_LOCAL) * BLOCK, o_s), high)
            if BRANCH == LOCAL:
                high = local
            else:
                low = tl.where(block < NUM_INIT, local, high)
        low = tl.maximum(low - OFFSET, 0)
        high = tl.maximum(high - OFFSET, 0)
    return low, high


@triton.jit
def attend_keys(
    b_q, b_acc, b_max, b_sum, d_k, d_v, i_b, i_g, low, high, from_key, all_from, all_to, to_key, scale,
    DK: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One online softmax over the keys from_key .. to_key, tiles outside [all_from, all_to) masked by row."""
    for j in range(from_key, to_key, BN):
        b_k = d_k.load([i_b, i_g, j, 0]).reshape(BN, DK)
        b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION)  # [M, BN]
        if (j < all_from) | (j + BN > all_to):
            o_s = (j + tl.arange(0, BN))[None, :]
            b_s = tl.where((o_s >= low[:, None]) & (o_s < high[:, None]), b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_p = tl.exp2(b_s * scale - b_new[:, None])
        b_scale = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_scale + tl.sum(b_p, 1)
        b_max = b_new
        b_v = d_v.load([i_b, i_g, j, 0]).reshape(BN, DV)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_scale[:, None], input_precision=PRECISION)
    return b_acc, b_max, b_sum


@triton.jit(do_not_specialize=["N", "OFFSET", "GRID"])
def attend_forward(
    x_q, d_k, d_v, x_o, p_lse, p_start, p_base, N, OFFSET, GRID, scale, stride_qb, stride_qh, stride_qt, stride_ob,
    stride_oh, stride_ot, UNITS: tl.constexpr, SHARE: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BRANCH: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK: tl.constexpr, NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
    M: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o and log-sum-exp (log2 units; +inf where nothing is seen) of a tile; late, heavy tiles first."""
    BQ: tl.constexpr = M // RP
    i = tl.program_id(0)
    i_bu = i % GRID
    i_b, i_u = i_bu // UNITS, i_bu % UNITS
    i_g = i_u // SHARE
    t0 = (tl.cdiv(N, BQ) - 1 - i // GRID) * BQ
    t1 = tl.minimum(t0 + BQ, N) - 1
    o_m = tl.arange(0, M)
    o_t, o_r = t0 + o_m // RP, o_m % RP
    low, high = key_bounds(
        tl.minimum(o_t, N - 1), OFFSET, p_start, p_base, BRANCH, LENGTH, STRIDE, BLOCK, NUM_INIT, NUM_LOCAL, WINDOW, PACKED
    )
    from_key, all_to = key_bounds(t0, OFFSET, p_start, p_base, BRANCH, LENGTH, STRIDE, BLOCK, NUM_INIT, NUM_LOCAL, WINDOW, PACKED)
    all_from, to_key = key_bounds(t1, OFFSET, p_start, p_base, BRANCH, LENGTH, STRIDE, BLOCK, NUM_INIT, NUM_LOCAL, WINDOW, PACKED)
    m_row = (o_t < N) & (o_r < R)
    o_row = row_offsets(i_b, i_u, o_t, o_r, stride_qb, stride_qh, stride_qt, R)
    b_q = load_queries(x_q, i_b, i_u, t0, o_row, m_row, RP, M, D, DK)
    b_max = tl.full([M], -1e30, tl.float32)
    b_sum = tl.zeros([M], tl.float32)
    b_acc = tl.zeros([M, DV], tl.float32)
    b_acc, b_max, b_sum = attend_keys(
        b_q, b_acc, b_max, b_sum, d_k, d_v, i_b, i_g, low, high, from_key, all_from, all_to, to_key, scale,
        DK, DV, BN, PRECISION,
    )  # fmt: skip
    seen = b_sum > 0.0
    b_one = tl.where(seen, b_sum, 1.0)
    o_row = row_offsets(i_b, i_u, o_t, o_r, stride_ob, stride_oh, stride_ot, R)
    store_queries(x_o, b_acc / b_one[:, None], i_b, i_u, t0, o_row, m_row, RP, M, E, DV)
    o_lse = (i_b.to(tl.int64) * N + o_t) * (UNITS * R) + i_u * R + o_r
    tl.store(p_lse + o_lse, tl.where(seen, b_max + tl.log2(b_one), float("inf")), mask=m_row)


@triton.jit
def gradient_keys(
    b_acc, b_q, b_do, b_lse, b_delta, b_gate, d_k, d_v, i_b, i_g, low, high, from_key, all_from, all_to, to_key, scale,
    DK: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """b_acc [M, DK] + g P (do V^T - delta) K over the keys from_key .. to_key."""
    for j in range(from_key, to_key, BN):
        b_k = d_k.load([i_b, i_g, j, 0]).reshape(BN, DK)
        b_v = d_v.load([i_b, i_g, j, 0]).reshape(BN, DV)
        b_p = tl.exp2(tl.dot(b_q, b_k.T, input_precision=PRECISION) * scale - b_lse[:, None])
        if (j < all_from) | (j + BN > all_to):
            o_s = (j + tl.arange(0, BN))[None, :]
            b_p = tl.where((o_s >= low[:, None]) & (o_s < high[:, None]), b_p, 0.0)
        if GATED:
            b_p *= b_gate[:, None]
        b_ds = b_p * (tl.dot(b_do, b_v.T, input_precision=PRECISION) - b_delta[:, None])
        b_acc = tl.dot(b_ds.to(b_k.dtype), b_k, b_acc, input_precision=PRECISION)
    return b_acc


@triton.jit(do_not_specialize=["N", "OFFSET", "GRID"])
def attend_dq(
    x_q, x_do, d_k, d_v, x_dq, p_lse, p_delta, p_gate, p_start, p_base, N, OFFSET, GRID, scale, dq_scale, stride_qb,
    stride_qh, stride_qt, stride_ob, stride_oh, stride_ot, stride_db, stride_dh, stride_dt,
    UNITS: tl.constexpr, SHARE: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BRANCH: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK: tl.constexpr, NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
    M: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, ADD: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """dq of a tile, added to what x_dq holds if ADD."""
    BQ: tl.constexpr = M // RP
    i = tl.program_id(0)
    i_bu = i % GRID
    i_b, i_u = i_bu // UNITS, i_bu % UNITS
    i_g = i_u // SHARE
    t0 = (tl.cdiv(N, BQ) - 1 - i // GRID) * BQ
    t1 = tl.minimum(t0 + BQ, N) - 1
    o_m = tl.arange(0, M)
    o_t, o_r = t0 + o_m // RP, o_m % RP
    low, high = key_bounds(
        tl.minimum(o_t, N - 1), OFFSET, p_start, p_base, BRANCH, LENGTH, STRIDE, BLOCK, NUM_INIT, NUM_LOCAL, WINDOW, PACKED
    )
    from_key, all_to = key_bounds(t0, OFFSET, p_start, p_base, BRANCH, LENGTH, STRIDE, BLOCK, NUM_INIT, NUM_LOCAL, WINDOW, PACKED)
    all_from, to_key = key_bounds(t1, OFFSET, p_start, p_base, BRANCH, LENGTH, STRIDE, BLOCK, NUM_INIT, NUM_LOCAL, WINDOW, PACKED)
    m_row = (o_t < N) & (o_r < R)
    o_row = row_offsets(i_b, i_u, o_t, o_r, stride_qb, stride_qh, stride_qt, R)
    b_q = load_queries(x_q, i_b, i_u, t0, o_row, m_row, RP, M, D, DK)
    o_row = row_offsets(i_b, i_u, o_t, o_r, stride_ob, stride_oh, stride_ot, R)
    b_do = load_queries(x_do, i_b, i_u, t0, o_row, m_row, RP, M, E, DV)
    o_row = (i_b.to(tl.int64) * N + o_t) * (UNITS * R) + i_u * R + o_r
    b_lse = tl.load(p_lse + o_row, mask=m_row, other=float("inf"))
    b_delta = tl.load(p_delta + o_row, mask=m_row, other=0.0)
    b_acc = tl.zeros([M, DK], tl.float32)
    b_acc = gradient_keys(
        b_acc, b_q, b_do, b_lse, b_delta, b_delta, d_k, d_v, i_b, i_g, low, high, from_key, all_from, all_to, to_key, scale,
        DK, DV, BN, PRECISION, False,
    )  # fmt: skip
    b_acc = b_acc * dq_scale
    if GATED:
        b_acc = b_acc * tl.load(p_gate + o_row, mask=m_row, other=0.0)[:, None]
    o_row = row_offsets(i_b, i_u, o_t, o_r, stride_db, stride_dh, stride_dt, R)
    if ADD:
        b_acc += load_queries(x_dq, i_b, i_u, t0, o_row, m_row, RP, M, D, DK).to(tl.float32)
    store_queries(x_dq, b_acc, i_b, i_u, t0, o_row, m_row, RP, M, D, DK)


@triton.jit(do_not_specialize=["N", "OFFSET", "KEYS", "GRID", "CHUNK"])
def attend_dkv(
    d_q, d_do, d_k, d_v, p_dk, p_dv, p_lse, p_delta, p_gate, p_start, p_end, p_first, p_last, N, OFFSET, KEYS, GRID, CHUNK,
    scale, dk_scale, UNITS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BRANCH: tl.constexpr, LENGTH: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK: tl.constexpr, NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
    M: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """dk and dv of BN keys from the queries [i_split CHUNK, (i_split + 1) CHUNK): float32, one part a split.

    Scores are transposed [BN, M], so that P^T and dS^T go into the next product as they are.
    """
    BQ: tl.constexpr = M // RP
    i = tl.program_id(0)
    i_bu = i % GRID
    i_b, i_u = i_bu // UNITS, i_bu % UNITS
    tiles = tl.cdiv(KEYS, BN)
    i_split = i // GRID // tiles
    j0 = i // GRID % tiles * BN
    j1 = tl.minimum(j0 + BN, KEYS) - 1
    o_s = j0 + tl.arange(0, BN)
    low, high = query_bounds(
        tl.minimum(o_s, KEYS - 1), N, OFFSET, p_start, p_end, p_first, p_last, BRANCH, LENGTH, STRIDE, BLOCK, NUM_INIT,
        NUM_LOCAL, WINDOW, PACKED,
    )  # fmt: skip
    from_query, all_to = query_bounds(
        j0, N, OFFSET, p_start, p_end, p_first, p_last, BRANCH, LENGTH, STRIDE, BLOCK, NUM_INIT, NUM_LOCAL, WINDOW, PACKED
    )
    all_from, to_query = query_bounds(
        j1, N, OFFSET, p_start, p_end, p_first, p_last, BRANCH, LENGTH, STRIDE, BLOCK, NUM_INIT, NUM_LOCAL, WINDOW, PACKED
    )
    from_query = tl.maximum(from_query // BQ * BQ, i_split * CHUNK)  # CHUNK is a multiple of BQ: no tile is in two splits
    to_query = tl.minimum(to_query, (i_split + 1) * CHUNK)
    b_k = d_k.load([i_b, i_u, j0, 0]).reshape(BN, DK)
    b_v = d_v.load([i_b, i_u, j0, 0]).reshape(BN, DV)
    b_dk = tl.zeros([BN, DK], tl.float32)
    b_dv = tl.zeros([BN, DV], tl.float32)
    o_m = tl.arange(0, M)
    o_head = i_u * R + o_m % RP
    for t0 in range(from_query, to_query, BQ):
        b_q = load_rows(d_q, i_b, i_u, t0, RP, M, DK)
        b_do = load_rows(d_do, i_b, i_u, t0, RP, M, DV)
        o_t = t0 + o_m // RP
        o_row = (i_b.to(tl.int64) * N + o_t) * (UNITS * R) + o_head
        m_row = (o_t < N) & (o_m % RP < R)
        b_lse = tl.load(p_lse + o_row, mask=m_row, other=float("inf"))
        b_delta = tl.load(p_delta + o_row, mask=m_row, other=0.0)
        b_p = tl.exp2(tl.dot(b_k, b_q.T, input_precision=PRECISION) * scale - b_lse[None, :])
        if GATED:
            b_p *= tl.load(p_gate + o_row, mask=m_row, other=0.0)[None, :]
        if (t0 < all_from) | (t0 + BQ > all_to):
            b_p = tl.where((low[:, None] <= o_t[None, :]) & (o_t[None, :] < high[:, None]), b_p, 0.0)
        b_dp = tl.dot(b_v, b_do.T, input_precision=PRECISION)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_dk = tl.dot((b_p * (b_dp - b_delta[None, :])).to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    o_key = ((i_split.to(tl.int64) * (GRID // UNITS) + i_b) * KEYS + o_s) * UNITS + i_u
    o_d, o_e = tl.arange(0, DK), tl.arange(0, DV)
    m_key = (o_s < KEYS)[:, None]
    tl.store(p_dk + o_key[:, None] * D + o_d[None, :], b_dk * dk_scale, mask=m_key & (o_d < D)[None, :])
    tl.store(p_dv + o_key[:, None] * E + o_e[None, :], b_dv, mask=m_key & (o_e < E)[None, :])
