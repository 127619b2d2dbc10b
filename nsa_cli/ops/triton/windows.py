"""Compression's memory movement: tokens into blocks of l, and their gradient back (eq. 7 of arXiv 2502.11089).

The networks phi are matrix products and stay with PyTorch; here is what lies before them. No atomics: a token's gradient
adds the at most l / d blocks that hold it in ascending order, so that the same input gives the same bits.

Letters: b batch, g key/value group, s token, c compressed block, i token inside a block, d head dim, r row of a program.
Rows are counted in int64: tensors may have more than 2^31 elements. One grid axis, x, as y and z end at 65,535.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_cli.config import NSAConfig
from nsa_cli.ops.triton.problem import cdiv, next_power_of_2

TILE = 2048
"""Elements on chip in one program: 16 a thread, two 16-byte loads in bf16."""


def mean_pool(x: Tensor, config: NSAConfig, starts: Tensor | None = None) -> Tensor:
    """The mean over the tokens of every compressed block (eq. 7 with phi the mean).

    out[b, g, c] = 1/l sum_i x[b, g, start_c + i], 0 <= i < l, added up in float32 (in float64 for float64).
    x: [b, g, s, d], any strides and floating dtype. out: [b, g, c, d], contiguous, in x's dtype; c may be 0.
    starts: int32 or int64 [c], for packed documents: each block's first token, ascending, at least a stride apart and at most
    s - l, which is not checked. Left out, block c of one document starts at c * stride.
    Differentiable in x. Raises ValueError for wrong shapes or dtypes.
    """
    _check(x, None, config, starts)
    return mean_pool_forward(x, starts, config.compress_block, config.compress_stride)


def windows(x: Tensor, pos: Tensor | None, config: NSAConfig, starts: Tensor | None = None) -> Tensor:
    """Every compressed block's tokens with their intra-block position, what phi of eq. 7 is applied to.

    out[b, g, c, i] = x[b, g, start_c + i] + pos[g, i], 0 <= i < l, added in float32 and rounded once to x's dtype: under
    autocast that is what casting the promoted sum gives. pos None adds nothing.
    x: [b, g, s, d], any strides and floating dtype. pos: [g, l, d] in a dtype of its own. starts: as in `mean_pool`.
    out: [b, g, c, l, d], contiguous; c may be 0.
    Differentiable in x and pos. Raises ValueError for wrong shapes or dtypes.
    """
    _check(x, pos, config, starts)
    return windows_forward(x, pos, starts, config.compress_block, config.compress_stride)


def _check(x: Tensor, pos: Tensor | None, config: NSAConfig, starts: Tensor | None) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}: must be floating [b, g, s, d]")
    shape = (x.shape[1], config.compress_block, x.shape[3])
    if pos is not None and (tuple(pos.shape) != shape or not pos.is_floating_point()):
        raise ValueError(f"pos is {pos.dtype} {tuple(pos.shape)}: must be floating [g, l, d] = {shape}")
    if starts is not None and (starts.ndim != 1 or starts.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"starts is {starts.dtype} {tuple(starts.shape)}: must be torch.int32 or torch.int64 [c]")


@triton.jit
def _first_tokens(starts, o_c, m_c, STRIDE: tl.constexpr):
    return o_c * STRIDE if starts is None else tl.load(starts + o_c, mask=m_c, other=0).to(tl.int64)


@triton.jit(do_not_specialize=["groups", "rows", "tiles"])
def windows_kernel(
    x, pos, starts, out, s_b, s_g, s_s, s_d, groups, rows, tiles,
    L: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program copies BLOCK_R of the c * l rows (c, i) of one head."""
    i_head, i_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    i_b, i_g = (i_head // groups).to(tl.int64), (i_head % groups).to(tl.int64)
    o_r = i_tile.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    m_r = o_r < rows
    m = m_r[:, None] & (o_d < D)
    o_i = o_r % L
    o_s = _first_tokens(starts, o_r // L, m_r, STRIDE) + o_i
    p_x = x + i_b * s_b + i_g * s_g + o_s[:, None] * s_s + o_d * s_d
    b_x = tl.load(p_x, mask=m, other=0.0).to(ACC)  # [BLOCK_R, BLOCK_D]
    if pos is not None:
        b_x += tl.load(pos + (i_g * L + o_i)[:, None] * D + o_d, mask=m, other=0.0).to(ACC)
    p_out = out + (i_head.to(tl.int64) * rows + o_r)[:, None] * D + o_d
    tl.store(p_out, b_x.to(out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["groups", "rows", "tiles"])
def mean_pool_kernel(
    x, starts, out, s_b, s_g, s_s, s_d, groups, rows, tiles,
    L: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program averages BLOCK_R blocks of one head."""
    i_head, i_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    i_b, i_g = (i_head // groups).to(tl.int64), (i_head % groups).to(tl.int64)
    o_c = i_tile.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    m_c = o_c < rows
    m = m_c[:, None] & (o_d < D)
    o_s = _first_tokens(starts, o_c, m_c, STRIDE)
    p_x = x + i_b * s_b + i_g * s_g + o_s[:, None] * s_s + o_d * s_d
    b_sum = tl.zeros([BLOCK_R, BLOCK_D], ACC)
    for _ in range(L):
        b_sum += tl.load(p_x, mask=m, other=0.0).to(ACC)
        p_x += s_s
    p_out = out + (i_head.to(tl.int64) * rows + o_c)[:, None] * D + o_d
    tl.store(p_out, (b_sum / L).to(out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["groups", "rows", "tiles", "blocks"])
def token_gradient_kernel(
    dout, starts, begun, dx, s_ob, s_og, s_oc, s_oi, s_od, s_xb, s_xg, s_xs, groups, rows, tiles, blocks, MEAN: tl.constexpr,
    L: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program adds up the gradients of BLOCK_R tokens of one head, over the blocks that hold them.

    Of the blocks that have begun at token s, only the last l / d can reach it, as two starts are at least d apart.
    """
    i_head, i_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    i_b, i_g = (i_head // groups).to(tl.int64), (i_head % groups).to(tl.int64)
    o_s = i_tile.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    m_s = o_s < rows
    o_begun = o_s // STRIDE + 1 if begun is None else tl.load(begun + o_s, mask=m_s, other=0).to(tl.int64)
    b_sum = tl.zeros([BLOCK_R, BLOCK_D], ACC)
    for j in range(L // STRIDE):
        o_c = o_begun - L // STRIDE + j
        m_c = m_s & (o_c >= 0) & (o_c < blocks)
        o_i = o_s - _first_tokens(starts, o_c, m_c, STRIDE)
        m = (m_c & (o_i < L))[:, None] & (o_d < D)
        p_out = dout + i_b * s_ob + i_g * s_og + (o_c * s_oc + o_i * s_oi)[:, None] + o_d * s_od
        b_sum += tl.load(p_out, mask=m, other=0.0).to(ACC)
    if MEAN:
        b_sum = b_sum / L
    p_x = dx + i_b * s_xb + i_g * s_xg + o_s[:, None] * s_xs + o_d
    tl.store(p_x, b_sum.to(dx.dtype.element_ty), mask=m_s[:, None] & (o_d < D))


def _launch(kernel: Any, x: Tensor, rows: int, *arguments: Any, **constants: Any) -> None:
    """Run `kernel` over the heads of x [b, g, .., d] and their `rows`; groups, rows, tiles and the tile's shape are added here.

    `arguments` end where the kernel's `groups` begins; `constants` are the rest.
    """
    batch, groups, dim = x.shape[0], x.shape[1], x.shape[-1]
    if batch * groups * rows * dim == 0:
        return
    block_d = next_power_of_2(dim)
    block_r = max(1, TILE // block_d)
    tiles = cdiv(rows, block_r)
    acc = tl.float64 if x.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(x):
        kernel[(batch * groups * tiles,)](
            *arguments, groups, rows, tiles, D=dim, BLOCK_R=block_r, BLOCK_D=block_d, ACC=acc, **constants
        )


def _num_blocks(x: Tensor, starts: Tensor | None, length: int, stride: int) -> int:
    if starts is not None:
        return starts.shape[0]
    return 0 if x.shape[2] < length else (x.shape[2] - length) // stride + 1


def _empty_tokens(dout: Tensor, tokens: int) -> Tensor:
    """[b, g, s, d], a head's tokens apart as projections lay them out: [b, s, g, d] in memory."""
    return dout.new_empty(dout.shape[0], tokens, dout.shape[1], dout.shape[-1]).transpose(1, 2)


def _token_gradient(dout: Tensor, starts: Tensor | None, tokens: int, length: int, stride: int, *, mean: bool) -> Tensor:
    """[b, g, c, l, d] -> [b, g, s, d]."""
    dx = _empty_tokens(dout, tokens)
    begun = None
    if starts is not None:
        starts = starts.contiguous()
        every = torch.arange(tokens, device=starts.device, dtype=starts.dtype)
        begun = torch.searchsorted(starts, every, right=True, out_int32=True)
    _launch(
        token_gradient_kernel, dx, tokens, dout, starts, begun, dx, *dout.stride(), *dx.stride()[:3],
        blocks=dout.shape[2], MEAN=mean, L=length, STRIDE=stride,
    )  # fmt: skip
    return dx


@torch.library.custom_op(
    "nsa::mean_pool_forward", mutates_args=(), schema="(Tensor x, Tensor? starts, int length, int stride) -> Tensor"
)
def mean_pool_forward(x: Tensor, starts: Tensor | None, length: int, stride: int) -> Tensor:
    out = x.new_empty(*x.shape[:2], _num_blocks(x, starts, length, stride), x.shape[3])
    starts = None if starts is None else starts.contiguous()
    _launch(mean_pool_kernel, x, out.shape[2], x, starts, out, *x.stride(), L=length, STRIDE=stride)
    return out


@torch.library.custom_op(
    "nsa::mean_pool_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor? starts, SymInt tokens, int length, int stride) -> Tensor",
)
def mean_pool_backward(dout: Tensor, starts: Tensor | None, tokens: int, length: int, stride: int) -> Tensor:
    return _token_gradient(dout.unsqueeze(3).expand(-1, -1, -1, length, -1), starts, tokens, length, stride, mean=True)


@torch.library.custom_op(
    "nsa::windows_forward",
    mutates_args=(),
    schema="(Tensor x, Tensor? pos, Tensor? starts, int length, int stride) -> Tensor",
)
def windows_forward(x: Tensor, pos: Tensor | None, starts: Tensor | None, length: int, stride: int) -> Tensor:
    out = x.new_empty(*x.shape[:2], _num_blocks(x, starts, length, stride), length, x.shape[3])
    pos = None if pos is None else pos.contiguous()
    starts = None if starts is None else starts.contiguous()
    _launch(windows_kernel, x, out.shape[2] * length, x, pos, starts, out, *x.stride(), L=length, STRIDE=stride)
    return out


@torch.library.custom_op(
    "nsa::windows_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor? starts, SymInt tokens, int length, int stride) -> Tensor",
)
def windows_backward(dout: Tensor, starts: Tensor | None, tokens: int, length: int, stride: int) -> Tensor:
    return _token_gradient(dout, starts, tokens, length, stride, mean=False)


@mean_pool_forward.register_fake
def _(x: Tensor, starts: Tensor | None, length: int, stride: int) -> Tensor:
    return x.new_empty(*x.shape[:2], _num_blocks(x, starts, length, stride), x.shape[3])


@windows_forward.register_fake
def _(x: Tensor, pos: Tensor | None, starts: Tensor | None, length: int, stride: int) -> Tensor:
    return x.new_empty(*x.shape[:2], _num_blocks(x, starts, length, stride), length, x.shape[3])


@mean_pool_backward.register_fake
@windows_backward.register_fake
def _(dout: Tensor, starts: Tensor | None, tokens: int, length: int, stride: int) -> Tensor:
    return _empty_tokens(dout, tokens)


def _mean_pool_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, starts, ctx.length, ctx.stride = inputs
    ctx.save_for_backward(starts)
    ctx.tokens = x.shape[2]


def _mean_pool_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    (starts,) = ctx.saved_tensors
    return mean_pool_backward(dout, starts, ctx.tokens, ctx.length, ctx.stride), None, None, None


def _windows_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, pos, starts, ctx.length, ctx.stride = inputs
    ctx.save_for_backward(starts)
    ctx.tokens = x.shape[2]
    ctx.pos_dtype = None if pos is None else pos.dtype


def _windows_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    (starts,) = ctx.saved_tensors
    dx = dpos = None
    if ctx.needs_input_grad[0]:
        dx = windows_backward(dout, starts, ctx.tokens, ctx.length, ctx.stride)
    if ctx.needs_input_grad[1]:
        # One reduction kernel in a fixed order; half precision is widened inside it, not in memory.
        dpos = dout.sum((0, 2), dtype=torch.promote_types(dout.dtype, torch.float32)).to(ctx.pos_dtype)
    return dx, dpos, None, None, None


mean_pool_forward.register_autograd(_mean_pool_gradients, setup_context=_mean_pool_context)
windows_forward.register_autograd(_windows_gradients, setup_context=_windows_context)
