"""The Triton kernels as PyTorch operators: custom ops with fake kernels and gradients, so that torch.compile and CUDA graphs take
them whole, and the functions that nsa_cli.ops calls.

`geometry` is [l, d, l', n, num_init, num_local, w], and behind them, where it is not 0, the first query's token: queries may be
the last of the tokens that keys and values have. Nothing synchronises with the host; lengths of packed documents stay on the
device, and are the caller's to get right.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nsa_cli.config import NSAConfig
from nsa_cli.ops.triton import launch
from nsa_cli.ops.triton.problem import Problem, aligned, empty_rows, make_documents

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST = {"head dim": 256, "heads a group": 128, "select_block": 256, "num_selected": 256, "select_block / compress_stride": 128}


def refusal(config: NSAConfig, *, dim: int, group: int, dtype: torch.dtype | None = None) -> str | None:
    """Why these kernels cannot compute this attention, or None. dim: the larger head dim of keys and values."""
    if dtype is not None and dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    asked = (dim, group, config.select_block, config.num_selected, config.select_block // config.compress_stride)
    for (what, most), value in zip(MOST.items(), asked, strict=True):
        if value > most:
            return f"it takes {what} up to {most}, not {value}"
    return None


def _geometry(config: NSAConfig, offset: int = 0) -> list[int]:
    return [
        config.compress_block, config.compress_stride, config.select_block, config.num_selected, config.num_init,
        config.num_local, config.window, *([offset] if offset else []),
    ]  # fmt: skip


@lru_cache(maxsize=64)
def _config(geometry: tuple[int, ...]) -> NSAConfig:
    length, stride, block, num, init, local, window = geometry
    return NSAConfig(
        compress_block=length, compress_stride=stride, select_block=block, num_selected=num, num_init=init, num_local=local,
        window=window,
    )  # fmt: skip


def _problem(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, geometry: Sequence[int], scale: float, compressed: int = 0
) -> Problem:
    config, n = _config(tuple(geometry[:7])), q.shape[2]
    documents = None if cu_seqlens is None else make_documents(cu_seqlens, n, compressed, config)
    return Problem(
        config=config, b=q.shape[0], h=q.shape[1], g=k.shape[1], n=n, d=q.shape[3], e=v.shape[3], dtype=q.dtype,
        device=q.device, scale=scale, documents=documents, offset=sum(geometry[7:]),
    )  # fmt: skip


def _blocks(x: Tensor) -> Tensor:
    """Compressed keys or values for the kernels, which want at least one block: a block that nobody sees."""
    return aligned(x if x.shape[2] > 0 else x.new_zeros(x.shape[0], x.shape[1], 1, x.shape[3]))


def _as_gradient(x: Tensor, like: Tensor) -> Tensor:
    """float32 [b, s, g, d] -> like's dtype and shape [b, g, s, d] (none of the dummy block of `_blocks`)."""
    return x.to(like.dtype).transpose(1, 2)[:, :, : like.shape[2]]


def _like_rows(x: Tensor) -> Tensor:
    return empty_rows(x.shape[0], x.shape[1], x.shape[2], x.shape[3], x.dtype, x.device)


def _output(q: Tensor, v: Tensor) -> Tensor:
    return empty_rows(q.shape[0], q.shape[1], q.shape[2], v.shape[3], q.dtype, q.device)


def _like_keys(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], max(x.shape[2], 1), x.shape[1], x.shape[3]).transpose(1, 2)[:, :, : x.shape[2]]


