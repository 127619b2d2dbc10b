"""The inverted index of a selection: for every block the queries that chose it, cut into work items.

An entry is one free place of one query, numbered ((b g) t f), f = 0 .. F - 1. Queries are taken in units: the tokens
[u CHUNK, (u + 1) CHUNK) of one (b, g). A list is a unit's queries that chose one block, ascending in t. Lists are cut into items
of at most ITEM queries. How many items there are stays on the device: launches have a static bound, and programs beyond the
true count return. No host synchronisation.

Four launches sort the entries by counting: `rank_entries` finds, in every tile of TILE tokens, how many chose each block, and
how many of them before an entry; `count_lists` adds the tiles of a unit up; `place_lists` the lists, and cuts their items;
`place_entries` puts every entry where the three numbers say. A query has a block once, so that a tile's choice of a block is
one bit a token: its atomic operations are "or" on whole numbers, which give the same bits in any order.
Between launches live a number for every tile and block, and a byte for every entry: 12 MB at 65,536 tokens and 4 key/value
heads, 40 MB at 131,072; the numbers grow with the square of the tokens, to 2 GiB at a million.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_cli.ops.triton.problem import cdiv

TILE = 128
"""Tokens a tile; units are whole tiles. An entry's rank in its tile is one byte."""
WORD = 32
"""Tokens whose bits make one number."""
SCRATCH = 2**22
"""Numbers that all programs of `rank_entries` share, a tile's bits each (16 MiB)."""
LISTS_A_PROGRAM = 64
SIZE = 1024
"""Entries, or blocks, at a time."""


