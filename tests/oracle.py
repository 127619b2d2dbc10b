"""An independent oracle: the definition of Native Sparse Attention in plain numpy float64, a loop over queries.

Written from the definition alone (arXiv 2502.11089, in the form that README describes) and sharing no line with
nsa_cli.ops, so that an error would have to be made twice to stay unseen. Slow on purpose: sets of tokens are sets.

Layout [b, h, t, d] as in the ops: b batch, h query head, t query token, s key token, g key/value head, c compressed
block, j selection block. Every function takes arrays that numpy can read and computes in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from nsa_cli.config import NSAConfig

Array = NDArray[np.float64]


def f64(x: object) -> Array:
    """float64 copy of a tensor or an array."""
    detach = getattr(x, "detach", None)
    if detach is not None:
        x = detach().cpu().double().numpy()
    return np.array(x, dtype=np.float64)


def softmax(logits: Array) -> Array:
    """exp(x) / sum exp(x) of a non-empty vector."""
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def compressed_tokens(c: int, config: NSAConfig) -> range:
    """Tokens that compressed block c covers."""
    start = c * config.compress_stride
    return range(start, start + config.compress_block)


def selection_tokens(j: int, config: NSAConfig) -> range:
    """Tokens that selection block j covers, were the document long enough."""
    start = j * config.select_block
    return range(start, start + config.select_block)


def num_compressed(tokens: int, config: NSAConfig) -> int:
    """M: how many full compressed blocks fit."""
    count = 0
    while compressed_tokens(count, config)[-1] < tokens:
        count += 1
    return count


def overlap(c: int, j: int, config: NSAConfig) -> float:
    """Tokens that compressed block c and selection block j share, over d."""
    shared = set(compressed_tokens(c, config)) & set(selection_tokens(j, config))
    return len(shared) / config.compress_stride


def attend(q: Array, k: Array, v: Array, visible: list[int], scale: float) -> Array:
    """softmax over `visible` keys of scale * q . k, times v; 0 when nothing is visible."""
    if not visible:
        return np.zeros(v.shape[-1])
    return softmax(scale * (k[visible] @ q)) @ v[visible]


def _attention(q: object, k: object, v: object, scale: float | None, visible: Callable[..., list[int]]) -> Array:
    q, k, v = f64(q), f64(k), f64(v)
    batch, heads, tokens, dim = q.shape
    group = heads // k.shape[1]
    scale = dim**-0.5 if scale is None else scale
    out = np.zeros((batch, heads, tokens, v.shape[-1]))
    for b in range(batch):
        for h in range(heads):
            for t in range(tokens):
                g = h // group
                out[b, h, t] = attend(q[b, h, t], k[b, g], v[b, g], visible(b, g, t), scale)
    return out


def dense(q: object, k: object, v: object, *, scale: float | None = None) -> Array:
    """Causal attention: query t sees the keys 0 .. t."""
    return _attention(q, k, v, scale, lambda b, g, t: list(range(t + 1)))


def window(q: object, k: object, v: object, config: NSAConfig, *, scale: float | None = None) -> Array:
    """Section 6: query t sees t - w < s <= t."""
    return _attention(q, k, v, scale, lambda b, g, t: [s for s in range(t + 1) if t - config.window < s])


def selected(
    q: object, k: object, v: object, block_indices: object, config: NSAConfig, *, scale: float | None = None
) -> Array:
    """Section 5: query t sees the tokens s <= t of its group's selected blocks."""
    chosen = f64(block_indices).astype(int)

    def visible(b: int, g: int, t: int) -> list[int]:
        tokens = {s for j in chosen[b, g, t] if j >= 0 for s in selection_tokens(int(j), config)}
        return sorted(s for s in tokens if s <= t)

    return _attention(q, k, v, scale, visible)


