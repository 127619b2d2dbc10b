"""Looking into a model: what every layer's sparse attention saw and chose in an ordinary forward pass.

The tensors recorded are those that the pass used; recording adds no arithmetic to it, so the logits stay the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from nsa_cli.config import NSAConfig
from nsa_cli.model.nsa import SparseAttention
from nsa_cli.model.transformer import Transformer
from nsa_cli.ops import reference
from nsa_cli.ops.selection import pool_importance, visible_blocks


@dataclass(frozen=True)
class LayerTrace:
    """One layer's pass over tokens 0 .. t - 1.

    q_cmp [b, h, t, d] and k_cmp [b, g, c, d]: what the compressed branch scored. block_indices: int32 [b, g, t, n].
    gates: [b, h, t, 3], in the order cmp slc win.
    """

    layer: int
    nsa: NSAConfig
    q_cmp: Tensor
    k_cmp: Tensor
    block_indices: Tensor
    gates: Tensor

    def scores(self, query: int | Tensor) -> Tensor:
        """p_cmp of the queries, [b, h, len(query), c] in float32: softmax over the visible compressed blocks (eq. 8)."""
        return rearrange(self._probabilities(query), "b g r t c -> b (g r) t c")

    def importance(self, query: int | Tensor) -> Tensor:
        """Importance of every selection block for the queries, [b, g, len(query), j] (eq. 9 and 10)."""
        blocks = self.nsa.num_select_blocks(self.q_cmp.shape[2])
        return pool_importance(self._probabilities(query).sum(2), blocks, self.nsa)

    def _probabilities(self, query: int | Tensor) -> Tensor:
        at = torch.as_tensor(query, device=self.q_cmp.device).reshape(-1) % self.q_cmp.shape[2]
        seen = visible_blocks(at, self.nsa)[:, None]
        visible = torch.arange(self.k_cmp.shape[2], device=at.device) < seen
        return reference.masked_softmax(reference.scores(self.q_cmp[:, :, at], self.k_cmp), visible)


@contextmanager
def record(model: Transformer) -> Iterator[list[LayerTrace]]:
    """`with record(model) as layers: model(ids)` fills `layers`, one trace a layer; it stays empty for a dense model."""
    layers: list[LayerTrace] = []
    with watch(model, layers.append):
        yield layers


@contextmanager
def watch(model: Transformer, see: Callable[[LayerTrace], None]) -> Iterator[None]:
    """`with watch(model, see): model(ids)` calls `see` with the trace of each sparse layer as the pass leaves it, so that a
    long text's traces need not be held all at once."""
    sparse = [(i, b.attn) for i, b in enumerate(model.layers) if isinstance(b.attn, SparseAttention)]
    for i, attention in sparse:

        def keep(*tensors: Tensor, layer: int = i, nsa: NSAConfig = attention.nsa) -> None:
            see(LayerTrace(layer, nsa, *(x.detach() for x in tensors)))

        attention.recorder = keep
    try:
        yield
    finally:
        for _, attention in sparse:
            attention.recorder = None
