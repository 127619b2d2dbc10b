"""What a model and its attention cost: parameters, floating-point operations, cache bytes, all in closed form.

Every report divides by these numbers (share of the roofline, tokens per FLOP), so they are exact where exactness is
possible: visible pairs are counted query by query in the mask's own terms, not as N^2 / 2. A multiply and an add
count as two operations; softmax, masks, rotary and norms are left out, as is customary. Plain integers; no tensors
needed.

N tokens, l compress_block, d compress_stride, l' select_block, n num_selected, w window, D dim_head,
h query heads, g key/value heads, M compressed blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nsa_cli.config import ModelConfig, NSAConfig

FORWARD_PRODUCTS = 2
"""Matrix products of attention forward: q k^T and p v."""
BACKWARD_PRODUCTS = 5
"""Of its backward: q k^T again, do v^T, and those of dq, dk and dv."""


def dense_pairs(tokens: int) -> int:
    """(query, key) pairs of causal attention over N tokens: N (N + 1) / 2."""
    return tokens * (tokens + 1) // 2


def compressed_pairs(tokens: int, nsa: NSAConfig) -> int:
    """(query, compressed block) pairs where the block's last token is not in the future.

    Query t >= l - 1 sees (t - l + 1) // d + 1 blocks, earlier ones none; the sum over t < N.
    """
    queries = max(0, tokens - nsa.compress_block + 1)
    steps, rest = divmod(queries, nsa.compress_stride)
    return nsa.compress_stride * steps * (steps + 1) // 2 + rest * (steps + 1)


def selected_pairs(tokens: int, nsa: NSAConfig) -> int:
    """(query, token) pairs of the selected branch: the causal tokens of each query's n blocks.

    Query t of block cur = t // l' takes m = min(n, cur + 1) blocks: m - 1 whole ones and t % l' + 1 tokens of its
    own. Exact when num_local >= 1. With num_local = 0 a query's own block may be passed over, and this is then a
    lower bound, less than l' tokens a query from the truth.
    """
    block, full = nsa.select_block, tokens // nsa.select_block
    ramp = min(full, nsa.num_selected)
    whole_blocks = ramp * (ramp - 1) // 2 + (full - ramp) * (nsa.num_selected - 1)
    total = block * block * whole_blocks + full * (block * (block + 1) // 2)
    rest = tokens - full * block
    return total + rest * block * (min(nsa.num_selected, full + 1) - 1) + rest * (rest + 1) // 2


def window_pairs(tokens: int, nsa: NSAConfig) -> int:
    """(query, token) pairs of the window branch: the sum over t < N of min(t + 1, w)."""
    width = min(nsa.window, tokens)
    return width * (width + 1) // 2 + (tokens - width) * width


def dense_attention_flops(tokens: int, heads: int, dim_head: int, *, backward: bool = False) -> int:
    """Operations of dense causal attention over one sequence: pairs * h * products * 2 D."""
    products = BACKWARD_PRODUCTS if backward else FORWARD_PRODUCTS
    return 2 * products * dim_head * heads * dense_pairs(tokens)


@dataclass(frozen=True, kw_only=True)
class SparseFlops:
    """Operations of sparse attention over one sequence, by branch. `importance` is a second pass over q k_cmp^T."""

    compressed: int
    importance: int
    selected: int
    window: int
    combine: int

    @property
    def total(self) -> int:
        """Sum of all branches."""
        return self.compressed + self.importance + self.selected + self.window + self.combine


def sparse_attention_flops(
    tokens: int, heads: int, dim_head: int, nsa: NSAConfig, *, backward: bool = False
) -> SparseFlops:
    """Operations of the three branches, importance and the gated sum; compression networks are `compression_flops`.

    Importance costs one product forward and nothing backward (no gradient flows through it); compare
    `compressed_pairs`, `selected_pairs`, `window_pairs`. The gated sum is three multiply-adds a channel forward, and
    its backward scales the gradient for each branch and reduces it against each output.
    """
    per_pair = 2 * (BACKWARD_PRODUCTS if backward else FORWARD_PRODUCTS) * dim_head * heads
    compressed = compressed_pairs(tokens, nsa)
    return SparseFlops(
        compressed=per_pair * compressed,
        importance=0 if backward else 2 * dim_head * heads * compressed,
        selected=per_pair * selected_pairs(tokens, nsa),
        window=per_pair * window_pairs(tokens, nsa),
        combine=(9 if backward else 6) * tokens * heads * dim_head,
    )


def compression_flops(tokens: int, kv_heads: int, dim_head: int, nsa: NSAConfig) -> int:
    """Forward operations of one layer's two compression networks (k and v) over the M blocks of N tokens."""
    length, dim = nsa.compress_block, dim_head
    per_block = {
        "mean": length * dim,
        "attention-pool": 4 * length * dim,
        "conv": 2 * length * dim,
        "linear": 2 * length * dim * dim,
        "mlp": 2 * length * dim * dim + 2 * dim * dim,
        "gated": 2 * length * dim * dim + 2 * length * dim,
        "grouped-mlp": 2 * length * dim * dim + 2 * dim * dim,
    }[nsa.compress]
    return 2 * kv_heads * nsa.num_compressed(tokens) * per_block


