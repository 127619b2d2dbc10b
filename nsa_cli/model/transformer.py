"""The transformer: pre-norm blocks around dense or sparse attention, no biases but the gates'.

Weights start normal with deviation 1 / sqrt(fan in), those that write to the residual stream divided by sqrt(2 depth);
embeddings and gates with 0.02. (GPT-2's 0.02 everywhere is too small at dim 128: 1.73 against 1.64 nats a byte after 1,000
steps of `tiny` on tinyshakespeare.) Gates start at 1/2, so that every branch is alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nsa_cli.config import ModelConfig
from nsa_cli.model.attention import DenseAttention, Geometry
from nsa_cli.model.cache import Cache, LayerCache
from nsa_cli.model.nsa import SparseAttention
from nsa_cli.model.parallel import ContextParallel
from nsa_cli.model.rotary import Rotary
from nsa_cli.ops.dispatch import document_ends

IGNORED_TARGET = -1
NORM_EPS = 1e-6


class FeedForward(nn.Module):
    """gelu: W2 gelu(W1 x). swiglu: W2 (silu(W1 x) * W3 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = round(config.ff_mult * config.dim)
        self.w1 = nn.Linear(config.dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, hidden, bias=False) if config.ff == "swiglu" else None

    def hidden(self, x: Tensor) -> Tensor:
        """What W2 is applied to."""
        return F.gelu(self.w1(x)) if self.w3 is None else F.silu(self.w1(x)) * self.w3(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.hidden(x))


class Block(nn.Module):
    """x + attention(norm x), then x + feed-forward(norm x)."""

    def __init__(self, config: ModelConfig, kernel: str) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.attn = DenseAttention(config) if config.nsa is None else SparseAttention(config, kernel)
        self.ff_norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.ff = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, geometry: Geometry, layer: LayerCache | None = None) -> Tensor:
        x = x + self.dropout(self.attn(self.attn_norm(x), geometry, layer))
        return x + self.dropout(self.ff(self.ff_norm(x)))


