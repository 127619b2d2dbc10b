"""`selected_gradient_parts` on Hopper (Gluon): the copy engine gathers an item's queries, products run asynchronously.

A program is an item: the 64 keys of one selection block, and up to ITEM of the queries that chose it. A step has 64 rows, the
heads of 64 / R queries. A multiprocessor has two programs, so that one's tensor cores work while the other takes exponentials
or waits; each has

  a consumer of four warps: five products a step, with dk and dv of the whole item in its registers
  a producer of one warp: q and do of a query are two boxes each, R heads x 64 channels. The boxes of a step's queries fill the
  panels of one tile, one below the other, and the tile looks as if its rows had been adjacent in memory
  a writer of one warp: sends a query's rows of dq to its partial, and says when their buffers have been read

Rows are the products' second side, S^T = k q^T and dP^T = v do^T: P^T and dS^T are then in the registers just as they must be
for dv += P^T do and dk += dS^T q. dS^T goes to shared memory for dq = dS k, which comes in two halves of 64 channels: the lower
one is staged in a buffer of its own, the higher one where dS^T was. That makes 112 KB of buffers, and 113 fit twice. (All this
for heads of 128 channels; of 64, q and do of a query are one box each, dq has no halves, and buffers take 65 KB.)

What an item has no query for is a box outside the tensor, zeros, with a log-sum-exp of infinity; its dq is not sent.

A step moves 48 KB between a multiprocessor and the cache (q and do in, dq out) for 5.2 MFLOP, and asks shared memory for about
1500 cycles and the tensor cores for 1280: bounds of 7.5, 6 and 5.6 ms at 65,536 tokens of 64 heads. `selected_gradient` is the
same for everything else.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment,var-annotated"

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa_cli.ops.triton.hopper import DTYPES, barrier, head_boxes, layout_of, load_box, make_barriers, store_box, view
from nsa_cli.ops.triton.problem import Problem

if TYPE_CHECKING:
    from nsa_cli.ops.triton.launch import Selection

ROWS = gl.constexpr(64)
"""Rows of a step."""
PANEL = gl.constexpr(64)
"""Channels that lie side by side on chip: 128 bytes."""
DIMS = (64, 128)
"""Channels of a head: a panel, or two."""
KEYS = gl.constexpr(64)
"""Keys of a block: what the tensor cores' first side has at least."""
HEADS = (8, 16, 32)
"""Heads of a group: a query's box is whole patterns (8 rows) of shared memory, and no more than a step."""
RING = 2
"""Steps on chip at a time."""
MOST_REGISTERS, REGISTERS = 128, (24, 24)
"""On average of a program's 256 threads (two programs have all), and of a thread of the producer and of the writer: 232 are left
for the consumer's, which is what it needs for products that run asynchronously."""