def compression_parameters(kv_heads: int, dim_head: int, nsa: NSAConfig) -> int:
    """Parameters of one layer's two compression networks, intra-block positions included (nsa.compress)."""
    length, dim = nsa.compress_block, dim_head
    network = {
        "mean": 0,
        "attention-pool": dim,
        "conv": length * dim,
        "linear": length * dim * dim,
        "mlp": length * dim * dim + dim * dim,
        "gated": dim * dim,
        "grouped-mlp": kv_heads * (length * dim * dim + dim * dim),
    }[nsa.compress]
    positions = 0 if nsa.compress == "mean" else kv_heads * length * dim
    return 2 * (network + positions)


def parameters_by_part(model: Any) -> dict[str, int]:
    """Trainable parameters by part, of a ModelConfig or of a model that carries one as `config`.

    Parts: embedding (with the output matrix when it is not tied), attention (q, k, v and output projections),
    compression (both networks and their positions), gates, feed_forward, norms, and total, their sum.
    """
    config: ModelConfig = model if isinstance(model, ModelConfig) else model.config
    nsa, dim, width = config.nsa, config.dim, config.dim_head
    kv_copies = 3 if nsa is not None and nsa.branch_kv == "independent" else 1
    hidden = round(config.ff_mult * dim)
    parts = {
        "embedding": config.vocab_size * dim * (1 if config.tie_embeddings else 2),
        "attention": config.depth * dim * width * (2 * config.heads + 2 * kv_copies * config.kv_heads),
        "compression": 0 if nsa is None else config.depth * compression_parameters(config.kv_heads, width, nsa),
        "gates": 0 if nsa is None else config.depth * 3 * config.heads * (dim + 1),
        "feed_forward": config.depth * dim * hidden * (3 if config.ff == "swiglu" else 2),
        "norms": dim * (2 * config.depth + 1),
    }
    return {**parts, "total": sum(parts.values())}


@dataclass(frozen=True, kw_only=True)
class ModelFlops:
    """Operations of one token of a sequence, on average: the forward pass, and a training step (both directions).

    necessary: of training, without what kernels compute a second time (importance, scores in the backward): three times the
    forward's own, as MFU is defined (PaLM, arXiv 2204.02311, appendix B).
    """

    forward: float
    training: float
    necessary: float


def model_flops_per_token(config: ModelConfig, tokens: int | None = None) -> ModelFlops:
    """Model FLOPs of a token in a sequence of `tokens` (the configuration's context by default).

    Every weight matrix costs 2 operations a parameter forward and 4 backward, output matrix included and embedding
    look-up not; attention's backward costs BACKWARD_PRODUCTS / FORWARD_PRODUCTS of its forward, importance only its
    forward.
    """
    tokens = config.context if tokens is None else tokens
    parts, nsa = parameters_by_part(config), config.nsa
    gate_biases = 0 if nsa is None else config.depth * 3 * config.heads
    matrices = parts["attention"] + parts["feed_forward"] + parts["gates"] - gate_biases
    linear = 2 * tokens * (matrices + config.vocab_size * config.dim)
    if nsa is None:
        forward = dense_attention_flops(tokens, config.heads, config.dim_head)
        backward = dense_attention_flops(tokens, config.heads, config.dim_head, backward=True)
        again = 0
    else:
        linear += config.depth * compression_flops(tokens, config.kv_heads, config.dim_head, nsa)
        sparse = sparse_attention_flops(tokens, config.heads, config.dim_head, nsa)
        forward, again = sparse.total, sparse.importance
        backward = sparse_attention_flops(tokens, config.heads, config.dim_head, nsa, backward=True).total
    return ModelFlops(
        forward=(linear + config.depth * forward) / tokens,
        training=(3 * linear + config.depth * (forward + backward)) / tokens,
        necessary=3 * (linear + config.depth * (forward - again)) / tokens,
    )


def cache_bytes(config: ModelConfig, tokens: int, itemsize: int) -> int:
    """Bytes of a cache with room for N tokens of one sequence, in all layers: what `Cache.nbytes` says.

    itemsize: bytes of one number. Dense: k and v of N tokens. Sparse: those of the selected branch (N tokens), those of the
    M compressed blocks, and two rings: the last w tokens of the window, and the last l - 1, of which the next blocks will
    be made. With shared keys and values the window needs no ring, and the last tokens only their keys, before rotary.
    """
    nsa, per_token = config.nsa, 2 * config.kv_heads * config.dim_head * itemsize * config.depth
    if nsa is None:
        return per_token * tokens
    stored, pending = tokens + nsa.num_compressed(tokens), nsa.compress_block - 1
    if nsa.branch_kv == "shared":
        return per_token * stored + per_token // 2 * pending
    return per_token * (stored + pending + nsa.window)


def decode_read_tokens(tokens: int, nsa: NSAConfig | None) -> int:
    """Cached keys (and as many values) that the last of N tokens reads: N if dense, else blocks, selection and window.

    Sparse: M + the causal tokens of its selected blocks + min(w, N). What a new compressed block is made of is not counted (l
    tokens, every d-th step). 64k tokens of the paper's geometry: 5,631, 11.6 times fewer.
    """
    if nsa is None:
        return tokens
    selected = selected_pairs(tokens, nsa) - selected_pairs(tokens - 1, nsa)
    return nsa.num_compressed(tokens) + selected + min(nsa.window, tokens)


def decode_read_bytes(config: ModelConfig, tokens: int, itemsize: int) -> int:
    """Bytes of cached keys and values that one decode step of one sequence reads at N tokens, in all layers."""
    per_token = 2 * config.kv_heads * config.dim_head * itemsize * config.depth
    return per_token * decode_read_tokens(tokens, config.nsa)