class Transformer(nn.Module):
    """Token ids in, logits (or a loss) out. Made by `build_model`."""

    def __init__(self, config: ModelConfig, kernel: str) -> None:
        super().__init__()
        self.config, self.kernel = config, kernel
        self.context_parallel: ContextParallel | None = None
        self.recompute = False
        self.rotary = Rotary(config.dim_head, config.rope_theta)
        self.token_emb = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, kernel) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.to_logits = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self._initialise()

    @property
    def device(self) -> torch.device:
        return self.token_emb.weight.device

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear):
                deviation = 0.02 if name.endswith("to_gates") else module.in_features**-0.5
                if name.endswith((".to_out", ".ff.w2")):
                    deviation /= (2 * self.config.depth) ** 0.5
                nn.init.normal_(module.weight, std=deviation)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        counts: Sequence[int] | None = None,
        last: bool = False,
    ) -> Tensor:
        """Logits float32 [b, t, vocab] of ids int64 [b, t]; with targets, the mean cross-entropy in nats, a scalar.

        targets: int64 [b, t], -1 where nothing is to be predicted. cu_seqlens: int32 [documents + 1], with b = 1: attention and
        positions start anew in every document. cache: the ids continue each of its sequences, and are added to it.
        counts: with a cache, how many of each row's ids are real; what follows is padding on the right. last: logits of each
        row's last real token alone, [b, 1, vocab]; of a row with none, whatever.
        With `recompute` a training pass keeps each block's input alone, and the backward computes the block again.
        With `context_parallel` every process of the group passes the same ids, and gets the logits of its own tokens
        (`context_parallel.split`), or the mean over them: all have equally many, so the mean of those is the loss.
        Raises ValueError for wrong shapes, dtypes or ids outside of the vocabulary's range (on a CPU).
        """
        self._check(ids, targets, cu_seqlens, cache)
        if counts is not None and cache is None:
            raise ValueError("counts goes with a cache: padding on the right changes nothing before it")
        parallel = self.context_parallel
        if parallel is not None:
            ids, targets = parallel.split(ids), None if targets is None else parallel.split(targets)
        geometry = self._geometry(ids, cu_seqlens, cache, counts)
        x = self.dropout(self.token_emb(ids))
        for i, block in enumerate(self.layers):
            if self.recompute and cache is None and self.training and torch.is_grad_enabled():
                drops = self.config.dropout > 0  # nothing else in a block is random
                x = checkpoint(block, x, geometry, use_reentrant=False, preserve_rng_state=drops)
            else:
                x = block(x, geometry, None if cache is None else cache.layers[i])
        if cache is not None and geometry.span is not None:
            cache.advance(geometry.span)
        if last and ids.shape[1] > 1:
            if counts is None:
                x = x[:, -1:]
            else:
                at = torch.tensor([max(n - 1, 0) for n in counts]).to(x.device)
                x = x[torch.arange(len(x), device=x.device), at][:, None]
        logits = self.unembed(x).float()
        if targets is None:
            return logits
        return F.cross_entropy(
            rearrange(logits, "b t v -> (b t) v"), rearrange(targets, "b t -> (b t)"), ignore_index=IGNORED_TARGET
        )

    def unembed(self, x: Tensor) -> Tensor:
        """Logits [.., vocab] of the last block's output [.., dim]."""
        x = self.norm(x)
        return F.linear(x, self.token_emb.weight) if self.to_logits is None else self.to_logits(x)

    def make_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` sequences of `capacity` tokens; it grows when more come."""
        return Cache(self.config, batch, capacity, self.device)

    def gate_means(self) -> list[list[float]]:
        """Mean gate [cmp, slc, win] of every layer in the last training pass; [] for a dense model or before one."""
        means = [getattr(block.attn, "gate_mean", None) for block in self.layers]
        return [mean.tolist() for mean in means if mean is not None]

    def _geometry(
        self, ids: Tensor, cu_seqlens: Tensor | None, cache: Cache | None, counts: Sequence[int] | None
    ) -> Geometry:
        tokens, device = ids.shape[1], ids.device
        span = None if cache is None else cache.span(tokens, counts)
        if cache is not None and cache.longest > 0:
            positions = cache.lengths[:, None] + torch.arange(tokens, device=device)
            cos_sin = self.rotary.cos_sin(positions)[:, :, None]
            return Geometry(self.rotary, positions, cos_sin, cache=cache, span=span, first=False)
        positions = torch.arange(tokens, device=device)
        if self.context_parallel is not None:
            parallel = self.context_parallel
            positions = parallel.split(torch.arange(tokens * parallel.size, device=device), 0)
            return Geometry(self.rotary, positions, self.rotary.cos_sin(positions), parallel=parallel)
        ends = starts = block_positions = None
        if cu_seqlens is not None:
            ends = document_ends(cu_seqlens, tokens)  # the host waits for them once a pass
            begins, sizes = ends[:-1], [stop - start for start, stop in pairwise(ends)]
            positions = _counted(sizes).to(device)
            if self.config.nsa is not None:
                counts = [self.config.nsa.num_compressed(size) for size in sizes]
                steps = _counted(counts) * self.config.nsa.compress_stride
                starts = (torch.tensor(begins).repeat_interleave(torch.tensor(counts)) + steps).to(device)
                block_positions = steps.to(device)
        return Geometry(
            self.rotary, positions, self.rotary.cos_sin(positions), cu_seqlens, starts, block_positions, cache, span, ends=ends
        )

    def _check(self, ids: Tensor, targets: Tensor | None, cu_seqlens: Tensor | None, cache: Cache | None) -> None:
        if ids.ndim != 2 or ids.dtype != torch.int64 or ids.shape[1] == 0:
            raise ValueError(f"ids is {ids.dtype} {tuple(ids.shape)}: must be torch.int64 [b, t] with at least one token")
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high, last = int(ids.min()), int(ids.max()), self.config.vocab_size - 1
            if low < 0 or high > last:
                raise ValueError(f"ids run from {low} to {high}: must be in 0 .. {last}, the vocabulary")
        if targets is not None and targets.shape != ids.shape:
            raise ValueError(f"targets is {tuple(targets.shape)}: must be like ids, {tuple(ids.shape)}")
        if cache is not None and (cu_seqlens is not None or targets is not None):
            raise ValueError("cache goes with ids alone: neither targets nor cu_seqlens")
        if cache is not None and len(cache.host_lengths) != ids.shape[0]:
            raise ValueError(f"ids has batch {ids.shape[0]}: the cache holds {len(cache.host_lengths)} sequences")
        if self.context_parallel is not None and (cache is not None or cu_seqlens is not None):
            raise ValueError("context_parallel goes with ids and targets alone: neither cu_seqlens nor cache")
        if cu_seqlens is not None and ids.shape[0] != 1:
            raise ValueError(f"ids has batch {ids.shape[0]}: must be 1 with cu_seqlens")


def _counted(sizes: Sequence[int]) -> Tensor:
    """0 .. n - 1 for each n, one after another: int64 on the CPU."""
    counts = torch.tensor(sizes)
    return torch.arange(sum(sizes)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
