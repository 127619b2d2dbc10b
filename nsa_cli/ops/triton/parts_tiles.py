"""`selected.selected_parts` on Hopper (Gluon): the copy engine gathers queries and writes partials, tensor cores multiply.

A program walks through work items (`index.py`): one block's 64 keys and values stay on chip, while its queries pass by, 64 rows
(tokens times a group's heads) a stage of one ring of buffers. No warp computes an address of a row:

    one warp        loads: an item's keys and values, then its queries, RING stages ahead, also into the program's next item
    4 warps, each   one of the consumers: s = q k^T, softmax of 64 keys, o = p v; what it makes goes to the stage where q was
    one warp        stores: a stage's partials, a query's heads at a time; then the stage is free again

Consumers take turns by stages; each waits for its own products alone: they hide one another's latency. Items differ in length:
programs ask for the next one when they have loaded one, and which program makes it changes nothing in it. What bounds the kernel
is the cache between the multiprocessors and memory: 16 KiB of queries come, and 16 KiB of partials go, for every 2.1 MFLOP.
Barriers: `full` (queries have come), `done` (partials are on chip), `free` (they have been read); of keys `full_kv`, `free_kv`.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment,var-annotated"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa_cli.ops.triton.device import cores
from nsa_cli.ops.triton.hopper import DTYPES, barrier, head_boxes, load_box, store_box, view
from nsa_cli.ops.triton.problem import Problem

if TYPE_CHECKING:
    from nsa_cli.ops.triton.launch import Selection

ROWS = gl.constexpr(64)
"""Of a stage: tokens times a group's heads. The first side of a product of the tensor cores has as many."""
KEYS = gl.constexpr(64)
"""Of a block."""
DIM = gl.constexpr(128)
"""Channels of queries, keys and values. With 64 the portable kernel is faster."""
PANEL, PANELS = gl.constexpr(64), gl.constexpr(2)
"""Channels that lie side by side on chip, and how many times as many there are."""
HEADS = (8, 16, 32)
"""Of a group: whole 1 KiB patterns of the copy engine, and whole queries in a stage."""


CONSUMERS = gl.constexpr(3)
RING, RING_KV = gl.constexpr(9), gl.constexpr(2)
"""Stages of queries, and items' keys and values, on chip at a time."""
MOST_REGISTERS, REGISTERS = 128, (152, 152, 40, 40)
"""Of a thread: on average of all warps; of the consumers but for the first, and of the warps that load and store. Of a consumer
ptxas wants 112 at least, or it waits for every single product."""


@gluon.jit
def entries_of(p_item_start, i_w, items, end, ITEM: gl.constexpr):
    """Entries [e0, e1) of item i_w, or of the last one. An item ends where the next one starts, which needs no list."""
    i_w = gl.minimum(i_w, items - 1)
    next_start = gl.load(p_item_start + gl.minimum(i_w + 1, items - 1))
    e0 = gl.load(p_item_start + i_w)
    return e0, gl.minimum(e0 + ITEM, gl.where(i_w + 1 < items, next_start, end))


