"""Launches: each branch's forward and backward on tensors, from descriptors, tiles and grids to results.

Nothing here knows autograd; `operators.py` registers what stands here. Every tensor is [b, heads, tokens, dim] with any strides
(`problem.aligned` copies what the copy engine cannot read). Log-sum-exps, deltas and gates are float32 [b, n, h], in log2 units.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nsa_cli.ops.triton import attend, gates, selected, selected_gradient, selection, tuning
from nsa_cli.ops.triton.device import cores, has_tiles
from nsa_cli.ops.triton.index import Index, build_index
from nsa_cli.ops.triton.problem import Problem, aligned, cdiv, group_rows, head_rows, next_power_of_2, split_queries

SCORE_ELEMENTS = 2**26
"""Float32 block scores alive at a time (256 MiB): importance and selection run in chunks of queries."""
SUM_BYTES = 2**30
"""Bytes of every head's block sums alive at a time, where the compressed branch stores them (more if 128 queries have more)."""
PART_BYTES = {"forward": 2**31, "backward": 2**30}
"""Bytes of partial outputs, or query gradients, alive at a time in the selected branch."""
UNIT_TOKENS = {"forward": 4096, "backward": 8192}
"""Query tokens a unit of the inverted index. Forward: what its items gather stays in a 50 MB cache. Backward: items are long,
since each writes dk and dv of its block."""
LEAST_LIST = 32
"""Queries that a list should have on average: units grow with the number of blocks."""
MOST_ROWS = 128
"""Of a tile, for a group of at most as many heads."""
ITEM = {"forward": 64, "backward": 128}
"""Queries an item of the inverted index, at most."""
LONG_DOCUMENT = 4096
"""Packed tokens from which first blocks are gathered: with fewer, launches cost more than steps one after another."""
KEY_BYTES = {2: 2**16, 4: 2**15}
"""A selected block's keys, or values, on chip at a time, by the bytes of a number (float32's products take registers)."""


def _tile(kernel: str, p: Problem) -> tuning.Tile:
    return tuning.tile(kernel, width=max(p.dk, p.dv), group=p.r, dtype=p.dtype, device=p.device)


def _rows(tile: tuning.Tile, p: Problem) -> int:
    """Rows of a tile that holds whole groups."""
    return max(tile.rows, p.rp)


def _stays(x: Tensor, rp: int, rows: int, width: int) -> Tensor | TensorDescriptor:
    """Query rows as attend.load_queries takes them."""
    return head_rows(x, rows, width) if rp == 1 else x


NAMES = {"cmp": "compressed", "win": "window"}


