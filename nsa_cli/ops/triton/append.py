"""A token's place in the cache: what stands between a layer's projections and attention when one token a sequence is decoded.

    append         rotary on queries and keys, gates, and every key and value where it belongs: full buffers at the token's
                   position, rings at its remainder; where the token completes a block, the block's raw tokens side by side
    store_blocks   the compressed blocks that the network made of them

A program a head: nothing here is more than a row of a few hundred bytes, and launches are all that it costs.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_cli.config import NSAConfig
from nsa_cli.ops.triton.overlap import follow, overlap
from nsa_cli.ops.triton.problem import next_power_of_2


@triton.jit
def turned(p_x, b_x, p_turns, at, o_d, m_d, D: tl.constexpr):
    """b_x = p_x[o_d] by rotary at token `at`: channels 2i and 2i + 1 by one angle.

    It is at turns[i] in turns, of which the fraction counts, in float64; 2 pi times that in float32, as are cosine and sine."""
    b_pair = tl.load(p_x + (o_d ^ 1), mask=m_d, other=0.0).to(tl.float32)
    b_turns = at.to(tl.float64) * tl.load(p_turns + o_d // 2, mask=m_d, other=0.0)
    b_angle = ((b_turns - tl.floor(b_turns)) * tl.load(p_turns + (D + 1) // 2)).to(tl.float32)
    b_sin = tl.where(o_d % 2 == 0, -tl.sin(b_angle), tl.sin(b_angle))
    return b_x.to(tl.float32) * tl.cos(b_angle) + b_pair * b_sin


@triton.jit
def keep(p_buffer, b_x, i_bg, places, place, o_d, m_d, D: tl.constexpr):
    """buffer[i_bg, place] = b_x, of a buffer [b g, places, d]."""
    tl.store(p_buffer + (i_bg * places + place) * D + o_d, b_x.to(p_buffer.dtype.element_ty), mask=m_d)


@triton.jit
def gather_block(
    p_source, b_x, p_pos, p_block, i_bg, i_g, places, at, o_d, m_d, RING: tl.constexpr, D: tl.constexpr, LENGTH: tl.constexpr,
    LP: tl.constexpr, STRIDE: tl.constexpr, POSITIONED: tl.constexpr,
):  # fmt: skip
    """The last LENGTH tokens, b_x the newest of them, plus the network's pos, if they are a block."""
    start = at - LENGTH + 1
    if (start >= 0) & (start % STRIDE == 0):
        o_l = tl.arange(0, LP)
        place = start + o_l
        if RING:
            place = place % places
        m_old = (o_l < LENGTH - 1)[:, None] & m_d[None, :]
        o_old = (i_bg * places + place)[:, None] * D + o_d[None, :]
        b_block = tl.load(p_source + o_old, mask=m_old, other=0.0)
        b_block = tl.where((o_l == LENGTH - 1)[:, None], b_x[None, :], b_block)
        o_block = o_l[:, None] * D + o_d[None, :]
        m_block = (o_l < LENGTH)[:, None] & m_d[None, :]
        if POSITIONED:
            b_pos = tl.load(p_pos + i_g * LENGTH * D + o_block, mask=m_block, other=0.0)
            b_block = (b_block.to(tl.float32) + b_pos.to(tl.float32)).to(b_block.dtype)
        tl.store(p_block + i_bg * LENGTH * D + o_block, b_block, mask=m_block)