@gluon.jit
def tell(s_item, slot, e0, e1):
    """What the other warps are told of an item: its entries. Visible to who waits for the barrier that is arrived at next."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    s_item.index(slot * 2).store(gl.full([1], e0, gl.int32, layout=ONE))
    s_item.index(slot * 2 + 1).store(gl.full([1], e1, gl.int32, layout=ONE))
    barrier()


@gluon.jit
def hear(s_item, full_kv, stage_kv, WARPS: gl.constexpr):
    """Waits for the stage_kv-th item: its entries [e0, e1), none behind the last item."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    slot = stage_kv % RING_KV
    mbarrier.wait(full_kv.index(slot), (stage_kv // RING_KV) & 1)
    return gl.max(s_item.index(slot * 2).load(ONE), 0), gl.max(s_item.index(slot * 2 + 1).load(ONE), 0)


@gluon.jit
def load_all(
    args, numbers, p_sel_start, G: gl.constexpr, R: gl.constexpr, FREE: gl.constexpr, ITEM: gl.constexpr,
    PACKED: gl.constexpr,
):  # fmt: skip
    """The warp that loads, and deals items out. s_q: boxes of one query and one panel; s_k, s_v: of one block."""
    d_q, d_k, d_v, s_q, s_k, s_v, s_item, full, free, full_kv, free_kv = args
    p_entries, p_ends, p_items, p_item_list, p_item_start, p_ticket, LIST0, LIST1, N, UNITS_A_HEAD, BLOCKS = numbers
    BQ: gl.constexpr = ROWS // R
    i_w, items, end = gl.load(p_items + LIST0), gl.load(p_items + LIST1), gl.load(p_ends + LIST1)
    dealt = i_w + gl.num_programs(0)  # every program's first item; the others are taken by who comes first
    i_w += gl.program_id(0)
    stage, stage_kv = 0, 0
    if i_w < items:
        e0, e1 = entries_of(p_item_start, i_w, items, end, ITEM)
        i_list = gl.load(p_item_list + i_w)
        i_next = dealt + gl.atomic_add(p_ticket, 1, sem="relaxed")
        while i_w < items:
            # The next item's numbers are asked for now, and looked at when this item is done.
            e0_next, e1_next = entries_of(p_item_start, i_next, items, end, ITEM)
            list_next = gl.load(p_item_list + gl.minimum(i_next, items - 1))
            i_bg = i_list // BLOCKS // UNITS_A_HEAD
            i_b, i_g = i_bg // G, i_bg % G
            i_key = i_list % BLOCKS * KEYS
            if PACKED:
                i_key = gl.load(p_sel_start + i_list % BLOCKS)
            slot_kv = stage_kv % RING_KV
            mbarrier.wait(free_kv.index(slot_kv), ((stage_kv // RING_KV) & 1) ^ 1)
            tell(s_item, slot_kv, e0, e1)
            mbarrier.expect(full_kv.index(slot_kv), d_k.block_type.nbytes + d_v.block_type.nbytes)
            load_box(d_k, [i_b, i_g, i_key, 0], full_kv.index(slot_kv), s_k.index(slot_kv))
            load_box(d_v, [i_b, i_g, i_key, 0], full_kv.index(slot_kv), s_v.index(slot_kv))
            stage_kv += 1
            i_after = dealt + gl.atomic_add(p_ticket, 1, sem="relaxed")
            for e in range(e0, e1, BQ):
                b_t = ()
                for i in gl.static_range(BQ):  # before the wait, which hides their latency; behind the end: the last one again
                    b_t += (gl.load(p_entries + gl.minimum(e + i, e1 - 1)) // FREE - i_bg * N,)
                slot = stage % RING
                mbarrier.wait(free.index(slot), ((stage // RING) & 1) ^ 1)
                mbarrier.expect(full.index(slot), PANELS * BQ * d_q.block_type.nbytes)
                for i in gl.static_range(BQ):
                    for j in gl.static_range(PANELS):
                        s_box = s_q.index((slot * PANELS + j) * BQ + i)
                        load_box(d_q, [i_b, i_g * R, b_t[i], j * PANEL], full.index(slot), s_box)
                stage += 1
            i_w, e0, e1, i_list, i_next = i_next, e0_next, e1_next, list_next, i_after
    slot_kv = stage_kv % RING_KV
    mbarrier.wait(free_kv.index(slot_kv), ((stage_kv // RING_KV) & 1) ^ 1)
    tell(s_item, slot_kv, 0, 0)
    mbarrier.arrive(full_kv.index(slot_kv), count=1)


@gluon.jit
def store_all(args, R: gl.constexpr, FREE: gl.constexpr):
    """The warp that stores. A stage is free when it has been read, which is waited for one stage later."""
    d_o, s_o, s_item, done, free, full_kv, free_kv, p_entries, ROW0 = args
    BQ: gl.constexpr = ROWS // R
    stage, stage_kv = 0, 0
    e0, e1 = hear(s_item, full_kv, stage_kv, 1)
    while e0 < e1:
        barrier()
        mbarrier.arrive(free_kv.index(stage_kv % RING_KV), count=1)
        for e in range(e0, e1, BQ):
            b_place, b_row = (), ()
            for i in gl.static_range(BQ):
                entry = gl.load(p_entries + gl.minimum(e + i, e1 - 1))
                b_place += (entry % FREE,)
                b_row += ((entry // FREE - ROW0) * R,)
            slot = stage % RING
            mbarrier.wait(done.index(slot), (stage // RING) & 1)
            for i in gl.static_range(BQ):
                if e + i < e1:
                    for j in gl.static_range(PANELS):
                        store_box(d_o, [0, b_place[i], b_row[i], j * PANEL], s_o.index((slot * PANELS + j) * BQ + i))
            if stage > 0:
                if e + BQ <= e1:
                    tma.store_wait(PANELS * BQ)  # all but this stage's
                else:
                    tma.store_wait(0)
                mbarrier.arrive(free.index((stage - 1) % RING), count=1)
            stage += 1
        stage_kv += 1
        e0, e1 = hear(s_item, full_kv, stage_kv, 1)
    tma.store_wait(0)  # shared memory is another program's soon


@gluon.jit
def attend_all(args, WHICH: gl.constexpr, R: gl.constexpr, FREE: gl.constexpr):
    """The WHICH-th consumer: every CONSUMERS-th stage."""
    s_q, s_k, s_v, s_item, full, done, full_kv, free_kv, p_lse, p_entries, ROW0, rows, scale = args
    BQ: gl.constexpr = ROWS // R
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    dtype: gl.constexpr = s_q.dtype
    o_m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    o_q, o_r = o_m // R, o_m % R
    stage, stage_kv = 0, 0  # of the item's first queries, and of its keys
    e0, e1 = hear(s_item, full_kv, stage_kv, 4)
    while e0 < e1:
        slot_kv = stage_kv % RING_KV
        s_k_now, s_v_now = s_k.index(slot_kv), s_v.index(slot_kv)
        steps = (e1 - e0 + BQ - 1) // BQ
        for i in range((WHICH + CONSUMERS - stage % CONSUMERS) % CONSUMERS, steps, CONSUMERS):
            slot = (stage + i) % RING
            s_now = s_q.index(slot)
            o_e = e0 + i * BQ + o_q
            m_e = o_e < e1
            b_entry = gl.load(p_entries + o_e, mask=m_e, other=0)
            mbarrier.wait(full.index(slot), ((stage + i) // RING) & 1)
            b_s = gl.zeros([ROWS, KEYS], gl.float32, layout=SCORES)
            b_s = warpgroup_mma(s_now, s_k_now.permute((1, 0)), b_s, use_acc=False, is_async=True)
            b_s = warpgroup_mma_wait(0, [b_s])
            b_max = gl.maximum(gl.max(b_s, 1) * scale, -1e30)
            b_p = gl.exp2(b_s * scale - gl.expand_dims(b_max, 1))
            b_sum = gl.sum(b_p, 1)
            b_p16 = gl.convert_layout(b_p.to(dtype), gl.DotOperandLayout(0, OUT, 2))
            b_o = gl.zeros([ROWS, DIM], gl.float32, layout=OUT)
            b_o = warpgroup_mma(b_p16, s_v_now, b_o, use_acc=False, is_async=True)
            o_part = (b_entry % FREE * rows + (b_entry // FREE - ROW0)) * R + o_r
            gl.store(p_lse + o_part, b_max + gl.log2(b_sum), mask=m_e)
            b_norm = gl.convert_layout(1.0 / gl.maximum(b_sum, 1.0), gl.SliceLayout(1, OUT))
            b_o = warpgroup_mma_wait(0, [b_o])
            b_o = (b_o * gl.expand_dims(b_norm, 1)).to(dtype)
            barrier()  # all four warps' products with q are done
            s_now.store(b_o)
            fence_async_shared()
            barrier()  # all of the stage is written
            mbarrier.arrive(done.index(slot), count=1)
        barrier()
        mbarrier.arrive(free_kv.index(slot_kv), count=1)
        stage += steps
        stage_kv += 1
        e0, e1 = hear(s_item, full_kv, stage_kv, 4)


@gluon.jit(do_not_specialize=["LIST0", "LIST1", "ROW0", "rows", "N", "UNITS_A_HEAD", "BLOCKS"])
def parts_tiles(
    d_q, d_k, d_v, d_o, p_lse, p_entries, p_ends, p_items, p_item_list, p_item_start, p_sel_start, p_ticket, LIST0, LIST1,
    ROW0, rows, N, UNITS_A_HEAD, BLOCKS, scale, G: gl.constexpr, R: gl.constexpr, FREE: gl.constexpr, ITEM: gl.constexpr,
    PACKED: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """`selected.selected_parts` of the items of lists [LIST0, LIST1). p_ticket: a zero, which counts the items dealt out."""
    # A buffer has one consumer: who waits for its next queries has seen the ones before, and a phase's parity tells them apart.
    gl.static_assert(RING % CONSUMERS == 0)
    BQ: gl.constexpr = ROWS // R
    dtype: gl.constexpr = d_q.dtype
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, DIM], dtype)
    s_q = gl.allocate_shared_memory(dtype, [RING, ROWS, DIM], TILE)
    s_k = gl.allocate_shared_memory(dtype, [RING_KV, KEYS, DIM], TILE)
    s_v = gl.allocate_shared_memory(dtype, [RING_KV, KEYS, DIM], TILE)
    s_q_boxes = view(s_q, dtype, [RING * PANELS * BQ, 1, R, 1, PANEL], d_q.layout)
    s_o_boxes = view(s_q, dtype, [RING * PANELS * BQ, 1, 1, R, PANEL], d_o.layout)
    s_k_boxes = view(s_k, dtype, [RING_KV, 1, 1, KEYS, DIM], d_k.layout)
    s_v_boxes = view(s_v, dtype, [RING_KV, 1, 1, KEYS, DIM], d_v.layout)
    s_item = gl.allocate_shared_memory(gl.int32, [RING_KV * 2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    full_kv = gl.allocate_shared_memory(gl.int64, [RING_KV, 1], mbarrier.MBarrierLayout())
    free_kv = gl.allocate_shared_memory(gl.int64, [RING_KV, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(RING):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(done.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(RING_KV):
        mbarrier.init(full_kv.index(i), count=1)
        mbarrier.init(free_kv.index(i), count=CONSUMERS + 1)
    fence_async_shared()
    barrier()
    # Variables make numbers of constants: those stand where they are passed on.
    attend = (s_q, s_k, s_v, s_item, full, done, full_kv, free_kv, p_lse, p_entries, ROW0, rows, scale)
    load = (d_q, d_k, d_v, s_q_boxes, s_k_boxes, s_v_boxes, s_item, full, free, full_kv, free_kv)
    numbers = (p_entries, p_ends, p_items, p_item_list, p_item_start, p_ticket, LIST0, LIST1, N, UNITS_A_HEAD, BLOCKS)
    store = (d_o, s_o_boxes, s_item, done, free, full_kv, free_kv, p_entries, ROW0)
    gl.warp_specialize(
        [
            (attend_all, (attend, 0, R, FREE)),
            (attend_all, (attend, 1, R, FREE)),
            (attend_all, (attend, 2, R, FREE)),
            (load_all, (load, numbers, p_sel_start, G, R, FREE, ITEM, PACKED)),
            (store_all, (store, R, FREE)),
        ],
        [4, 4, 1, 1],
        REGISTERS,
    )  # fmt: skip


def fits(p: Problem, s: Selection) -> bool:
    """Whether `selected_parts` here takes a call (on a GPU that `has_tiles`). Free blocks then are whole and in the past: no key
    needs a mask."""
    return (
        p.dtype in DTYPES
        and p.r in HEADS
        and p.d == p.e == DIM.value
        and (p.config.select_block, s.bs) == (KEYS.value, KEYS.value)
        and s.free > 0
        and not s.causal
    )


def selected_parts(
    q: Tensor, k: Tensor, v: Tensor, part_o: Tensor, part_lse: Tensor, units: tuple[int, int], row0: int, s: Selection, p: Problem
) -> None:
    """`launch.selected_parts`, for a call that `fits`: part_o [1, places, rows r, e] and part_lse [places, rows r] are written
    where there are entries."""
    i = s.index
    assert i is not None
    ticket = torch.zeros(1, dtype=torch.int32, device=p.device)
    programs = min(cores(p.device), i.most_items(units[1] - units[0], s.part_entries()))
    parts_tiles[(programs,)](
        head_boxes(q, 1, PANEL.value, heads=p.r), head_boxes(k, KEYS.value, p.d), head_boxes(v, KEYS.value, p.d),
        head_boxes(part_o, p.r, PANEL.value), part_lse, i.entries, i.ends, i.items, i.item_list, i.item_start,
        p.table("sel_start"), ticket, units[0] * i.blocks, units[1] * i.blocks, row0, s.part_rows(), p.n, s.a_head, i.blocks,
        p.scale_log2, G=p.g, R=p.r, FREE=s.free, ITEM=i.item, PACKED=p.packed, REGISTERS=REGISTERS, num_warps=4,
        maxnreg=MOST_REGISTERS,
    )  # fmt: skip
