"""One decoding step of the whole model through kernels made for it: launches cost more than all that they launch.

The same function as `model(ids, cache=cache)` for one token a row, in six to nine launches a layer: the projections of a layer
are one product, what lies between them and attention is one kernel, and products of a batch take norms and activations with
them. Nothing waits for the host, and every launch is the same at every length, so that a CUDA graph can replay it; but for a
step in which no row completes a block, which leaves compression out.
"""

from __future__ import annotations

import importlib.util
from typing import cast

import torch
from torch import Tensor

from nsa_cli.config import NSAConfig
from nsa_cli.model.attention import DenseAttention
from nsa_cli.model.cache import Cache, LayerCache
from nsa_cli.model.compress import Positioned, Product
from nsa_cli.model.nsa import SparseAttention
from nsa_cli.model.transformer import NORM_EPS, Block, Transformer
from nsa_cli.ops.decode import fits


def can_step(model: Transformer) -> bool:
    """Whether `Step` does the model's steps: on a CUDA GPU, sparse ones with Triton's kernels, in the weights' own precision,
    with nobody who watches the layers."""
    if model.device.type != "cuda":
        return False
    from torch.distributed.fsdp import FSDPModule  # a second to load

    if isinstance(model, FSDPModule):  # whose passes gather weights from other processes
        return False
    if torch.is_autocast_enabled("cuda") or importlib.util.find_spec("triton") is None:
        return False
    from nsa_cli.ops.triton.operators import DTYPES, MOST

    config, dtype = model.config, model.token_emb.weight.dtype
    if config.nsa is None:
        return dtype in DTYPES and config.dim_head <= MOST["head dim"] and config.group <= MOST["heads a group"]
    watched = any(getattr(block.attn, "recorder", None) is not None for block in model.layers)
    return model.kernel == "triton" and not watched and fits(config.nsa, config.dim_head, dtype.itemsize)


