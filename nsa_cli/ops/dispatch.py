"""The public operators: arguments checked, documents split, kernel chosen.

The algorithm is in the kernels' own modules; here is only what all of them share.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from nsa_cli.config import KERNELS, NSAConfig
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.ops import flex, torch_backend


def resolve_kernel(
    kernel: str, device: str | torch.device, *, allow_fallback: bool = False
) -> tuple[str, str | None]:
    """The kernel that will run on `device`, and a one-line notice if it is not the one asked for by name.

    "auto" is `triton` on a CUDA GPU and `torch` elsewhere. "triton" elsewhere goes on as `torch`, the same function, when
    allow_fallback, unless TRITON_INTERPRET=1 has its kernels run in Triton's interpreter; otherwise, and for "flex" off a
    CUDA GPU, NsaError with exit code 5. Unknown names: ValueError.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel = {kernel!r}: must be one of {', '.join(KERNELS)}")
    on_gpu = torch.device(device).type == "cuda"
    if kernel == "triton" and not on_gpu and not interpreting():
        reason = "kernel 'triton' needs a CUDA GPU"
        if not allow_fallback:
            raise NsaError(reason, "use --kernel torch, which computes the same function", ExitCode.UNAVAILABLE)
        return "torch", f"{reason}; going on with 'torch', which computes the same function"
    if kernel == "flex" and not on_gpu:
        hint = "use --kernel torch, which runs everywhere"
        raise NsaError("kernel 'flex' needs a CUDA GPU: FlexAttention cannot train elsewhere", hint, ExitCode.UNAVAILABLE)
    if kernel == "auto":
        return ("triton" if on_gpu else "torch"), None
    return kernel, None


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU: TRITON_INTERPRET=1, set before triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")