@gluon.jit
def query_of(p_entries, e, e1, shift, N, FREE: gl.constexpr):
    """The token of entry number e; N, which is outside the tensor, if the item has none."""
    entry = gl.load(p_entries + gl.minimum(e, e1 - 1))
    return gl.where(e < e1, entry // FREE - shift, N)


@gluon.jit
def ask_rows(d_x, s_boxes, full, i_tile, i_b, i_head, o_t, R: gl.constexpr, PANELS: gl.constexpr):
    """A step's tile, of queries o_t: zeros where they are outside the tensor."""
    QUERIES: gl.constexpr = ROWS // R
    mbarrier.expect(full, PANELS * QUERIES * d_x.block_type.nbytes)
    for j in gl.static_range(QUERIES):
        for c in gl.static_range(PANELS):
            s_box = s_boxes.index((i_tile * PANELS + c) * QUERIES + j)
            load_box(d_x, [i_b, i_head, o_t[j], c * PANEL], full, s_box)


@gluon.jit
def produce(
    d_q, d_do, p_entries, s_tiles, full, turn, e0, e1, i_bg, N, G: gl.constexpr, R: gl.constexpr, FREE: gl.constexpr,
    RING: gl.constexpr,
):  # fmt: skip
    """Every step's q and do."""
    QUERIES: gl.constexpr = ROWS // R
    PANELS: gl.constexpr = s_tiles.shape[2] // PANEL
    s_boxes = view(s_tiles, s_tiles.dtype, [(2 * RING + 2) * PANELS * QUERIES, 1, R, 1, PANEL], d_q.layout)
    i_b, i_head = i_bg // G, i_bg % G * R
    for i in range(gl.cdiv(e1 - e0, QUERIES)):
        slot, phase = i % RING, (i // RING) & 1
        o_t = ()
        for j in gl.static_range(QUERIES):
            o_t = o_t + (query_of(p_entries, e0 + i * QUERIES + j, e1, i_bg * N, N, FREE),)  # noqa: RUF005
        mbarrier.wait(turn.index(slot), phase ^ 1)
        ask_rows(d_q, s_boxes, full.index(slot), slot, i_b, i_head, o_t, R, PANELS)
        mbarrier.wait(turn.index(RING + slot), phase ^ 1)
        ask_rows(d_do, s_boxes, full.index(RING + slot), RING + slot, i_b, i_head, o_t, R, PANELS)


@gluon.jit
def write(
    d_dq, p_entries, s_ds, s_low, turn, e0, e1, before, R: gl.constexpr, RING: gl.constexpr, PANELS: gl.constexpr
):
    """Every step's dq to the partial. before: entries before the partial's."""
    QUERIES: gl.constexpr = ROWS // R
    s_low_boxes = view(s_low, s_low.dtype, [QUERIES, R, PANEL], d_dq.layout)
    s_high_boxes = view(s_ds, s_ds.dtype, [QUERIES, R, PANEL], d_dq.layout)
    for i in range(gl.cdiv(e1 - e0, QUERIES)):
        rows = ()
        for j in gl.static_range(QUERIES):
            entry = gl.load(p_entries + gl.minimum(e0 + i * QUERIES + j, e1 - 1))
            rows = rows + ((entry - before) * R,)  # noqa: RUF005
        mbarrier.wait(turn.index(2 * RING), i & 1)
        for j in gl.static_range(QUERIES):
            if e0 + i * QUERIES + j < e1:
                store_box(d_dq, [rows[j], 0], s_low_boxes.index(j))
                if PANELS == 2:
                    store_box(d_dq, [rows[j], PANEL], s_high_boxes.index(j))
        tma.store_wait(0)  # both buffers have been read
        mbarrier.arrive(turn.index(2 * RING + 1), count=1)


@gluon.jit
def consume(
    p_dk, p_dv, p_lse, p_delta, p_gate, p_entries, s_tiles, s_ds, s_low, s_lse, s_delta, s_gate, full, turn, e0, e1,
    i_item, i_bg, N, scale, dk_scale, G: gl.constexpr, R: gl.constexpr, FREE: gl.constexpr, GATED: gl.constexpr,
    RING: gl.constexpr,
):  # fmt: skip
    """dk and dv of the item, and every step's dq."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])  # also of half of dq
    WIDTH: gl.constexpr = s_tiles.shape[2]
    WHOLE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, WHOLE, 2)
    ACROSS: gl.constexpr = gl.SliceLayout(0, SCORES)
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    dtype: gl.constexpr = s_ds.dtype
    PANELS: gl.constexpr = WIDTH // PANEL
    H: gl.constexpr = G * R
    QUERIES: gl.constexpr = ROWS // R
    s_k, s_v = s_tiles.index(2 * RING), s_tiles.index(2 * RING + 1)
    s_panels = view(s_tiles, dtype, [(2 * RING + 2) * PANELS, KEYS, PANEL], s_ds.layout)
    s_k_low, s_k_high = s_panels.index(2 * RING * PANELS), s_panels.index(2 * RING * PANELS + PANELS - 1)
    steps = gl.cdiv(e1 - e0, QUERIES)
    o_m = gl.arange(0, ROWS, layout=FLAT)
    i_row, shift = i_bg % G * R + o_m % R, i_bg * N
    p_lse += (i_bg // G).to(gl.int64) * N * H
    p_delta += (i_bg // G).to(gl.int64) * N * H
    p_gate += (i_bg // G).to(gl.int64) * N * H
    o_a = e0 + o_m // R
    o_row = (gl.load(p_entries + gl.minimum(o_a, e1 - 1)) // FREE - shift) * H + i_row
    s_lse.store(gl.load(p_lse + o_row, mask=o_a < e1, other=float("inf")))
    s_delta.store(gl.load(p_delta + o_row, mask=o_a < e1, other=0.0))
    if GATED:
        s_gate.store(gl.load(p_gate + o_row, mask=o_a < e1, other=0.0))
    b_entry = gl.load(p_entries + gl.minimum(o_a + QUERIES, e1 - 1))
    b_dk = gl.zeros([KEYS, WIDTH], gl.float32, layout=WHOLE)
    b_dv = gl.zeros([KEYS, WIDTH], gl.float32, layout=WHOLE)
    b_zero = gl.zeros([KEYS, ROWS], gl.float32, layout=SCORES)
    mbarrier.wait(full.index(2 * RING), 0)
    barrier()
    for i in range(steps):
        slot, phase = i % RING, (i // RING) & 1
        s_q, s_do = s_tiles.index(slot), s_tiles.index(RING + slot)
        # The next step's numbers come while this one computes, and the entries of the step after it.
        o_a += QUERIES
        o_row = (b_entry // FREE - shift) * H + i_row
        b_next_lse = gl.load(p_lse + o_row, mask=o_a < e1, other=float("inf"))
        b_next_delta = gl.load(p_delta + o_row, mask=o_a < e1, other=0.0)
        if GATED:
            b_next_gate = gl.load(p_gate + o_row, mask=o_a < e1, other=0.0)
        b_entry = gl.load(p_entries + gl.minimum(o_a + QUERIES, e1 - 1))
        mbarrier.wait(full.index(slot), phase)
        b_s = warpgroup_mma(s_k, s_q.permute((1, 0)), b_zero, use_acc=False, is_async=True)
        mbarrier.wait(full.index(RING + slot), phase)
        b_dp = warpgroup_mma(s_v, s_do.permute((1, 0)), b_zero, use_acc=False, is_async=True)
        b_s = warpgroup_mma_wait(1, [b_s])
        b_p = gl.exp2(b_s * scale - gl.expand_dims(s_lse.load(ACROSS), 0))
        if GATED:
            b_p *= gl.expand_dims(s_gate.load(ACROSS), 0)
        b_dv = warpgroup_mma(gl.convert_layout(b_p.to(dtype), LEFT), s_do, b_dv, is_async=True)
        b_dp = warpgroup_mma_wait(1, [b_dp])
        b_ds = (b_p * (b_dp - gl.expand_dims(s_delta.load(ACROSS), 0))).to(dtype)
        b_dk = warpgroup_mma(gl.convert_layout(b_ds, LEFT), s_q, b_dk, is_async=True)
        mbarrier.wait(turn.index(2 * RING + 1), (i & 1) ^ 1)  # the writer has sent dq of the step before
        s_ds.store(b_ds)
        fence_async_shared()
        b_dv = warpgroup_mma_wait(1, [b_dv])
        barrier()  # every warp has written its part of dS, and is done with do and with this step's numbers
        mbarrier.arrive(turn.index(RING + slot), count=1)
        b_low = warpgroup_mma(s_ds.permute((1, 0)), s_k_low, b_zero, use_acc=False, is_async=True)
        s_lse.store(b_next_lse)
        s_delta.store(b_next_delta)
        if GATED:
            s_gate.store(b_next_gate)
        b_dk = warpgroup_mma_wait(1, [b_dk])
        b_low = warpgroup_mma_wait(0, [b_low])
        if PANELS == 2:
            # Both halves at once would need more registers than there are for products that do not wait for one another.
            b_high = warpgroup_mma(s_ds.permute((1, 0)), s_k_high, b_zero, use_acc=False, is_async=True)
        s_low.store(b_low.to(dtype))
        if PANELS == 2:
            b_high = warpgroup_mma_wait(0, [b_high])
            barrier()  # every warp is done with dS, and with q
            s_ds.store(b_high.to(dtype))
        fence_async_shared()
        barrier()  # dq is written, and every warp is done with q
        mbarrier.arrive(turn.index(2 * RING), count=1)
        mbarrier.arrive(turn.index(slot), count=1)
    o_key = gl.arange(0, KEYS, layout=gl.SliceLayout(1, WHOLE))
    o_d = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, WHOLE))
    o_part = gl.expand_dims((i_item.to(gl.int64) * KEYS + o_key) * WIDTH, 1) + gl.expand_dims(o_d, 0)
    gl.store(p_dk + o_part, b_dk * dk_scale)
    gl.store(p_dv + o_part, b_dv)


@gluon.jit(do_not_specialize=["LIST0", "LIST1", "ROW0", "N", "UNITS_A_HEAD", "BLOCKS"])
def gradient_tiles(
    d_q, d_do, d_k, d_v, d_dq, p_dk, p_dv, p_lse, p_delta, p_gate, p_entries, p_ends, p_items, p_item_list, p_item_start,
    p_sel_start, LIST0, LIST1, ROW0, N, UNITS_A_HEAD, BLOCKS, scale, dk_scale, G: gl.constexpr, R: gl.constexpr,
    FREE: gl.constexpr, ITEM: gl.constexpr, PACKED: gl.constexpr, GATED: gl.constexpr, RING: gl.constexpr,
    PANELS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """`selected_gradient.selected_gradient_parts` of one item. d_q, d_do: boxes [1, R, 1, PANEL] of [b, h, n, d]; d_k, d_v: boxes
    [1, 1, KEYS, PANEL]; d_dq: boxes [R, PANEL] of the partial's rows."""
    i_item = gl.program_id(0)
    i_w = gl.load(p_items + LIST0) + i_item
    if i_w < gl.load(p_items + LIST1):
        dtype: gl.constexpr = d_q.dtype
        WIDTH: gl.constexpr = PANEL * PANELS
        TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, WIDTH], dtype)
        HALF: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, PANEL], dtype)
        PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        i_list = gl.load(p_item_list + i_w)
        e0 = gl.load(p_item_start + i_w)
        e1 = gl.minimum(e0 + ITEM, gl.load(p_ends + i_list + 1))
        i_block = i_list % BLOCKS
        i_bg = i_list // BLOCKS // UNITS_A_HEAD
        first = i_block * KEYS
        if PACKED:
            first = gl.load(p_sel_start + i_block)
        # Tiles: RING of q, RING of do, k, v. Half tiles: dS and then the higher channels of dq, the lower channels of dq.
        s_tiles = gl.allocate_shared_memory(dtype, [2 * RING + 2, ROWS, WIDTH], TILE)
        s_ds = gl.allocate_shared_memory(dtype, [KEYS, ROWS], HALF)
        s_low = gl.allocate_shared_memory(dtype, [ROWS, PANEL], HALF)
        s_lse = gl.allocate_shared_memory(gl.float32, [ROWS], PLAIN)
        s_delta = gl.allocate_shared_memory(gl.float32, [ROWS], PLAIN)
        s_gate = s_delta
        if GATED:
            s_gate = gl.allocate_shared_memory(gl.float32, [ROWS], PLAIN)
        # What the consumer waits for (RING of q, RING of do, k and v); whose turn it is (RING of q and RING of do are done with,
        # dq is there, dq has been sent). Two arrays, since what a partition is told takes shared memory, which is full.
        full, turn = make_barriers(2 * RING + 1, 1), make_barriers(2 * RING + 2, 1)
        fence_async_shared()
        barrier()
        s_keys = view(s_tiles, dtype, [(2 * RING + 2) * PANELS, 1, 1, KEYS, PANEL], d_k.layout)
        mbarrier.expect(full.index(2 * RING), 2 * PANELS * d_k.block_type.nbytes)
        for c in gl.static_range(PANELS):
            s_k_box, s_v_box = s_keys.index(2 * RING * PANELS + c), s_keys.index((2 * RING + 1) * PANELS + c)
            load_box(d_k, [i_bg // G, i_bg % G, first, c * PANEL], full.index(2 * RING), s_k_box)
            load_box(d_v, [i_bg // G, i_bg % G, first, c * PANEL], full.index(2 * RING), s_v_box)
        gl.warp_specialize(
            [
                (consume, (
                    p_dk, p_dv, p_lse, p_delta, p_gate, p_entries, s_tiles, s_ds, s_low, s_lse, s_delta, s_gate, full, turn, e0,
                    e1, i_item, i_bg, N, scale, dk_scale, G, R, FREE, GATED, RING,
                )),
                (produce, (d_q, d_do, p_entries, s_tiles, full, turn, e0, e1, i_bg, N, G, R, FREE, RING)),
                (write, (d_dq, p_entries, s_ds, s_low, turn, e0, e1, ROW0 * FREE, R, RING, PANELS)),
            ],
            [1, 1],
            REGISTERS,
        )  # fmt: skip


def fits(p: Problem, s: Selection) -> bool:
    """Whether `selected_gradient_parts` here takes a call (on a GPU that `has_tiles`)."""
    return (
        p.dtype in DTYPES
        and p.d == p.e and p.d in DIMS
        and p.r in HEADS
        and p.config.select_block == s.bs == KEYS.value
        and not s.causal
        and s.index is not None
        and max(p.n * p.h, p.b * p.g * p.n) < 2**31
    )


def selected_gradient_parts(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, gate: Tensor | None, part_dq: Tensor,
    part_dk: Tensor, part_dv: Tensor, units: tuple[int, int], row0: int, s: Selection, p: Problem,
) -> None:  # fmt: skip
    """Writes dq of all entries, and dk and dv of all items, of the units [units[0], units[1]), whose first row (b g t) is row0.

    part_dq: [entries, r, d]. part_dk, part_dv: float32 [items, keys, d]. For a call that `fits`.
    """
    i, heads, width, keys = s.index, p.r, PANEL.value, KEYS.value
    assert i is not None
    rows = [part_dq.shape[0] * heads, p.d]
    d_dq = TensorDescriptor(part_dq, rows, [p.d, 1], [heads, width], layout_of(heads, width, dtype=p.dtype))
    first = p.table("sel_start")
    gradient_tiles[(i.most_items(units[1] - units[0], s.part_entries()),)](
        head_boxes(q, 1, width, heads=heads), head_boxes(do, 1, width, heads=heads), head_boxes(k, keys, width),
        head_boxes(v, keys, width), d_dq, part_dk, part_dv, lse, delta, delta if gate is None else gate, i.entries, i.ends,
        i.items, i.item_list, i.item_start, i.items if first is None else first, units[0] * i.blocks, units[1] * i.blocks, row0,
        p.n, s.a_head, i.blocks, p.scale_log2, p.scale, G=p.g, R=heads, FREE=s.free, ITEM=i.item, PACKED=p.packed,
        GATED=gate is not None, RING=RING, PANELS=p.d // width, REGISTERS=REGISTERS, num_warps=4, maxnreg=MOST_REGISTERS,
    )  # fmt: skip