@triton.jit(do_not_specialize=["CAPACITY"])
def append_kernel(
    p_x, p_turns, p_at, p_bias, p_q, p_gates, p_k, p_v, p_k_win, p_v_win, p_k_raw, p_v_raw, p_k_pos, p_v_pos, p_k_block,
    p_v_block, CAPACITY, stride_xb, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SETS: tl.constexpr,
    GATES: tl.constexpr, LENGTH: tl.constexpr, LP: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    BLOCKS: tl.constexpr, POSITIONED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One head's row of a token's projections x [q | k of each set | v of each set | gates]. GATES: 3 H rounded up, 0: dense."""
    follow(OVERLAP)
    SLOTS: tl.constexpr = H + 2 * SETS * G + (GATES > 0)
    i_b, i_slot = (tl.program_id(0) // SLOTS).to(tl.int64), tl.program_id(0) % SLOTS
    at = tl.load(p_at + i_b)
    p_row = p_x + i_b * stride_xb
    o_d = tl.arange(0, DP)
    m_d = o_d < D
    p_head = p_row + i_slot * D
    if i_slot < H:
        b_x = tl.load(p_head + o_d, mask=m_d, other=0.0)
        b_x = turned(p_head, b_x, p_turns, at, o_d, m_d, D)
        tl.store(p_q + (i_b * H + i_slot) * D + o_d, b_x.to(p_q.dtype.element_ty), mask=m_d)
    elif i_slot < H + 2 * SETS * G:
        i_kv = i_slot - H
        is_key = i_kv < SETS * G
        i_set, i_g = i_kv % (SETS * G) // G, i_kv % G
        i_bg = i_b * G + i_g
        b_x = tl.load(p_head + o_d, mask=m_d, other=0.0)
        if (SETS == 1) | (i_set == 1):  # the selected branch's, or all there is
            if is_key:
                keep(p_k, turned(p_head, b_x, p_turns, at, o_d, m_d, D), i_bg, CAPACITY, at, o_d, m_d, D)
            else:
                keep(p_v, b_x, i_bg, CAPACITY, at, o_d, m_d, D)
        if GATES > 0:
            if (SETS == 1) | (i_set == 0):  # the raw ones
                RING: tl.constexpr = LENGTH - 1 if LENGTH > 1 else 1
                if is_key:
                    if BLOCKS:
                        gather_block(
                            p_k_raw, b_x, p_k_pos, p_k_block, i_bg, i_g, RING, at, o_d, m_d, True, D, LENGTH, LP, STRIDE,
                            POSITIONED,
                        )  # fmt: skip
                    tl.debug_barrier()  # the place that is written now was read as the block's first token
                    if LENGTH > 1:
                        keep(p_k_raw, b_x, i_bg, RING, at % RING, o_d, m_d, D)
                elif SETS == 3:
                    if BLOCKS:
                        gather_block(
                            p_v_raw, b_x, p_v_pos, p_v_block, i_bg, i_g, RING, at, o_d, m_d, True, D, LENGTH, LP, STRIDE,
                            POSITIONED,
                        )  # fmt: skip
                    tl.debug_barrier()
                    if LENGTH > 1:
                        keep(p_v_raw, b_x, i_bg, RING, at % RING, o_d, m_d, D)
                elif BLOCKS:
                    gather_block(
                        p_v, b_x, p_v_pos, p_v_block, i_bg, i_g, CAPACITY, at, o_d, m_d, False, D, LENGTH, LP, STRIDE, POSITIONED
                    )
            if (SETS == 3) & (i_set == 2):
                if is_key:
                    keep(p_k_win, turned(p_head, b_x, p_turns, at, o_d, m_d, D), i_bg, WINDOW, at % WINDOW, o_d, m_d, D)
                else:
                    keep(p_v_win, b_x, i_bg, WINDOW, at % WINDOW, o_d, m_d, D)
    else:
        o_g = tl.arange(0, GATES if GATES > 0 else 1)
        m_g = o_g < 3 * H
        b_g = tl.load(p_head + o_g, mask=m_g, other=0.0).to(tl.float32)
        b_g += tl.load(p_bias + o_g, mask=m_g, other=0.0).to(tl.float32)
        tl.store(p_gates + i_b * 3 * H + o_g, tl.sigmoid(b_g).to(p_gates.dtype.element_ty), mask=m_g)


@triton.jit(do_not_specialize=["BLOCKS"])
def store_blocks_kernel(
    p_k_new, p_v_new, p_k_cmp, p_v_cmp, p_at, p_turns, BLOCKS, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    LENGTH: tl.constexpr, STRIDE: tl.constexpr, TURN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The block that ends with the token at p_at, if one does, of one key/value head: its key (turned, or not) or its value."""
    follow(OVERLAP)
    i_bg, is_key = (tl.program_id(0) // 2).to(tl.int64), tl.program_id(0) % 2 == 0
    start = tl.load(p_at + i_bg // G) - LENGTH + 1
    if (start >= 0) & (start % STRIDE == 0):
        o_d = tl.arange(0, DP)
        m_d = o_d < D
        if is_key:
            p_new = p_k_new + i_bg * D
            b_x = tl.load(p_new + o_d, mask=m_d, other=0.0)
            if TURN:
                b_x = turned(p_new, b_x, p_turns, start, o_d, m_d, D).to(b_x.dtype)
            keep(p_k_cmp, b_x, i_bg, BLOCKS, start // STRIDE, o_d, m_d, D)
        else:
            keep(p_v_cmp, tl.load(p_v_new + i_bg * D + o_d, mask=m_d, other=0.0), i_bg, BLOCKS, start // STRIDE, o_d, m_d, D)


@dataclass(frozen=True)
class Places:
    """One layer's buffers, contiguous [b, g, places, d]: the selected branch's, or a dense layer's; rings of the window and of
    raw tokens, None where a layer has none."""

    k: Tensor
    v: Tensor
    k_win: Tensor | None = None
    v_win: Tensor | None = None
    k_raw: Tensor | None = None
    v_raw: Tensor | None = None


def append(
    x: Tensor, turns: Tensor, at: Tensor, places: Places, *, heads: int, sets: int, config: NSAConfig | None,
    bias: Tensor | None = None, pos: tuple[Tensor, Tensor] | None = None, blocks: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Puts one token a sequence into its places.

    x: projections [b, P] of q, k and v (`sets` of each, one after another) and, sparse, gates [b, heads 3] before `bias`.
    turns: `Rotary.turns` [d / 2 + 1]. at: the tokens' positions, int64 [b]. blocks: whether a row's token may complete a
    block, whose l raw tokens, with pos ([g, l, d] of keys and of values) added, are then gathered.
    Returns q turned [b, heads, 1, d], gates [b, heads, 1, 3] and the raw blocks of keys and values [2, b, g, 1, l, d], of rows
    that complete none without meaning. Sparse gates alone have a meaning.
    """
    (b, g, capacity, d), device = places.k.shape, x.device
    length = 1 if config is None else config.compress_block
    q = torch.empty(b, heads, 1, d, dtype=x.dtype, device=device)
    gates = torch.empty(b, heads, 1, 3, dtype=x.dtype, device=device) if config is not None else q
    raw = torch.empty(2, b if blocks else 0, g, 1, length, d, dtype=x.dtype, device=device)
    rings = [q if ring is None else ring for ring in (places.k_win, places.v_win, places.k_raw, places.v_raw)]
    k_pos, v_pos = (q, q) if pos is None else pos
    slots = heads + 2 * sets * g + (config is not None)
    append_kernel[(b * slots,)](
        x, turns, at, q if bias is None else bias, q, gates, places.k, places.v, *rings, k_pos, v_pos, *raw, capacity,
        x.stride(0), H=heads, G=g, D=d, DP=next_power_of_2(d), SETS=sets,
        GATES=0 if config is None else next_power_of_2(3 * heads), LENGTH=length, LP=next_power_of_2(length),
        STRIDE=1 if config is None else config.compress_stride,
        WINDOW=1 if config is None else config.window, BLOCKS=blocks, POSITIONED=pos is not None,
        num_warps=4 if blocks else 1, **overlap(device),
    )  # fmt: skip
    return q, gates, raw


def store_blocks(
    k_new: Tensor, v_new: Tensor, k_cmp: Tensor, v_cmp: Tensor, at: Tensor, config: NSAConfig, turns: Tensor | None
) -> None:
    """k_new, v_new [b, g, 1, d] into k_cmp, v_cmp [b, g, c, d], in the rows whose token at `at` completes a block.

    turns: `Rotary.turns`, by which keys are turned at their blocks' first positions; None: they are not.
    """
    b, g, blocks, d = k_cmp.shape
    store_blocks_kernel[(2 * b * g,)](
        k_new.contiguous(), v_new.contiguous(), k_cmp, v_cmp, at, at if turns is None else turns, blocks, G=g, D=d,
        DP=next_power_of_2(d), LENGTH=config.compress_block, STRIDE=config.compress_stride, TURN=turns is not None,
        num_warps=1, **overlap(at.device),
    )  # fmt: skip
