"""Importance of selection blocks and the exact choice among them (eq. 9 to 12), one chunk of queries at a time.

Importance is a second pass over the compressed keys with the known log-sum-exp (`block_importance`): nothing of size N x N / d
is stored, and float32 block scores only for a chunk of queries. Or the compressed pass stores the block sums of every head,
float16, for a chunk of queries too (`attend_tiles`, on Hopper), and `select_from_sums` adds them up. Blocks are numbered over
all documents (`sel_first`: a block's first compressed key), and inside their document in the result.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from nsa_cli.ops.triton.attend import CMP, blocks_seen, key_bounds

WORD = tl.constexpr(32)
"""Blocks whose choice is one integer."""
SPREAD = tl.constexpr(128)
"""Compressed keys of a tile whose block sums `attend_tiles` stores: a word of blocks."""


@triton.jit(do_not_specialize=["T0", "T1", "N", "OFFSET", "KEYS", "GRID", "KEY_TILES"])
def block_importance(
    d_q, p_k, p_lse, p_scores, p_start, p_base, p_sel_base, p_sel_first, p_sel_last, T0, T1, N, OFFSET, KEYS, BLOCKS, GRID,
    KEY_TILES, scale, stride_kb, stride_kg, stride_ks, G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DK: tl.constexpr,
    LENGTH: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, PACKED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """imp[t, j] = sum over the group's heads and over c of p[t, h, c] overlap(c, j), for BM queries and BN / STEP blocks.

    Selection block j has the compressed keys j l' / d + i, i = 0 .. l' / d - 1 (STEP places, a power of two), of which the
    last l / d - 1 reach into block j + 1 too. The key tile stays while the heads' queries stream past; tiles overlap by one
    block, the left neighbour, so that nothing crosses programs.
    """
    RATIO: tl.constexpr = BLOCK // STRIDE
    REACH: tl.constexpr = LENGTH // STRIDE - 1
    TILE: tl.constexpr = BN // STEP
    # Neighbouring programs have the same queries, a group's worth of which is the larger part of what is read.
    i_bg = tl.program_id(0) // KEY_TILES % GRID
    i_b, i_g = i_bg // G, i_bg % G
    t0 = T0 + (tl.cdiv(T1 - T0, BM) - 1 - tl.program_id(0) // KEY_TILES // GRID) * BM
    j0 = tl.program_id(0) % KEY_TILES * (TILE - 1) - 1  # the left neighbour of the first block that is written
    t1 = tl.minimum(t0 + BM, T1) - 1
    from_block, to_block = 0, (t1 + OFFSET) // BLOCK + 1
    if PACKED:
        from_block = tl.load(p_sel_base + t0)
        to_block = tl.load(p_sel_base + t1) + (t1 - tl.load(p_start + t1)) // BLOCK + 1
    if (j0 + 1 < to_block) & (j0 + TILE > from_block):
        o_n = tl.arange(0, BN)
        o_j, o_i = j0 + o_n // STEP, o_n % STEP
        m_c = (o_j >= 0) & (o_j < BLOCKS) & (o_i < RATIO)
        o_c = o_j * RATIO + o_i
        if PACKED:
            o_c = tl.load(p_sel_first + o_j, mask=m_c, other=0) + o_i
            m_c = m_c & (o_c < tl.load(p_sel_last + o_j, mask=m_c, other=0))
        m_c = m_c & (o_c < KEYS)
        o_d = tl.arange(0, DK)
        o_k = i_b.to(tl.int64) * stride_kb + i_g.to(tl.int64) * stride_kg + o_c.to(tl.int64) * stride_ks
        b_k = tl.load(p_k + o_k[:, None] + o_d[None, :], mask=m_c[:, None] & (o_d < D)[None, :], other=0.0)
        b_k = tl.trans(b_k)
        o_t = t0 + tl.arange(0, BM)
        m_t = o_t < N
        o_lse = (i_b.to(tl.int64) * N + o_t) * (G * R) + i_g * R
        b_p = tl.zeros([BM, BN], tl.float32)
        b_next = tl.load(p_lse + o_lse, mask=m_t, other=float("inf"))
        for r in range(R):
            b_lse = b_next
            b_next = tl.load(p_lse + o_lse + r + 1, mask=m_t & (r + 1 < R), other=float("inf"))
            b_q = d_q.load([i_b, i_g * R + r, t0, 0]).reshape(BM, DK)
            b_p += tl.exp2(tl.dot(b_q, b_k, input_precision=PRECISION) * scale - b_lse[:, None])
        low, high = key_bounds(tl.minimum(o_t, N - 1), OFFSET, p_start, p_base, CMP, LENGTH, STRIDE, BLOCK, 0, 0, 0, PACKED)
        m_p = m_c[None, :] & (o_c[None, :] >= low[:, None]) & (o_c[None, :] < high[:, None])
        b_p = tl.reshape(tl.where(m_p, b_p, 0.0), (BM, TILE, STEP))
        o_i = tl.arange(0, STEP)[None, None, :]
        b_score = tl.sum(b_p * tl.minimum(RATIO - o_i, REACH + 1).to(tl.float32), 2)
        o_j = j0 + tl.arange(0, TILE)
        if REACH > 0:
            b_right = tl.sum(b_p * tl.maximum(o_i - (RATIO - REACH - 1), 0).to(tl.float32), 2)
            o_left = tl.maximum(tl.arange(0, TILE) - 1, 0)
            b_score += tl.gather(b_right, tl.broadcast_to(o_left[None, :], (BM, TILE)), 1)
        o_score = (i_bg.to(tl.int64) * (T1 - T0) + o_t - T0)[:, None] * BLOCKS + o_j[None, :]
        m_score = (o_t < T1)[:, None] & ((o_j > j0) & (o_j < BLOCKS))[None, :]
        tl.store(p_scores + o_score, b_score, mask=m_score)


@triton.jit
def free_blocks(o_j, current, NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr):
    """Which blocks are forced for a query of block `current`, and which others it may choose."""
    forced = (o_j <= current) & ((o_j < NUM_INIT) | (o_j > current - NUM_LOCAL))
    return forced, (o_j <= current) & (forced == 0)


@triton.jit
def threshold(bits, candidates, places, WAYS: tl.constexpr):
    """(low, count): of bits, -1 where there is no candidate, a number that exactly `places` of the candidates reach, or, where
    several equal it, the greatest that more do; and how many reach it. All do where they are no more than places.

    Bisection between the least and the greatest. WAYS: thresholds tried at a time. One is least work; more, of bits [n], are
    fewer steps, where a program waits for nothing else.
    """
    low = tl.where(places > 0, 0, 0x7FFFFFFF)
    count = tl.where(places > 0, candidates, 0)  # of bits >= low
    if count > places:
        high = tl.max(bits) + 1
        low = tl.min(tl.where(bits >= 0, bits, 0x7FFFFFFF))
        while (count != places) & (high - low > 1):
            if WAYS == 1:
                middle = low + (high - low) // 2
                above = tl.sum((bits >= middle).to(tl.int32))
                enough = above >= places
                low = tl.where(enough, middle, low)
                count = tl.where(enough, above, count)
                high = tl.where(enough, high, middle)
            else:
                step = tl.maximum((high - low) // (WAYS + 1), 1)
                at = low + (tl.arange(0, WAYS) + 1) * step
                above = tl.sum((bits[:, None] >= at[None, :]).to(tl.int32), 0)
                enough = above >= places  # of the lowest thresholds
                passed = tl.sum(enough.to(tl.int32), 0)
                count = tl.minimum(count, tl.min(tl.where(enough, above, 0x7FFFFFFF), 0))
                low += passed * step
                high = tl.where(passed < WAYS, low + step, high)
    return low, count


@triton.jit
def top_blocks(
    b_score, o_j, current, p_out, NUM: tl.constexpr, NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr, PLACES: tl.constexpr,
    WAYS: tl.constexpr,
):  # fmt: skip
    """Writes the forced blocks and the most important others of one query, ascending, -1 behind; ties go to the lower block.

    Scores are not negative, so that they order like their bits; NaN counts as infinity. A threshold has exactly the free places
    at or above it, or, among equals, a prefix sum breaks the tie.
    """
    forced, candidate = free_blocks(o_j, current, NUM_INIT, NUM_LOCAL)
    b_score = tl.minimum(b_score, float("inf"))  # of a number and NaN, the number
    bits = tl.where(candidate, tl.maximum(b_score.to(tl.int32, bitcast=True), 0), -1)
    count_forced = tl.sum(forced.to(tl.int32), 0)
    candidates = current + 1 - count_forced
    places = NUM - count_forced
    low, count = threshold(bits, candidates, places, WAYS)
    chosen = bits >= low
    if count > places:
        equal = bits == low
        above = count - tl.sum(equal.to(tl.int32), 0)
        chosen = (bits > low) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= places - above))
    chosen = (chosen & candidate) | forced
    tl.store(p_out + tl.cumsum(chosen.to(tl.int32), 0) - 1, o_j, mask=chosen)
    o_n = tl.arange(0, PLACES)
    taken = count_forced + tl.minimum(places, candidates)
    tl.store(p_out + o_n, tl.full([PLACES], -1, tl.int32), mask=(o_n >= taken) & (o_n < NUM))


@triton.jit
def below(o_word, end):
    """Of every word's blocks, as bits, those below `end`."""
    count = tl.minimum(tl.maximum(end - o_word * WORD, 0), WORD)
    return tl.where(count < WORD, (1 << tl.minimum(count, WORD - 1)) - 1, -1)


