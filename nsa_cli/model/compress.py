"""Compression networks phi: l consecutive keys (or values) of one head become one (eq. 7 of arXiv 2502.11089).

x = window + pos, with a learned intra-block position pos [g, l, d]; phi maps x [l, d] to [d]. Weights are shared by the
key/value heads of a layer (but for `grouped-mlp`) and separate for keys and values. `mean` has neither weights nor pos.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nsa_cli.config import NSAConfig

Product = tuple[Tensor, str | None]
"""weight [n, k] and "gelu" or None: act(x weight^T)."""


def windows(x: Tensor, config: NSAConfig, starts: Tensor | None = None) -> Tensor:
    """The blocks of x [b, g, s, d] as [b, g, c, l, d]: those of one document, or those that begin at the tokens `starts`."""
    length = config.compress_block
    if starts is not None:
        return x[:, :, starts[:, None] + torch.arange(length, device=x.device)]
    if x.shape[2] < length:
        return x.new_zeros(x.shape[0], x.shape[1], 0, length, x.shape[3])
    return x.unfold(2, length, config.compress_stride).transpose(-1, -2)


def _drawn(*shape: int, std: float, mean: float = 0.0) -> nn.Parameter:
    return nn.Parameter(nn.init.normal_(torch.empty(*shape), mean, std))


class Compression(nn.Module):
    """phi over windows [.., g, c, l, d] -> [.., g, c, d], in the windows' dtype (or autocast's)."""

    def __init__(self, config: NSAConfig, kv_heads: int, dim_head: int) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        return self.phi(x)

    def compress(self, x: Tensor, starts: Tensor | None, kernel: str) -> Tensor:
        """Tokens [b, g, s, d] -> [b, g, c, d]: every block of `windows(x, config, starts)`, gathered by `kernel`."""
        return self.fused(x, starts) if kernel == "triton" else self(windows(x, self.config, starts))

    @abstractmethod
    def phi(self, x: Tensor) -> Tensor:
        """[.., g, c, l, d] -> [.., g, c, d]."""

    def products(self) -> list[Product]:
        """What phi does to vec(x), one after another, where it is made of products with the same matrices for every head;
        none otherwise."""
        return []

    @abstractmethod
    def fused(self, x: Tensor, starts: Tensor | None) -> Tensor:
        """`compress` through Triton's kernels."""


class Mean(Compression):
    """mean_i x_i, without intra-block positions."""

    def phi(self, x: Tensor) -> Tensor:
        return x.mean(-2)

    def fused(self, x: Tensor, starts: Tensor | None) -> Tensor:
        from nsa_cli.ops.triton.windows import mean_pool

        return mean_pool(x, self.config, starts)


class Positioned(Compression):
    """phi over windows + pos."""

    def __init__(self, config: NSAConfig, kv_heads: int, dim_head: int) -> None:
        super().__init__(config, kv_heads, dim_head)
        self.pos = _drawn(kv_heads, config.compress_block, dim_head, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.phi(x + self.pos[:, None])

    def fused(self, x: Tensor, starts: Tensor | None) -> Tensor:
        from nsa_cli.ops.triton import windows as kernels

        return self.phi(kernels.windows(x, self.pos, self.config, starts))


class AttentionPool(Positioned):
    """sum_i softmax_i(a . x_i) x_i."""

    def __init__(self, config: NSAConfig, kv_heads: int, dim_head: int) -> None:
        super().__init__(config, kv_heads, dim_head)
        self.a = _drawn(dim_head, std=dim_head**-0.5)

    def phi(self, x: Tensor) -> Tensor:
        weights = (x @ self.a).softmax(-1)
        return torch.einsum("...l,...ld->...d", weights.to(x.dtype), x)


class Conv(Positioned):
    """sum_i w_i * x_i, one weight a place and channel (a depthwise convolution of width l and stride d)."""

    def __init__(self, config: NSAConfig, kv_heads: int, dim_head: int) -> None:
        super().__init__(config, kv_heads, dim_head)
        length = config.compress_block
        self.w = _drawn(length, dim_head, mean=1 / length, std=0.1 / length)

    def phi(self, x: Tensor) -> Tensor:
        return (x * self.w).sum(-2)


class Linear(Positioned):
    """W vec(x)."""

    def __init__(self, config: NSAConfig, kv_heads: int, dim_head: int) -> None:
        super().__init__(config, kv_heads, dim_head)
        width = config.compress_block * dim_head
        self.w = _drawn(dim_head, width, std=width**-0.5)

    def phi(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(-2), self.w)

    def products(self) -> list[Product]:
        return [(self.w, None)]


class MLP(Positioned):
    """W2 gelu(W1 vec(x)), hidden width d: the paper's choice, and the default."""

    def __init__(self, config: NSAConfig, kv_heads: int, dim_head: int) -> None:
        super().__init__(config, kv_heads, dim_head)
        width = config.compress_block * dim_head
        self.w1 = _drawn(dim_head, width, std=width**-0.5)
        self.w2 = _drawn(dim_head, dim_head, std=dim_head**-0.5)

    def phi(self, x: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x.flatten(-2), self.w1)), self.w2)

    def products(self) -> list[Product]:
        return [(self.w1, "gelu"), (self.w2, None)]


class Gated(Positioned):
    """mean_i x_i * sigmoid(W x_i)."""

    def __init__(self, config: NSAConfig, kv_heads: int, dim_head: int) -> None:
        super().__init__(config, kv_heads, dim_head)
        self.w = _drawn(dim_head, dim_head, std=dim_head**-0.5)

    def phi(self, x: Tensor) -> Tensor:
        return (x * F.linear(x, self.w).sigmoid()).mean(-2)


class GroupedMLP(Positioned):
    """W2 gelu(W1 vec(x)) with weights of its own for every key/value head."""

    def __init__(self, config: NSAConfig, kv_heads: int, dim_head: int) -> None:
        super().__init__(config, kv_heads, dim_head)
        width = config.compress_block * dim_head
        self.w1 = _drawn(kv_heads, dim_head, width, std=width**-0.5)
        self.w2 = _drawn(kv_heads, dim_head, dim_head, std=dim_head**-0.5)

    def phi(self, x: Tensor) -> Tensor:
        return F.gelu(x.flatten(-2) @ self.w1.mT) @ self.w2.mT


NETWORKS: dict[str, type[Compression]] = {
    "mean": Mean,
    "attention-pool": AttentionPool,
    "conv": Conv,
    "linear": Linear,
    "mlp": MLP,
    "gated": Gated,
    "grouped-mlp": GroupedMLP,
}


def make_compression(config: NSAConfig, kv_heads: int, dim_head: int) -> Compression:
    """The network that `config.compress` names, for one layer's keys or values."""
    return NETWORKS[config.compress](config, kv_heads, dim_head)