class Step:
    """Steps of one model, whose weights must not change meanwhile: projections of one input are kept side by side.

    proven: the kinds of steps (with blocks, or not; how many rows) that have run here. can_run, can_capture: False once they
    could not.
    """

    def __init__(self, model: Transformer) -> None:
        from nsa_cli.ops.triton.residual import make_counters

        self.model = model
        self.proven: set[tuple[bool, int]] = set()
        self.can_run = self.can_capture = True
        self.sets = 3 if model.config.nsa is not None and model.config.nsa.branch_kv == "independent" else 1
        with torch.no_grad():
            self.weights = [torch.cat([layer.weight for layer in _projections(block)]) for block in self._blocks()]
            self.products = [_products(block) for block in self._blocks()]
        self.counters = make_counters(model.device)

    def _blocks(self) -> list[Block]:
        return [cast(Block, block) for block in self.model.layers]

    def completes(self, cache: Cache) -> bool:
        """Whether the next token completes a compressed block in some row, as the host knows it."""
        nsa = self.model.config.nsa
        if nsa is None:
            return False
        return any(nsa.num_compressed(n + 1) > nsa.num_compressed(n) for n in cache.host_lengths)

    def reserve(self, cache: Cache) -> None:
        """Room for one more token, in buffers that stay where they are until there is none."""
        nsa, room = self.model.config.nsa, cache.room(cache.longest + 1)
        sizes = {"k": room, "v": room}
        if nsa is not None:
            blocks = nsa.num_compressed(room)
            sizes = {"k_slc": room, "v_slc": room, "k_cmp": blocks, "v_cmp": blocks}
        for layer in cache.layers:
            for name, places in sizes.items():
                layer.buffer(name, layer.buffers[name], places)
        cache.capacity = room

    def __call__(self, ids: Tensor, cache: Cache, *, blocks: bool) -> Tensor:
        """Logits float32 [b, vocab] of what follows ids int64 [b]. cache: not empty, with room (`reserve`); its lengths on the
        device are counted here, those on the host are the caller's. blocks: False if no row's token completes a block."""
        from nsa_cli.ops.triton.residual import begin

        model = self.model
        nsa, act = model.config.nsa, "gelu" if model.config.ff == "gelu" else "silu"
        norms = [norm.weight for block in self._blocks() for norm in (block.attn_norm, block.ff_norm)]
        norms.append(model.norm.weight)
        x, at = begin(ids, model.token_emb.weight, cache.lengths, norms, NORM_EPS, self.counters)
        turns = model.rotary.turns(ids.device)
        for weight, products, block, layer in zip(self.weights, self.products, self._blocks(), cache.layers, strict=True):
            projected = x.project(weight)
            if nsa is None:
                out = self._dense(cast(DenseAttention, block.attn), projected, turns, at, layer)
            else:
                attn = cast(SparseAttention, block.attn)
                out = self._sparse(attn, nsa, projected, turns, at, layer, products if blocks else None)
            x.add(out.flatten(1), block.attn.to_out.weight)
            ff = block.ff
            x.add(x.project(ff.w1.weight, act=act, gate_weight=None if ff.w3 is None else ff.w3.weight), ff.w2.weight)
        weight = model.token_emb.weight if model.to_logits is None else model.to_logits.weight
        return x.project(weight, out=torch.empty(len(ids), len(weight), dtype=torch.float32, device=ids.device))

    def _dense(self, attn: DenseAttention, projected: Tensor, turns: Tensor, at: Tensor, layer: LayerCache) -> Tensor:
        from nsa_cli.ops.triton.append import Places, append
        from nsa_cli.ops.triton.decode import dense_attention

        k, v = (layer.buffers[name] for name in ("k", "v"))
        q, _, _ = append(projected, turns, at, Places(k, v), heads=attn.heads, sets=1, config=None)
        return dense_attention(q, k, v, positions=at, scale=q.shape[-1] ** -0.5)

    def _sparse(
        self, attn: SparseAttention, nsa: NSAConfig, projected: Tensor, turns: Tensor, at: Tensor, layer: LayerCache,
        products: list[Product] | None,
    ) -> Tensor:  # fmt: skip
        """products: None if no row's token completes a block."""
        from nsa_cli.ops.triton.append import Places, append, store_blocks
        from nsa_cli.ops.triton.decode import decode_attention
        from nsa_cli.ops.triton.residual import multiply

        held = layer.buffers.get
        k, v, k_cmp, v_cmp = (layer.buffers[name] for name in ("k_slc", "v_slc", "k_cmp", "v_cmp"))
        k_win, v_win = held("k_win_ring"), held("v_win_ring")
        places = Places(k, v, k_win, v_win, held("k_raw_ring"), held("v_raw_ring"))
        networks = (attn.compress_k, attn.compress_v)
        pos = None
        if isinstance(networks[0], Positioned) and isinstance(networks[1], Positioned):
            pos = (networks[0].pos, networks[1].pos)
        blocks = products is not None and k_cmp.shape[2] > 0
        q, gates, raw = append(
            projected, turns, at, places, heads=attn.heads, sets=self.sets, config=nsa, bias=attn.to_gates.bias, pos=pos,
            blocks=blocks,
        )  # fmt: skip
        if blocks:
            if products:
                new = raw.view(2, -1, products[0][0].shape[-1])
                for weight, act in products:
                    new = multiply(new, weight, act=act, counters=self.counters)
                k_new, v_new = new.view(*raw.shape[:4], -1)
            else:
                k_new, v_new = (network.phi(x) for network, x in zip(networks, raw, strict=True))
            store_blocks(k_new, v_new, k_cmp, v_cmp, at, nsa, turns if nsa.compress_rope == "block" else None)
        unturned = projected[:, : attn.heads * q.shape[-1]].view(*q.shape)
        out, _ = decode_attention(
            q, k, v, k_cmp, v_cmp, gates, nsa, positions=at, q_cmp=q if nsa.compress_rope == "block" else unturned, k_win=k_win,
            v_win=v_win, scale=q.shape[-1] ** -0.5, early=True,
        )  # fmt: skip
        return out


def _products(block: Block) -> list[Product]:
    """Of both networks at once, weights [2, n, k], where they are made of products."""
    attn = block.attn
    if not isinstance(attn, SparseAttention):
        return []
    pairs = zip(attn.compress_k.products(), attn.compress_v.products(), strict=True)
    return [(torch.stack([k, v]), act) for (k, act), (v, _) in pairs]


def _projections(block: Block) -> list[torch.nn.Linear]:
    attn = block.attn
    assert isinstance(attn, (DenseAttention, SparseAttention))
    own = [attn.to_q, attn.to_k, attn.to_v]
    return [*own, attn.to_gates] if isinstance(attn, SparseAttention) else own