@triton.jit
def population(words):
    """Ones in every uint32."""
    words -= (words >> 1) & 0x55555555
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def top_of_many(
    b_score, current, p_out, NUM: tl.constexpr, NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr, PLACES: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """`top_blocks` of scores [WORDS, WORD], with less work where there are many: the choice goes through words of bits."""
    o_word = tl.arange(0, WORDS)
    o_bit = tl.arange(0, WORD)
    init = tl.minimum(NUM_INIT, current + 1)
    local = tl.maximum(current + 1 - NUM_LOCAL, init)
    candidates = local - init
    count_forced = current + 1 - candidates
    places = NUM - count_forced
    o_j = o_word[:, None] * WORD + o_bit[None, :]
    b_score = tl.minimum(b_score, float("inf"))  # of a number and NaN, the number
    bits = tl.where((o_j >= init) & (o_j < local), tl.maximum(b_score.to(tl.int32, bitcast=True), 0), -1)
    low, count = threshold(bits, candidates, places, 1)
    chosen = bits >= low
    if count > places:
        equal = (bits == low).to(tl.int32)
        rows = tl.sum(equal, 1)
        rank = (tl.cumsum(rows, 0) - rows)[:, None] + tl.cumsum(equal, 1)
        chosen = (bits > low) | ((equal > 0) & (rank <= places - (count - tl.sum(rows, 0))))
    words = tl.sum(tl.where(chosen, 1 << o_bit[None, :], 0), 1)
    words = (words | below(o_word, init) | (below(o_word, current + 1) & ~below(o_word, local))).to(tl.uint32, bitcast=True)
    counts = population(words)
    place = tl.cumsum(counts, 0) - counts
    most = tl.max(counts, 0)
    for _ in range(most):
        lowest = words ^ (words & (words - 1))
        bit = (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        tl.store(p_out + place, o_word * WORD + bit, mask=words != 0)
        place += 1
        words = words & (words - 1)
    o_n = tl.arange(0, PLACES)
    taken = count_forced + tl.minimum(places, candidates)
    tl.store(p_out + o_n, tl.full([PLACES], -1, tl.int32), mask=(o_n >= taken) & (o_n < NUM))


@triton.jit(do_not_specialize=["T0", "T1", "N", "OFFSET"])
def select_top(
    p_scores, p_indices, p_start, p_sel_base, T0, T1, N, OFFSET, BLOCKS, BLOCK: tl.constexpr, NUM: tl.constexpr,
    NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr, PACKED: tl.constexpr, PLACES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """`top_of_many` of one query's scores."""
    i = tl.program_id(0)
    rows = T1 - T0
    i_bg, i_t = i // rows, i % rows
    t = T0 + i_t
    start, base = 0, 0
    if PACKED:
        start = tl.load(p_start + t)
        base = tl.load(p_sel_base + t)
    current = (t + OFFSET - start) // BLOCK
    o_j = tl.arange(0, WORDS)[:, None] * WORD + tl.arange(0, WORD)[None, :]
    o_row = i_bg.to(tl.int64) * rows + i_t
    b_score = tl.load(p_scores + o_row * BLOCKS + base + o_j, mask=o_j <= current - NUM_LOCAL, other=0.0)
    p_out = p_indices + (i_bg.to(tl.int64) * N + t) * NUM
    top_of_many(b_score, current, p_out, NUM, NUM_INIT, NUM_LOCAL, PLACES, WORDS)


@triton.jit(do_not_specialize=["KEYS", "GRID"])
def spread_keys(
    p_k, p_v, p_out, KEYS, GRID, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs, G: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out [2, b, g, tiles SPREAD, WIDTH]: k and v, zeros beyond them, every tile in another order.

    Place 8 a + 2 i + j (i < 4, j < 2) has key 32 i + 2 a + j: of the tensor cores' columns a thread has 8 a + 2 i and its
    neighbour, for every a, so that it has 32 keys side by side.
    """
    i_bg, i_tile = tl.program_id(0) % GRID, tl.program_id(0) // GRID
    i_b, i_g = i_bg // G, i_bg % G
    o_n = tl.arange(0, SPREAD)
    o_d = tl.arange(0, WIDTH)[None, :]
    o_s = i_tile * SPREAD + o_n // 2 % 4 * (SPREAD // 4) + o_n // 8 * 2 + o_n % 2
    m_s = (o_s < KEYS)[:, None]
    tiles = tl.num_programs(0) // GRID
    o_out = (i_bg * tiles + i_tile).to(tl.int64) * (SPREAD * WIDTH) + o_n[:, None] * WIDTH + o_d
    if tl.program_id(1) == 0:
        o_k = i_b.to(tl.int64) * stride_kb + i_g.to(tl.int64) * stride_kg + o_s.to(tl.int64) * stride_ks
        tl.store(p_out + o_out, tl.load(p_k + o_k[:, None] + o_d, mask=m_s & (o_d < D), other=0.0))
    else:
        o_v = i_b.to(tl.int64) * stride_vb + i_g.to(tl.int64) * stride_vg + o_s.to(tl.int64) * stride_vs
        p_all = p_out + tl.num_programs(0).to(tl.int64) * (SPREAD * WIDTH)
        tl.store(p_all + o_out, tl.load(p_v + o_v[:, None] + o_d, mask=m_s & (o_d < E), other=0.0))


@triton.jit(do_not_specialize=["T0", "T1", "N", "OFFSET", "TILES"])
def select_from_sums(
    p_sums, p_marks, p_lse, p_indices, T0, T1, N, OFFSET, TILES, G: tl.constexpr, R: tl.constexpr, LENGTH: tl.constexpr,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr, NUM: tl.constexpr, NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr,
    PLACES: tl.constexpr, WORDS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """`top_of_many` of one query, whose importance is added up from what `attend_tiles` stored for its heads.

    sums float16 [b, h, T1 - T0, TILES, WORD]; marks float32 [b, h, T1 - T0, TILES, 2]: what a tile's sums are relative to (log2
    units), and what its last key adds to the next tile's first block. Tiles of which a query sees nothing need not be there.
    """
    tl.static_assert(SPREAD * STRIDE == WORD * BLOCK, "a tile of keys is a word of blocks")
    i = tl.program_id(0)
    rows = T1 - T0
    i_bg, i_t = i // rows, i % rows
    i_b, i_g = i_bg // G, i_bg % G
    t = T0 + i_t
    o_tile, o_n = tl.arange(0, WORDS), tl.arange(0, WORD)
    m_tile = o_tile * SPREAD < blocks_seen(t + OFFSET + 1, LENGTH, STRIDE)
    o_row = (i_bg.to(tl.int64) * R * rows + i_t) * TILES
    p_tile = p_sums + o_row * WORD + (o_tile[:, None] * WORD + o_n[None, :])
    p_mark = p_marks + o_row * 2 + o_tile * 2
    p_head = p_lse + (i_b.to(tl.int64) * N + t) * (G * R) + i_g * R
    step = rows.to(tl.int64) * TILES
    b_score = tl.zeros([WORDS, WORD], tl.float32)
    b_last = tl.zeros([WORDS], tl.float32)
    for _ in range(R // AT_ONCE):
        for _ in tl.static_range(AT_ONCE):
            b_weight = tl.exp2(tl.load(p_mark, mask=m_tile, other=float("-inf")) - tl.load(p_head))
            b_last += tl.load(p_mark + 1, mask=m_tile, other=0.0) * b_weight
            b_score += tl.load(p_tile, mask=m_tile[:, None], other=0.0).to(tl.float32) * b_weight[:, None]
            p_tile += step * WORD
            p_mark += step * 2
            p_head += 1
    b_last = tl.where(o_tile > 0, tl.gather(b_last, tl.maximum(o_tile - 1, 0), 0), 0.0)
    b_score += tl.where(o_n == 0, 1.0, 0.0)[None, :] * b_last[:, None]
    p_out = p_indices + (i_bg.to(tl.int64) * N + t) * NUM
    top_of_many(b_score, (t + OFFSET) // BLOCK, p_out, NUM, NUM_INIT, NUM_LOCAL, PLACES, WORDS)
