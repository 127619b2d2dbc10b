"""Is the selection alive? A few numbers a layer of a sparse model, from one pass over one validation window.

A selection that is of use looks at something (entropy well below uniform), settles (neighbouring queries mostly agree) and
reaches the whole text (few blocks that no query ever takes). What is counted are the free places, those that forced blocks
leave to importance, of the queries that had a choice: more free candidates than free places.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from nsa_cli.model import Transformer
from nsa_cli.model.trace import LayerTrace, watch

QUERIES, SCORES = 256, 2**25
"""So many queries of a layer are looked at, evenly spread, and at most so many scores of theirs (128 MiB)."""

Health = dict[str, list[float | None]]


def selection_health(model: Transformer, ids: Tensor, *, autocast: Callable[[], AbstractContextManager[Any]]) -> Health:
    """Of the window ids [1, t]: a list of one number a layer for each measure, null where no query had a choice.

    entropy_nats, entropy_share: of importance over a query's candidates, the mean over queries and groups; the share is of
        its largest value, ln(candidates): 1 says that importance tells nothing apart.
    changed: share of the free places whose block the query before had not selected.
    never_selected: share of the blocks that stood for choice which no query took.

    Call inside `evaluating`. Empty for a dense model.
    """
    if model.config.nsa is None:
        return {}
    layers: list[Tensor] = []
    with autocast(), watch(model, lambda trace: layers.append(_measures(trace))):
        model(ids)
    rows = [[None if value != value else value for value in row] for row in torch.stack(layers).T.tolist()]
    return dict(zip(("entropy_nats", "entropy_share", "changed", "never_selected"), rows, strict=True))


def _measures(trace: LayerTrace) -> Tensor:
    """The four numbers of one layer, NaN where there is none: float64 [4] on the device."""
    heads, tokens = trace.q_cmp.shape[1:3]
    device, blocks = trace.q_cmp.device, max(trace.k_cmp.shape[2], 1)
    count = max(1, min(tokens, QUERIES, SCORES // (heads * blocks)))
    queries = torch.linspace(tokens - 1, 0, count, device=device, dtype=torch.float64).round().long()
    with torch.autocast(device.type, enabled=False):  # scores in float32, as in the pass
        measures = [*_entropies(trace, queries), _changed(trace, queries), _never_selected(trace)]
    return torch.stack([measure.double() for measure in measures])


def _entropies(trace: LayerTrace, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Mean entropy in nats and as a share, over the queries that see a compressed block and have two candidates."""
    importance = trace.importance(queries)
    total = importance.sum(-1, keepdim=True)
    p = importance / total
    entropy = -torch.special.xlogy(p, p).sum(-1)
    candidates = queries // trace.nsa.select_block + 1
    counted = (total[..., 0] > 0) & (candidates > 1)
    return _mean(entropy, counted), _mean(entropy / candidates.log().clamp(min=1e-9), counted)


def _changed(trace: LayerTrace, queries: Tensor) -> Tensor:
    queries = queries[queries > 0]
    chosen, before = trace.block_indices[:, :, queries], trace.block_indices[:, :, queries - 1]
    known = (chosen[..., :, None] == before[..., None, :]).any(-1)
    return _mean((~known).double(), _free(chosen, queries, trace))


def _never_selected(trace: LayerTrace) -> Tensor:
    nsa, tokens = trace.nsa, trace.q_cmp.shape[2]
    queries = torch.arange(tokens, device=trace.q_cmp.device)
    free, chosen = _free(trace.block_indices, queries, trace), trace.block_indices.long().clamp(min=0)
    blocks = nsa.num_select_blocks(tokens)
    taken = torch.zeros(*chosen.shape[:2], blocks, device=chosen.device)
    taken.scatter_add_(2, chosen.flatten(2), free.flatten(2).to(taken.dtype))
    # The newest query has the most candidates; if it had no choice, nobody had.
    last = (tokens - 1) // nsa.select_block
    j = torch.arange(blocks, device=chosen.device)
    stood = (j >= nsa.num_init) & (j <= last - nsa.num_local) & _had_choice(queries[-1:], trace)
    return _mean((taken == 0).double(), stood)


def _had_choice(queries: Tensor, trace: LayerTrace) -> Tensor:
    """bool [t]: whether a query has free places and more free candidates than those: more candidates than places."""
    nsa = trace.nsa
    return (queries // nsa.select_block + 1 > nsa.num_selected) & (nsa.num_selected > nsa.num_init + nsa.num_local)


def _free(chosen: Tensor, queries: Tensor, trace: LayerTrace) -> Tensor:
    """bool [b, g, t, n]: the places of block_indices `chosen` that importance filled and might have filled otherwise."""
    local = queries[:, None] // trace.nsa.select_block - trace.nsa.num_local
    return (chosen >= trace.nsa.num_init) & (chosen <= local) & _had_choice(queries, trace)[:, None]


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """The mean of the values that count, NaN if none does."""
    counted = counted.expand_as(values)
    return torch.where(counted, values, 0.0).sum() / counted.sum()