def _statistics(q: Tensor, count: int | None = None) -> Tensor:
    shape = (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty(shape if count is None else (count, *shape), dtype=torch.float32)


# Branch `cmp` and the selection.


@torch.library.custom_op("nsa::compressed_attention", mutates_args=())
def compressed_forward(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, cu_seqlens: Tensor | None, geometry: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(o_cmp, its log-sum-exp, block_indices)."""
    p = _problem(q, k_cmp, v_cmp, cu_seqlens, geometry, scale, k_cmp.shape[2])
    q, k_cmp, v_cmp, out = aligned(q), _blocks(k_cmp), _blocks(v_cmp), p.empty_rows(p.e)
    lse = _statistics(q)
    return out, lse, launch.attend_and_select(q, k_cmp, v_cmp, out, lse, p)


@compressed_forward.register_fake
def _(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, cu_seqlens: Tensor | None, geometry: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    indices = q.new_empty(q.shape[0], k_cmp.shape[1], q.shape[2], geometry[3], dtype=torch.int32)
    return _output(q, v_cmp), _statistics(q), indices


@torch.library.custom_op("nsa::compressed_attention_backward", mutates_args=())
def compressed_backward(
    do: Tensor, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor | None,
    geometry: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk_cmp, dv_cmp."""
    p = _problem(q, k_cmp, v_cmp, cu_seqlens, geometry, scale, k_cmp.shape[2])
    do, q, k, v, dq = aligned(do), aligned(q), _blocks(k_cmp), _blocks(v_cmp), _like_rows(q)
    delta, _, _ = launch.row_deltas(do, out[None], None, p)
    launch.attend_dq("cmp", q, k, v, do, lse, delta, None, dq, p, add=False)
    dk, dv = launch.attend_dkv("cmp", q, k, v, do, lse, delta, None, p)
    return dq, _as_gradient(dk, k_cmp), _as_gradient(dv, v_cmp)


@compressed_backward.register_fake
def _(
    do: Tensor, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor | None,
    geometry: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _like_rows(q), _like_keys(k_cmp), _like_keys(v_cmp)


# Branch `slc`.


@torch.library.custom_op("nsa::selected_attention", mutates_args=())
def selected_forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, cu_seqlens: Tensor | None, geometry: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """(o_slc, its log-sum-exp) for any block_indices: no block is taken for forced."""
    p = _problem(q, k, v, cu_seqlens, geometry, scale)
    out, lse = p.empty_rows(p.e), _statistics(q)
    launch.selected_forward(aligned(q), aligned(k), aligned(v), block_indices.contiguous(), out, lse, p, forced=False)
    return out, lse


@selected_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, cu_seqlens: Tensor | None, geometry: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    return _output(q, v), _statistics(q)


@torch.library.custom_op("nsa::selected_attention_backward", mutates_args=())
def selected_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor | None,
    geometry: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv."""
    p = _problem(q, k, v, cu_seqlens, geometry, scale)
    do, dq = aligned(do), _like_rows(q)
    delta, _, _ = launch.row_deltas(do, out[None], None, p)
    dk, dv = launch.selected_backward(
        aligned(q), aligned(k), aligned(v), do, block_indices.contiguous(), lse, delta, None, dq, p, forced=False, add=False
    )
    return dq, _as_gradient(dk, k), _as_gradient(dv, v)


@selected_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor | None,
    geometry: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _like_rows(q), _like_keys(k), _like_keys(v)


# Branch `win`.


@torch.library.custom_op("nsa::window_attention", mutates_args=())
def window_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, geometry: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """(o_win, its log-sum-exp)."""
    p = _problem(q, k, v, cu_seqlens, geometry, scale)
    out, lse = p.empty_rows(p.e), _statistics(q)
    launch.attend_forward("win", aligned(q), aligned(k), aligned(v), out, lse, p)
    return out, lse


@window_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, geometry: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    return _output(q, v), _statistics(q)


@torch.library.custom_op("nsa::window_attention_backward", mutates_args=())
def window_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor | None, geometry: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv."""
    p = _problem(q, k, v, cu_seqlens, geometry, scale)
    do, dq = aligned(do), _like_rows(q)
    delta, _, _ = launch.row_deltas(do, out[None], None, p)
    arguments = (aligned(q), aligned(k), aligned(v), do, lse, delta, None)
    launch.attend_dq("win", *arguments, dq, p, add=False)
    dk, dv = launch.attend_dkv("win", *arguments, p)
    return dq, _as_gradient(dk, k), _as_gradient(dv, v)


@window_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor | None, geometry: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _like_rows(q), _like_keys(k), _like_keys(v)


# The whole operator.


@torch.library.custom_op("nsa::attention", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, q_cmp: Tensor | None, k_win: Tensor | None,
    v_win: Tensor | None, cu_seqlens: Tensor | None, geometry: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, the branches' outputs [3, b, h, n, e], their log-sum-exps [3, b, n, h], block_indices)."""
    p = _problem(q, k, v, cu_seqlens, geometry, scale, k_cmp.shape[2])
    out, branches = p.empty_rows(p.e), _branches(q, p.e)
    q, k, v = aligned(q), aligned(k), aligned(v)
    q_cmp = q if q_cmp is None else aligned(q_cmp)
    k_win = k if k_win is None else aligned(k_win)
    v_win = v if v_win is None else aligned(v_win)
    k_cmp, v_cmp = _blocks(k_cmp), _blocks(v_cmp)
    lse = _statistics(q, 3)
    lse_cmp, lse_slc, lse_win = lse.unbind()
    indices = launch.attend_and_select(q_cmp, k_cmp, v_cmp, branches[0], lse_cmp, p)
    rest = launch.Rest(k_win, v_win, gates, branches[0], branches[2], lse_win, out)
    launch.selected_forward(q, k, v, indices, branches[1], lse_slc, p, forced=True, rest=rest)
    return out, branches, lse, indices


def _branches(q: Tensor, width: int) -> Tensor:
    """Uninitialised [3, b, h, n, e] whose branches are each as `empty_rows` makes them."""
    b, h, n, _ = q.shape
    rows = empty_rows(3 * b, h, n, width, q.dtype, q.device)
    return rows.as_strided((3, b, h, n, width), (b * rows.stride(0), *rows.stride()))


@attention_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, q_cmp: Tensor | None, k_win: Tensor | None,
    v_win: Tensor | None, cu_seqlens: Tensor | None, geometry: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    out = _output(q, v)
    indices = q.new_empty(q.shape[0], k.shape[1], q.shape[2], geometry[3], dtype=torch.int32)
    return out, _branches(q, v.shape[3]), _statistics(q, 3), indices


@torch.library.custom_op("nsa::attention_backward", mutates_args=())
def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, q_cmp: Tensor | None,
    k_win: Tensor | None, v_win: Tensor | None, cu_seqlens: Tensor | None, branches: Tensor, lse: Tensor, indices: Tensor,
    geometry: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, k_cmp, v_cmp, gates, q_cmp, k_win, v_win; of one that was left out, an empty tensor."""
    p = _problem(q, k, v, cu_seqlens, geometry, scale, k_cmp.shape[2])
    do = aligned(do)
    delta, gate, dgates = launch.row_deltas(do, branches, gates, p)
    assert gate is not None
    assert dgates is not None
    q_in, k_in, v_in = aligned(q), aligned(k), aligned(v)
    dq = _like_rows(q)
    dq_cmp = None if q_cmp is None else _like_rows(q_cmp)
    k_win_in, v_win_in = k_in if k_win is None else aligned(k_win), v_in if v_win is None else aligned(v_win)
    cmp = (q_in if q_cmp is None else aligned(q_cmp), _blocks(k_cmp), _blocks(v_cmp), do, lse[0], delta[0], gate[0])
    launch.attend_dq("cmp", *cmp, dq if dq_cmp is None else dq_cmp, p, add=False)
    dk_cmp, dv_cmp = launch.attend_dkv("cmp", *cmp, p)
    dk_cmp, dv_cmp = _as_gradient(dk_cmp, k_cmp), _as_gradient(dv_cmp, v_cmp)
    dk, dv = launch.selected_backward(
        q_in, k_in, v_in, do, indices, lse[1], delta[1], gate[1], dq, p, forced=True, add=q_cmp is None,
        window=(k_win_in, v_win_in, lse[2], delta[2], gate[2]),
    )  # fmt: skip
    dk_win, dv_win = launch.attend_dkv("win", q_in, k_win_in, v_win_in, do, lse[2], delta[2], gate[2], p)
    if k_win is None:
        dk += dk_win
    if v_win is None:
        dv += dv_win
    dq_cmp = q.new_empty(0) if dq_cmp is None else dq_cmp
    dk_win = q.new_empty(0) if k_win is None else _as_gradient(dk_win, k_win)
    dv_win = q.new_empty(0) if v_win is None else _as_gradient(dv_win, v_win)
    return dq, _as_gradient(dk, k), _as_gradient(dv, v), dk_cmp, dv_cmp, dgates, dq_cmp, dk_win, dv_win


@attention_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, q_cmp: Tensor | None,
    k_win: Tensor | None, v_win: Tensor | None, cu_seqlens: Tensor | None, branches: Tensor, lse: Tensor, indices: Tensor,
    geometry: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dgates = gates.new_empty(gates.shape[0], gates.shape[2], gates.shape[1], gates.shape[3]).transpose(1, 2)
    return (
        _like_rows(q), _like_keys(k), _like_keys(v), _like_keys(k_cmp), _like_keys(v_cmp), dgates,
        q.new_empty(0) if q_cmp is None else _like_rows(q_cmp), q.new_empty(0) if k_win is None else _like_keys(k_win),
        q.new_empty(0) if v_win is None else _like_keys(v_win),
    )  # fmt: skip


# Gradients. Outputs beside the first are for the backward alone, and are not differentiated.


def _context(tensors: int, save: Sequence[int]) -> Any:
    """A setup_context that keeps the first `tensors` inputs and the outputs `save`, then the rest of the inputs."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:tensors], *(output[i] for i in save))
        ctx.geometry, ctx.scale = inputs[tensors:]

    return setup


def _compressed_gradients(ctx: Any, do: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if do is None:
        return (None,) * 6
    q, k_cmp, v_cmp, cu_seqlens, out, lse = ctx.saved_tensors
    return *compressed_backward(do, q, k_cmp, v_cmp, out, lse, cu_seqlens, ctx.geometry, ctx.scale), None, None, None


def _selected_gradients(ctx: Any, do: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if do is None:
        return (None,) * 7
    q, k, v, indices, cu_seqlens, out, lse = ctx.saved_tensors
    grads = selected_backward(do, q, k, v, indices, out, lse, cu_seqlens, ctx.geometry, ctx.scale)
    return *grads, None, None, None, None


def _window_gradients(ctx: Any, do: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if do is None:
        return (None,) * 6
    q, k, v, cu_seqlens, out, lse = ctx.saved_tensors
    return *window_backward(do, q, k, v, out, lse, cu_seqlens, ctx.geometry, ctx.scale), None, None, None


def _attention_gradients(ctx: Any, do: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if do is None:
        return (None,) * 12
    *inputs, branches, lse, indices = ctx.saved_tensors
    grads = attention_backward(do, *inputs, branches, lse, indices, ctx.geometry, ctx.scale)
    given = [grad if x is not None else None for x, grad in zip(inputs[:9], grads, strict=True)]
    return *given, None, None, None


compressed_forward.register_autograd(_compressed_gradients, setup_context=_context(4, (0, 1)))
selected_forward.register_autograd(_selected_gradients, setup_context=_context(5, (0, 1)))
window_forward.register_autograd(_window_gradients, setup_context=_context(4, (0, 1)))
attention_forward.register_autograd(_attention_gradients, setup_context=_context(10, (1, 2, 3)))


def compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, config: NSAConfig, *, scale: float, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Branch `cmp` and the selection it decides, as nsa_cli.ops.compressed_attention says."""
    out, _, indices = compressed_forward(q, k_cmp, v_cmp, cu_seqlens, _geometry(config), scale)
    return out, indices


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, config: NSAConfig, *, scale: float, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Branch `slc`, as nsa_cli.ops.selected_attention says."""
    return selected_forward(q, k, v, block_indices, cu_seqlens, _geometry(config), scale)[0]


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, *, scale: float, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Branch `win`, as nsa_cli.ops.window_attention says."""
    return window_forward(q, k, v, cu_seqlens, _geometry(config), scale)[0]


def nsa_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, config: NSAConfig, *, scale: float,
    q_cmp: Tensor | None = None, k_win: Tensor | None = None, v_win: Tensor | None = None, cu_seqlens: Tensor | None = None,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, block_indices) of the three branches, gated and summed, as nsa_cli.ops.nsa_attention says.

    offset: the queries are tokens offset .. offset + t - 1, the last ones of k and v.
    """
    out, _, _, indices = attention_forward(
        q, k, v, k_cmp, v_cmp, gates, q_cmp, k_win, v_win, cu_seqlens, _geometry(config, offset), scale
    )
    return out, indices
