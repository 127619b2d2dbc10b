"""Context parallelism: one sequence over several processes, each with the queries of a head and a tail piece of it.

The tokens are cut into 2 P equal pieces, and process r of P has the pieces r and 2 P - 1 - r: under a causal mask a query
costs what lies before it, and each such pair costs the same. Projections, feed-forward and loss see a process's own tokens
alone. Attention gathers the keys and values of all (cheap with few key/value heads: 2 kv_heads dim_head numbers a token),
in the sequence's order, and gives each query its position; compressed blocks are made after gathering, by every process for
itself, so that none has to cross an edge. The gradient of a gathered tensor is summed over the processes and each keeps its own
tokens' part.

Each piece is one call of a kernel, whose queries are the last tokens of the prefix that they see, k[:, :, :stop].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed both.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class ContextParallel:
    """Process `rank` of the `size` that share a sequence and speak through `group`."""

    group: dist.ProcessGroup
    rank: int
    size: int

    def ranges(self, tokens: int) -> list[tuple[int, int]]:
        """[start, stop) of this process's two pieces of a sequence; ValueError unless 2 P divides it."""
        pieces = 2 * self.size
        if tokens % pieces:
            raise ValueError(f"{tokens} tokens: must be a multiple of {pieces}, twice the processes that share a sequence")
        width = tokens // pieces
        return [(piece * width, (piece + 1) * width) for piece in (self.rank, pieces - 1 - self.rank)]

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        """This process's tokens of x, whose dimension `dim` is the whole sequence."""
        return torch.cat([x.narrow(dim, start, stop - start) for start, stop in self.ranges(x.shape[dim])], dim)

    def gather(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Each [b, g, t, d] of this process's tokens as [b, g, P t, d] of all, in one exchange. Differentiable."""
        gathered: Tensor = _Gather.apply(torch.cat(tensors, 1), self)
        return gathered.split([x.shape[1] for x in tensors], 1)


class _Gather(torch.autograd.Function):
    """[b, g, t, d] -> [b, g, P t, d]. Backward is a reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parallel: ContextParallel) -> Tensor:
        ctx.parallel = parallel
        b, g, t, d = x.shape
        # Half a process's tokens are a piece: the first halves lie in the order of the processes, the second against it.
        halves = x.unflatten(2, (2, t // 2)).permute(2, 0, 1, 3, 4).contiguous()
        every = halves.new_empty(parallel.size, *halves.shape)
        _all_gather(every.flatten(0, 1), halves, group=parallel.group)
        pieces = torch.cat([every[:, 0], every[:, 1].flip(0)])
        return pieces.permute(1, 2, 0, 3, 4).reshape(b, g, parallel.size * t, d)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        parallel: ContextParallel = ctx.parallel
        size = parallel.size
        pieces = grads[0].unflatten(2, (2 * size, -1)).permute(2, 0, 1, 3, 4)
        every = torch.stack([pieces[:size], pieces[size:].flip(0)], 1).contiguous()
        halves = torch.empty_like(every[0])
        _reduce_scatter(halves, every.flatten(0, 1), group=parallel.group)
        return halves.permute(1, 2, 0, 3, 4).flatten(2, 3), None
