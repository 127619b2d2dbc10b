"""What a selection is worth: which block was forced, how spread importance is, how much of it was kept.

Pure functions of plain lists, one query of one key/value group at a time. t is the query's position, l' the tokens of a
selection block (`select_block`), j a selection block, cur = t // l' the query's own. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nsa_cli.config import NSAConfig

Tag = Literal["init", "local", "top"]


@dataclass(frozen=True, kw_only=True)
class SelectionStatistics:
    """Of one query and group. None where a number does not exist, never NaN.

    entropy_nats: - sum_j p_j ln p_j of importance over the candidates 0 .. cur, p_j = imp_j / sum imp; 0 when one
        block has all, ln(cur + 1) when all are equal; None when the query sees no compressed block.
    entropy_share: entropy_nats over that largest value ln(cur + 1), 0 to 1; None with a single candidate.
    selected_share: share of importance, 0 to 1, that lies in the selected blocks; None as for entropy.
    changed: how many selected blocks the query before, t - 1, had not selected; None for t = 0.
    top_distances: tokens from the query back to the newest token of each `top` block, in the order of the blocks; 0 when
        the query itself is inside.
    """

    entropy_nats: float | None
    entropy_share: float | None
    selected_share: float | None
    changed: int | None
    top_distances: tuple[int, ...]


def tag_of(block: int, query: int, nsa: NSAConfig) -> Tag:
    """Why a block was selected: `init` for j < num_init, `local` for j > cur - num_local, `top` for its importance.

    A block that is both of the first two counts once, as `init`.
    """
    if block < nsa.num_init:
        return "init"
    if block > query // nsa.select_block - nsa.num_local:
        return "local"
    return "top"


def entropy_nats(weights: Sequence[float]) -> float | None:
    """- sum p ln p of non-negative weights scaled to sum 1; None when they are all zero."""
    total = math.fsum(weights)
    if total <= 0:
        return None
    shares = [weight / total for weight in weights if weight > 0]
    return max(0.0, -math.fsum(p * math.log(p) for p in shares))


def selection_statistics(
    query: int, importance: Sequence[float], selected: Sequence[int], previous: Sequence[int] | None, nsa: NSAConfig
) -> SelectionStatistics:
    """Statistics of query t = `query`.

    importance: of the candidates 0 .. cur. selected: its blocks, unpadded. previous: those of query t - 1, None at
    t = 0.
    """
    assert len(importance) == query // nsa.select_block + 1
    entropy, total = entropy_nats(importance), math.fsum(importance)
    largest = math.log(len(importance))
    newest = {j: min(query, (j + 1) * nsa.select_block - 1) for j in selected}
    return SelectionStatistics(
        entropy_nats=entropy,
        entropy_share=None if entropy is None or largest == 0 else min(1.0, entropy / largest),
        selected_share=None if entropy is None else min(1.0, math.fsum(importance[j] for j in selected) / total),
        changed=None if previous is None else len(set(selected) - set(previous)),
        top_distances=tuple(query - newest[j] for j in selected if tag_of(j, query, nsa) == "top"),
    )