def attend_forward(branch: str, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, p: Problem) -> None:
    """Writes a branch's output ("cmp" or "win") to `out`, and its log-sum-exp to `lse` [b, n, h]."""
    if branch == "cmp" and has_tiles(p.device):
        from nsa_cli.ops.triton import attend_tiles

        if attend_tiles.fits(p):
            attend_tiles.attend_forward(q, k, v, out, lse, p)
            return
    tile = _tile(NAMES[branch], p)
    # A compressed tile is one head's, so that its queries stay in shared memory; a window's is a group's, which needs fewer keys.
    single = branch == "cmp"
    m = tile.rows if single else _rows(tile, p)
    units, share, r, rp = (p.h, p.r, 1, 1) if single else (p.g, 1, p.r, p.rp)
    grid = (cdiv(p.n, m // rp) * p.b * units,)
    attend.attend_forward[grid](
        _stays(q, rp, m, p.dk), head_rows(k, tile.keys, p.dk), head_rows(v, tile.keys, p.dv), _stays(out, rp, m, p.dv), lse,
        p.table("start"), p.table("base"), p.n, p.offset,
        p.b * units, p.scale_log2, *_at(q), *_at(out), UNITS=units, SHARE=share, R=r, RP=rp, D=p.d, E=p.e, DK=p.dk, DV=p.dv,
        BRANCH=attend.BRANCHES[branch].value, **p.bounds(),
        M=m, BN=tile.keys, PRECISION=p.precision, **tile.options(),
    )  # fmt: skip


def block_importance(q: Tensor, k_cmp: Tensor, lse: Tensor, scores: Tensor, t0: int, t1: int, p: Problem) -> None:
    """Writes the importance [b, g, t1 - t0, blocks] of the queries [t0, t1), as far as they may choose among the blocks."""
    config, tile, blocks = p.config, _tile("importance", p), p.select_blocks
    step = next_power_of_2(config.select_block // config.compress_stride)
    bn = max(tile.keys, 2 * step)
    tables = [p.table(name) for name in ("start", "base", "sel_base", "sel_first", "sel_last")]
    key_tiles = cdiv(_reach(t1, p), bn // step - 1)
    selection.block_importance[(p.b * p.g * cdiv(t1 - t0, tile.rows) * key_tiles,)](
        head_rows(q, tile.rows, p.dk), k_cmp, lse, scores, *tables, t0, t1, p.n, p.offset, k_cmp.shape[2], blocks, p.b * p.g,
        key_tiles, p.scale_log2, *_at(k_cmp), G=p.g, R=p.r, D=p.d, DK=p.dk, LENGTH=config.compress_block,
        STRIDE=config.compress_stride, BLOCK=config.select_block, STEP=step, PACKED=p.packed, BM=tile.rows, BN=bn,
        PRECISION=p.precision, **tile.options(),
    )  # fmt: skip


def _reach(t1: int, p: Problem) -> int:
    """A bound on the selection blocks that the queries before t1 may choose among."""
    return p.select_blocks if p.packed else p.config.num_select_blocks(t1 + p.offset)


def _choice(t1: int, p: Problem) -> dict[str, int]:
    """The constants of the choice among the blocks that the queries before t1 may choose among."""
    config, words = p.config, next_power_of_2(cdiv(_reach(t1, p), selection.WORD.value))
    return {
        "BLOCK": config.select_block, "NUM": config.num_selected, "NUM_INIT": config.num_init, "NUM_LOCAL": config.num_local,
        "PLACES": next_power_of_2(config.num_selected), "WORDS": words,
    }  # fmt: skip


def select(q: Tensor, k_cmp: Tensor, lse: Tensor, p: Problem) -> Tensor:
    """block_indices int32 [b, g, n, num_selected] from the compressed branch's log-sum-exp."""
    config, blocks = p.config, p.select_blocks
    indices = torch.empty(p.b, p.g, p.n, config.num_selected, dtype=torch.int32, device=p.device)
    rows = min(p.n, max(MOST_ROWS, SCORE_ELEMENTS // (p.b * p.g * blocks) // MOST_ROWS * MOST_ROWS))
    scores = torch.empty(p.b * p.g * rows * blocks, dtype=torch.float32, device=p.device)
    for t0 in range(0, p.n, rows):
        t1 = min(t0 + rows, p.n)
        block_importance(q, k_cmp, lse, scores, t0, t1, p)
        choice = _choice(t1, p)
        selection.select_top[(p.b * p.g * (t1 - t0),)](
            scores, indices, p.table("start"), p.table("sel_base"), t0, t1, p.n, p.offset, blocks, **choice, PACKED=p.packed,
            num_warps=max(1, min(8, choice["WORDS"] // 64)),
        )  # fmt: skip
    return indices


def attend_and_select(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, p: Problem) -> Tensor:
    """The compressed branch: writes its output and log-sum-exp; returns `select`'s block_indices."""
    if has_tiles(p.device):
        from nsa_cli.ops.triton import attend_tiles

        if attend_tiles.sums_fit(p):
            return _attend_and_select(q, k, v, out, lse, p)
    attend_forward("cmp", q, k, v, out, lse, p)
    return select(q, k, lse, p)


def _attend_and_select(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, p: Problem) -> Tensor:
    """In one pass over the compressed keys: their attention stores block sums of every head, for a chunk of queries at a time."""
    from nsa_cli.ops.triton import attend_tiles

    config, tile, word = p.config, selection.SPREAD.value, selection.WORD.value
    keys = config.num_compressed(p.keys)
    tiles = max(cdiv(keys, tile), 1)
    spread = torch.empty(2, p.b, p.g, tiles * tile, p.dk, dtype=p.dtype, device=p.device)
    selection.spread_keys[(tiles * p.b * p.g, 2)](
        k, v, spread, keys, p.b * p.g, *_at(k), *_at(v), G=p.g, D=p.d, E=p.e, WIDTH=p.dk, num_warps=8
    )
    indices = torch.empty(p.b, p.g, p.n, config.num_selected, dtype=torch.int32, device=p.device)
    rows = min(p.n, max(MOST_ROWS, SUM_BYTES // (p.b * p.h * tiles * (2 * word + 8)) // MOST_ROWS * MOST_ROWS))
    sums = torch.empty(p.b * p.h * rows * tiles * word, dtype=torch.float16, device=p.device)
    marks = torch.empty(p.b * p.h * rows * tiles * 2, dtype=torch.float32, device=p.device)
    for t0 in range(0, p.n, rows):
        t1 = min(t0 + rows, p.n)
        attend_tiles.attend_forward(q, spread[0], spread[1], out, lse, p, attend_tiles.Sums(t0, t1, tiles, sums, marks))
        choice = _choice(t1, p)
        selection.select_from_sums[(p.b * p.g * (t1 - t0),)](
            sums, marks, lse, indices, t0, t1, p.n, p.offset, tiles, **choice, G=p.g, R=p.r, LENGTH=config.compress_block,
            STRIDE=config.compress_stride, AT_ONCE=4 if p.r % 4 == 0 else 1, num_warps=max(1, min(32, choice["WORDS"] // 32)),
        )  # fmt: skip
    return indices


class Selection:
    """block_indices with their inverted index, and the chunks of units in which partials are made.

    forced: the indices hold the configuration's forced blocks in their first and last places, as `select` puts them there.
    """

    def __init__(self, indices: Tensor, p: Problem, *, forced: bool, way: str) -> None:
        config = p.config
        self.p, self.indices = p, indices
        self.num_init = config.num_init if forced else 0
        self.num_local = config.num_local if forced else 0
        self.free = config.num_selected - self.num_init - self.num_local
        whole = max(16, next_power_of_2(config.select_block))
        self.bs = min(whole, max(16, KEY_BYTES[p.dtype.itemsize] // (max(p.dk, p.dv) * p.dtype.itemsize)))
        self.sub = whole // self.bs
        self.places = next_power_of_2(max(self.free, 1)) * self.sub
        self.causal = self.num_local == 0
        heads = p.rp if way == "forward" else p.r  # of a partial
        a_row = max(self.free, 1) * self.sub * heads * max(p.d, p.e) * p.dtype.itemsize
        wanted = max(UNIT_TOKENS[way], LEAST_LIST * p.select_blocks // max(self.free, 1))
        most = min(wanted, PART_BYTES[way] // a_row) // MOST_ROWS * MOST_ROWS  # whole tiles
        self.chunk = min(max(most, MOST_ROWS), cdiv(p.n, MOST_ROWS) * MOST_ROWS)
        self.a_head = cdiv(p.n, self.chunk)
        self.units = p.b * p.g * self.a_head
        self.index: Index | None = None
        if self.free > 0:
            self.index = build_index(
                indices, select_block=config.select_block, num_init=self.num_init, num_local=self.num_local,
                blocks=p.select_blocks, chunk=self.chunk, item=ITEM[way], start=p.table("start"), sel_base=p.table("sel_base"),
                offset=p.offset,
            )  # fmt: skip
        self.units_a_part = max(1, min(self.units, PART_BYTES[way] // (a_row * min(self.chunk, p.n))))

    def part_rows(self) -> int:
        """Rows (b g t) of the largest chunk of units."""
        return self.units_a_part * min(self.chunk, self.p.n)

    def part_entries(self) -> int:
        """Entries of the largest chunk of units."""
        return self.part_rows() * self.free

    def chunks(self) -> list[tuple[int, int, int]]:
        """(first unit, last unit + 1, first row (b g t)) of every chunk."""
        starts = range(0, self.units, self.units_a_part)
        rows = [unit // self.a_head * self.p.n + unit % self.a_head * self.chunk for unit in starts]
        ends = [min(start + self.units_a_part, self.units) for start in starts]
        return list(zip(starts, ends, rows, strict=True))

    def constants(self) -> dict[str, int | bool]:
        """What the finishing kernels are told of places and forced blocks."""
        return {
            "BLOCK": self.p.config.select_block, "NUM": self.p.config.num_selected, "FREE": self.free,
            "SUB": self.sub, "NUM_INIT": self.num_init, "NUM_LOCAL": self.num_local, "WINDOW": self.p.config.window,
            "PACKED": self.p.packed,
        }  # fmt: skip


def _at(x: Tensor) -> tuple[int, ...]:
    """What the kernels are told of where a tensor's rows are."""
    return x.stride()[:3]


@dataclass(frozen=True)
class Rest:
    """What the last forward kernel does besides the selected branch: the window branch, the gates and the sum.

    o_cmp is read; o_win, its log-sum-exp and total are written.
    """

    k_win: Tensor
    v_win: Tensor
    gates: Tensor
    o_cmp: Tensor
    o_win: Tensor
    lse_win: Tensor
    total: Tensor


def selected_parts(
    q: Tensor, k: Tensor, v: Tensor, part_o: Tensor, part_lse: Tensor, units: tuple[int, int], row0: int, s: Selection, p: Problem
) -> None:
    """Writes the partials of all entries of the units [units[0], units[1]), whose first row (b g t) is row0."""
    if has_tiles(p.device):
        from nsa_cli.ops.triton import parts_tiles

        if parts_tiles.fits(p, s):
            parts_tiles.selected_parts(q, k, v, part_o, part_lse, units, row0, s, p)
            return
    i, tile = s.index, _tile("selected_parts", p)
    assert i is not None
    selected.selected_parts[(i.most_items(units[1] - units[0], s.part_entries()) * s.sub,)](
        q, k, v, part_o, part_lse, i.entries, i.ends, i.items, i.item_list, i.item_start, p.table("sel_start"),
        p.table("sel_end"), units[0] * i.blocks, units[1] * i.blocks, row0, s.part_rows(), p.n, p.offset, s.a_head, i.blocks,
        p.scale_log2, *_at(q), *_at(k), *_at(v), G=p.g, R=p.r, RP=p.rp, D=p.d, E=p.e, EP=part_o.stride(2), DK=p.dk, DV=p.dv,
        BLOCK=p.config.select_block, BS=s.bs, SUB=s.sub, FREE=s.free, ITEM=i.item, CAUSAL=s.causal, PACKED=p.packed,
        M=_rows(tile, p), PRECISION=p.precision, **tile.options(),
    )  # fmt: skip


def selected_forward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, out: Tensor, lse: Tensor, p: Problem, *, forced: bool,
    rest: Rest | None = None,
) -> None:  # fmt: skip
    """Writes o_slc to `out`, and its log-sum-exp to `lse`. forced: as in Selection."""
    s = Selection(indices, p, forced=forced, way="forward")
    finish = _tile("selected_finish", p)
    m = _rows(finish, p)
    part_o = part_lse = d_o = None
    rows = s.part_rows()
    if s.index is not None:
        width = cdiv(p.e, 16 // p.dtype.itemsize) * (16 // p.dtype.itemsize)  # rows fit for the copy engine
        part_o = torch.empty(1, s.free * s.sub, rows * p.rp, width, dtype=p.dtype, device=p.device)[..., : p.e]
        part_lse = torch.empty(s.free * s.sub, rows * p.rp, dtype=torch.float32, device=p.device)
        d_o = head_rows(part_o, m, p.dv)
    d_k, d_v = head_rows(k, finish.keys, p.dk), head_rows(v, finish.keys, p.dv)
    all_of = rest or Rest(k, v, q, out, out, lse, out)
    assert _at(out) == _at(all_of.total) == _at(all_of.o_cmp) == _at(all_of.o_win)
    d_k_win = d_k if all_of.k_win is k else head_rows(all_of.k_win, finish.keys, p.dk)
    d_v_win = d_v if all_of.v_win is v else head_rows(all_of.v_win, finish.keys, p.dv)
    for unit0, unit1, row0 in s.chunks():
        if part_o is not None and part_lse is not None:
            selected_parts(q, k, v, part_o, part_lse, (unit0, unit1), row0, s, p)
        grid = ((unit1 - unit0) * cdiv(s.chunk, m // p.rp),)
        selected.selected_finish[grid](
            q, d_k, d_v, d_k_win, d_v_win, out, all_of.total, all_of.o_cmp, all_of.o_win, all_of.gates, indices, d_o,
            part_lse, lse, all_of.lse_win, p.table("start"), unit0, row0, rows, p.n, p.offset, s.a_head, s.chunk,
            p.scale_log2, *_at(q), *_at(out), *all_of.gates.stride(), G=p.g, R=p.r, RP=p.rp, D=p.d, E=p.e, DK=p.dk, DV=p.dv,
            PLACES=s.places,
            **s.constants(), M=m, BN=finish.keys, STAGES=finish.stages, PRECISION=p.precision, COMBINE=rest is not None,
            **(finish.options() | {"num_stages": finish.key_stages}),
        )  # fmt: skip


def row_deltas(do: Tensor, branches: Tensor, gate: Tensor | None, p: Problem) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """delta [r, b, n, h], the gates [r, b, n, h] and their gradient [b, h, n, r]; branches [r, b, h, n, e]."""
    count = branches.shape[0]
    delta = torch.empty(count, p.b, p.n, p.h, dtype=torch.float32, device=p.device)
    gate32 = dgates = None
    if gate is not None:
        gate32 = torch.empty_like(delta)
        dgates = torch.empty(p.b, p.n, p.h, count, dtype=gate.dtype, device=p.device)
    size, rows = 32, p.b * p.n * p.h
    gates.row_deltas[(cdiv(rows, size),)](
        do, branches, gate, delta, gate32, dgates, rows, p.n, *_at(do), *(gate.stride() if gate is not None else (0,) * 4),
        branches.stride(0), branches.stride(2), H=p.h, E=p.e, DV=p.dv, BRANCHES=count, GATED=gate is not None, SIZE=size,
    )  # fmt: skip
    return delta, gate32, None if dgates is None else dgates.transpose(1, 2)


def attend_dq(
    branch: str, q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, gate: Tensor | None, dq: Tensor,
    p: Problem, *, add: bool,
) -> None:  # fmt: skip
    """Writes, or adds, a branch's ("cmp" or "win") query gradient to dq."""
    if branch == "cmp" and not add and has_tiles(p.device):
        from nsa_cli.ops.triton import attend_tiles

        if attend_tiles.fits(p):
            attend_tiles.attend_dq(q, k, v, do, lse, delta, gate, dq, p)
            return
    tile = _tile(NAMES[branch] + "_dq", p)
    single = branch == "cmp"
    m = tile.rows if single else _rows(tile, p)
    units, share, r, rp = (p.h, p.r, 1, 1) if single else (p.g, 1, p.r, p.rp)
    grid = (cdiv(p.n, m // rp) * p.b * units,)
    attend.attend_dq[grid](
        _stays(q, rp, m, p.dk), _stays(do, rp, m, p.dv), head_rows(k, tile.keys, p.dk), head_rows(v, tile.keys, p.dv),
        _stays(dq, rp, m, p.dk), lse, delta, gate, p.table("start"), p.table("base"), p.n, p.offset, p.b * units,
        p.scale_log2, p.scale, *_at(q), *_at(do), *_at(dq), UNITS=units, SHARE=share,
        R=r, RP=rp, D=p.d, E=p.e, DK=p.dk, DV=p.dv, BRANCH=attend.BRANCHES[branch].value, **p.bounds(), M=m, BN=tile.keys,
        PRECISION=p.precision, ADD=add, GATED=gate is not None,
        **tile.options(),
    )  # fmt: skip


def attend_dkv(
    branch: str, q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, gate: Tensor | None, p: Problem,
    keys: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk and dv of a branch, or of the "local" or "init" forced blocks, over the first `keys` keys: float32 [b, s, g, d].

    "first": of keys that p's documents give any ranges of queries, as `_add_first_blocks` asks.
    """
    if has_tiles(p.device):
        from nsa_cli.ops.triton import dkv_tiles

        if dkv_tiles.fits(p):
            return dkv_tiles.attend_dkv(branch, q, k, v, do, lse, delta, gate, p, keys)
    tile = _tile(NAMES.get(branch, "forced") + "_dkv", p)
    keys = k.shape[2] if keys is None else keys
    m = _rows(tile, p)
    step = m // p.rp
    tiles = cdiv(keys, tile.keys) * p.b * p.g
    splits, chunk = split_queries(branch, tiles, step, p)
    dk = torch.empty(splits, p.b, keys, p.g, p.d, dtype=torch.float32, device=p.device)
    dv = torch.empty(splits, p.b, keys, p.g, p.e, dtype=torch.float32, device=p.device)
    attend.attend_dkv[(tiles * splits,)](
        group_rows(q, p.g, p.rp, m, p.dk), group_rows(do, p.g, p.rp, m, p.dv), head_rows(k, tile.keys, p.dk),
        head_rows(v, tile.keys, p.dv), dk, dv, lse, delta, gate, p.table("start"), p.table("end"), p.table("first"),
        p.table("last"), p.n, p.offset, keys, p.b * p.g, chunk, p.scale_log2, p.scale, UNITS=p.g, R=p.r, RP=p.rp, D=p.d, E=p.e,
        DK=p.dk, DV=p.dv, BRANCH=attend.BRANCHES[branch].value, **p.bounds(), M=m, BN=tile.keys, PRECISION=p.precision,
        GATED=gate is not None, **tile.options(),
    )  # fmt: skip
    return (dk[0], dv[0]) if splits == 1 else (dk.sum(0), dv.sum(0))


def _add_first_blocks(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, gate: Tensor | None, p: Problem, dk: Tensor,
    dv: Tensor,
) -> None:  # fmt: skip
    """Adds dk and dv of the first num_init blocks, of every packed document, to dk and dv, float32 [b, s, g, d].

    These blocks have long ranges of queries, and those of documents are few among all keys. Gathered, they are split and added
    up like the first blocks of one sequence; as they lie, one program a group would have the first block of a long document.
    Where no document is long, or this would gather more than half of the keys, they stay.
    """
    documents, config = p.documents, p.config
    length, block = config.num_init * config.select_block, config.select_block
    arguments = (q, k, v, do, lse, delta, gate)
    if documents is None or p.keys < LONG_DOCUMENT or 2 * (len(documents.ends) - 1) * length > p.keys:
        keys = p.keys if p.packed else min(length, p.keys)
        for total, part in zip((dk, dv), attend_dkv("init", *arguments, p, keys), strict=True):
            total[:, :keys] += part
        return
    start, end = documents.ends[:-1, None], documents.ends[1:, None]
    place = torch.arange(length, dtype=torch.int32, device=p.device)
    token = start + place
    later = torch.maximum(start + (place // block + config.num_local) * block, token)  # the first query that is not LOCAL to it
    low = torch.where(token < end, torch.minimum(later, end), end)
    ranges = replace(documents, first=low.flatten(), last=end.repeat(1, length).flatten())
    at = token.flatten().clamp(max=p.keys - 1).long()
    gathered = (q, aligned(k[:, :, at]), aligned(v[:, :, at]), *arguments[3:])
    parts = attend_dkv("first", *gathered, replace(p, documents=ranges))
    # Behind a document's end, `at` has tokens of the next ones, several times then: they get the same sum again.
    inside = at - documents.start[at]
    row, first = documents.document[at] * length + inside.clamp(max=length - 1), (inside < length)[:, None, None]
    for total, part in zip((dk, dv), parts, strict=True):
        total.index_copy_(1, at, total[:, at] + torch.where(first, part[:, row], 0.0))


def selected_gradient_parts(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, gate: Tensor | None, part_dq: Tensor,
    part_dk: Tensor, part_dv: Tensor, units: tuple[int, int], row0: int, s: Selection, p: Problem,
) -> None:  # fmt: skip
    """Writes the partials of all entries and items of the units [units[0], units[1]), whose first row (b g t) is row0."""
    if has_tiles(p.device):
        from nsa_cli.ops.triton import gradient_tiles

        if gradient_tiles.fits(p, s):
            gradient_tiles.selected_gradient_parts(
                q, k, v, do, lse, delta, gate, part_dq, part_dk, part_dv, units, row0, s, p
            )
            return
    i, tile = s.index, _tile("selected_gradient_parts", p)
    assert i is not None
    selected_gradient.selected_gradient_parts[(i.most_items(units[1] - units[0], s.part_entries()) * s.sub,)](
        q, do, k, v, part_dq, part_dk, part_dv, lse, delta, gate, i.entries, i.ends, i.items, i.item_list, i.item_start,
        p.table("sel_start"), p.table("sel_end"), units[0] * i.blocks, units[1] * i.blocks, row0, p.n, p.offset, s.a_head,
        i.blocks, p.scale_log2, p.scale, *_at(q), *_at(do), *_at(k), *_at(v), G=p.g, R=p.r, RP=p.rp, D=p.d, E=p.e, DK=p.dk,
        DV=p.dv, BLOCK=p.config.select_block, BS=s.bs, SUB=s.sub, FREE=s.free, ITEM=i.item, CAUSAL=s.causal, PACKED=p.packed,
        M=_rows(tile, p), STAGES=tile.stages, PRECISION=p.precision, GATED=gate is not None, **tile.options(),
    )  # fmt: skip


def _add_up(part_dk: Tensor, part_dv: Tensor, dk: Tensor, dv: Tensor, units: tuple[int, int], s: Selection, p: Problem) -> None:
    """Adds the items' parts to dk and dv, in the items' order."""
    i = s.index
    assert i is not None
    heads = (units[1] - 1) // s.a_head - units[0] // s.a_head + 1
    selected_gradient.selected_gradient_sum[(heads * i.blocks * s.sub,)](
        part_dk, part_dv, dk, dv, i.items, p.table("sel_start"), p.table("sel_end"), *units, p.keys, s.a_head, i.blocks, G=p.g,
        D=p.d, E=p.e, DK=p.dk, DV=p.dv, BLOCK=p.config.select_block, BS=s.bs, SUB=s.sub, PACKED=p.packed, num_warps=8,
    )  # fmt: skip


def selected_backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, indices: Tensor, lse: Tensor, delta: Tensor, gate: Tensor | None, dq: Tensor,
    p: Problem, *, forced: bool, add: bool = False,
    window: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Writes, or adds, the selected branch's query gradient to dq; returns dk and dv, float32 [b, s, g, d].

    window: (k_win, v_win, lse, delta, gate): the window branch's query gradient too.
    """
    config = p.config
    if forced and config.num_local > 0:
        dk, dv = attend_dkv("local", q, k, v, do, lse, delta, gate, p)
    else:
        dk = torch.zeros(p.b, p.keys, p.g, p.d, dtype=torch.float32, device=p.device)
        dv = torch.zeros(p.b, p.keys, p.g, p.e, dtype=torch.float32, device=p.device)
    if forced and config.num_init > 0:
        _add_first_blocks(q, k, v, do, lse, delta, gate, p, dk, dv)
    s = Selection(indices, p, forced=forced, way="backward")
    finish = _tile("selected_gradient_finish", p)
    m = _rows(finish, p)
    part_dq = part_dk = part_dv = None
    if s.index is not None:
        entries, block = s.part_entries(), config.select_block
        most = s.index.most_items(s.units_a_part, entries)
        part_dq = torch.empty(entries * s.sub, p.r, p.d, dtype=p.dtype, device=p.device)
        part_dk = torch.empty(most, block, p.d, dtype=torch.float32, device=p.device)
        part_dv = torch.empty(most, block, p.e, dtype=torch.float32, device=p.device)
    k_win, v_win, *win_rows = window or (k, v, None, None, None)
    d_k, d_v = head_rows(k, finish.keys, p.dk), head_rows(v, finish.keys, p.dv)
    d_k_win = d_k if k_win is k else head_rows(k_win, finish.keys, p.dk)
    d_v_win = d_v if v_win is v else head_rows(v_win, finish.keys, p.dv)
    for unit0, unit1, row0 in s.chunks():
        if part_dq is not None and part_dk is not None and part_dv is not None:
            selected_gradient_parts(q, k, v, do, lse, delta, gate, part_dq, part_dk, part_dv, (unit0, unit1), row0, s, p)
            _add_up(part_dk, part_dv, dk, dv, (unit0, unit1), s, p)
        selected_gradient.selected_gradient_finish[((unit1 - unit0) * cdiv(s.chunk, m // p.rp),)](
            q, do, d_k, d_v, d_k_win, d_v_win, dq, part_dq, lse, delta, gate, *win_rows, indices, p.table("start"), unit0,
            row0, p.n, p.offset, s.a_head, s.chunk, cores(p.device), p.scale_log2, p.scale, *_at(q), *_at(do), *_at(dq), G=p.g,
            R=p.r, RP=p.rp, D=p.d,
            E=p.e, DK=p.dk, DV=p.dv, **s.constants(), M=m, BN=finish.keys, STAGES=finish.stages, PRECISION=p.precision,
            ADD=add, GATED=gate is not None, WINDOW_TOO=window is not None,
            **(finish.options() | {"num_stages": finish.key_stages}),
        )  # fmt: skip
    return dk, dv