@dataclass(frozen=True)
class Index:
    """The lists of all units.

    entries: int32 [e], sorted by list; what no list has is behind them, unwritten. ends, items: int32 [lists + 1], a list's
    first entry and first item. item_list, item_start: int32, every item's list and first entry. blocks: lists a unit.
    chunk: query tokens a unit. item: ITEM.
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


@triton.jit
def bits_set(x):
    """How many bits of each number are set."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def chosen_blocks(
    o_x, t0, i_bg, p_indices, p_start, p_sel_base, N, OFFSET, BLOCK: tl.constexpr, NUM: tl.constexpr, FREE: tl.constexpr,
    NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr, PACKED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Token, row (b g t), free place and block (over all documents) of the entries o_x of a tile, and whether they have one.

    A place that is empty, or whose block is in the future, has none. Numbers are divided that are known at run time alone:
    those that fit 16 bits by what the compiler knows end up in pairs, and ptxas 12.9 adds zero to one of those where it should
    add two (FREE 3, one forced block and two).
    """
    o_e = t0 * FREE + o_x
    o_t, o_f = o_e // FREE, o_e % FREE
    m_x = (o_x < TILE * FREE) & (o_t < N)
    start, base = o_t * 0, o_t * 0
    if PACKED:
        start = tl.load(p_start + o_t, mask=m_x, other=0)
        base = tl.load(p_sel_base + o_t, mask=m_x, other=0)
    current = (o_t + OFFSET - start) // BLOCK
    o_row = (i_bg * N + o_t).to(tl.int64)  # b g t is less than 2^31: `build_index` sees to it
    block = tl.load(p_indices + o_row * NUM + NUM_INIT + o_f, mask=m_x, other=-1)
    full = (block >= 0) & (block <= current)
    if NUM_INIT + NUM_LOCAL > 0:
        full = full & (o_f < current + 1 - NUM_INIT - NUM_LOCAL)
    return o_t, o_row, o_f, base + block, full


@triton.jit(do_not_specialize=["N", "OFFSET", "TILES", "TOTAL", "BLOCKS"])
def rank_entries(
    p_indices, p_bits, p_ranks, p_counts, p_start, p_sel_base, N, OFFSET, TILES, TOTAL, BLOCKS, BLOCK: tl.constexpr,
    NUM: tl.constexpr, FREE: tl.constexpr, NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr, PACKED: tl.constexpr,
    TILE: tl.constexpr, WORD: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Of every tile of this program: each entry's rank among its block's, and how many entries each block has."""
    WORDS: tl.constexpr = TILE // WORD
    p_bits += tl.program_id(0).to(tl.int64) * (WORDS * BLOCKS)
    for i_tile in range(tl.program_id(0), TOTAL, tl.num_programs(0)):
        i_bg, t0 = i_tile // TILES, i_tile % TILES * TILE
        for j in range(0, WORDS * BLOCKS, SIZE):
            o_j = j + tl.arange(0, SIZE)
            tl.store(p_bits + o_j, tl.zeros([SIZE], tl.int32), mask=o_j < WORDS * BLOCKS)
        tl.debug_barrier()  # what some of this program's threads wrote is changed, and then read, by others
        for x in range(0, TILE * FREE, SIZE):
            o_t, _, _, o_j, full = chosen_blocks(
                x + tl.arange(0, SIZE), t0, i_bg, p_indices, p_start, p_sel_base, N, OFFSET, BLOCK, NUM, FREE, NUM_INIT,
                NUM_LOCAL, PACKED, TILE,
            )  # fmt: skip
            bit = (tl.full([SIZE], 1, tl.uint32) << ((o_t - t0) % WORD).to(tl.uint32)).to(tl.int32, bitcast=True)
            tl.atomic_or(p_bits + (o_t - t0) // WORD * BLOCKS + o_j, bit, mask=full, sem="relaxed")
        tl.debug_barrier()
        for x in range(0, TILE * FREE, SIZE):
            o_t, o_row, o_f, o_j, full = chosen_blocks(
                x + tl.arange(0, SIZE), t0, i_bg, p_indices, p_start, p_sel_base, N, OFFSET, BLOCK, NUM, FREE, NUM_INIT,
                NUM_LOCAL, PACKED, TILE,
            )  # fmt: skip
            rank = tl.zeros([SIZE], tl.int32)
            for w in tl.static_range(WORDS):
                # Of this word the bits before the token's own: none, some, or all.
                o_b = tl.minimum(tl.maximum(o_t - t0 - w * WORD, 0), WORD)
                below = (tl.full([SIZE], 1, tl.uint64) << o_b.to(tl.uint64)) - 1
                b_bits = tl.load(p_bits + w * BLOCKS + o_j, mask=full & (o_b > 0), other=0)
                rank += bits_set(b_bits & below.to(tl.uint32).to(tl.int32, bitcast=True))
            tl.store(p_ranks + o_row * FREE + o_f, rank.to(tl.int8), mask=full)
        for j in range(0, BLOCKS, SIZE):
            o_j = j + tl.arange(0, SIZE)
            count = tl.zeros([SIZE], tl.int32)
            for w in tl.static_range(WORDS):
                count += bits_set(tl.load(p_bits + w * BLOCKS + o_j, mask=o_j < BLOCKS, other=0))
            tl.store(p_counts + (i_tile + o_j.to(tl.int64) * 0) * BLOCKS + o_j, count, mask=o_j < BLOCKS)
        tl.debug_barrier()


@triton.jit
def lists_of(BLOCKS, RANGES, LISTS_A_PROGRAM: tl.constexpr):
    """(unit, its lists) of this program: consecutive programs have consecutive lists."""
    return tl.program_id(0) // RANGES, tl.program_id(0) % RANGES * LISTS_A_PROGRAM + tl.arange(0, LISTS_A_PROGRAM)


@triton.jit(do_not_specialize=["TILES", "TILES_A_UNIT", "UNITS_A_HEAD", "BLOCKS", "RANGES", "ITEM"])
def count_lists(
    p_counts, p_lengths, p_sums, TILES, TILES_A_UNIT, UNITS_A_HEAD, BLOCKS, RANGES, ITEM, LISTS_A_PROGRAM: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """A unit's entries of each of some blocks: before every tile (in the place of the tile's own), and in all.

    p_sums [2, programs]: the entries of this program's lists, and their items.
    """
    i_unit, o_j = lists_of(BLOCKS, RANGES, LISTS_A_PROGRAM)
    i_bg = i_unit // UNITS_A_HEAD
    from_tile = i_unit % UNITS_A_HEAD * TILES_A_UNIT
    to_tile = tl.minimum(from_tile + TILES_A_UNIT, TILES)
    before = tl.zeros([LISTS_A_PROGRAM], tl.int32)
    for i in range(from_tile, to_tile, STEP):
        o_i = i + tl.arange(0, STEP)
        p_tile = p_counts + ((i_bg * TILES + o_i).to(tl.int64) * BLOCKS)[:, None] + o_j[None, :]
        m_tile = (o_i < to_tile)[:, None] & (o_j < BLOCKS)[None, :]
        count = tl.load(p_tile, mask=m_tile, other=0)
        tl.store(p_tile, before[None, :] + tl.cumsum(count, 0) - count, mask=m_tile)
        before += tl.sum(count, 0)
    tl.store(p_lengths + i_unit * BLOCKS + o_j, before, mask=o_j < BLOCKS)
    tl.store(p_sums + tl.program_id(0), tl.sum(before, 0))
    tl.store(p_sums + tl.num_programs(0) + tl.program_id(0), tl.sum((before + ITEM - 1) // ITEM, 0))


@triton.jit(do_not_specialize=["BLOCKS", "RANGES", "ITEM"])
def place_lists(
    p_lengths, p_sums, p_ends, p_items, p_item_list, p_item_start, BLOCKS, RANGES, ITEM, LISTS_A_PROGRAM: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """ends and items of some lists, and their items' list and first entry."""
    i, programs = tl.program_id(0), tl.num_programs(0)
    i_unit, o_j = lists_of(BLOCKS, RANGES, LISTS_A_PROGRAM)
    m_l = o_j < BLOCKS
    o_l = i_unit * BLOCKS + o_j
    b_entries = tl.zeros([SIZE], tl.int32)
    b_items = tl.zeros([SIZE], tl.int32)
    for p in range(0, i, SIZE):
        o_p = p + tl.arange(0, SIZE)
        b_entries += tl.load(p_sums + o_p, mask=o_p < i, other=0)
        b_items += tl.load(p_sums + programs + o_p, mask=o_p < i, other=0)
    length = tl.load(p_lengths + o_l, mask=m_l, other=0)
    count = (length + ITEM - 1) // ITEM
    start = tl.sum(b_entries, 0) + tl.cumsum(length, 0) - length
    first = tl.sum(b_items, 0) + tl.cumsum(count, 0) - count
    tl.store(p_ends + o_l, start, mask=m_l)
    tl.store(p_items + o_l, first, mask=m_l)
    m_last = m_l & (o_l == programs // RANGES * BLOCKS - 1)
    tl.store(p_ends + o_l + 1, start + length, mask=m_last)
    tl.store(p_items + o_l + 1, first + count, mask=m_last)
    for c in range(0, tl.max(count, 0)):
        m_c = m_l & (c < count)
        tl.store(p_item_list + first + c, o_l, mask=m_c)
        tl.store(p_item_start + first + c, start + c * ITEM, mask=m_c)


@triton.jit(do_not_specialize=["N", "OFFSET", "TILES", "TILES_A_UNIT", "UNITS_A_HEAD", "BLOCKS"])
def place_entries(
    p_indices, p_ranks, p_before, p_ends, p_entries, p_start, p_sel_base, N, OFFSET, TILES, TILES_A_UNIT, UNITS_A_HEAD, BLOCKS,
    BLOCK: tl.constexpr, NUM: tl.constexpr, FREE: tl.constexpr, NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr,
    PACKED: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A tile's entries to their lists."""
    i_tile = tl.program_id(0)
    i_bg, i = i_tile // TILES, i_tile % TILES
    p_before += i_tile.to(tl.int64) * BLOCKS
    p_ends += (i_bg * UNITS_A_HEAD + i // TILES_A_UNIT) * BLOCKS
    for x in range(0, TILE * FREE, SIZE):
        _, o_row, o_f, o_j, full = chosen_blocks(
            x + tl.arange(0, SIZE), i * TILE, i_bg, p_indices, p_start, p_sel_base, N, OFFSET, BLOCK, NUM, FREE, NUM_INIT,
            NUM_LOCAL, PACKED, TILE,
        )  # fmt: skip
        o_e = o_row * FREE + o_f
        at = tl.load(p_ends + o_j, mask=full, other=0) + tl.load(p_before + o_j, mask=full, other=0)
        at += tl.load(p_ranks + o_e, mask=full, other=0).to(tl.int32)
        tl.store(p_entries + at, o_e.to(tl.int32), mask=full)


def build_index(
    indices: Tensor, *, select_block: int, num_init: int, num_local: int, blocks: int, chunk: int, item: int,
    start: Tensor | None, sel_base: Tensor | None, offset: int = 0,
) -> Index:  # fmt: skip
    """The index of block_indices int32 [b, g, t, n], without the forced places (the first num_init and the last num_local).

    blocks: how many selection blocks there are, over all documents. chunk: query tokens a unit, whole tiles. item: queries an
    item. start, sel_base: int32 [t], of packed documents: the first token of a token's document, and its first block.
    offset: the first query's token. A query has each block at most once.
    """
    b, g, n, num = indices.shape
    free = num - num_init - num_local
    units_a_head, tiles, tiles_a_unit = cdiv(n, chunk), cdiv(n, TILE), chunk // TILE
    units, total = b * g * units_a_head, b * g * tiles
    lists, entries = units * blocks, b * g * n * free
    assert max(entries, lists) < 2**31
    assert chunk % TILE == 0
    ranges = cdiv(blocks, LISTS_A_PROGRAM)
    programs = min(total, max(SCRATCH // (TILE // WORD * blocks), 1))
    numbers = indices.new_empty
    bits, counts = numbers(programs * (TILE // WORD) * blocks), numbers(total * blocks)
    ranks = numbers(entries, dtype=torch.int8)
    lengths, sums = numbers(lists), numbers(2 * units * ranges)
    ends, items, of_entry = numbers(lists + 1), numbers(lists + 1), numbers(entries)
    most = min(entries // item + lists, entries)
    item_list, item_start = numbers(most), numbers(most)
    places = {
        "BLOCK": select_block, "NUM": num, "FREE": free, "NUM_INIT": num_init, "NUM_LOCAL": num_local,
        "PACKED": start is not None, "TILE": TILE, "SIZE": SIZE,
    }  # fmt: skip
    rank_entries[(programs,)](indices, bits, ranks, counts, start, sel_base, n, offset, tiles, total, blocks, WORD=WORD, **places)
    count_lists[(units * ranges,)](
        counts, lengths, sums, tiles, tiles_a_unit, units_a_head, blocks, ranges, item, LISTS_A_PROGRAM=LISTS_A_PROGRAM, STEP=32
    )
    place_lists[(units * ranges,)](
        lengths, sums, ends, items, item_list, item_start, blocks, ranges, item, LISTS_A_PROGRAM=LISTS_A_PROGRAM, SIZE=SIZE
    )
    place_entries[(total,)](
        indices, ranks, counts, ends, of_entry, start, sel_base, n, offset, tiles, tiles_a_unit, units_a_head, blocks, **places
    )
    return Index(of_entry, ends, items, item_list, item_start, blocks, chunk, units, item)
