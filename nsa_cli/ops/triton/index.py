"""The inverted index of a selection: for every block the queries that chose it, cut into work items.

An entry is one free place of one query, numbered ((b g) t f), f = 0 .. F - 1. Queries are taken in units: the tokens
[u CHUNK, (u + 1) CHUNK) of one (b, g). A list is a unit's queries that chose one block; a stable sort of the entries by
list leaves them ascending in t. Lists are cut into items of at most ITEM queries. How many items there are stays on the
device: launches have a static bound, and programs beyond the true count return. No atomics, no host synchronisation.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LISTS_A_PROGRAM = 256


@dataclass(frozen=True)
class Index:
    """The lists of all units.

    entries: int32 [e], sorted by list. ends, items: int32 [lists + 1], a list's first entry and first item. item_list,
    item_start: int32, every item's list and first entry. blocks: lists a unit. chunk: query tokens a unit. item: ITEM.
    """

    entries: Tensor
    ends: Tensor
    items: Tensor
    item_list: Tensor
    item_start: Tensor
    blocks: int
    chunk: int
    units: int
    item: int

    def most_items(self, units: int, entries: int) -> int:
        """A bound on the items of some units that hold that many entries."""
        return min(entries // self.item + units * self.blocks, entries)


@triton.jit(do_not_specialize=["ENTRIES", "N", "OFFSET", "UNITS_A_HEAD", "BLOCKS", "LISTS", "CHUNK"])
def entry_lists(
    p_indices, p_lists, p_start, p_sel_base, ENTRIES, N, OFFSET, UNITS_A_HEAD, BLOCKS, LISTS, CHUNK, BLOCK: tl.constexpr,
    NUM: tl.constexpr, FREE: tl.constexpr, NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr, PACKED: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Every entry's list, LISTS for a place that is empty or in the future."""
    o_e = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    m_e = o_e < ENTRIES
    o_row, o_f = o_e // FREE, o_e % FREE
    o_bg, o_t = o_row // N, o_row % N
    start, base = o_t * 0, o_t * 0
    if PACKED:
        start = tl.load(p_start + o_t, mask=m_e, other=0)
        base = tl.load(p_sel_base + o_t, mask=m_e, other=0)
    current = (o_t + OFFSET - start) // BLOCK
    block = tl.load(p_indices + o_row * NUM + NUM_INIT + o_f, mask=m_e, other=-1)
    full = (block >= 0) & (block <= current)
    if NUM_INIT + NUM_LOCAL > 0:
        full = full & (o_f < current + 1 - NUM_INIT - NUM_LOCAL)
    o_list = (o_bg * UNITS_A_HEAD + o_t // CHUNK) * BLOCKS + base + block
    tl.store(p_lists + o_e, tl.where(full, o_list, LISTS).to(tl.int32), mask=m_e)


@triton.jit(do_not_specialize=["LISTS", "ITEM"])
def fill_items(p_ends, p_items, p_item_list, p_item_start, LISTS, ITEM, SIZE: tl.constexpr):
    """item_list and item_start of SIZE lists."""
    o_l = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    m_l = o_l < LISTS
    start = tl.load(p_ends + o_l, mask=m_l, other=0)
    first = tl.load(p_items + o_l, mask=m_l, other=0)
    count = tl.load(p_items + o_l + 1, mask=m_l, other=0) - first
    for i in range(0, tl.max(count, 0)):
        m_i = m_l & (i < count)
        tl.store(p_item_list + first + i, o_l, mask=m_i)
        tl.store(p_item_start + first + i, start + i * ITEM, mask=m_i)


def build_index(
    indices: Tensor, *, select_block: int, num_init: int, num_local: int, blocks: int, chunk: int, item: int,
    start: Tensor | None, sel_base: Tensor | None, offset: int = 0,
) -> Index:  # fmt: skip
    """The index of block_indices int32 [b, g, t, n], without the forced places (the first num_init and the last num_local).

    blocks: how many selection blocks there are, over all documents. chunk: query tokens a unit. item: queries an item.
    start, sel_base: int32 [t], of packed documents: the first token of a token's document, and its first block.
    offset: the first query's token.
    """
    b, g, n, num = indices.shape
    free = num - num_init - num_local
    units_a_head = triton.cdiv(n, chunk)
    units = b * g * units_a_head
    lists, entries, device = units * blocks, b * g * n * free, indices.device
    assert max(entries, lists) < 2**31
    of_entry = torch.empty(entries, dtype=torch.int32, device=device)
    size = 1024
    entry_lists[(triton.cdiv(entries, size),)](
        indices, of_entry, start, sel_base, entries, n, offset, units_a_head, blocks, lists, chunk,
        BLOCK=select_block, NUM=num, FREE=free, NUM_INIT=num_init, NUM_LOCAL=num_local, PACKED=start is not None, SIZE=size,
    )  # fmt: skip
    sorted_lists, order = torch.sort(of_entry, stable=True)
    ends = torch.searchsorted(sorted_lists, torch.arange(lists + 1, dtype=torch.int32, device=device), out_int32=True)
    items = torch.zeros(lists + 1, dtype=torch.int32, device=device)
    torch.cumsum((ends.diff() + (item - 1)) // item, 0, dtype=torch.int32, out=items[1:])
    most = min(entries // item + lists, entries)
    item_list = torch.empty(most, dtype=torch.int32, device=device)
    item_start = torch.empty_like(item_list)
    fill_items[(triton.cdiv(lists, LISTS_A_PROGRAM),)](ends, items, item_list, item_start, lists, item, SIZE=LISTS_A_PROGRAM)
    return Index(order.int(), ends, items, item_list, item_start, blocks, chunk, units, item)
