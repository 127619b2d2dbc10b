"""`attend.attend_dkv` on Hopper (Gluon): FlashAttention-3's backward without dq.

A program makes dk and dv of 64 keys a consumer from a range of queries, and keeps both in registers all the time. A step has 64
rows, the heads of 64 / R query tokens of a group: a producer warp brings them as a box of q and one of do, which lie in
shared memory as rows of a matrix, and their numbers (log-sum-exp, delta, gate), through rings of buffers. Every consumer, four
warps, has keys of its own; they share what comes, and pass over the steps in which none of their keys is seen. With one
consumer a multiprocessor has two programs, which suits a branch of few keys; with two it has one, and half as much comes from
the cache.

Rows are the products' second side, S^T = k q^T and dP^T = v do^T: P^T and dS^T are then in the registers just as they must be
for dv += P^T do and dk += dS^T q. The order of a step's products:

  S_i and dP_i are asked for; P_i when S_i is there; dv_i is asked for; dS_i when dP_i is there; dk_i is asked for, awaited
  EARLY: S_i, dk_(i-1) and dP_i are asked for; P_i when S_i is there; dv_i is asked for; dS_i when dP_i is there; dv_i is awaited

EARLY, the tensor cores have two products for the time of the exponentials, not one, and a step's buffers go back in the next one.
dS crosses the step in float32, since halves would be unpacked and packed again. (With 128 channels that needs the 240 registers
of two consumers, else products wait for one another.)

Tokens outside the tensor come as zeros, numbers too, and are masked. A program without queries takes one such step. Of splits
the last come first, all key tiles' at a time, which read the same queries; but those at the diagonal come last of all: whole
ones first, so that all multiprocessors end together.

Triton puts a barrier of the four warps before each arrival at a barrier in memory: the code relies on it.
`attend.attend_dkv` is the same function for everything else.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment,var-annotated"

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa_cli.ops.triton import attend
from nsa_cli.ops.triton.hopper import DTYPES, barrier, head_boxes, layout_of, load_box, make_barriers, make_tiles, view
from nsa_cli.ops.triton.problem import Problem, cdiv, lawful_strides, split_queries

ROWS = gl.constexpr(64)
"""Rows of a step."""
KEYS = gl.constexpr(64)
"""Keys of a consumer: what the tensor cores' first side has at least."""
PANEL = 64
"""Channels that lie side by side on chip: 128 bytes."""
DIMS = (PANEL, 2 * PANEL)
"""Channels of a head."""
HEADS = (1, 2, 4, 8, 16, 32, 64)
"""Heads of a group: a step has whole groups."""


class Plan(NamedTuple):
    """consumers: of a program. ring: steps on chip at a time. early: the order of products."""

    consumers: int
    ring: int
    early: bool


LONG, SHORT, NARROW = Plan(2, 4, True), Plan(1, 2, False), Plan(1, 4, True)
"""For the compressed branch and the window; for the forced blocks; for heads of 64 channels."""
REGISTERS = {1: (24,), 2: (240, 24)}
"""By consumers: of a thread of each consumer but the first (which has what is left: as many), and of the producer."""
MOST_REGISTERS = {1: 128}
"""By consumers: on average of a program's threads, where two programs have all registers."""


query_bounds = gluon.jit(attend.query_bounds.fn)
"""The portable kernel's own, in this language."""


@gluon.jit
def make_numbers(COUNT: gl.constexpr):
    """COUNT buffers of a number a row, in the order in which a consumer's threads hold columns of scores: by four."""
    ORDER: gl.constexpr = gl.SharedLinearLayout([[1], [8], [2], [4], [16], [32]])
    return gl.allocate_shared_memory(gl.float32, [COUNT, ROWS], ORDER)


@gluon.jit
def make_steps(d_x, COUNT: gl.constexpr):
    """COUNT buffers for the rows of a step: as tiles [ROWS, width], and as d_x's boxes [1, tokens, heads, width]."""
    TOKENS: gl.constexpr = d_x.block_shape[1]
    R: gl.constexpr = d_x.block_shape[2]
    WIDTH: gl.constexpr = d_x.block_shape[3]
    FLAT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, WIDTH], d_x.dtype)
    s_x = gl.allocate_shared_memory(d_x.dtype, [COUNT, ROWS, WIDTH], FLAT)
    return s_x, view(s_x, d_x.dtype, [COUNT, 1, TOKENS, R, WIDTH], d_x.layout)