def compressed(
    q: object, k_cmp: object, v_cmp: object, config: NSAConfig, *, scale: float | None = None
) -> tuple[Array, Array]:
    """Section 2: (o_cmp [b, h, t, dv], p_cmp [b, h, t, c], 0 where a block is not visible)."""
    q, k_cmp, v_cmp = f64(q), f64(k_cmp), f64(v_cmp)
    batch, heads, tokens, dim = q.shape
    blocks = k_cmp.shape[2]
    group = heads // k_cmp.shape[1]
    scale = dim**-0.5 if scale is None else scale
    probabilities = np.zeros((batch, heads, tokens, blocks))
    out = np.zeros((batch, heads, tokens, v_cmp.shape[-1]))
    for b in range(batch):
        for h in range(heads):
            for t in range(tokens):
                visible = [c for c in range(blocks) if compressed_tokens(c, config)[-1] <= t]
                if visible:
                    p = softmax(scale * (k_cmp[b, h // group, visible] @ q[b, h, t]))
                    probabilities[b, h, t, visible] = p
                    out[b, h, t] = p @ v_cmp[b, h // group, visible]
    return out, probabilities


def importance(probabilities: object, groups: int, config: NSAConfig) -> Array:
    """Section 3: imp [b, g, t, j] over every selection block that the tokens touch."""
    p = f64(probabilities)
    batch, heads, tokens, blocks = p.shape
    group = heads // groups
    selection_blocks = -(-tokens // config.select_block)
    imp = np.zeros((batch, groups, tokens, selection_blocks))
    for j in range(selection_blocks):
        for c in range(blocks):
            share = overlap(c, j, config)
            if share > 0:
                for h in range(heads):
                    imp[:, h // group, :, j] += share * p[:, h, :, c]
    return imp


def select_one(imp: Array, t: int, config: NSAConfig) -> list[int]:
    """Section 4 for one query: its blocks, ascending, not padded."""
    cur = t // config.select_block
    candidates = list(range(cur + 1))
    forced = {j for j in candidates if j < config.num_init or j > cur - config.num_local}
    free = sorted((j for j in candidates if j not in forced), key=lambda j: (-imp[j], j))
    return sorted(forced | set(free[: max(0, config.num_selected - len(forced))]))


def select(imp: object, config: NSAConfig) -> NDArray[np.int32]:
    """Section 4: int32 [b, g, t, n], ascending, padded at the end with -1."""
    imp = f64(imp)
    batch, groups, tokens, _ = imp.shape
    out = np.full((batch, groups, tokens, config.num_selected), -1, dtype=np.int32)
    for b in range(batch):
        for g in range(groups):
            for t in range(tokens):
                chosen = select_one(imp[b, g, t], t, config)
                out[b, g, t, : len(chosen)] = chosen
    return out


def check_selection(block_indices: object, imp: object, config: NSAConfig, *, relative: float = 0.0) -> None:
    """Assert that a selection is the definition's, except at ties: importances within `relative` (or 1e-10) may swap.

    `relative` 0 demands the oracle's own choice to the last block.
    """
    chosen, imp = f64(block_indices).astype(int), f64(imp)
    expected = select(imp, config)
    assert chosen.shape == expected.shape, (chosen.shape, expected.shape)
    for b, g, t in np.argwhere((chosen != expected).any(-1)):
        place = f"batch {b} group {g} query {t}: got {chosen[b, g, t]}, want {expected[b, g, t]}"
        got, want = list(chosen[b, g, t]), list(expected[b, g, t])
        real = [j for j in got if j >= 0]
        assert got == sorted(set(real)) + [-1] * (len(got) - len(real)), f"not ascending or not padded: {place}"
        assert len(real) == sum(j >= 0 for j in want), f"wrong number of blocks: {place}"
        assert max(real, default=0) <= t // config.select_block, f"a block of the future: {place}"
        extra, missing = sorted(set(real) - set(want)), sorted(set(want) - set(real) - {-1})
        gap = max(imp[b, g, t, missing]) - min(imp[b, g, t, extra])
        size = max(abs(imp[b, g, t, missing]))
        cur = t // config.select_block
        assert not any(j < config.num_init or j > cur - config.num_local for j in missing), f"forced block: {place}"
        assert relative > 0, f"differs: {place}, importances {imp[b, g, t]}"
        assert gap <= max(relative * size, 1e-10), f"not a tie: {place}, importances {imp[b, g, t]}"


def documents(tokens: int, cu_seqlens: object | None) -> Iterator[slice]:
    """One slice of tokens a document; the whole when nothing is packed."""
    edges = [0, tokens] if cu_seqlens is None else [int(edge) for edge in f64(cu_seqlens)]
    for first, last in pairwise(edges):
        yield slice(first, last)


def compressed_documents(tokens: int, cu_seqlens: object | None, config: NSAConfig) -> Iterator[tuple[slice, slice]]:
    """(tokens, compressed blocks) of every document: blocks lie one document's after another's."""
    first = 0
    for rows in documents(tokens, cu_seqlens):
        last = first + num_compressed(rows.stop - rows.start, config)
        yield rows, slice(first, last)
        first = last


def nsa(
    q: object,
    k: object,
    v: object,
    k_cmp: object,
    v_cmp: object,
    gates: object,
    config: NSAConfig,
    *,
    q_cmp: object | None = None,
    k_win: object | None = None,
    v_win: object | None = None,
    scale: float | None = None,
    cu_seqlens: object | None = None,
    block_indices: object | None = None,
) -> Array:
    """Section 7, document by document. `block_indices` puts another's selection in the place of the oracle's own."""
    q, k, v, k_cmp, v_cmp, gates = (f64(x) for x in (q, k, v, k_cmp, v_cmp, gates))
    q_cmp = q if q_cmp is None else f64(q_cmp)
    k_win = k if k_win is None else f64(k_win)
    v_win = v if v_win is None else f64(v_win)
    chosen = None if block_indices is None else f64(block_indices)
    tokens, groups = q.shape[2], k.shape[1]
    parts = []
    for row, block in compressed_documents(tokens, cu_seqlens, config):
        at = (slice(None), slice(None), row)
        o_cmp, p = compressed(q_cmp[at], k_cmp[:, :, block], v_cmp[:, :, block], config, scale=scale)
        indices = select(importance(p, groups, config), config) if chosen is None else chosen[at]
        o_slc = selected(q[at], k[at], v[at], indices, config, scale=scale)
        o_win = window(q[at], k_win[at], v_win[at], config, scale=scale)
        g = gates[at]
        parts.append(g[..., 0:1] * o_cmp + g[..., 1:2] * o_slc + g[..., 2:3] * o_win)
    return np.concatenate(parts, axis=2)


def gelu(x: Array) -> Array:
    """x Phi(x), the exact form."""
    return 0.5 * x * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def compress_block(name: str, x: Array, weights: Mapping[str, Array]) -> Array:
    """Section 1: phi of one block x [l, D] (positions already added), by the network's name.

    weights: `a` [D] (attention-pool), `w` [l, D] (conv), `W` [D, l D] (linear) or [D, D] (gated), `W1` [D, l D] and
    `W2` [D, D] (mlp; grouped-mlp gets its own head's).
    """
    if name == "mean":
        return x.mean(0)
    if name == "attention-pool":
        return softmax(x @ weights["a"]) @ x
    if name == "conv":
        return (weights["w"] * x).sum(0)
    if name == "linear":
        return weights["W"] @ x.reshape(-1)
    if name in ("mlp", "grouped-mlp"):
        return weights["W2"] @ gelu(weights["W1"] @ x.reshape(-1))
    if name == "gated":
        return np.mean([row * sigmoid(weights["W"] @ row) for row in x], axis=0)
    raise ValueError(name)


def rotate(x: object, positions: object, theta: float = 10000.0) -> Array:
    """Rotary embedding of x [..., t, D]: the pair (2i, 2i + 1) turns by positions * theta ** (-2i / D)."""
    x, positions = f64(x), f64(positions)
    dim = x.shape[-1]
    out = np.empty_like(x)
    for i in range(dim // 2):
        angle = positions * theta ** (-2.0 * i / dim)
        even, odd = x[..., 2 * i], x[..., 2 * i + 1]
        out[..., 2 * i] = even * np.cos(angle) - odd * np.sin(angle)
        out[..., 2 * i + 1] = even * np.sin(angle) + odd * np.cos(angle)
    return out
