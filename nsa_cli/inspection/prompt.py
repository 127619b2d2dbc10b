"""From a prompt to what every layer's sparse attention did with it: one ordinary forward pass, looked at from outside.

The model runs as it always does, in evaluation mode and without gradients, under `nsa_cli.model.trace.record`: the
scores are those of its own queries and keys, the selections those it attended to. Nothing here prints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.inspection.report import CompressedBlock, GroupSelection, HeadView, Inspection, QueryView, SelectedBlock
from nsa_cli.inspection.statistics import selection_statistics, tag_of
from nsa_cli.model import Transformer
from nsa_cli.model.trace import LayerTrace, record


def clip_prompt(ids: Sequence[int], context: int) -> tuple[list[int], str | None]:
    """The last `context` tokens of a prompt, and a one-line notice when that cut something off (else None)."""
    if len(ids) <= context:
        return list(ids), None
    notice = f"the prompt has {len(ids)} tokens; looking at the last {context}, the model's context"
    return list(ids[-context:]), notice


def inspect_prompt(
    model: Transformer,
    ids: Sequence[int],
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    queries: Sequence[int] = (-1,),
) -> Inspection:
    """What the chosen layers and query heads did for the chosen queries of one prompt.

    ids: token ids, at least one. layers, heads: from 0, None for all; the groups shown are those of the heads.
    queries: positions in the prompt. Negative numbers count from the end, in all three; duplicates count once.
    Raises NsaError: exit 2 for a --layer, --head or --query out of range, exit 3 for a dense model, an empty prompt,
    and weights that give scores which are not finite. ValueError for ids outside the vocabulary.
    """
    config = model.config
    nsa = config.nsa
    if nsa is None:
        hint = "train one with --sparse"
        message = "the checkpoint is dense: it selects no blocks, so there is nothing to inspect"
        raise NsaError(message, hint, ExitCode.BAD_INPUT)
    if len(ids) == 0:
        raise NsaError("the prompt is empty", "give at least one token on stdin", ExitCode.BAD_INPUT)
    chosen_layers = _resolve("--layer", range(config.depth) if layers is None else layers, config.depth)
    chosen_heads = _resolve("--head", range(config.heads) if heads is None else heads, config.heads)
    chosen_queries = _resolve("--query", queries, len(ids))
    traces = _trace(model, ids)
    views = [_look(traces[i], query, chosen_heads) for i in chosen_layers for query in chosen_queries]
    return Inspection(
        kernel=model.kernel,
        geometry=dataclasses.asdict(nsa),
        ids=tuple(int(i) for i in ids),
        layers=chosen_layers,
        heads=chosen_heads,
        groups=tuple(sorted({head // config.group for head in chosen_heads})),
        queries=chosen_queries,
        views=tuple(views),
    )


def _resolve(flag: str, values: Sequence[int], size: int) -> tuple[int, ...]:
    """Non-negative numbers below size, each once, in the order given."""
    for value in values:
        if not -size <= value < size:
            hint = f"choose from 0 to {size - 1}, or count from the end: -1 to {-size}"
            raise NsaError(f"{flag} {value}: must be from {-size} to {size - 1}", hint, ExitCode.USAGE)
    return tuple(dict.fromkeys(value % size for value in values))


def _trace(model: Transformer, ids: Sequence[int]) -> list[LayerTrace]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), record(model) as traces:
            model(torch.tensor([list(ids)], dtype=torch.int64, device=model.device))
    finally:
        model.train(was_training)
    return traces


def _look(trace: LayerTrace, query: int, heads: tuple[int, ...]) -> QueryView:
    nsa = trace.nsa
    scores, importance = trace.scores(query)[0, :, 0].cpu(), trace.importance(query)[0, :, 0].cpu()
    gates = trace.gates[0, :, query].float().cpu()
    if not (scores.isfinite().all() and gates.isfinite().all()):
        message = f"layer {trace.layer} gives scores that are not finite"
        raise NsaError(message, "the weights are not usable: take an earlier checkpoint", ExitCode.BAD_INPUT)
    blocks = [
        CompressedBlock(block=c, first=c * nsa.compress_stride, last=c * nsa.compress_stride + nsa.compress_block - 1)
        for c in range(nsa.num_compressed(query + 1))
    ]
    group_size = trace.q_cmp.shape[1] // trace.k_cmp.shape[1]
    views = [
        HeadView(
            head=h,
            group=h // group_size,
            scores=tuple(scores[h, : len(blocks)].tolist()),
            gate_cmp=gates[h, 0].item(),
            gate_slc=gates[h, 1].item(),
            gate_win=gates[h, 2].item(),
        )
        for h in heads
    ]
    groups = [_group(trace, query, g, importance[g].tolist()) for g in sorted({h // group_size for h in heads})]
    return QueryView(layer=trace.layer, query=query, blocks=tuple(blocks), heads=tuple(views), groups=tuple(groups))


def _group(trace: LayerTrace, query: int, group: int, importance: list[float]) -> GroupSelection:
    nsa = trace.nsa
    candidates = importance[: query // nsa.select_block + 1]

    def selection(t: int) -> list[int]:
        return [j for j in trace.block_indices[0, group, t].tolist() if j >= 0]

    selected = selection(query)
    return GroupSelection(
        group=group,
        importance=tuple(candidates),
        selected=tuple(
            SelectedBlock(
                block=j,
                first=j * nsa.select_block,
                last=min((j + 1) * nsa.select_block - 1, query),
                tag=tag_of(j, query, nsa),
                importance=candidates[j],
            )
            for j in selected
        ),
        statistics=selection_statistics(query, candidates, selected, selection(query - 1) if query > 0 else None, nsa),
    )