@gluon.jit
def produce(
    d_q, d_do, p_lse, p_delta, p_gate, s_q, s_do, s_lse, s_delta, s_gate, full_q, full_do, empty, t0, steps, i_b,
    i_g, N, G: gl.constexpr, R: gl.constexpr, GATED: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Every step's q, do and numbers."""
    TOKENS: gl.constexpr = ROWS // R
    H: gl.constexpr = G * R
    o_m = gl.arange(0, ROWS, layout=gl.BlockedLayout([1], [32], [1], [0]))
    first = i_b.to(gl.int64) * N * H + i_g * R
    p_lse += first
    p_delta += first
    p_gate += first
    for i in range(steps):
        slot, phase = i % RING, (i // RING) & 1
        o_t = t0 + o_m // R
        o_row = o_t * H + o_m % R
        b_lse = gl.load(p_lse + o_row, mask=o_t < N, other=0.0)
        b_delta = gl.load(p_delta + o_row, mask=o_t < N, other=0.0)
        if GATED:
            b_gate = gl.load(p_gate + o_row, mask=o_t < N, other=0.0)
        mbarrier.wait(empty.index(slot), phase ^ 1)
        mbarrier.expect(full_q.index(slot), d_q.block_type.nbytes)
        load_box(d_q, [i_b, t0, i_g * R, 0], full_q.index(slot), s_q.index(slot))
        s_lse.index(slot).store(b_lse)
        s_delta.index(slot).store(b_delta)
        if GATED:
            s_gate.index(slot).store(b_gate)
        barrier()  # the numbers are written: what follows says so, too
        mbarrier.expect(full_do.index(slot), d_do.block_type.nbytes)
        load_box(d_do, [i_b, t0, i_g * R, 0], full_do.index(slot), s_do.index(slot))
        t0 += TOKENS


@gluon.jit
def pass_over(full_q, full_do, empty, i, RING: gl.constexpr):
    """A step that this consumer does not need."""
    slot, phase = i % RING, (i // RING) & 1
    mbarrier.wait(full_q.index(slot), phase)
    mbarrier.wait(full_do.index(slot), phase)
    mbarrier.arrive(empty.index(slot), count=1)


@gluon.jit
def dkv_step(
    s_k, s_v, s_q, s_do, s_lse, s_delta, s_gate, full_q, full_do, empty, i, before, more, b_ds, b_dk, b_dv, t0,
    low, high, all_from, all_to, scale, R: gl.constexpr, GATED: gl.constexpr, RING: gl.constexpr, EARLY: gl.constexpr,
    SCORES: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """Step i, but for its dk if EARLY: then dk of the step before, whose slot is `before`. more: there is one (if not, dS is
    zeros)."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, WHOLE, 2)
    ACROSS: gl.constexpr = gl.SliceLayout(0, SCORES)
    dtype: gl.constexpr = s_q.dtype
    slot, phase = i % RING, (i // RING) & 1
    b_zero = gl.zeros([KEYS, ROWS], gl.float32, layout=SCORES)
    mbarrier.wait(full_q.index(slot), phase)
    s_next = warpgroup_mma(s_k, s_q.index(slot).permute((1, 0)), b_zero, use_acc=False, is_async=True)
    if EARLY:
        b_half = gl.convert_layout(b_ds.to(dtype), LEFT)
        dk_next = warpgroup_mma(b_half, s_q.index(before), b_dk, is_async=True)
    mbarrier.wait(full_do.index(slot), phase)
    dp_next = warpgroup_mma(s_v, s_do.index(slot).permute((1, 0)), b_zero, use_acc=False, is_async=True)
    if EARLY:
        b_s = warpgroup_mma_wait(2, [s_next])
    else:
        b_s = warpgroup_mma_wait(1, [s_next])
    b_p = gl.exp2(b_s * scale - gl.expand_dims(s_lse.index(slot).load(ACROSS), 0))
    if (t0 < all_from) | (t0 + ROWS // R > all_to):
        o_m = gl.expand_dims(gl.arange(0, ROWS, layout=ACROSS), 0)
        seen = (o_m >= gl.expand_dims((low - t0) * R, 1)) & (o_m < gl.expand_dims((high - t0) * R, 1))
        b_p = gl.where(seen, b_p, 0.0)
    if GATED:
        b_p *= gl.expand_dims(s_gate.index(slot).load(ACROSS), 0)
    if EARLY:
        b_p, b_dk = warpgroup_mma_wait(1, [b_p, dk_next])  # b_p: not before the exponentials
    dv_next = warpgroup_mma(gl.convert_layout(b_p.to(dtype), LEFT), s_do.index(slot), b_dv, is_async=True)
    if EARLY:
        mbarrier.arrive(empty.index(before), count=1, pred=more)
    b_dp = warpgroup_mma_wait(1, [dp_next])
    b_ds = b_p * (b_dp - gl.expand_dims(s_delta.index(slot).load(ACROSS), 0))
    if EARLY:
        b_dv = warpgroup_mma_wait(0, [dv_next])
    else:
        b_half = gl.convert_layout(b_ds.to(dtype), LEFT)
        dk_next = warpgroup_mma(b_half, s_q.index(slot), b_dk, is_async=True)
        b_dk, b_dv = warpgroup_mma_wait(0, [dk_next, dv_next])
        mbarrier.arrive(empty.index(slot), count=1)
    return b_ds, b_dk, b_dv


@gluon.jit
def consume(
    W: gl.constexpr, p_dk, p_dv, p_start, p_end, p_first, p_last, s_k, s_v, s_q, s_do, s_lse, s_delta, s_gate, full_kv, full_q,
    full_do, empty, j0, t0, steps, i_part, i_g, N, OFFSET, COUNT, scale, dk_scale, G: gl.constexpr, R: gl.constexpr,
    BRANCH: gl.constexpr, LENGTH: gl.constexpr, STRIDE: gl.constexpr, BLOCK: gl.constexpr, NUM_INIT: gl.constexpr,
    NUM_LOCAL: gl.constexpr, WINDOW: gl.constexpr, PACKED: gl.constexpr, GATED: gl.constexpr, RING: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """dk and dv of the program's W-th 64 keys. COUNT: keys of all. i_part: split and batch entry."""
    WIDTH: gl.constexpr = s_k.shape[2]
    TOKENS: gl.constexpr = ROWS // R
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    WHOLE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    j0 += W * KEYS
    o_s = gl.minimum(j0 + gl.arange(0, KEYS, layout=gl.SliceLayout(1, SCORES)), COUNT - 1)
    low, high = query_bounds(
        o_s, N, OFFSET, p_start, p_end, p_first, p_last, BRANCH, LENGTH, STRIDE, BLOCK, NUM_INIT, NUM_LOCAL, WINDOW, PACKED
    )
    from_query, all_to = query_bounds(
        gl.minimum(j0, COUNT - 1), N, OFFSET, p_start, p_end, p_first, p_last, BRANCH, LENGTH, STRIDE, BLOCK, NUM_INIT, NUM_LOCAL,
        WINDOW, PACKED,
    )  # fmt: skip
    all_from, to_query = query_bounds(
        gl.minimum(j0 + KEYS, COUNT) - 1, N, OFFSET, p_start, p_end, p_first, p_last, BRANCH, LENGTH, STRIDE, BLOCK, NUM_INIT,
        NUM_LOCAL, WINDOW, PACKED,
    )  # fmt: skip
    # Its own steps, at least one; in a step of none of its keys' queries all is masked.
    first = gl.minimum(gl.maximum(from_query - t0, 0) // TOKENS, steps - 1)
    last = gl.minimum(gl.maximum(gl.cdiv(gl.maximum(to_query - t0, 0), TOKENS), first + 1), steps)
    for i in range(0, first):
        pass_over(full_q, full_do, empty, i, RING)
    t0 += first * TOKENS
    b_ds = gl.zeros([KEYS, ROWS], gl.float32, layout=SCORES)
    b_dk = gl.zeros([KEYS, WIDTH], gl.float32, layout=WHOLE)
    b_dv = gl.zeros([KEYS, WIDTH], gl.float32, layout=WHOLE)
    before = first % RING
    mbarrier.wait(full_kv, 0)
    for i in range(first, last):
        b_ds, b_dk, b_dv = dkv_step(
            s_k.index(W), s_v.index(W), s_q, s_do, s_lse, s_delta, s_gate, full_q, full_do, empty, i, before,
            i > first, b_ds, b_dk, b_dv, t0, low, high, all_from, all_to, scale, R, GATED, RING, EARLY, SCORES, WHOLE,
        )  # fmt: skip
        before = i % RING
        t0 += TOKENS
    if EARLY:
        b_half = gl.convert_layout(b_ds.to(s_q.dtype), gl.DotOperandLayout(0, WHOLE, 2))
        dk_next = warpgroup_mma(b_half, s_q.index(before), b_dk, is_async=True)
        b_dk = warpgroup_mma_wait(0, [dk_next])
        mbarrier.arrive(empty.index(before), count=1)
    for i in range(last, steps):
        pass_over(full_q, full_do, empty, i, RING)
    o_s = j0 + gl.arange(0, KEYS, layout=gl.SliceLayout(1, WHOLE))
    o_d = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, WHOLE))
    o_out = gl.expand_dims(((i_part.to(gl.int64) * COUNT + o_s) * G + i_g) * WIDTH, 1) + gl.expand_dims(o_d, 0)
    gl.store(p_dk + o_out, b_dk * dk_scale, mask=gl.expand_dims(o_s < COUNT, 1))
    gl.store(p_dv + o_out, b_dv, mask=gl.expand_dims(o_s < COUNT, 1))


@gluon.jit(do_not_specialize=["N", "OFFSET", "COUNT", "GRID", "CHUNK", "SPLITS"])
def dkv_tiles(
    d_q, d_do, d_k, d_v, p_dk, p_dv, p_lse, p_delta, p_gate, p_start, p_end, p_first, p_last, N, OFFSET, COUNT, GRID, CHUNK,
    SPLITS, scale, dk_scale, G: gl.constexpr, R: gl.constexpr, BRANCH: gl.constexpr, LENGTH: gl.constexpr, STRIDE: gl.constexpr,
    BLOCK: gl.constexpr, NUM_INIT: gl.constexpr, NUM_LOCAL: gl.constexpr, WINDOW: gl.constexpr, PACKED: gl.constexpr,
    GATED: gl.constexpr, CONSUMERS: gl.constexpr, RING: gl.constexpr, EARLY: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """`attend.attend_dkv`. d_q, d_do: boxes [1, 64 / R, R, width] of [b, n, h, d]; d_k, d_v: boxes [1, 1, KEYS, width]. COUNT:
    keys; GRID: batch entries times groups; CHUNK: tokens of a split, whole steps."""
    TOKENS: gl.constexpr = ROWS // R
    BN: gl.constexpr = CONSUMERS * KEYS
    i = gl.program_id(0)
    i_b, i_g = i % GRID // G, i % GRID % G
    i //= GRID
    tiles = gl.cdiv(COUNT, BN)
    j0 = i % tiles * BN
    from_query, _ = query_bounds(
        j0, N, OFFSET, p_start, p_end, p_first, p_last, BRANCH, LENGTH, STRIDE, BLOCK, NUM_INIT, NUM_LOCAL, WINDOW, PACKED
    )
    _, to_query = query_bounds(
        gl.minimum(j0 + BN, COUNT) - 1, N, OFFSET, p_start, p_end, p_first, p_last, BRANCH, LENGTH, STRIDE, BLOCK, NUM_INIT,
        NUM_LOCAL, WINDOW, PACKED,
    )  # fmt: skip
    own, late = gl.minimum(from_query // CHUNK, SPLITS - 1), SPLITS - 1 - i // tiles
    i_split = gl.where(late == 0, own, late - (late <= own).to(gl.int32))
    t0 = gl.maximum(from_query // TOKENS * TOKENS, i_split * CHUNK)
    steps = gl.cdiv(gl.minimum(to_query, (i_split + 1) * CHUNK) - t0, TOKENS)
    if steps <= 0:
        t0 = gl.cdiv(N, TOKENS) * TOKENS
        steps = 1
    i_part = i_split * (GRID // G) + i_b
    s_k, s_k_box = make_tiles(d_k, CONSUMERS)
    s_v, s_v_box = make_tiles(d_v, CONSUMERS)
    s_q, s_q_box = make_steps(d_q, RING)
    s_do, s_do_box = make_steps(d_do, RING)
    s_lse, s_delta = make_numbers(RING), make_numbers(RING)
    s_gate = s_delta
    if GATED:
        s_gate = make_numbers(RING)
    full_kv = make_barriers(CONSUMERS, 1)
    full_q, full_do, empty = make_barriers(RING, 1), make_barriers(RING, 1), make_barriers(RING, CONSUMERS)
    fence_async_shared()
    barrier()
    for w in gl.static_range(CONSUMERS):
        mbarrier.expect(full_kv.index(w), d_k.block_type.nbytes + d_v.block_type.nbytes)
        load_box(d_k, [i_b, i_g, j0 + w * KEYS, 0], full_kv.index(w), s_k_box.index(w))
        load_box(d_v, [i_b, i_g, j0 + w * KEYS, 0], full_kv.index(w), s_v_box.index(w))
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (consume, (
                    0, p_dk, p_dv, p_start, p_end, p_first, p_last, s_k, s_v, s_q, s_do, s_lse, s_delta, s_gate,
                    full_kv.index(0), full_q, full_do, empty, j0, t0, steps, i_part, i_g, N, OFFSET, COUNT, scale,
                    dk_scale, G, R, BRANCH, LENGTH, STRIDE, BLOCK, NUM_INIT, NUM_LOCAL, WINDOW, PACKED, GATED, RING, EARLY,
                )),
                (produce, (
                    d_q, d_do, p_lse, p_delta, p_gate, s_q_box, s_do_box, s_lse, s_delta, s_gate, full_q, full_do, empty,
                    t0, steps, i_b, i_g, N, G, R, GATED, RING,
                )),
            ],
            [1],
            REGISTERS,
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (
                    0, p_dk, p_dv, p_start, p_end, p_first, p_last, s_k, s_v, s_q, s_do, s_lse, s_delta, s_gate,
                    full_kv.index(0), full_q, full_do, empty, j0, t0, steps, i_part, i_g, N, OFFSET, COUNT, scale,
                    dk_scale, G, R, BRANCH, LENGTH, STRIDE, BLOCK, NUM_INIT, NUM_LOCAL, WINDOW, PACKED, GATED, RING, EARLY,
                )),
                (consume, (
                    1, p_dk, p_dv, p_start, p_end, p_first, p_last, s_k, s_v, s_q, s_do, s_lse, s_delta, s_gate,
                    full_kv.index(1), full_q, full_do, empty, j0, t0, steps, i_part, i_g, N, OFFSET, COUNT, scale,
                    dk_scale, G, R, BRANCH, LENGTH, STRIDE, BLOCK, NUM_INIT, NUM_LOCAL, WINDOW, PACKED, GATED, RING, EARLY,
                )),
                (produce, (
                    d_q, d_do, p_lse, p_delta, p_gate, s_q_box, s_do_box, s_lse, s_delta, s_gate, full_q, full_do, empty,
                    t0, steps, i_b, i_g, N, G, R, GATED, RING,
                )),
            ],
            [4, 1],
            REGISTERS,
        )  # fmt: skip


def fits(p: Problem) -> bool:
    """Whether `attend_dkv` here takes a call (on a GPU that `has_tiles`)."""
    return (
        p.dtype in DTYPES and p.d == p.e and p.d in DIMS and p.r in HEADS and max(p.n * p.h, p.keys, p.b * p.n) < 2**30
    )  # fmt: skip


def token_boxes(x: Tensor, heads: int) -> TensorDescriptor:
    """x [b, h, n, d] in boxes [1, tokens, heads, d] of [b, n, h, d]: the rows of a step."""
    b, h, n, d = x.shape
    shape, box = [b, n, h, d], [1, ROWS.value // heads, heads, d]
    strides = [*lawful_strides(shape[:3], [x.stride(0), x.stride(2), x.stride(1)], 16), 1]
    return TensorDescriptor(x, shape, strides, box, layout_of(*box, dtype=x.dtype))


def attend_dkv(
    branch: str, q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, gate: Tensor | None, p: Problem,
    keys: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`launch.attend_dkv`, for a call that `fits`."""
    keys = k.shape[2] if keys is None else keys
    plan = NARROW if p.d == PANEL else LONG if branch in ("cmp", "win") else SHORT
    step = ROWS.value // p.r
    tiles = cdiv(keys, plan.consumers * KEYS.value) * p.b * p.g
    splits, chunk = split_queries(branch, tiles, step, p)
    dk = torch.empty(splits, p.b, keys, p.g, p.d, dtype=torch.float32, device=p.device)
    dv = torch.empty(splits, p.b, keys, p.g, p.e, dtype=torch.float32, device=p.device)
    names = ("start", "end", "first", "last")
    tables = [lse if table is None else table for table in map(p.table, names)]
    cap = MOST_REGISTERS.get(plan.consumers)
    dkv_tiles[(tiles * splits,)](
        token_boxes(q, p.r), token_boxes(do, p.r), head_boxes(k, KEYS.value, p.d), head_boxes(v, KEYS.value, p.d), dk, dv, lse,
        delta, delta if gate is None else gate, *tables, p.n, p.offset, keys, p.b * p.g, chunk, splits, p.scale_log2, p.scale,
        G=p.g, R=p.r, BRANCH=attend.BRANCHES[branch].value, **p.bounds(), GATED=gate is not None, CONSUMERS=plan.consumers,
        RING=plan.ring, EARLY=plan.early, REGISTERS=REGISTERS[plan.consumers], num_warps=4, **({"maxnreg": cap} if cap else {}),
    )  # fmt: skip
    return (dk[0], dv[0]) if splits == 1 else (dk.sum(0), dv.sum(0))