def kernel_refusal(
    kernel: str, config: NSAConfig, *, dim: int, group: int, dtype: torch.dtype | None = None, scale: float = 1.0
) -> NsaError | None:
    """Why `kernel` (a resolved name) cannot compute this attention, and what can; None if it can.

    dim: the larger head dim of keys and values. group: query heads that share a key/value head.
    """
    if kernel != "triton":
        return None
    from nsa_cli.ops import triton

    reason = triton.refusal(config, dim=dim, group=group, dtype=dtype)
    if reason is None and scale <= 0:
        reason = f"it takes a scale above 0, not {scale}"
    if reason is None:
        return None
    hint = "use --kernel torch, which computes the same function for every geometry"
    return NsaError(f"kernel 'triton' cannot do this: {reason}", hint, ExitCode.UNAVAILABLE)


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    config: NSAConfig,
    *,
    scale: float | None = None,
    kernel: str = "auto",
    cu_seqlens: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Branch `cmp` (eq. 8) and the selection it decides (eq. 9 to 12): (out, block_indices).

    p[t, h, :] = softmax over the visible c of scale * q[t, h] . k_cmp[c, h // G]; out = p v_cmp. Block c is visible iff its
    last token c d + l - 1 <= t; a query that sees none gets 0. The importance of selection block j is the sum of p over the
    group's heads and over c, weighted with the tokens that c and j share over d; the forced blocks and the most important
    others, n in all, are selected, equal importance to the lower block. No gradient flows through importance or selection.

    q: [b, h, t, d]. k_cmp: [b, g, c, d]. v_cmp: [b, g, c, e]. g divides h, any strides, one floating dtype and device.
    out: [b, h, t, e] in q's dtype; block_indices: int32 [b, g, t, n], ascending, padded at the end with -1.
    scale: default d ** -0.5. Scores and softmax are computed in float32 (float64 for float64).
    cu_seqlens: int32 [documents + 1] from 0 to t, with b = 1: positions and blocks start anew in every document; k_cmp
    holds one document's blocks after another's, block_indices count inside the document.
    positions: int64 [b, t], each query's position when k_cmp is a cache that may be longer than the queries; blocks that
    are not complete at a position are never read. Left out, the queries are tokens 0 .. t - 1.
    Raises ValueError for wrong shapes or dtypes, NsaError (exit 5) for a kernel that cannot run here.
    """
    _check_attention(("q", "k_cmp", "v_cmp"), q, k_cmp, v_cmp, positions)
    name, scale = _resolve(q, k_cmp, v_cmp, config, scale, kernel, positions)
    if name == "triton":
        _check_packed(cu_seqlens, q, k_cmp, config)
        return _triton().compressed_attention(q, k_cmp, v_cmp, config, scale=scale, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:
        # Every document on its own: correct for any mixture of lengths, at a loop's price.
        documents = list(_documents(cu_seqlens, q, config, k_cmp=k_cmp, positions=positions))
        parts = [
            compressed_attention(q[:, :, t], k_cmp[:, :, c], v_cmp[:, :, c], config, scale=scale, kernel=kernel)
            for t, c in documents
        ]
        return torch.cat([out for out, _ in parts], 2), torch.cat([indices for _, indices in parts], 2)
    if positions is None:
        _check_blocks(k_cmp, config.num_compressed(q.shape[2]), q.shape[2])
    return _torch().compressed_attention(q, k_cmp, v_cmp, config, scale=scale, positions=positions)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    config: NSAConfig,
    *,
    scale: float | None = None,
    kernel: str = "auto",
    cu_seqlens: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Branch `slc`: softmax attention over the tokens s <= t that lie in the selected blocks.

    q: [b, h, t, d]. k: [b, g, s, d]. v: [b, g, s, e]. block_indices: int32 [b, g, t, n], -1 for an empty place, each block at
    most once a query; one selection serves the G heads of a group. out: [b, h, t, e]. A query that sees nothing gets 0.
    scale, kernel, cu_seqlens, positions and errors as in `compressed_attention`; without positions s equals t.
    """
    _check_attention(("q", "k", "v"), q, k, v, positions)
    expected = (k.shape[0], k.shape[1], q.shape[2], config.num_selected)
    if (tuple(block_indices.shape), block_indices.dtype, block_indices.device) != (expected, torch.int32, q.device):
        rule = f"torch.int32 [b, g, t, n] = {expected} on {q.device}"
        raise ValueError(f"block_indices is {_describe(block_indices)}: must be {rule}")
    name, scale = _resolve(q, k, v, config, scale, kernel, positions)
    if name == "triton":
        _check_packed(cu_seqlens, q)
        return _triton().selected_attention(q, k, v, block_indices, config, scale=scale, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:
        parts = [
            selected_attention(
                q[:, :, t], k[:, :, t], v[:, :, t], block_indices[:, :, t], config, scale=scale, kernel=kernel
            )
            for t, _ in _documents(cu_seqlens, q, config, positions=positions)
        ]
        return torch.cat(parts, 2)
    if name == "flex" and positions is None:
        return flex.selected_attention(q, k, v, block_indices, config, scale=scale)
    return _torch().selected_attention(q, k, v, block_indices, config, scale=scale, positions=positions)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: NSAConfig,
    *,
    scale: float | None = None,
    kernel: str = "auto",
    cu_seqlens: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Branch `win`: softmax attention over the w tokens t - w < s <= t, the query's own included.

    q: [b, h, t, d]. k: [b, g, s, d]. v: [b, g, s, e]. out: [b, h, t, e].
    scale, kernel, cu_seqlens, positions and errors as in `compressed_attention`; without positions s equals t.
    """
    _check_attention(("q", "k", "v"), q, k, v, positions)
    name, scale = _resolve(q, k, v, config, scale, kernel, positions)
    if name == "triton":
        _check_packed(cu_seqlens, q)
        return _triton().window_attention(q, k, v, config, scale=scale, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:
        parts = [
            window_attention(q[:, :, t], k[:, :, t], v[:, :, t], config, scale=scale, kernel=kernel)
            for t, _ in _documents(cu_seqlens, q, config, positions=positions)
        ]
        return torch.cat(parts, 2)
    if name == "flex" and positions is None:
        return flex.window_attention(q, k, v, config, scale=scale)
    return _torch().window_attention(q, k, v, config, scale=scale, positions=positions)


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    config: NSAConfig,
    *,
    q_cmp: Tensor | None = None,
    k_win: Tensor | None = None,
    v_win: Tensor | None = None,
    scale: float | None = None,
    kernel: str = "auto",
    cu_seqlens: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Native Sparse Attention (eq. 5): o = g_cmp o_cmp + g_slc o_slc + g_win o_win.

    q, k, v: the selected branch's (rotated) queries, keys and values, and the window's where it has none of its own.
    k_cmp, v_cmp: [b, g, c, d] and [b, g, c, e], the compressed keys and values. gates: [b, h, t, 3], in the order cmp slc win.
    q_cmp: the compressed branch's (unrotated) queries; k_win, v_win: the window's keys and values. out: [b, h, t, e].
    Shapes, scale, kernel, cu_seqlens, positions and errors as in `compressed_attention`. Differentiable in all float inputs.
    """
    return nsa_attention_and_selection(
        q, k, v, k_cmp, v_cmp, gates, config,
        q_cmp=q_cmp, k_win=k_win, v_win=v_win, scale=scale, kernel=kernel, cu_seqlens=cu_seqlens, positions=positions,
    )[0]  # fmt: skip


def nsa_attention_and_selection(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    config: NSAConfig,
    *,
    q_cmp: Tensor | None = None,
    k_win: Tensor | None = None,
    v_win: Tensor | None = None,
    scale: float | None = None,
    kernel: str = "auto",
    cu_seqlens: Tensor | None = None,
    positions: Tensor | None = None,
    offset: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`nsa_attention`, and the block_indices [b, g, t, n] that it attended to (for those who look into a model).

    offset: instead of positions, for queries that are the last tokens of a document, offset .. offset + t - 1, whose keys,
    values and compressed blocks are all there: every kernel takes those.
    """
    if offset is not None:
        if positions is not None or cu_seqlens is not None or k.shape[2] != offset + q.shape[2] or offset < 0:
            rule = "must make k's tokens with q's, without positions or cu_seqlens"
            raise ValueError(f"offset = {offset}: {rule}, and k has {k.shape[2]} and q {q.shape[2]}")
        positions = torch.arange(offset, k.shape[2], device=q.device).expand(q.shape[0], -1)
        _check_blocks(k_cmp, config.num_compressed(k.shape[2]), k.shape[2])
    q_cmp = q if q_cmp is None else q_cmp
    k_win = k if k_win is None else k_win
    v_win = v if v_win is None else v_win
    _check_attention(("q", "k", "v"), q, k, v, positions)
    _check_attention(("q", "k_win", "v_win"), q, k_win, v_win, positions)
    _check_attention(("q_cmp", "k_cmp", "v_cmp"), q_cmp, k_cmp, v_cmp, positions)
    name, scale = _resolve(q, k, v, config, scale, kernel, positions if offset is None else None)
    if q_cmp.shape[:3] != q.shape[:3] or q_cmp.dtype != q.dtype or q_cmp.device != q.device:
        raise ValueError(f"q_cmp is {_describe(q_cmp)}: must agree with q, {_describe(q)}, in all but the head dim")
    if gates.shape != (*q.shape[:3], 3) or not gates.is_floating_point() or gates.device != q.device:
        raise ValueError(f"gates is {_describe(gates)}: must be floating, [b, h, t, 3] = {(*q.shape[:3], 3)}, on {q.device}")
    if not v.shape[-1] == v_win.shape[-1] == v_cmp.shape[-1]:
        dims = f"v {v.shape[-1]}, v_win {v_win.shape[-1]}, v_cmp {v_cmp.shape[-1]}"
        raise ValueError(f"the branches' values are added up and must share a head dim: {dims}")
    if name == "triton":
        same_keys = q_cmp.shape[3] == q.shape[3] == k_win.shape[3] and k_win.shape[1] == k_cmp.shape[1] == k.shape[1]
        if same_keys:
            if offset is None:
                _check_packed(cu_seqlens, q, k_cmp, config)
            return _triton().nsa_attention(
                q, k, v, k_cmp, v_cmp, gates, config, scale=scale, cu_seqlens=cu_seqlens, offset=offset or 0,
                q_cmp=None if q_cmp is q else q_cmp, k_win=None if k_win is k else k_win, v_win=None if v_win is v else v_win,
            )  # fmt: skip
    o_cmp, block_indices = compressed_attention(
        q_cmp, k_cmp, v_cmp, config, scale=scale, kernel=kernel, cu_seqlens=cu_seqlens, positions=positions
    )
    o_slc = selected_attention(
        q, k, v, block_indices, config, scale=scale, kernel=kernel, cu_seqlens=cu_seqlens, positions=positions
    )
    o_win = window_attention(
        q, k_win, v_win, config, scale=scale, kernel=kernel, cu_seqlens=cu_seqlens, positions=positions
    )
    g_cmp, g_slc, g_win = gates.unsqueeze(-1).unbind(-2)
    return (g_cmp * o_cmp + g_slc * o_slc + g_win * o_win).to(q.dtype), block_indices


def _torch() -> ModuleType:
    if torch.compiler.is_compiling():
        from nsa_cli.ops import untraced

        return untraced
    return torch_backend


def _triton() -> ModuleType:
    """The Triton kernels, imported where they run: triton's import costs, and may be impossible elsewhere."""
    from nsa_cli.ops import triton

    return triton


def _resolve(
    q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, scale: float | None, kernel: str, positions: Tensor | None
) -> tuple[str, float]:
    """The kernel's name and the scale. Queries at explicit positions (a cache) go to `torch`, whatever the kernel."""
    name, _ = resolve_kernel(kernel, q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if name != "triton":
        return name, scale
    if positions is not None:
        return "torch", scale
    sizes = {"dim": max(q.shape[3], v.shape[3]), "group": q.shape[1] // k.shape[1]}
    refusal = kernel_refusal(name, config, dtype=q.dtype, scale=scale, **sizes)
    if refusal is not None and kernel != "auto":
        raise refusal
    return ("torch" if refusal is not None else name), scale


def _check_packed(
    cu_seqlens: Tensor | None, q: Tensor, k_cmp: Tensor | None = None, config: NSAConfig | None = None
) -> None:
    """What can be said of packed documents, or of one, without waiting for the device to tell their lengths."""
    if cu_seqlens is None:
        if k_cmp is not None and config is not None:
            _check_blocks(k_cmp, config.num_compressed(q.shape[2]), q.shape[2])
        return
    if q.shape[0] != 1:
        raise ValueError(f"q has batch {q.shape[0]}: must be 1 with cu_seqlens")
    if cu_seqlens.device.type == "cpu":
        ends = document_ends(cu_seqlens, q.shape[2])
        if k_cmp is not None and config is not None:
            _check_blocks(k_cmp, sum(config.num_compressed(stop - start) for start, stop in pairwise(ends)), q.shape[2])
    elif cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens is {_describe(cu_seqlens)}: must be torch.int32 [documents + 1]")


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)} on {x.device}"


def _check_attention(names: tuple[str, str, str], q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
    """Raise ValueError, in the caller's names, unless q, k and v make one attention (k_cmp's length is checked elsewhere)."""
    q_name, k_name, v_name = names
    for name, x in zip(names, (q, k, v), strict=True):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: must be [batch, heads, tokens, dim_head]")
        if not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype}: must be a floating dtype")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}: must be like {q_name}, {q.dtype} on {q.device}")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"{k_name} has batch {k.shape[0]}: must be {q_name}'s, {q.shape[0]}")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"{k_name} has {k.shape[1]} heads: must divide {q_name}'s {q.shape[1]}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"{k_name} has head dim {k.shape[3]}: must be {q_name}'s, {q.shape[3]}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{v_name} is {tuple(v.shape)}: must agree with {k_name} {tuple(k.shape)} in all but the head dim")
    if q.shape[2] < 1:
        raise ValueError(f"{q_name} has no tokens: must have at least one")
    if positions is not None:
        shape = (q.shape[0], q.shape[2])
        if tuple(positions.shape) != shape or positions.dtype != torch.int64:
            raise ValueError(f"positions is {_describe(positions)}: must be torch.int64 [b, t] = {shape}")
    elif k_name != "k_cmp" and k.shape[2] != q.shape[2]:
        raise ValueError(f"{k_name} has {k.shape[2]} tokens and {q_name} {q.shape[2]}: must be equal, or give positions")


def _check_blocks(k_cmp: Tensor, expected: int, tokens: int) -> None:
    if k_cmp.shape[2] != expected:
        raise ValueError(f"k_cmp has {k_cmp.shape[2]} blocks: {tokens} tokens make {expected} (config.num_compressed)")


def _documents(
    cu_seqlens: Tensor, q: Tensor, config: NSAConfig, *, k_cmp: Tensor | None = None, positions: Tensor | None = None
) -> Iterator[tuple[slice, slice]]:
    """(tokens, compressed blocks) of every packed document; empty documents are passed over."""
    if positions is not None:
        raise ValueError("positions and cu_seqlens exclude each other: packed documents count from 0")
    if q.shape[0] != 1:
        raise ValueError(f"q has batch {q.shape[0]}: must be 1 with cu_seqlens")
    ends = document_ends(cu_seqlens, q.shape[2])
    counts = [config.num_compressed(stop - start) for start, stop in pairwise(ends)]
    if k_cmp is not None:
        _check_blocks(k_cmp, sum(counts), q.shape[2])
    block = 0
    for (start, stop), count in zip(pairwise(ends), counts, strict=True):
        if stop > start:
            yield slice(start, stop), slice(block, block + count)
        block += count


def document_ends(cu_seqlens: Tensor, tokens: int) -> list[int]:
    """cu_seqlens, int32 [documents + 1] ascending from 0 to `tokens`, as a list; anything else raises ValueError."""
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}: must be torch.int32 [documents + 1]")
    ends: list[int] = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != tokens or any(start > stop for start, stop in pairwise(ends)):
        raise ValueError(f"cu_seqlens runs from {ends[0]} to {ends[-1]}: must ascend from 0 to the {tokens} tokens")
    return ends
